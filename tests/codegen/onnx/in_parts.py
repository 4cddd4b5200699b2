"""What holds for every way to run a model whose weights do not all stay in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import einfold

from ...greedy import all_logits

TEXT = list(range(3, 43))

#: Models and weights that differ in what is cut and packed.
RESIDENT = pytest.mark.parametrize(
    ("name", "weights"), [("llama", "int4"), ("gemma2", "fp32"), ("gpt2", "int8")]
)


def check_as_resident(model: einfold.Model, path: Path) -> None:
    """Logits, bit by bit, and tokens are those of the artifact with all of its weights in memory."""
    whole = einfold.load(path, threads=1, chunk=16)
    assert np.array_equal(all_logits(model, TEXT), all_logits(whole, TEXT))
    found, wanted = (
        m.generate_batch([TEXT[:9], TEXT[:5]], max_new_tokens=6, ignore_eos=True)
        for m in (model, whole)
    )
    assert [row.tokens for row in found] == [row.tokens for row in wanted]
