"""What policies share that average tokens which leave into tokens that stay."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..attention_sums import host, like
from .policy import Floats, Ints, Row


def directions(row: Row, head: int, used: int) -> Floats:
    """The keys of one head's first slots at length 1, [used, D]."""
    keys_TD = host(row["key"][head, :used]).astype(np.float32, copy=False)
    return keys_TD / np.maximum(np.linalg.norm(keys_TD, axis=1, keepdims=True), 1e-30)  # type: ignore[no-any-return]


def nearest(units_TD: Floats, leaving_L: Ints, kept_C: Ints) -> tuple[Ints, Floats]:
    """Which of the kept tokens has the key most like that of each that leaves, [L], and their cosine."""
    cosine_LC = units_TD[leaving_L] @ units_TD[kept_C].T
    return cosine_LC.argmax(1), cosine_LC.max(1)


def average(
    row: Row,
    head: int,
    kept_C: Ints,
    own_C: Floats,
    leaving_L: Ints,
    into_L: Ints,
    weights_L: Floats,
) -> None:
    """Averages each token that leaves by its weight into kept token `into_L`, whose own weight is `own_C`.

    Keys and values are averaged alike. A kept token that takes nothing in stays as it is.
    """
    taking_M, into_L = np.unique(into_L, return_inverse=True)
    weights_ML = np.zeros((len(taking_M), len(leaving_L)), np.float32)
    weights_ML[into_L, np.arange(len(leaving_L))] = weights_L
    own_M = own_C[taking_M]
    total_M = own_M + weights_ML.sum(1)
    for slots_KND in (row["key"], row["value"]):
        x_TD = host(slots_KND[head])
        mixed_MD = own_M[:, None] * x_TD[kept_C[taking_M]] + weights_ML @ x_TD[leaving_L]
        slots_KND[head, kept_C[taking_M]] = like(mixed_MD / total_M[:, None], slots_KND)


def add_scores(
    row: Row, names: Iterable[str], head: int, kept_C: Ints, leaving_L: Ints, into_L: Ints
) -> None:
    """Adds the scores of each token that leaves to those of the kept one that it was averaged into."""
    for score_KN in (row[name] for name in names):
        sums_N = np.array(host(score_KN[head]))
        np.add.at(sums_N, kept_C[into_L], sums_N[leaving_L])
        score_KN[head] = like(sums_N, score_KN)
