"""The check refuses what is not the model as transformers runs it, whatever of it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import einfold
from einfold.compiler import kept_trace
from einfold.compiler.driver import Input, load_weights, open_model, wrap_model
from einfold.compiler.frontend import hooks
from einfold.compiler.frontend.export import capture_language_model
from einfold.compiler.frontend.masks import Mask
from einfold.compiler.frontend.original import original_logits
from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.program import Program, attention_nodes
from einfold.compiler.ir.quant.scheme import PRESETS
from einfold.compiler.ir.weights import Weight
from einfold.errors import EinfoldError, UnsupportedError
from einfold.evaluate import original
from einfold.evaluate.original import OriginalCheck

from .. import models
from ..quick import quick

_KEPT: dict[str, Any] = {}


def given(name: str) -> Any:
    if name not in _KEPT:
        _KEPT[name] = models.build(name)
    return _KEPT[name]


def captured(model: Any) -> tuple[Input, Program]:
    found = wrap_model(model)
    context = models.CONTEXT
    return found, capture_language_model(
        found.source, found.config, context, found.state, found.module
    )


def change_weight(
    program: Program, end: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    (name,) = [name for name in program.weights if name.endswith(end)]
    weight: Weight = program.weights[name]
    program.weights._weights[name] = replace(weight, load=lambda: change(weight.load()))


def one_weight(program: Program) -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0] += 0.1
        return x

    change_weight(program, "layers.1.mlp.down_proj.weight", change)


def norm(program: Program) -> None:
    change_weight(program, "layers.0.input_layernorm.weight", lambda x: x * 1.01)


def head(program: Program) -> None:
    (embedding,) = [name for name in program.weights if name.endswith("embed_tokens.weight")]
    change_weight(program, "lm_head.weight", lambda x: program.weights[embedding].load())


def window(program: Program) -> None:
    for node in attention_nodes(program):
        node.args = (*node.args[:6], models.WINDOW + 1, *node.args[7:])


def scale(program: Program) -> None:
    node = attention_nodes(program)[0]
    node.args = (*node.args[:5], float(node.args[5]) * 1.1, *node.args[6:])  # type: ignore[arg-type]


@pytest.mark.parametrize("breaking", [one_weight, norm, head, window, scale])
def test_a_broken_graph_is_refused(breaking: Callable[[Program], None]) -> None:
    """A weight, a norm, the head, the window and the scale; unbroken the graph agrees."""
    model, program = captured(given("mistral"))
    assert "as transformers computes them" in OriginalCheck().graph(model, program)
    breaking(program)
    with pytest.raises(EinfoldError, match="not the model as transformers runs it") as caught:
        OriginalCheck().graph(model, program)
    if breaking is window:  # the first token that sees one key too many
        assert f"from token {models.WINDOW} on" in str(caught.value)


def test_a_lost_mask_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is read off no mask, on each road; nothing is written."""
    monkeypatch.setattr(hooks, "read_mask", lambda *_, **__: Mask(0))
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))  # where no plan was kept before
    monkeypatch.setattr(kept_trace, "cache_home", cache_home)  # and others find no such trace
    model, out = given("mistral"), tmp_path / "out"
    for work in (
        lambda: einfold.compile(model, out),
        lambda: einfold.export_onnx(model, out),
        lambda: einfold.cache_for(model),
    ):
        with pytest.raises(EinfoldError, match=f"from token {models.WINDOW} on"):
            work()
    assert not out.exists()
    assert model.config._attn_implementation != "einfold_cache"
    einfold.compile(model, out, target="reference", check=False)


def test_padding_that_the_model_takes_otherwise_is_refused() -> None:
    """What a row behind padding gives depends on the mask: here the graph has no place for it."""
    model = models.build("llama")

    class Counting(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            out = super().forward(*args, attention_mask=attention_mask, **kwargs)
            if attention_mask is not None:
                out.logits = out.logits + (attention_mask == 0).sum(-1)[:, None, None]
            return out

    model.__class__ = Counting
    found, program = captured(model)
    with pytest.raises(EinfoldError, match="from token 0 of a row behind padding on"):
        OriginalCheck().graph(found, program)


def test_a_model_that_draws_numbers_is_refused() -> None:
    model = models.build("llama")
    model.model.norm.register_forward_hook(lambda module, given, out: out + torch.rand(1))
    found, program = captured(models.build("llama"))
    found.module = model
    with pytest.raises(UnsupportedError, match="other numbers each time"):
        OriginalCheck().graph(found, program)


def test_an_original_that_cannot_run_is_said() -> None:
    found, program = captured(models.build("llama"))

    def fail(*_: Any) -> None:
        raise RuntimeError("needs a GPU")

    found.module.model.norm.register_forward_hook(fail)
    said = OriginalCheck().graph(found, program)
    assert said == "not compared with the original, which cannot be run here: needs a GPU"


def check_widened(half: Any, default: torch.dtype = torch.float32) -> None:
    """The logits of a model in two bytes are those of the model widened at once, where new tensors are of the
    type `default`."""
    found = wrap_model(half)
    ids, mask = original._texts(models.VOCABULARY, 24)
    assert found.state is not None
    torch.set_default_dtype(default)
    try:
        got = original_logits(found.source, found.config, found.state, half, ids, mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert half.dtype == torch.bfloat16
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = half.float()
    whole.set_attn_implementation("eager")
    with torch.no_grad():
        want = whole(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss"])
def test_half_precision_is_widened_a_layer_at_a_time(name: str) -> None:
    check_widened(models.build(name).bfloat16())


def test_what_two_layers_read_is_there_in_both() -> None:
    half = models.build("llama").bfloat16()
    first, second = half.model.layers
    second.mlp = first.mlp
    check_widened(half)


def test_new_tensors_of_another_type_change_nothing() -> None:
    """A layer's weights are in float32 whatever torch makes else."""
    check_widened(models.build("llama").bfloat16(), torch.bfloat16)


def test_buffers_that_a_checkpoint_holds_are_the_model_s(tmp_path: Path) -> None:
    """Such as Gemma 4's scalar of each layer, which is one until it was trained."""
    model = models.build("gemma4")
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.5)
    model.save_pretrained(tmp_path)
    found = open_model(tmp_path)
    load_weights(found)
    assert found.state is not None
    ids, mask = original._texts(models.VOCABULARY, 24)
    got = original_logits(found.source, found.config, found.state, None, ids, mask)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.allclose(got[real], want[real], atol=1e-4)
    program = capture_language_model(found.source, found.config, models.CONTEXT, found.state)
    OriginalCheck().graph(found, program)


def test_windows_are_passed_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = captured(models.build("mistral"))
    assert original.check_length(program) == (models.WINDOW + original._BEHIND, "")
    monkeypatch.setattr(original, "_LOGITS", models.VOCABULARY * models.WINDOW)
    monkeypatch.setattr(original, "_LENGTH", 12)
    length, said = original.check_length(program)
    assert length == 12
    assert "too short to pass the window of 16 tokens" in said


def test_the_report_tells_of_both_comparisons(tmp_path: Path) -> None:
    report = einfold.compile(given("mistral"), tmp_path / "out", weights="int8")
    (record,) = [record for record in report.passes if record.name == "compare_original"]
    assert not record.changed
    assert "as transformers computes them" in record.notes[0].what
    assert report.check["bound on that"] == PRESETS["int8"].bound
    assert 0 < report.check["same likeliest token as the original"] <= 1


@pytest.mark.parametrize(
    "weights",
    quick(["int4", "fp32", "fp16", "int8"], "int4"),
)
def test_a_finished_artifact_of_another_model_is_refused(weights: str, tmp_path: Path) -> None:
    """Behind the graph, each form of weights has a bound of its own."""
    check = OriginalCheck()
    out = tmp_path / weights
    einfold.compile(given("llama"), out, weights=weights, check=False, target="reference")
    model, program = captured(given("llama"))
    check.graph(model, program)
    check.files(out)
    other = OriginalCheck()
    model, program = captured(models.build("llama", seed=5))
    other.graph(model, program)
    with pytest.raises(EinfoldError, match="differs from the original"):
        other.files(out)
