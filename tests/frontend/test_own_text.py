"""Texts that a model writes itself, to be calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from einfold.compiler.frontend.huggingface import find_model
from einfold.compiler.frontend.own_text import loader, own_text
from einfold.errors import CalibrationError

MODEL = Path(__file__).parents[2] / "examples" / "tiny_llama"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))


def quiet(text: str, share: float) -> None:
    assert 0 <= share <= 1


def write(named: str = "a", seed: int = 0, load: Any = None) -> torch.Tensor:
    make = load or loader(find_model(MODEL), None)
    return own_text(make, 512, (2, 12), lambda: named, quiet, seed)


def test_a_text_is_likely_the_same_each_time_and_kept() -> None:
    text = write()
    assert text.shape == (2, 12) and text.dtype == torch.long

    def never() -> Any:
        raise AssertionError("loaded again")

    assert torch.equal(write(load=never), text)
    assert torch.equal(write("b"), text)
    assert not torch.equal(write(seed=1), text)
    model = loader(find_model(MODEL), None)()
    said = torch.log_softmax(model(input_ids=text).logits[:, :-1], -1)
    own = said.gather(-1, text[:, 1:, None]).mean()
    other = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))
    assert own > said.gather(-1, other[:, 1:, None]).mean() + 2


def test_a_model_in_memory_is_taken_as_it_is() -> None:
    module = loader(find_model(MODEL), None)()
    assert loader(find_model(MODEL), module)() is module


def test_logits_that_are_no_numbers() -> None:
    module = loader(find_model(MODEL), None)()
    with torch.no_grad():
        module.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="logits are not finite where it writes a text"):
        write("c", load=lambda: module)
