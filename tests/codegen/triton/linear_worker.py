"""Products with stored weights in Triton's interpreter; started as `tests.codegen.triton.worker` is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from einfold.compiler.codegen.triton.dtypes import DTYPES
from einfold.compiler.codegen.triton.linear.bound import bind, linear_kernels, reorder
from einfold.compiler.codegen.triton.linear.kernels import LinearWeight, linear_kernel, product
from einfold.compiler.codegen.triton.linear.kinds import LinearKind
from einfold.compiler.codegen.triton.linear.through import product_call
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.quant.scheme import SCHEMES, Scheme, read_scheme
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.passes.weight_quant.round_activations import RoundActivations
from einfold.compiler.solve.round_to_nearest import RoundToNearest

from ...programs import program
from ...quant.common import BODY, INPUTS
from ...quant.test_activations import LINEARS
from .levels import LEVELS
from .worker import difference, serve


def pieces_of(request: dict[str, Any]) -> tuple[Scheme, dict[str, Tensor]]:
    """A random weight [outs, width] in a scheme."""
    rows, width = request["outs"], request["width"]
    if request["scheme"] in LEVELS:
        made = LEVELS[request["scheme"]]()
        return made, made.random(rows, width)
    scheme = read_scheme(request["scheme"])
    pieces = RoundToNearest().solve(torch.randn(rows, width), scheme, {}).pieces
    if request.get("scales"):
        pieces = {**pieces, "scales": pieces["scales"].to(DTYPES[request["scales"]])}
    return scheme, dict(pieces)


def one(request: dict[str, Any]) -> dict[str, Any]:
    """The error against float64, and whether a second launch, by torch's operator, gives the same bits."""
    torch.manual_seed(0)
    scheme, pieces = pieces_of(request)
    kind, outs, width = request["type"], request["outs"], request["width"]
    activations = request.get("activations", "f32")
    # The interpreter multiplies bfloat16 by its bits.
    widened = "i8" if activations == "int8" else "fp32" if kind == "bf16" else ""
    bias = torch.randn(outs) if request.get("bias") else None
    kernel = linear_kernel(LinearKind(scheme, kind, "" if bias is None else "fp32", widened))
    layout = kernel.kind.layout(width)
    ready = {name: layout.repacked(name, piece) for name, piece in pieces.items()}
    weight = LinearWeight.of_pieces(ready)
    x = torch.randn(*request["rows"], width).to(DTYPES[kind])
    exact = scheme.dequantize(pieces, width).double()
    read = x.float()
    read = read if activations == "f32" else torch.ops.einfold.round_to_int8(read)
    expected = read.double() @ exact.T + (0 if bias is None else bias.double())
    found = product(kernel, weight, x, bias, request["parts"])
    if request["parts"] == 1 and scheme.name in SCHEMES and "scales" not in request:
        shape = [outs, width]
        again = product_call(x, list(ready.values()), bias, str(scheme), shape, activations)
    else:
        again = product(kernel, weight, x, bias, request["parts"])
    return {
        "error": difference(found.double(), expected),
        "type": str(found.dtype),
        "same": torch.equal(found, again),
    }


def graph(request: dict[str, Any]) -> dict[str, Any]:
    """The errors of a graph with a head that is an embedding too, and linears or experts, by kernels."""
    found = program(LINEARS if "activations" in request else BODY)
    QuantizeWeights(read_scheme(request["graph"])).run(found)
    if "activations" in request:
        RoundActivations().run(found)
    copies = {name: found.weights[name].load() for name in found.weights}
    expected = Interpreter(found).run(INPUTS)
    kernels = linear_kernels(found)
    before = dict.fromkeys(copies, 0) | {name: t.nbytes for name, t in copies.items()}
    reorder(found)
    instead = bind(found, kernels)
    after = {name: found.weights[name] for name in found.weights}
    real = {name: weight.load() for name, weight in after.items()}
    got = Interpreter(found, instead=instead).run(INPUTS)
    return {
        "kernels": len(kernels),
        "calls": sorted(str(node.target) for node in instead),
        "errors": {name: difference(got[name].double(), expected[name].double()) for name in got},
        "accounted": all(
            real[n].nbytes == w.nbytes and real[n].shape == w.shape for n, w in after.items()
        ),
        "grown": sum(w.nbytes for w in after.values()) / sum(before.values()),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    return graph(request) if "graph" in request else one(request)


if __name__ == "__main__":
    serve(answer)
