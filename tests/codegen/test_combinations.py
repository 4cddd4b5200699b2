"""Weights, flavours and architectures that the README names, together: each runs.

In float32 every architecture has both flavours in `frontend/test_architectures.py`, token by token. Here
those whose matrices are kept in ways of their own meet every form of weights in both flavours, the others
one each, in turn. The compile's own check runs the artifact on onnxruntime beside the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import einfold

from .. import models
from ..quick import quick

#: Transposed and tied matrices; experts; experts with biases and a gate of their own.
OWN = ("gpt2", "mixtral", "gpt_oss")
FORMS = [(weights, portable) for weights in ("fp16", "int8", "int4") for portable in (False, True)]
#: Recipes that come with einfold.
RECIPES = ("int4", "int4-128", "int4-exact")

OTHERS = [name for name in models.CONFIGS if name not in (*OWN, "llama")]
CASES: list[tuple[str, str, bool]] = [
    *((name, weights, portable) for name in OWN for weights, portable in FORMS),
    *(("llama", recipe, False) for recipe in RECIPES),
    *((name, *FORMS[at % len(FORMS)]) for at, name in enumerate(OTHERS)),
]

#: Largest difference of a logit as a share of the largest. Int8 products round activations to 8 bits.
BOUNDS = {"float32": 1e-4, "int8 products (accuracy level 4)": 0.05}


@pytest.mark.parametrize(
    ("name", "weights", "portable"),
    quick(CASES, *(case for at, case in enumerate(CASES) if case[0] != "mixtral" and at % 5 == 1)),
)
def test_it_runs(
    name: str,
    weights: str,
    portable: bool,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    chosen: dict[str, Any] = {"recipe": weights} if weights in RECIPES else {"weights": weights}
    report = einfold.compile(model_folder(name), tmp_path / "a", portable=portable, **chosen)
    found = report.check
    assert found["largest difference of logits"] <= BOUNDS[found["arithmetic"]] * max(
        1.0, found["largest logit"]
    )
