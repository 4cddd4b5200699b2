"""The tokens that a model is calibrated on, and texts that give none."""

from __future__ import annotations

from pathlib import Path

import pytest

from einfold.compiler.calibrate.text import calibration_tokens
from einfold.errors import CalibrationError


class Letters:
    """A token a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_text_is_cut_into_rows(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abcdefghijk")
    rows, origin = calibration_tokens(Letters(), text, 1000, 128, 4)
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcd", "efgh"]
    assert origin == "a.txt"
    assert calibration_tokens(Letters(), None, 512, 2**17, 512)[0].shape == (2, 256)
    rows, origin = calibration_tokens(None, None, 512, 11, 64)
    assert rows.shape == (8, 64) and int(rows.max()) < 11 and origin.startswith("random tokens")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (b"abc", r"a\.txt has 3 tokens; 4 are needed at least"),
        (b"", r"a\.txt has 0 tokens; 4 are needed at least"),
        (b"caf\xe9", "cannot read the calibration text .*a.txt"),
        (b"abcz", "the tokenizer gives token 122, but the model has 120 tokens"),
        (None, "cannot read the calibration text .*a.txt"),
    ],
)
def test_texts_that_give_no_tokens(written: bytes | None, says: str, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    if written is not None:
        text.write_bytes(written)
    with pytest.raises(CalibrationError, match=says):
        calibration_tokens(Letters(), text, 1000, 120, 4)
