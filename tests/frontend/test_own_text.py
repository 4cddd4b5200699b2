"""Texts that a model writes itself, to be calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.driver import Input, load_weights, open_model
from einfold.compiler.frontend.huggingface import find_model, load_reference
from einfold.compiler.frontend.own_text import _drawn, own_text, runs
from einfold.compiler.ir.weights import Weight
from einfold.errors import CalibrationError

from .. import models

MODEL = Path(__file__).parents[2] / "examples" / "tiny_llama"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))


def quiet(text: str, share: float) -> None:
    assert 0 <= share <= 1


def opened(folder: Path = MODEL) -> Input:
    model = open_model(folder)
    load_weights(model)
    return model


def by(model: Input) -> Callable[[], AbstractContextManager[Any]]:
    return runs(model.source, model.config, model.state, model.module)


def write(named: str = "a", seed: int = 0, running: Any = None) -> torch.Tensor:
    return own_text(running or by(opened()), 512, (2, 12), lambda: named, quiet, seed)


def test_a_text_is_likely_the_same_each_time_and_kept() -> None:
    text = write()
    assert text.shape == (2, 12) and text.dtype == torch.long

    def never() -> Any:
        raise AssertionError("run again")

    assert torch.equal(write(running=never), text)
    assert torch.equal(write("b"), text)
    assert not torch.equal(write(seed=1), text)
    model = load_reference(find_model(MODEL))
    said = torch.log_softmax(model(input_ids=text).logits[:, :-1], -1)
    own = said.gather(-1, text[:, 1:, None]).mean()
    other = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))
    assert own > said.gather(-1, other[:, 1:, None]).mean() + 2


def test_weights_that_are_loaded_are_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is of them, as where an adapter was merged; and as of the files, where these are it."""
    model = opened()
    state = dict(model.state or {})
    files = write("files", running=runs(model.source, model.config))
    monkeypatch.setattr(f"{own_text.__module__}.load_reference", None)
    assert torch.equal(write("loaded"), files)
    head = next(name for name in state if "lm_head" in name or "embed" in name)
    state[head] = state[head].flip(0)
    changed = runs(model.source, model.config, state)
    assert not torch.equal(write("changed", running=changed), files)


def test_weights_of_two_bytes_are_widened_where_they_are_read(tmp_path: Path) -> None:
    """The text is that of the model widened at once; of it nothing is held that has a size to speak of."""
    wide = models.build("llama", vocab_size=512)
    wide.bfloat16().save_pretrained(tmp_path)
    model = opened(tmp_path)
    text = write("half", running=by(model))
    assert torch.equal(write("wide", running=lambda: nullcontext(wide.float())), text)
    with by(model)() as half:
        parts = dict(half.named_parameters())
    held = {name: part.untyped_storage().nbytes() for name, part in parts.items()}
    norm = held.pop("model.norm.weight")
    assert norm > 4 and {*held.values()} == {4}


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    """Of words with nothing to them none is, whatever the part that is drawn."""
    likely = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).expand(4000, 6)
    drawn = _drawn(likely.cumsum(-1, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1)
    shares = drawn.flatten().bincount(minlength=6) / 4000
    assert torch.allclose(shares, likely[0], atol=0.03)
    assert not shares[[0, 2, 5]].any()


@pytest.mark.parametrize(("part", "token"), [(0.0, 1), (1.0, 5)])
def test_the_least_and_the_largest_part(
    part: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest is below one, but times a sum it may be rounded to that."""
    monkeypatch.setattr(
        torch, "rand", lambda *size, dtype, **_: torch.full(size, part, dtype=dtype)
    )
    sums = torch.tensor([[0.0, 0.5, 0.5, 0.7, 1.0, 1.0]], dtype=torch.float64)
    assert _drawn(sums, torch.Generator()).tolist() == [[token]]


def test_codes_of_a_tied_table_are_widened_once() -> None:
    model = opened()
    state = dict(model.state or {})
    name, other = "model.embed_tokens.weight", "lm_head.weight"
    loads: list[Tensor] = []

    def load(table: Tensor = state[name]) -> Tensor:
        loads.append(table)
        return table.clone()

    state[name] = state[other] = Weight(tuple(state[name].shape), torch.float32, load)
    with runs(model.source, model.config, state)() as found:
        assert found.lm_head.weight is found.model.embed_tokens.weight
    assert len(loads) == 1


def test_a_model_in_memory_is_taken_as_it_is() -> None:
    module = load_reference(find_model(MODEL))
    with runs(find_model(MODEL), None, {}, module)() as model:
        assert model is module


def test_logits_that_are_no_numbers() -> None:
    module = load_reference(find_model(MODEL))
    with torch.no_grad():
        module.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="logits are not finite where it writes a text"):
        write("c", running=lambda: nullcontext(module))
