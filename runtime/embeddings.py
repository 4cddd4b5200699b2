"""Embeddings that stand in a prompt in the places of tokens: those of images, made outside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..compiler.ir.manifest import EMBEDDINGS
from ..errors import PromptError
from .runner import Floats


def no_table(rows: int, width: int) -> dict[str, Floats]:
    """What is given beside prompts without embeddings: a graph reads a row of the table for every token."""
    return {EMBEDDINGS: np.zeros((rows, 1, width), np.float32)}


def table_of(
    rows: Sequence[Sequence[int]], embeddings: Sequence[npt.ArrayLike | None], width: int
) -> Floats:
    """The embeddings of each prompt as one table [B, N, width]; token -1 - n of a prompt stands for row n.

    Raises PromptError, naming the prompt, for what does not fit.
    """
    if len(embeddings) != len(rows):
        raise PromptError(f"there are {len(rows)} prompts, and embeddings for {len(embeddings)}")
    tables = [
        _table(f"the embeddings of prompt {at}", given, width)
        for at, given in enumerate(embeddings)
    ]
    for at, (table, row) in enumerate(zip(tables, rows, strict=True)):
        lowest = min((int(token) for token in row), default=0)
        if -lowest > len(table):
            raise PromptError(
                f"token {lowest} of prompt {at} stands for row {-lowest - 1} of its embeddings, and there "
                f"are {len(table)}"
            )
    most = max(1, *map(len, tables))
    return np.stack([np.pad(table, ((0, most - len(table)), (0, 0))) for table in tables])


def _table(name: str, given: npt.ArrayLike | None, width: int) -> Floats:
    if given is None:
        return np.zeros((0, width), np.float32)
    try:
        table = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} are no numbers") from error
    if table.ndim != 2 or table.shape[1] != width:
        raise PromptError(f"{name} are {list(table.shape)}, and the model takes [N, {width}]")
    if not np.isfinite(table).all():
        raise PromptError(f"{name} hold NaN or infinity")
    return table
