"""GEAR (Kang et al. 2024): KIVI's codes, a low-rank part of their error, and outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...codes.affine import narrowed
from ...codes.grouped import in_granules
from ...codes.salient import Seen
from ..kivi import codec as kivi
from ..packed import Pieces
from .storage import Gear

#: Rounds of the power iteration (the paper's SVD solver, algorithm 2).
ROUNDS = 4


def encode(storage: Gear, keys_KTD: Tensor, values_KTD: Tensor, seen: Seen) -> Pieces:
    given = {"key": keys_KTD, "value": values_KTD}
    whole = {part: in_granules(storage, x) for part, x in given.items()}
    places = {part: _outliers(storage, part, x) for part, x in whole.items()}
    rest = {part: _without(x, places[part], _axis(part)) for part, x in whole.items()}
    pieces = kivi.codes(storage, rest["key"], rest["value"])
    for part, coded in zip(whole, kivi.decode(storage, pieces), strict=True):
        error, place, axis = whole[part] - coded, places[part], _axis(part)
        if storage.rank:
            smooth = error if place is None else error.scatter(axis, place, 0.0)
            left, right = (narrowed(x, torch.float16) for x in low_rank(smooth, storage.rank))
            pieces |= {f"{part}_left": left, f"{part}_right": right}
            error = error - left.float() @ right.float().mT
        if place is not None:
            pieces[f"{part}_place"] = place.to(torch.uint8)
            pieces[f"{part}_outlier"] = narrowed(error.gather(axis, place), torch.float16)
    return pieces


def decode(storage: Gear, pieces: Pieces) -> tuple[Tensor, Tensor]:
    keys, values = (
        _added(storage, part, x, pieces)
        for part, x in zip(("key", "value"), kivi.decode(storage, pieces), strict=True)
    )
    return keys, values


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [.., T, r] and right [.., D, r] with x about left right^T, by power iteration, always the same."""
    start = torch.randn(x.shape[-1], rank, generator=torch.Generator().manual_seed(0))
    right = start.to(x.device).expand(*x.shape[:-2], -1, -1)
    left = x @ right
    for _ in range(ROUNDS):
        left = torch.linalg.qr(x @ right).Q
        right = x.mT @ left
    return left, right


def _axis(part: str) -> int:
    """The axis along which outliers are looked for: time for keys, channels for values."""
    return -2 if part == "key" else -1


def _outliers(storage: Gear, part: str, x: Tensor) -> Tensor | None:
    """Places of the largest and smallest numbers of each vector."""
    axis = _axis(part)
    count = storage.outliers(x.shape[axis])
    if not count:
        return None
    ends = [x.topk(count, axis, largest=big).indices for big in (True, False)]
    return torch.cat(ends, dim=axis)


def _without(x: Tensor, place: Tensor | None, axis: int) -> Tensor:
    """x with its outliers at the middle of the others, where they widen no range."""
    if place is None:
        return x
    hidden = torch.zeros_like(x, dtype=torch.bool).scatter(axis, place, True)
    low = x.masked_fill(hidden, float("inf")).amin(axis, keepdim=True)
    high = x.masked_fill(hidden, float("-inf")).amax(axis, keepdim=True)
    middle = torch.nan_to_num((low + high) / 2, posinf=0.0, neginf=0.0)
    return torch.where(hidden, middle, x)


def _added(storage: Gear, part: str, x: Tensor, pieces: Pieces) -> Tensor:
    if storage.rank:
        x = x + pieces[f"{part}_left"].float() @ pieces[f"{part}_right"].float().mT
    if f"{part}_place" in pieces:
        place = pieces[f"{part}_place"].long()
        x = x.scatter_add(_axis(part), place, pieces[f"{part}_outlier"].float())
    return x
