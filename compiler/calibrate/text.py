"""The tokens that a model is calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CalibrationError, pass_on

DEFAULT = Path(__file__).with_name("default.txt")

#: Tokens read together in one row. More rows bound the memory of attention, not its meaning.
_ROW = 256


def rows_of(count: int, context: int) -> tuple[int, int]:
    """(rows, tokens of a row) of a text of about `count` tokens."""
    row = min(_ROW, context)
    return max(1, count // row), row


def calibration_tokens(
    tokenizer: Any, text: Path | None, count: int, vocabulary: int, context: int
) -> tuple[Tensor, str]:
    """(token ids [rows, tokens of a row], where they are from), about `count` in all.

    Without a tokenizer they are random. Raises CalibrationError where the text cannot be read or holds
    fewer tokens than one row.
    """
    rows, row = rows_of(count, context)
    if tokenizer is None:
        ids = torch.randint(vocabulary, (rows, row), generator=torch.Generator().manual_seed(0))
        return ids, "random tokens, for the model has no tokenizer"
    found = torch.tensor(encoded(tokenizer, text), dtype=torch.long)
    if len(found) < row:
        raise CalibrationError(
            f"the calibration text {text or DEFAULT} has {len(found)} tokens; {row} are needed at least, "
            "so give a longer one"
        )
    if len(found) and int(found.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token {int(found.max())}, but the model has {vocabulary} tokens"
        )
    rows = min(rows, len(found) // row)
    return found[: rows * row].reshape(rows, row), text.name if text else "the built-in text"


def first_rows(tokens_BS: Tensor, rows: int, length: int, who: str) -> Tensor:
    """The first tokens of a text in at most so many rows, of at most so many tokens each.

    Raises CalibrationError where a row has fewer than the 2 that `who` needs.
    """
    flat, length = tokens_BS.flatten(), min(length, tokens_BS.shape[1])
    if length < 2:
        raise CalibrationError(
            f"the calibration text has rows of {length} tokens; {who} needs 2 at least"
        )
    rows = min(rows, len(flat) // length)
    return flat[: rows * length].reshape(rows, length)


def encoded(tokenizer: Any, text: Path | None) -> list[int]:
    """The tokens of a text, or of the built-in one. Raises CalibrationError where it cannot be read."""
    path = text or DEFAULT
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        pass_on(error)
        raise CalibrationError(f"cannot read the calibration text {path}: {error}") from error
    found: list[int] = tokenizer.encode(written, add_special_tokens=False)
    return found
