"""What a mask of transformers asks of a cache: which new tokens it takes in, and what each of them sees.

A cache holds real tokens alone, row by row; *columns* are the tokens as transformers counts them, padding
among them. A mask is [B, T] over all columns (padding, and tokens that are hidden from now on), or
[B, 1, S, T], which says for each new token what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PromptError, UnsupportedError


@dataclass(frozen=True)
class Asked:
    """What one step asks of the cache."""

    real_BS: Tensor
    """Which new tokens are taken in; the others are padding, whose queries get zeros."""
    shown_BST: Tensor | None
    """The columns that each new token sees, where these are not all real ones in its window up to itself."""


def read_mask(mask: Tensor | None, known_BT: Tensor, new: int, window: int) -> Asked:
    """The meaning of a mask for `new` tokens behind the columns whose real ones are `known`.

    `window` is the layer's own, 0 for none. Raises PromptError for a mask of another size, UnsupportedError
    for one that shows what was not taken in, or adds numbers to scores.
    """
    batch, seen = known_BT.shape
    if mask is None:
        _check_taken_in(~known_BT)
        return _expected(known_BT, known_BT.new_ones(batch, new), window)
    total = seen + new
    if mask.dim() not in (2, 4):
        raise UnsupportedError(
            f"an einfold cache takes masks [rows, tokens] and [rows, 1, new tokens, tokens], not one of "
            f"{mask.dim()} dimensions"
        )
    if mask.shape[-1] < total or mask.shape[0] != batch:
        raise PromptError(
            f"the mask has {mask.shape[0]} rows of {mask.shape[-1]} tokens, but the cache has seen {seen} "
            f"tokens and {new} are new, in {batch} rows; give a mask over all of them, or generate with "
            "use_cache=True, which feeds each token once"
        )
    mask = mask[..., :total].to(known_BT.device)
    if mask.dim() == 2:
        shown_BT = mask != 0
        _check_taken_in(shown_BT[:, :seen] & ~known_BT)
        asked = _expected(known_BT, shown_BT[:, seen:], window)
        if torch.equal(shown_BT[:, :seen], known_BT):
            return asked
        sees_BST = _causal(known_BT, asked.real_BS, window) & shown_BT[:, None]
        return Asked(asked.real_BS, sees_BST)
    sees_BST = _booleans(mask, new)
    real_BS = sees_BST[:, :, seen:].diagonal(dim1=1, dim2=2)
    sees_BST = sees_BST & real_BS[:, :, None]
    _check_taken_in(sees_BST[:, :, :seen].any(1) & ~known_BT)
    if bool((sees_BST[:, :, seen:] & ~real_BS[:, None]).any()):
        raise UnsupportedError(
            "the mask shows a new token that does not see itself; an einfold cache takes such tokens for "
            "padding"
        )
    asked = _expected(known_BT, real_BS, window)
    plain_BST = _causal(known_BT, real_BS, window)
    plain_BST &= torch.cat((known_BT, real_BS), 1)[:, None] & real_BS[:, :, None]
    if torch.equal(plain_BST, sees_BST):
        return asked
    return Asked(real_BS, sees_BST)


def _expected(known_BT: Tensor, real_BS: Tensor, window: int) -> Asked:
    """Every real token sees every real one up to itself. Windows count columns, and so see less than slots
    tell where padding stands between tokens."""
    real_BT = torch.cat((known_BT, real_BS), 1)
    gaps = bool((real_BT[:, :-1] & ~real_BT[:, 1:]).any())
    if not window or not gaps or real_BT.shape[1] <= window:
        return Asked(real_BS, None)
    return Asked(real_BS, _causal(known_BT, real_BS, window) & real_BT[:, None])


def _causal(known_BT: Tensor, real_BS: Tensor, window: int) -> Tensor:
    """What new tokens see by their columns alone, [B, S, T]."""
    seen, new = known_BT.shape[1], real_BS.shape[1]
    at_S = torch.arange(seen, seen + new, device=known_BT.device)[:, None]
    column_T = torch.arange(seen + new, device=known_BT.device)
    sees_ST = column_T <= at_S
    if window:
        sees_ST &= at_S - column_T < window
    return sees_ST.expand(len(known_BT), -1, -1).clone()


def _booleans(mask: Tensor, new: int) -> Tensor:
    """A mask of four dimensions as [B, S, T]: true where a token is seen."""
    if mask.shape[1] != 1 or mask.shape[2] != new:
        raise UnsupportedError(
            f"a mask of four dimensions is [rows, 1, {new} new tokens, tokens] for an einfold cache, one for "
            f"all heads, not {list(mask.shape)}"
        )
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return mask != 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool((~hidden & (mask != 0)).any()):
        raise UnsupportedError(
            "the mask adds numbers to scores other than 0 and the smallest; through an einfold cache a token "
            "is seen or hidden"
        )
    return ~hidden


def _check_taken_in(missing_BT: Tensor) -> None:
    if bool(missing_BT.any()):
        row, column = missing_BT.nonzero()[0].tolist()
        raise UnsupportedError(
            f"the mask shows token {column} of row {row}, which was hidden as padding when it came, so that "
            "the cache did not take it in; feed the text again with the mask that is wanted"
        )
