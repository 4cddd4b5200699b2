"""MiniCache (Liu et al. 2024): directions of two layers merged, lengths and distinct tokens kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....types import DTYPES
from ...codes.affine import narrowed
from ..packed import Pieces
from .storage import MiniCache

#: Below this sine of the angle two directions are merged along the line between them.
_STRAIGHT = 1e-4


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """(unit vectors, lengths [.., 1]); a vector of zeros has the direction zero."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny), length


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The unit vector at a share t of the arc from a to b (section 4.2, equation 2)."""
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle)
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine.clamp(min=_STRAIGHT)
    return torch.where(sine < _STRAIGHT, directions((1 - t) * a + t * b)[0], arc)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between unit vectors as a share of a half turn, 0 to 1 (section 4.3)."""
    return torch.arccos((a * b).sum(-1).clamp(-1, 1)) / math.pi


def distinct(distance_GT: Tensor, gamma: float, capacity: int) -> Tensor:
    """Places [.., capacity] of the tokens to retain in each group, -1 where there are fewer.

    Those within `gamma` of the spread from the largest distance; beyond the capacity, the most distant.
    """
    most, least = distance_GT.amax(-1, keepdim=True), distance_GT.amin(-1, keepdim=True)
    found = distance_GT.topk(capacity, dim=-1)
    wanted = found.values >= most - gamma * (most - least)
    return torch.where(wanted, found.indices, -1)


def encode_pair(
    storage: MiniCache, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor]
) -> tuple[Pieces, Pieces]:
    """The pieces of the shallower and of the deeper layer, from both layers' [.., G, T, D]."""
    first: Pieces = {}
    second: Pieces = {}
    for part, (a, b) in (("key", keys), ("value", values)):
        (to_a, length_a), (to_b, length_b) = directions(a), directions(b)
        merged = slerp(to_a, to_b, storage.slerp).to(DTYPES[storage.dtype])
        first |= {f"{part}_direction": merged, f"{part}_length": length_a}
        second |= {f"{part}_length": length_b}
        if storage.rows:
            place = distinct(distance(to_a, to_b), storage.gamma, storage.rows)
            first |= {
                f"{part}_kept": narrowed(_taken(a, place), merged.dtype),
                f"{part}_place": place.to(torch.int32).unsqueeze(-1),
            }
            second |= {f"{part}_kept": narrowed(_taken(b, place), merged.dtype)}
    return first, second


def decode(storage: MiniCache, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer; its pieces are its own and those that it shares."""
    keys, values = (_decoded(storage, part, pieces) for part in ("key", "value"))
    return keys, values


def _decoded(storage: MiniCache, part: str, pieces: Pieces) -> Tensor:
    merged: Tensor = pieces[f"{part}_direction"].float() * pieces[f"{part}_length"]
    if not storage.rows:
        return merged
    place, kept = pieces[f"{part}_place"].long(), pieces[f"{part}_kept"].float()
    # What is not retained is written to a row behind the last, which is cut off.
    index = torch.where(place < 0, storage.group, place).expand_as(kept)
    room = torch.cat((merged, merged[..., :1, :]), dim=-2)
    return room.scatter(-2, index, kept)[..., : storage.group, :]


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """The tokens at these places, [.., capacity, D]; zeros at -1."""
    index = place.clamp(min=0).unsqueeze(-1).expand(*place.shape, x.shape[-1])
    return x.gather(-2, index) * (place >= 0).unsqueeze(-1)
