"""`einfold.explain` and its verb: what is fused, what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import einfold
from einfold.errors import UnsupportedError

from .. import models
from ..cli.test_cli import einfold as cli
from .test_forms import inputs_of, sinks, softcap

FILE = """
import torch

def attention(q, k, v):
    return torch.softmax(torch.tanh(q @ k.mT) * 9, dim=-1) @ v

def rounded(q, k, v):
    p = torch.softmax(q @ k.mT, dim=-1)
    s = p.amax(-1, keepdim=True) / 127
    return (torch.round(p / s) @ v) * s

def example_inputs():
    return [torch.ones(1, 2, 5, 8) for _ in range(3)]
"""


def test_a_fused_form() -> None:
    report = einfold.explain(sinks, *inputs_of(sinks))
    (cascade,) = report.cascades
    assert (cascade.status, cascade.passes_before, cascade.passes_after) == ("fused", 4, 1)
    assert not cascade.reason
    assert "einfold_cpu.attention_with_sum" in cascade.source
    assert "# rank" in cascade.source, "the cascade stands above the code"
    assert "1 of 1 cascades fused" in str(report)
    assert "the caller owns the cache" in str(report)


def test_a_model_by_its_layers() -> None:
    model = models.build("gpt_oss")
    report = einfold.explain(model, torch.arange(3, 10)[None])
    assert [c.where for c in report.cascades] == [
        f"model.layers.{layer}.self_attn" for layer in range(2)
    ]
    assert {c.status for c in report.cascades} == {"fused"}


def test_a_folder_of_a_language_model(tmp_path: Path) -> None:
    """Its attention is an operator already, whose meaning folds; the report is the same."""
    models.build("gpt_oss").save_pretrained(tmp_path / "model")
    report = einfold.explain_export(tmp_path / "model")
    assert [c.where for c in report.cascades] == ["layer 0", "layer 1"]
    assert {(c.status, c.passes_before, c.passes_after) for c in report.cascades} == {
        ("fused", 3, 1)
    }
    windowed, whole = report.cascades
    assert "pos(h) - pos(m) < 16" in windowed.cascade and "< 16" not in whole.cascade
    assert "virtual(m, 0), sinks_H[" in whole.cascade


def test_on_tensors_without_numbers_it_shows_what_a_gpu_gets() -> None:
    pytest.importorskip("triton")
    (cascade,) = einfold.explain(sinks, *(x.to("meta") for x in inputs_of(sinks))).cascades
    assert (cascade.status, cascade.lowering) == ("fused", "kernel")
    assert "einfold_triton.kernel" in cascade.source


def test_a_region_that_does_not_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that it is imported another operator becomes an input of it: it is left, with a sentence."""
    from dataclasses import replace

    from einfold.compiler.fuse import decide, folded

    real = folded.import_graph
    monkeypatch.setattr(
        folded, "import_graph", lambda graph: replace(real(graph), opaque={"nothing": "as a test"})
    )
    decide.forget()
    (cascade,) = einfold.explain(softcap, *inputs_of(softcap)).cascades
    decide.forget()
    assert cascade.status == "refused"
    assert "the region keeps changing while it is imported" in cascade.reason


class Branching(torch.nn.Module):
    """Does one of two things, by what it computes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.transpose(2, 3), dim=-1)
        if weights.max() > 0.5:
            return weights @ v
        return weights @ v * 2


def test_control_flow_that_depends_on_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sentence with the line, and nothing of what torch prints; no folder is left."""
    inputs = tuple(torch.randn(1, 2, 4, 8) for _ in range(3))
    sentence = (
        r"depends on the numbers in a tensor \(line \d+ of .*test_explain.py: `if weights.max"
    )
    with pytest.raises(UnsupportedError, match=sentence):
        einfold.explain(Branching(), *inputs)
    with pytest.raises(UnsupportedError, match=sentence):
        einfold.export_onnx(Branching(), tmp_path / "out", inputs)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    module, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    for model, given, sentence in (
        (module, x.to("meta"), "Linear: example input 0 is on the device meta, which holds no"),
        (torch.nn.Linear(8, 8, device="meta"), x, "the weight weight is on the device meta"),
    ):
        with pytest.raises(UnsupportedError, match=sentence):
            einfold.export_onnx(model, tmp_path / "out", (given,))
    with pytest.raises(
        UnsupportedError, match="does not run on these inputs: Tensor device mismatch"
    ):
        einfold.explain(softcap, inputs_of(softcap)[0].to("meta"), *inputs_of(softcap)[1:])
    if not torch.cuda.is_available():
        path = tmp_path / "form.py"
        path.write_text(FILE.replace("torch.ones(1, 2, 5, 8)", "torch.ones(3, device='cuda')"))
        said = cli("explain", f"{path}::attention", code=3)
        assert "form.py: example_inputs() fails: " in said and "CUDA" in said


def test_what_has_no_region_is_read_whole() -> None:
    def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(2, 3)) @ v

    (cascade,) = einfold.explain(sigmoid, *(torch.randn(1, 2, 4, 8) for _ in range(3))).cascades
    assert (cascade.passes_before, cascade.passes_after) == (1, 1)
    assert "# rank" in cascade.source and "tl.dot(" in cascade.source


def test_random_numbers_and_compiled_code_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    inputs = inputs_of(softcap)
    torch.manual_seed(3)
    einfold.explain(softcap, *inputs)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("function", "inputs", "sentence"),
    [
        (lambda x: x + 1, [torch.ones(3)], "nothing"),
        (lambda x: x @ x, [torch.ones(3, 4)], "does not run on these inputs: mat1 and mat2 shapes"),
        (torch.nn.Identity, [torch.ones(3)], "Identity is a class; give a function, or a module"),
        (lambda n: n + 1, [3], "a function of tensors alone is needed"),
    ],
)
def test_what_cannot_be_explained_is_said(
    function: object, inputs: list[object], sentence: str
) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        einfold.explain(function, *inputs)  # type: ignore[arg-type]


def test_the_verb(tmp_path: Path) -> None:
    path = tmp_path / "form.py"
    path.write_text(FILE)
    text = cli("explain", f"{path}::attention")
    assert "matmul_1: fused, 3 -> 1 passes, one tile" in text
    data = json.loads(cli("explain", f"{path}::rounded", "--json"))
    (cascade,) = data["cascades"]
    assert cascade["status"] == "refused"
    assert "round(" in cascade["reason"]
    assert {"passes_before", "passes_after", "source"} <= set(cascade)


def test_mistakes_at_the_verb(tmp_path: Path) -> None:
    path = tmp_path / "form.py"
    path.write_text("def attention(q):\n    return q\n")
    assert "like attention.py::forward" in cli("explain", "form.py", code=3)
    assert "is no file" in cli("explain", f"{tmp_path / 'none.py'}::f", code=3)
    assert "has no function 'f'; it has attention" in cli("explain", f"{path}::f", code=3)
    assert "example_inputs()" in cli("explain", f"{path}::attention", code=3)
    path.write_text("import nothing_of_that_name\n")
    assert "does not run: ModuleNotFoundError" in cli("explain", f"{path}::f", code=3)
