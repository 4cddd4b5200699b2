"""Queries as they were before their rotary embedding, and what that will do to later ones on the mean.

A policy that thinks of queries which are still to come (`Policy.ahead`) is shown, side by side as heads:

    q     H    the queries before their rotary embedding, times the softmax's scale
    one   K    R x of each KV head, where x has a 1 in the first channel of each pair that is turned together,
               and in each that is not turned
    two   K    R x where the 1 is in the second channel
    pair  1    the number of the channel that each one is turned with; its own where there is none

R is the rotary embedding of the token's position times its mean over the next `ahead` positions, counted from
it, times the scales of an int8 key. So `one` and `two` say what R does to any query, whatever the tables hold
and however channels are paired. This is right where turns add up, R(a) R(b) = R(a + b), as all that is called
rotary does; a factor in the tables (YaRN) counts once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir.kv.layout import HeadGroup
from ...ir.ops.rotary import rotary_reference
from ...ir.program import Editor
from ...ir.weights import Weight
from .rotate_heads import turned

aten = torch.ops.aten


def rotary_tables(editor: Editor, given: dict[str, Any]) -> tuple[Weight, Weight] | None:
    """Cosines and sines of an attention's rotary embedding, where it names one whose tables are weights."""
    if given["positions_BS"] is None:
        return None
    cos, sin = (editor.program.weight_of(given[name]) for name in ("cos_PR", "sin_PR"))
    return None if cos is None or sin is None else (cos, sin)


def turns_ahead(
    editor: Editor,
    given: dict[str, Any],
    tables: tuple[Weight, Weight],
    group: HeadGroup,
    of_keys: Weight | None,
    name: str,
) -> fx.Node:
    """The result [B, S, H + 2 K + 1, D] of a group's queries; `given` are its attention's arguments."""
    query = given["q_BSHD"]
    heads, size = len(group.heads), int(query.meta["val"].shape[3])
    cos, sin = tables
    ahead, interleaved = group.policy.ahead, bool(given["interleaved"])
    half = int(cos.shape[1])

    def probes() -> Tensor:
        found = _mean_turns(cos.load().float(), sin.load().float(), ahead, interleaved, size)
        return found.repeat_interleave(heads, 0)[None, None]

    shape = (1, 1, 2 * heads, size)
    batch = editor.call(aten.sym_size.int, query, 0)
    length = editor.call(aten.sym_size.int, query, 1)
    ones = editor.weight(f"{name}_probes", Weight(shape, torch.float32, probes))
    spread = editor.call(aten.expand.default, ones, [batch, length, *shape[2:]])
    found = turned(editor, given, spread)
    if of_keys is not None:
        scales = Weight((2 * heads, size), torch.float32, lambda: of_keys.load().repeat(2, 1))
        found = editor.call(aten.mul.Tensor, found, editor.weight(f"{name}_scale", scales))
    pair = partners(half, interleaved, size).float()[None, None, None]
    pairs = editor.weight(f"{name}_pairs", Weight.of(pair))
    pairs = editor.call(aten.expand.default, pairs, [batch, length, 1, size])
    plain = editor.call(aten.mul.Tensor, query, given["scale"])
    return editor.call(aten.cat.default, [plain, found, pairs], 2)


def partners(half: int, interleaved: bool, size: int) -> Tensor:
    """The channel that each one is turned with; its own behind the first 2 * `half`."""
    found = torch.arange(size)
    if interleaved:
        found[: 2 * half] ^= 1
    else:
        found[: 2 * half] = (found[: 2 * half] + half) % (2 * half)
    return found


def _mean_turns(cos_PR: Tensor, sin_PR: Tensor, ahead: int, interleaved: bool, size: int) -> Tensor:
    """What the mean of the next turns does to ones in first and in second channels, [2, D]; without a factor
    of the tables, which the turn at the token itself brings."""
    last = min(ahead, len(cos_PR) - 1)
    rows = slice(1, last + 1) if last else slice(1)
    factor_R = (cos_PR[0].square() + sin_PR[0].square()).sqrt()
    cos_1R, sin_1R = ((table[rows].mean(0) / factor_R)[None] for table in (cos_PR, sin_PR))
    second_D = partners(cos_PR.shape[1], interleaved, size) < torch.arange(size)
    ones_HD = torch.stack((~second_D, second_D)).float()
    first = torch.zeros(1, 1, dtype=torch.long)
    return rotary_reference(ones_HD[None, None], first, cos_1R, sin_1R, interleaved)[0, 0]
