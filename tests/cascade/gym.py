"""The masks and score modifications of attention-gym, each in plain torch and in other words.

Rows stand for what https://github.com/meta-pytorch/attention-gym has in `attn_gym/masks` and `attn_gym/mods`
at its commit 7fdb85d (2026-08-22), without what only makes another faster. `row` and `key` are places, [S, 1]
and [T]; a mask is true where a key is seen. B batch, H heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

B, H, T, D = 2, 4, 24, 8


@dataclass(frozen=True)
class Modification:
    """Attention with one of them, its inputs, and why ONNX leaves it as written, "" where it does not."""

    name: str
    function: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    left: str = ""


ROWS: list[Modification] = []

#: Why the default flavour leaves what adds a bias of its own for each head.
OF_HEADS = "adds a bias for each head as fast"

NO_INPUTS: Callable[[], tuple[Tensor, ...]] = tuple


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, T, D) for _ in range(3))


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(D)


def mask(
    name: str, inputs: Callable[[], tuple[Tensor, ...]] = NO_INPUTS, left: str = ""
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Adds a mask: a function of places and of inputs of its own."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            seen = function(torch.arange(T)[:, None], torch.arange(T), *own)
            return torch.softmax(scores_of(q, k).masked_fill(~seen, -math.inf), dim=-1) @ v

        ROWS.append(Modification(name, attention, lambda: (*qkv(), *inputs()), left))
        return function

    return register


def mod(
    name: str, inputs: Callable[[], tuple[Tensor, ...]] = NO_INPUTS, left: str = ""
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Adds a change of scores: a function of them, of places and of inputs of its own."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
            changed = function(scores_of(q, k), torch.arange(T)[:, None], torch.arange(T), *own)
            return torch.softmax(changed, dim=-1) @ v

        ROWS.append(Modification(name, attention, lambda: (*qkv(), *inputs()), left))
        return function

    return register


@mask("causal")
def causal(row: Tensor, key: Tensor) -> Tensor:
    return key <= row


@mask("sliding window")
def sliding(row: Tensor, key: Tensor) -> Tensor:
    return (key <= row) & (row - key <= 5)


@mask("dilated sliding window")
def dilated(row: Tensor, key: Tensor) -> Tensor:
    away = (row - key).abs()
    return (away <= 6) & (away % 2 == 0)


@mask("prefix of a language model")
def prefix(row: Tensor, key: Tensor) -> Tensor:
    return (key < 7) | (key <= row)


@mask("batches of tokens")
def batches(row: Tensor, key: Tensor) -> Tensor:
    return (row // 8 == key // 8) & (key % 8 <= row % 8)


@mask("block diffusion")
def block_diffusion(row: Tensor, key: Tensor) -> Tensor:
    """Noised tokens first, then as many clean ones; blocks of four."""
    half = T // 2
    noised, of_key = row < half, key < half
    block, block_of_key = row % half // 4, key % half // 4
    own = (block == block_of_key) & (noised == of_key)
    before = (block_of_key < block) & noised & ~of_key
    clean = (block_of_key <= block) & ~noised & ~of_key
    return own | before | clean


def documents() -> tuple[Tensor, ...]:
    """The document of each token, and where documents start."""
    lengths = torch.tensor([5, 9, 3, 7])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.arange(4).repeat_interleave(lengths), starts


@mask("documents", documents)
def of_documents(row: Tensor, key: Tensor, of: Tensor, starts: Tensor) -> Tensor:
    within = torch.arange(T) - starts[of]
    return (of[:, None] == of) & (within <= within[:, None])


@mask("packed documents", documents)
def packed(row: Tensor, key: Tensor, of: Tensor, starts: Tensor) -> Tensor:
    return (key >= starts[of][:, None]) & (key <= row)


@mask("shared prefixes", lambda: (*documents(), torch.tensor([0, 0, 2, 2])))
def shared_prefix(row: Tensor, key: Tensor, of: Tensor, starts: Tensor, prefixes: Tensor) -> Tensor:
    """Documents that go on from another one see all of that, and themselves causally."""
    before = prefixes[of]
    own = (key >= starts[of][:, None]) & (key <= row)
    other = (of != before)[:, None] & (key >= starts[before][:, None])
    return own | (other & (key < starts[before + 1][:, None]))


@mask("images before text", lambda: (torch.tensor([[0, 9], [5, 16], [12, 24]]),))
def images(row: Tensor, key: Tensor, spans: Tensor) -> Tensor:
    """Keys are image tokens, eight an image; rows of text see the images whose span they are in."""
    span = spans[key // 8]
    return (row >= span[:, 0]) & (row < span[:, 1])


@mask("global tokens and a window", lambda: (torch.arange(T) % 11 == 0,))
def with_global(row: Tensor, key: Tensor, everywhere: Tensor) -> Tensor:
    return ((row - key).abs() <= 2) | everywhere[:, None] | everywhere


@mask("draft heads in training")
def draft_training(row: Tensor, key: Tensor) -> Tensor:
    """Keys are a prefix of eight, then blocks of four, of which a row sees its own."""
    at = key - 8
    own = (at >= 0) & (row // 4 == at // 4) & (at % 4 <= row % 4)
    return (key < 8) | own


def ancestors() -> tuple[Tensor, ...]:
    """Whether a node of a random tree lies above another, or is it."""
    above = torch.eye(T, dtype=torch.bool)
    for node in range(1, T):
        above[node] |= above[int(torch.randint(0, node, ()))]
    return (above,)


@mask("a tree of drafts", ancestors)
def draft_tree(row: Tensor, key: Tensor, above: Tensor) -> Tensor:
    """Keys are a prefix of eight, then nodes of the tree."""
    node = (key - 8).clamp(0, T - 1)
    return (key < 8) | above[row, node]


def near(
    place: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], sizes: tuple[int, int]
) -> Tensor:
    """Whether points lie within one of each other along both axes, the middle kept inside."""
    x, y = (p.clamp(1, size - 2) for p, size in zip(place, sizes, strict=True))
    return ((x - other[0]).abs() <= 1) & ((y - other[1]).abs() <= 1)


@mask("a neighbourhood")
def neighbourhood(row: Tensor, key: Tensor) -> Tensor:
    """A picture of 4 by 6."""
    return near((row // 6, row % 6), (key // 6, key % 6), (4, 6))


@mask("a neighbourhood in tiles")
def tiled(row: Tensor, key: Tensor) -> Tensor:
    """A picture of 6 by 4, token by token within tiles of 2 by 2."""

    def point(place: Tensor) -> tuple[Tensor, Tensor]:
        tile, inside = place // 4, place % 4
        return tile // 2 * 2 + inside // 2, tile % 2 * 2 + inside % 2

    return near(point(row), point(key), (6, 4))


@mask("a neighbourhood along Morton's curve")
def morton(row: Tensor, key: Tensor) -> Tensor:
    """Bits of the two coordinates take turns."""

    def point(place: Tensor) -> tuple[Tensor, Tensor]:
        x = (place & 1) | ((place >> 1) & 2) | ((place >> 2) & 4)
        y = ((place >> 1) & 1) | ((place >> 2) & 2) | ((place >> 3) & 4)
        return x, y

    return near(point(row), point(key), (8, 4))


def tile_near(row: Tensor, key: Tensor, tiles: int) -> Tensor:
    """Whether tiles lie within one of each other, the middle kept inside."""
    return (row.clamp(1, tiles - 2) - key).abs() <= 1


@mask("sliding tiles of a picture")
def tiles_2d(row: Tensor, key: Tensor) -> Tensor:
    """4 by 5 tiles of one token, then four of text, which sees and is seen by all."""
    picture = (row < 20) & (key < 20)
    inside = tile_near(row // 5, key // 5, 4) & tile_near(row % 5, key % 5, 5)
    return (picture & inside) | ((row < 20) & (key >= 20)) | (row >= 20)


@mask("sliding tiles of a film")
def tiles_3d(row: Tensor, key: Tensor) -> Tensor:
    """Three frames of 3 by 2 tiles of one token, then six of text."""
    film = (row < 18) & (key < 18)
    inside = tile_near(row // 6, key // 6, 3) & tile_near(row // 2 % 3, key // 2 % 3, 3)
    return (film & inside) | ((row < 18) & (key >= 18)) | (row >= 18)


@mask("heads that look within frames")
def spatial(row: Tensor, key: Tensor) -> Tensor:
    return (row < 4) | (key < 4) | ((row - key).abs() < 6)


@mask("heads that look between frames")
def temporal(row: Tensor, key: Tensor) -> Tensor:
    return (row < 4) | (key < 4) | (((row - 4) % 5 - (key - 4) % 5).abs() < 2)


@mask("chosen tiles", lambda: (torch.rand(B, H, 6, 6).topk(2, -1).indices,))
def chosen(row: Tensor, key: Tensor, tiles: Tensor) -> Tensor:
    """The two tiles of four keys that each tile of rows has chosen."""
    of_row = tiles[:, :, torch.arange(T) // 4]
    return (of_row[..., None, :] == (key // 4)[:, None]).any(-1)


@mask("a map of tiles", lambda: (torch.rand(B, H, 6, 6) < 0.7,))
def mapped(row: Tensor, key: Tensor, tiles: Tensor) -> Tensor:
    return tiles[:, :, torch.arange(T) // 4][..., torch.arange(T) // 4]


@mask("tiles that are not full", lambda: (torch.tensor([4, 3, 4, 2, 4, 1]),))
def part_full(row: Tensor, key: Tensor, full: Tensor) -> Tensor:
    return (key % 4 < full[key // 4])[None]


@mod("softcap", left="rows that may see all keys leave nothing out")
def softcap(scores: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return 20 * torch.tanh(scores / 20)


@mod("ALiBi", left=OF_HEADS)
def alibi(scores: Tensor, row: Tensor, key: Tensor) -> Tensor:
    slopes = torch.exp2(-(torch.arange(H) + 1) * 8.0 / H)
    return scores + (key - row) * slopes[:, None, None]


@mod("an activation in place of the exponential", left="scores go through erf")
def activation(scores: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """The weights are in proportion to gelu(score) + 1."""
    return torch.log(torch.nn.functional.gelu(scores) + 1)


@mod("Sandwich", left=OF_HEADS)
def sandwich(scores: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Inner products of sinusoids of places, a table by distance, scaled by head."""
    waves = 1e4 ** -(torch.arange(4) / 4.0)
    table = torch.cos(torch.arange(1 - T, T)[:, None] * waves).sum(-1)
    scale = H / (8.0 * torch.arange(1, H + 1))
    return scores + table[row - key + T - 1] * scale[:, None, None]


@mod(
    "distances in a graph",
    lambda: (torch.randn(H, 6), torch.randint(0, 6, (B, T, T))),
    OF_HEADS,
)
def graph_distance(scores: Tensor, row: Tensor, key: Tensor, table: Tensor, away: Tensor) -> Tensor:
    return scores + table[:, away].transpose(0, 1)


def paths() -> tuple[Tensor, ...]:
    """A table [H, 2, types], the types of the first two edges of each path, and its length up to two."""
    return torch.randn(H, 2, 5), torch.randint(0, 5, (B, T, T, 2)), torch.randint(0, 3, (B, T, T))


@mod("edges along paths in a graph", paths, OF_HEADS)
def graph_edges(
    scores: Tensor, row: Tensor, key: Tensor, table: Tensor, kinds: Tensor, length: Tensor
) -> Tensor:
    """The mean over a path's edges."""
    total = torch.zeros(())
    for at in range(2):
        of_edge = table[:, at][:, kinds[..., at]].transpose(0, 1)
        total = total + torch.where((length > at)[:, None], of_edge, 0.0)
    return scores + total / length.clamp(min=1)[:, None]


@mod("MLA, a rotary part of its own", lambda: (torch.randn(B, H, T, 4), torch.randn(B, 1, T, 4)))
def latent_rotary(
    scores: Tensor, row: Tensor, key: Tensor, q_part: Tensor, k_part: Tensor
) -> Tensor:
    return scores + 0.5 * (q_part @ k_part.mT)
