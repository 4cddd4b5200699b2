"""Weights that the caller has frozen, stored in a scheme: what stays, what is stored, what it computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from einfold import backend
from einfold.compiler import frozen_weights
from einfold.compiler.frozen_weights import scheme_named, store_frozen_weights
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import RecipeError

INT4 = Grouped(4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 24, bias=False)).eval()


def rounded(module: nn.Sequential) -> nn.Sequential:
    found = copy.deepcopy(module)
    for linear in (found[0], found[2]):
        width = linear.weight.shape[1]
        pieces = RoundToNearest().solve(linear.weight.data, INT4, {}).pieces
        linear.weight.data = INT4.dequantize(pieces, width)
    return found


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    backend.clear_reports()
    with torch.no_grad():
        yield


def compiled(module: nn.Module, x: Tensor, freezing: bool, **options: Any) -> Tensor:
    with torch._inductor.config.patch(freezing=freezing):
        found: Tensor = torch.compile(
            module, backend="einfold", options={"rest": "eager", **options}
        )(x)
    return found


def test_weights_that_are_inputs_stay() -> None:
    module, x = model(), torch.randn(3, 40)
    assert torch.equal(compiled(module, x, False, weights="int4"), module(x))
    (report,) = backend.reports()
    assert report.stored == 0
    assert "freeze them: set torch._inductor.config.freezing = True" in report.skipped["weights"]


@pytest.mark.parametrize("weights", ["int4", str(INT4)])
def test_frozen_weights_are_stored(weights: str) -> None:
    module, x = model(), torch.randn(3, 40)
    torch.testing.assert_close(compiled(module, x, True, weights=weights), rounded(module)(x))
    (report,) = backend.reports()
    assert report.stored == 2 and "weights" not in report.skipped
    assert "  2 weights stored\n" in str(report)


def test_a_frozen_graph_compiles_as_it_is() -> None:
    """Its parameters are tensors that are no fakes."""
    module, x = model(), torch.randn(3, 40)
    torch.testing.assert_close(compiled(module, x, True), module(x))
    assert backend.reports()[0].stored == 0


@pytest.mark.slow
def test_inductor_compiles_what_was_stored() -> None:
    module, x = model(), torch.randn(3, 40)
    found = compiled(module, x, True, weights="int4", rest="inductor")
    torch.testing.assert_close(found, rounded(module)(x))


@pytest.mark.parametrize("weights", ["int9", "fp32", "grouped(bits=9)"])
def test_a_format_that_is_none_is_refused(weights: str) -> None:
    with pytest.raises(RecipeError, match=r"option weights is '.*'; it can be fp16, int8, .*int4"):
        scheme_named(weights)


def graph(dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """Two linears of one weight, and one whose weight is an input, as Dynamo writes them."""
    root = nn.Module()
    root.register_parameter("w", nn.Parameter(torch.randn(24, 40).to(dtype)))
    made = fx.Graph()
    x, given = made.placeholder("x"), made.placeholder("given")
    read = made.get_attr("w")
    linear = torch._C._nn.linear
    outs = tuple(made.call_function(linear, (x, weight)) for weight in (read, read, given))
    made.output(outs)
    return fx.GraphModule(root, made)


def test_a_weight_is_stored_once_and_others_are_told_of() -> None:
    gm, x, given = (
        graph(torch.bfloat16),
        torch.randn(2, 40).bfloat16(),
        torch.randn(3, 40).bfloat16(),
    )
    weight = gm.w.detach().float()
    found = store_frozen_weights(gm, INT4)
    assert found.stored == 1
    assert found.reason == "1 linears have weights that are no attributes of the graph"
    wide = INT4.dequantize(RoundToNearest().solve(weight, INT4, {}).pieces, 40)
    first, second, third = gm(x, given)
    assert torch.equal(first, second) and first.dtype == torch.bfloat16
    torch.testing.assert_close(first, (x.float() @ wide.T).bfloat16())
    torch.testing.assert_close(third, x @ given.T)


@pytest.mark.parametrize(
    ("weights", "activations"), [(str(Grouped(8, 0)), "int8"), ("qserve", None)]
)
def test_activations_are_rounded(weights: str, activations: str | None) -> None:
    """Of qserve without being asked."""
    module, x = model(), torch.randn(3, 40)
    asked = {} if activations is None else {"activations": activations}
    found = compiled(module, x, True, weights=weights, **asked)
    for at in (0, 2):
        linear, scheme = module[at], scheme_named(weights)
        pieces = RoundToNearest().solve(linear.weight.data, scheme, {}).pieces
        linear.weight.data = scheme.dequantize(pieces, linear.weight.shape[1])
        linear.register_forward_pre_hook(lambda _, args: einfold_ops.round_to_int8(*args))
    torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"weights": "int8", "activations": "int8"},
            "not for 8 bits, block 32, symmetric; use the weights",
        ),
        (
            {"weights": "qserve", "activations": "int4"},
            "activations is 'int4'; it can be f32 or int8",
        ),
        ({"activations": "int8"}, "give weights too"),
    ],
)
def test_activations_that_cannot_be_are_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=says):
        compiled(model(), torch.randn(3, 40), True, **options)


def test_on_a_gpu_kernels_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph calls their operator over pieces in their order; what no kernel reads stays as it is."""
    monkeypatch.setattr(frozen_weights, "without_kernels", lambda kind: "")
    gm = graph()
    assert store_frozen_weights(gm, INT4).stored == 1
    first, *_ = (node for node in gm.graph.nodes if node.op == "call_function")
    assert first.target is torch.ops.einfold_triton.product.default
    codes, scales = (getattr(gm, node.target) for node in first.args[1])
    assert codes.shape == (1, 24, 16) and codes.dtype == torch.int32 and scales.shape == (4, 24)
    assert first.args[3:] == (str(INT4), [24, 40], "f32")
    meta = torch.empty(5, 40, device="meta")
    assert torch.ops.einfold_triton.product(
        meta, [codes, scales], None, str(INT4), [24, 40]
    ).shape == (5, 24)
    gm = graph()
    assert store_frozen_weights(gm, scheme_named("qserve"), "int8").stored == 1
    first, *_ = (node for node in gm.graph.nodes if node.op == "call_function")
    assert getattr(gm, first.args[1][0].target).shape == (1, 24, 64) and first.args[5] == "int8"
    gm = graph()
    found = store_frozen_weights(gm, scheme_named("fp16"))
    assert (
        found.stored == 0
        and "no kernel multiplies torch.float32 by weights in half" in found.reason
    )
