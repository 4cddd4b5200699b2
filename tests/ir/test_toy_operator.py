"""Operators that stand wholly in this file: one that computes, and one that writes a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, fx

import einfold
from einfold.compiler.analysis.liveness import peak_activation_bytes
from einfold.compiler.codegen.onnx import lowerings
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.ops.record import OPERATORS, Operator, in_place, operator_of
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Editor, cache_writers
from einfold.compiler.ir.verifier import verify
from einfold.errors import IRError, UnsupportedError

from ..programs import HEADER, program


@dataclass(eq=False)
class Scaled(Operator):
    """x times a number."""

    name = "toy_scaled"

    x: Tensor
    factor: float

    def run(self) -> Tensor:
        return self.x * self.factor

    def shapes(self) -> Tensor:
        if self.factor == 0:
            raise ValueError("a factor of 0 leaves nothing")
        return torch.empty_like(self.x)


@dataclass(eq=False)
class RunningSum(Operator):
    """The sum of all tokens so far, x [B, S, M]; gives it behind each token [B, S, M]."""

    name = "toy_running_sum"
    writes = ("total_BM",)

    x_BSM: Tensor
    total_BM: Tensor
    names: str = ""

    def run(self) -> Tensor:
        sums = self.total_BM[:, None] + self.x_BSM.cumsum(1)
        self.total_BM.copy_(sums[:, -1])
        return sums


TEXT = """
    input %x "x" : f32[B, S, 4]
    input %t "t" : f32[B, 4]
    call %s = einfold.toy_scaled(%x, 3.0) : f32[B, S, 4]
    call %r = einfold.toy_running_sum(%s, %t) : (f32[B, S, 4], f32[B, 4])
    call %o = builtin.getitem(%r, 0) : f32[B, S, 4]
    call %u = builtin.getitem(%r, 1) : f32[B, 4]
    output "o" = %o
    output "t" = %u
"""


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in (Scaled, RunningSum):
            stack.enter_context(OPERATORS.with_one_more(kind))
        yield


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("einfold.compiler.codegen.onnx.lower")  # which fills the table, not a copy of it
    monkeypatch.setattr(lowerings, "_TABLE", dict(lowerings._TABLE))

    @lowerings.lowering(Scaled.overload())
    def scaled(context: lowerings.Context, node: fx.Node) -> Any:
        call = context.arguments(node)
        factor = context.builder.floats(call["factor"])
        return context.builder.op("Mul", context.value(call["x"]), factor)


def arrays() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 5, 4, generator=generator),
        "t": torch.randn(2, 4, generator=generator),
    }


def expected() -> tuple[Tensor, Tensor]:
    given = arrays()
    sums = given["t"][:, None] + (3 * given["x"]).cumsum(1)
    return sums, sums[:, -1]


def test_torch_takes_schema_and_shapes() -> None:
    given = arrays()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(Scaled.overload(), (given["x"], 2.0), test_utils=checks)
    torch.library.opcheck(RunningSum.overload(), (given["x"], given["t"]), test_utils=checks)
    assert str(RunningSum.overload()._schema).endswith(
        'toy_running_sum(Tensor x_BSM, Tensor total_BM, str names="") -> (Tensor, Tensor)'
    )


def test_its_text_is_read_back_and_an_artifact_may_hold_it() -> None:
    found = program(TEXT)
    text = print_program(found)
    assert print_program(parse(text)) == text
    verify(found, deep=True)


def test_without_its_registration_it_is_unknown() -> None:
    text = print_program(program(TEXT))
    del OPERATORS._found["toy_scaled"]
    try:
        with pytest.raises(IRError, match="toy_scaled is not among the operators"):
            parse(text)
    finally:
        OPERATORS._found["toy_scaled"] = Scaled


def test_its_shapes_refuse() -> None:
    body = 'input %x "x" : f32[B, 4]\ncall %y = einfold.toy_scaled(%x, 0.0) : f32[B, 4]\n'
    with pytest.raises(IRError, match="a factor of 0 leaves nothing"):
        parse(HEADER + body + 'output "y" = %y\n')


def test_the_reference_runs_it_and_writes_in_place_where_that_is_asked_for() -> None:
    found, given = program(TEXT), arrays()
    pure = Interpreter(found).run(given)
    assert torch.equal(given["t"], arrays()["t"])
    written = Interpreter(found, instead=in_place()).run(given)
    assert written["t"] is given["t"]
    for results in (pure, written):
        torch.testing.assert_close(results["o"], expected()[0])
        torch.testing.assert_close(results["t"], expected()[1])


def test_what_asks_for_writers_of_caches_finds_it() -> None:
    found = program(TEXT)
    assert [operator_of(node.target) for node in cache_writers(found)] == [RunningSum]
    # Of the last call the sums count, the cache that it writes does not; x is an input.
    assert peak_activation_bytes(found, {"B": 2, "S": 5}) == 2 * (2 * 5 * 4 * 4)


def test_a_pass_makes_a_call_by_names() -> None:
    found = program(
        'input %x "x" : f32[B, 4]\ncall %y = aten.neg.default(%x) : f32[B, 4]\noutput "y" = %y'
    )
    editor, old = Editor(found), next(found.nodes(torch.ops.aten.neg.default))
    with editor.before(old):
        editor.replace(old, editor.make(Scaled, x=old.args[0], factor=-1.0))
    verify(found, deep=True)
    assert "einfold.toy_scaled(%x, -1.0)" in print_program(found)
    with pytest.raises(TypeError, match="speed"):
        editor.make(Scaled, x=old, factor=1.0, speed=2)
    with pytest.raises(TypeError, match="factor"):
        editor.make(Scaled, x=old)


class Model(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = torch.ops.einfold.toy_scaled(torch.relu(x), 3.0)
        return scaled + 1


@pytest.mark.parametrize("portable", [False, True])
def test_onnx_has_it_by_a_lowering(lowered: None, portable: bool, tmp_path: Path) -> None:
    x = arrays()["x"]
    model = einfold.export_onnx(Model(), tmp_path / "m", (x,), portable=portable)
    assert not [node for node in onnx_ir.load(model).graph if "toy" in node.op_type]
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, Model()(x).numpy(), rtol=1e-6)


def test_onnx_refuses_it_without(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="toy_scaled"):
        einfold.export_onnx(Model(), tmp_path / "m", (arrays()["x"],))
    assert not list(tmp_path.iterdir())


def test_the_backend_runs_a_model_that_calls_it() -> None:
    x = arrays()["x"]
    compiled = torch.compile(Model(), backend="einfold", fullgraph=True)
    torch.testing.assert_close(compiled(x), Model()(x))


def test_two_of_one_name_are_refused() -> None:
    @dataclass(eq=False)
    class Other(Operator):
        name = "linear"

        x: Tensor

        def run(self) -> Tensor:
            return self.x

        def shapes(self) -> Tensor:
            return self.x

    with pytest.raises(ValueError, match="two of the operator linear"):
        OPERATORS.register(Other)
