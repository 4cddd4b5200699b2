"""Orthogonal bases of heads, trained so that any number of their first directions serves.

    o = softmax(q P k') v R W',    P = U diag(m) U',    R = V diag(n) V'

U and V are of each KV head's keys and values; m and n are 1 for the first directions, which are kept, and
else 0. U = U0 C(X - X'), where U0 are the principal directions and C(A) = (1 - A/2)^-1 (1 + A/2) is
orthogonal for every A that is its own negative transpose (Cayley). X starts at zero and is trained: in each
step each head is left with a number of directions that is drawn, so that one basis serves all numbers.

Source: MatryoshkaKV (Lin et al. 2024, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import CalibrationError

#: How many directions are kept is so many parts of a head's size; in training any of these.
PARTS = 8
DRAWN = tuple(range(1, PARTS + 1))

#: Queries of a step.
_QUERIES = 64

#: Of each row this share, its end, is not learned from; and so many of its queries are looked at.
JUDGED, _LOOKED_AT = 8, 32

#: Steps between two looks, and the parts that are kept then.
_LOOK, _SHOWN = 25, (1, 2, 4, 6)

#: How far Adam goes at first.
_RATE = 0.005


@dataclass(frozen=True)
class Heads:
    """What a layer's attention is given on a text (`einfold::attention` says what each means), and the weight
    that reads what it gives, where it is known."""

    q_BSHD: Tensor
    k_BSKD: Tensor
    v_BSKE: Tensor
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks_H: Tensor | None = None
    output_MN: Tensor | None = None

    def mean(self) -> Tensor:
        """What a head's values have in common [K, E], which stands in every result where weights sum to 1;
        else nothing."""
        mean = self.v_BSKE.mean((0, 1))
        return mean if self.sinks_H is None else torch.zeros_like(mean)

    def centred(self) -> Heads:
        """Without `mean`, and without the mean of keys: that adds as much to all logits of a query, and so
        nothing to their softmax. Where there are sinks or a softcap, keys are as they were."""
        shifts = self.sinks_H is None and not self.softcap
        keys = self.k_BSKD - self.k_BSKD.mean((0, 1)) if shifts else self.k_BSKD
        return replace(self, k_BSKD=keys, v_BSKE=self.v_BSKE - self.mean())

    def output(
        self,
        row: int,
        places_N: Tensor,
        near_KDD: Tensor | None = None,
        near_KEE: Tensor | None = None,
    ) -> Tensor:
        """What the layer gives at these places of a row, [N, M]; with P and R where they are given."""
        q_NHD, k_TKD, v_TKE = self.q_BSHD[row, places_N], self.k_BSKD[row], self.v_BSKE[row]
        count, heads, size = q_NHD.shape
        total, kv_heads, _ = k_TKD.shape
        q_KLD = q_NHD.transpose(0, 1).reshape(kv_heads, -1, size)
        q_KLD = q_KLD if near_KDD is None else q_KLD @ near_KDD
        logits_KLT = q_KLD @ k_TKD.permute(1, 2, 0) * self.scale
        weights_HNT = self._softmax(logits_KLT.reshape(heads, count, total), places_N)
        out_KLE = weights_HNT.reshape(kv_heads, -1, total) @ v_TKE.transpose(0, 1)
        out_KLE = out_KLE if near_KEE is None else out_KLE @ near_KEE
        out_NO = out_KLE.reshape(heads, count, -1).transpose(0, 1).flatten(1)
        return out_NO if self.output_MN is None else out_NO @ self.output_MN.T

    def _softmax(self, logits_HNT: Tensor, places_N: Tensor) -> Tensor:
        total = logits_HNT.shape[-1]
        if self.softcap:
            logits_HNT = self.softcap * torch.tanh(logits_HNT / self.softcap)
        distance_NT = places_N[:, None] - torch.arange(total)
        hidden_NT = distance_NT < 0
        if self.window:
            hidden_NT = hidden_NT | (distance_NT >= self.window)
        logits_HNT = logits_HNT.masked_fill(hidden_NT, -math.inf)
        if self.sinks_H is not None:
            sink_HN1 = self.sinks_H[:, None, None].expand(-1, len(places_N), 1)
            logits_HNT = torch.cat((logits_HNT, sink_HN1), -1)
        return torch.softmax(logits_HNT, -1)[..., :total]


def principal(x_BSKD: Tensor) -> Tensor:
    """The principal directions of each head's numbers [K, D, D], columns from the largest on."""
    x_KTD = x_BSKD.flatten(0, 1).transpose(0, 1).double()
    found: Tensor = torch.linalg.eigh(x_KTD.mT @ x_KTD).eigenvectors
    return found.flip(-1).float().contiguous()


def cayley(x_KDD: Tensor) -> Tensor:
    """C(X - X'), orthogonal, and the identity for zero."""
    half_KDD = (x_KDD - x_KDD.mT) / 2
    one_DD = torch.eye(x_KDD.shape[-1])
    found: Tensor = torch.linalg.solve(one_DD - half_KDD, one_DD + half_KDD)
    return found


def projection(basis_KDD: Tensor, parts_K: Tensor) -> Tensor:
    """U diag(m) U' with so many parts of each head's directions."""
    size = basis_KDD.shape[-1]
    kept_KD = torch.arange(size) < (parts_K * size // PARTS)[:, None]
    return (basis_KDD * kept_KD[:, None]) @ basis_KDD.mT


def trained(heads: Heads, steps: int, seed: int, drawn: Sequence[int] = DRAWN) -> dict[str, Tensor]:
    """`key` [K, D, D] and `value` [K, E, E] behind so many steps, as they were where the least was lacking of
    what they do not learn from; `mean` [K, E] of the values; and what a layer's output lacks there of its
    square with 1 to PARTS - 1 parts kept: `error` [PARTS - 1] of all heads, `start` the same of the principal
    directions, `key_error` and `value_error` [K, PARTS - 1] where keys or values of one head alone are cut.

    The loss of a step is what its queries' output lacks of its square; `drawn` are the parts that a head may
    be left with in one.
    """
    mean_KE, heads = heads.mean(), heads.centred()
    length = heads.k_BSKD.shape[1]
    judge = _Judge(heads, length - length // JUDGED, drawn)
    first = [principal(heads.k_BSKD), principal(heads.v_BSKE)]
    start = judge.errors(first)
    best = _descended(heads, first, judge, steps, seed, drawn)
    if not bool(torch.isfinite(start).all()):
        raise CalibrationError(
            "bases of heads cannot be trained: what attention gives on the calibration text is not finite"
        )
    return {
        "key": best[0],
        "value": best[1],
        "mean": mean_KE,
        "start": start,
        "error": judge.errors(best),
        "key_error": judge.alone(best, 0),
        "value_error": judge.alone(best, 1),
    }


def _descended(
    heads: Heads,
    first: list[Tensor],
    judge: _Judge,
    steps: int,
    seed: int,
    drawn: Sequence[int],
) -> list[Tensor]:
    """The bases of keys and values, from the first ones on, where the judge liked them best."""
    random = torch.Generator().manual_seed(seed)
    best, least, rows = first, judge.score(first), len(heads.k_BSKD)
    with torch.enable_grad():
        leaves = [torch.zeros_like(basis).requires_grad_() for basis in first]
        adam = torch.optim.Adam(leaves, lr=_RATE, foreach=False)
        for step in range(1, steps + 1):
            adam.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            places_N = torch.randperm(judge.cut, generator=random)[:_QUERIES]
            near = [
                projection(basis, _some(drawn, len(basis), random))
                for basis in _turned(first, leaves)
            ]
            adam.zero_grad()
            _lacking(heads, step % rows, places_N, near).backward()
            adam.step()
            if step % _LOOK == 0 or step == steps:
                with torch.no_grad():
                    now = _turned(first, leaves)
                    score = judge.score(now)
                if score < least:
                    best, least = now, score
    return best


def _turned(first: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    return [basis @ cayley(leaf) for basis, leaf in zip(first, leaves, strict=True)]


def _some(drawn: Sequence[int], heads: int, random: torch.Generator) -> Tensor:
    return torch.tensor(drawn)[torch.randint(len(drawn), (heads,), generator=random)]


def _lacking(heads: Heads, row: int, places_N: Tensor, near: Sequence[Tensor]) -> Tensor:
    """What the output lacks of its square with these projections."""
    with torch.no_grad():
        want = heads.output(row, places_N)
    return (heads.output(row, places_N, *near) - want).square().sum() / want.square().sum()


class _Judge:
    """Looks at the ends of rows, which are not learned from."""

    def __init__(self, heads: Heads, cut: int, drawn: Sequence[int]) -> None:
        self.cut = cut
        self._heads = heads
        self._shown = [parts for parts in _SHOWN if parts in drawn] or drawn
        length = heads.k_BSKD.shape[1]
        self._places = torch.arange(cut, length, max(1, (length - cut) // _LOOKED_AT))
        self._want = [heads.output(row, self._places) for row in range(len(heads.k_BSKD))]
        self._square = torch.stack([want.square().sum() for want in self._want]).sum()

    def errors(self, bases: Sequence[Tensor], shown: Sequence[int] = DRAWN[:-1]) -> Tensor:
        """What the output lacks of its square with so many parts kept of every head."""
        near = [[projection(b, torch.full(b.shape[:1], parts)) for b in bases] for parts in shown]
        return torch.stack([self._error(*each) for each in near])

    def alone(self, bases: Sequence[Tensor], which: int) -> Tensor:
        """The same [K, PARTS - 1] where one head's keys (0) or values (1) are cut, and all else is whole."""
        basis, found = bases[which], []
        whole = torch.full((len(basis),), PARTS)
        for head in range(len(basis)):
            for parts in DRAWN[:-1]:
                near = projection(basis, whole.index_fill(0, torch.tensor(head), parts))
                found.append(self._error(*((near, None) if which == 0 else (None, near))))
        return torch.stack(found).reshape(len(basis), -1)

    def score(self, bases: Sequence[Tensor]) -> float:
        """The mean of its logarithm, so that every rank counts alike."""
        return float(self.errors(bases, self._shown).log().mean())

    def _error(self, near_KDD: Tensor | None, near_KEE: Tensor | None) -> Tensor:
        off = [
            (self._heads.output(row, self._places, near_KDD, near_KEE) - want).square().sum()
            for row, want in enumerate(self._want)
        ]
        return torch.stack(off).sum() / self._square
