"""A model that was traced is not traced again, and what is found is what tracing gives."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from einfold.compiler import kept_trace
from einfold.compiler.driver import load_weights, open_model, wrap_model
from einfold.compiler.frontend.export import capture_language_model
from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.kept_trace import trace_language_model
from einfold.errors import ModelError

from .. import models
from ..quick import quick, rarely


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that were traced, in their order, from an empty cache folder on."""
    found: list[str] = []

    def capture(source: Any, config: Any, *more: Any) -> Program:
        found.append(config.model_type)
        return capture_language_model(source, config, *more)

    monkeypatch.setattr(kept_trace, "capture_language_model", capture)
    monkeypatch.setattr(kept_trace, "cache_home", cache_home)  # not what all tests share
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    return found


def folder(path: Path, name: str = "llama", **changes: Any) -> Any:
    model = models.build(name, **changes)
    model.save_pretrained(path)
    return given(path)


def given(path: Any) -> Any:
    found = open_model(path) if isinstance(path, Path) else wrap_model(path, None)
    load_weights(found)
    return found


def trace(model: Any, context: int = 64, state: bool = True) -> Program:
    known = model.state if state else None
    return trace_language_model(model.source, model.config, context, known, model.module)


def file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "traces").glob("*/*.pt")
    return path


@pytest.mark.parametrize(
    "name",
    quick([*models.CONFIGS, *models.SHARING, *models.EXPERTS], "gpt2", "gpt_oss"),
)
def test_what_is_found_is_what_tracing_gives(name: str, tmp_path: Path, traced: list[str]) -> None:
    model = folder(tmp_path / "model", name)
    first, again = trace(model), trace(model, context=32)
    assert len(traced) == 1
    assert (first.model.context, again.model.context) == (64, 32)
    assert print_program(again).replace("context=32", "context=64") == print_program(first)
    for weight in first.weights:
        assert torch.equal(first.weights[weight].load(), again.weights[weight].load())


def test_weights_are_those_of_the_model_at_hand(tmp_path: Path, traced: list[str]) -> None:
    for seed in range(2):
        model = folder(tmp_path / str(seed), seed=seed)
        found = trace(model)
        for name in model.state:
            if name in found.weights:
                assert torch.equal(found.weights[name].load(), model.state[name])
    assert len(traced) == 1


def test_a_trace_without_weights_serves_one_with_them_and_the_other_way(
    tmp_path: Path, traced: list[str]
) -> None:
    model = folder(tmp_path / "model")
    shapes, whole, again = trace(model, state=False), trace(model), trace(model, state=False)
    assert len(traced) == 1
    assert print_program(shapes) == print_program(whole) == print_program(again)
    assert torch.equal(whole.weights["lm_head.weight"].load(), model.state["lm_head.weight"])
    rotary = [name for name in whole.weights if name not in model.state]
    assert rotary  # frequencies, which the module computes
    for name in rotary:
        assert torch.equal(whole.weights[name].load(), shapes.weights[name].load())


@pytest.mark.parametrize(
    "changes",
    quick(
        [{"rms_norm_eps": 0.1}, {"rope_theta": 5.0}, {"hidden_act": "gelu"}], {"rope_theta": 5.0}
    ),
    ids=str,
)
def test_another_config_is_another_trace(
    changes: dict[str, Any], tmp_path: Path, traced: list[str]
) -> None:
    texts = []
    for name, more in (("a", {}), ("b", changes)):
        model = folder(tmp_path / name, **more)
        program = trace(model)
        texts.append((print_program(program), [w.load().tolist() for w in own(program, model)]))
    assert len(traced) == 2 and texts[0] != texts[1]


def own(program: Program, model: Any) -> list[Any]:
    return [program.weights[name] for name in program.weights if name not in model.state]


def test_other_code_and_other_versions_trace_anew(
    tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(tmp_path / "model")
    text = print_program(trace(model))
    activation = type(model_of(model).model.layers[0].mlp)
    forward = activation.forward
    monkeypatch.setattr(activation, "forward", lambda self, x: 2 * forward(self, x))
    assert print_program(trace(model)).count(", 2) :") == text.count(", 2) :") + 2  # a layer each
    assert len(traced) == 2
    monkeypatch.setattr(kept_trace, "versions", lambda *_: ["another"])
    trace(model)
    assert len(traced) == 3


def model_of(model: Any) -> Any:
    from einfold.compiler.frontend.structure import structure

    return structure(model.source, model.config)


@pytest.mark.slow
def test_what_is_damaged_or_does_not_fit_is_traced_anew(tmp_path: Path, traced: list[str]) -> None:
    model = folder(tmp_path / "model")
    text = print_program(trace(model))
    whole = file(tmp_path).read_bytes()
    for damaged in (whole[:100], whole.replace(b"aten.linear", b"aten.matmul"), b""):
        file(tmp_path).write_bytes(damaged)
        assert print_program(trace(model)) == text
    assert len(traced) == 4
    other = tmp_path / "cache" / "traces" / ("0" * 32)
    file(tmp_path).parent.rename(other)  # a trace under another name
    trace(model)
    assert len(traced) == 5


def test_a_weight_that_nothing_gives_is_told_by_tracing(tmp_path: Path, traced: list[str]) -> None:
    model = folder(tmp_path / "model")
    trace(model)
    del model.state["model.norm.weight"]
    with pytest.raises(
        ModelError, match=r"nothing gives the numbers of weight model\.norm\.weight"
    ):
        trace(model)
    assert len(traced) == 2


def test_models_in_memory_are_told_apart_by_what_they_do(traced: list[str]) -> None:
    model = models.build("llama")
    first = print_program(trace(given(model)))
    assert print_program(trace(given(model))) == first and len(traced) == 1
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert print_program(trace(given(model))) != first and len(traced) == 2
    model.model.layers[0].register_forward_hook(lambda *_: None)
    for _ in range(2):  # what a hook does nobody can tell
        trace(given(model))
    assert len(traced) == 4


_PACKAGE = """
import torch, {name}.ops
from torch.nn import functional

class Chain(torch.nn.Module):
    def forward(self, x):
        return {name}.ops.act(x)

class Local(torch.nn.Module):
    def forward(self, x):
        from {name}.ops import act
        return act(x)

class Torchs(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.relu(x)
"""


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("kind", "again"),
    [("Chain", 1), rarely("Local", 2), rarely("Torchs", 1)],
    ids=lambda each: str(each),
)
def test_functions_behind_modules_count(
    kind: str, again: int, tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a package of somebody's own, and what somebody put into torch; an import within a function is read
    by nobody, so that such a model is traced each time."""
    name = f"kept_trace_{kind.lower()}"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(_PACKAGE.format(name=name))
    (package / "ops.py").write_text("def act(x):\n    return x * 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    model = models.build("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = getattr(module, kind)()
    texts = [print_program(trace(given(model))) for _ in range(2)]
    assert len(traced) == again
    if kind == "Torchs":
        monkeypatch.setattr(nn.functional, "relu", _double)
    else:
        monkeypatch.setattr(module.ops, "act", _double)
    texts.append(print_program(trace(given(model))))
    assert len(traced) == again + 1
    assert texts[0] == texts[1] != texts[2]


_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from tests.frontend.test_kept_trace import given, trace
from einfold.compiler import kept_trace
from einfold.compiler.ir.kept import cache_home
from einfold.compiler.ir.printer import print_program
del kept_trace.capture_language_model
sys.stdout.write(print_program(trace(given(Path(sys.argv[1])))))
"""


def test_another_process_finds_it(tmp_path: Path, traced: list[str]) -> None:
    """Its hashes of strings are others, so that sets have another order."""
    text = print_program(trace(folder(tmp_path / "model", "gemma3")))
    run = [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(tmp_path / "model")]
    root = Path(__file__).parents[2]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == text and len(traced) == 1


@pytest.mark.slow
def test_the_newest_are_kept(
    tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_trace, "_KEPT", 2)
    asked = [folder(tmp_path / str(number), vocab_size=300 + number) for number in range(3)]
    for number in (0, 1, 0, 2, 0):  # the second is the last to have been asked for
        trace(asked[number])
    assert len(traced) == 3
    assert len(list((tmp_path / "cache" / "traces").iterdir())) == 2
    monkeypatch.setattr(kept_trace, "_NUMBERS", 1)
    trace(folder(tmp_path / "3", vocab_size=400))
    assert len(list((tmp_path / "cache" / "traces").iterdir())) == 2
