"""What products with stored weights are measured beside: cuBLAS over halves, torchao, Marlin, cuBLASLt.

Each peer multiplies by a weight of the same shape in a format of its own, groups of 128 where it has groups.
Their numbers are not compared, so weights may be anything; a peer that is not installed says so in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Any]


def peers(
    shape: tuple[int, int], x: Tensor, integers: bool = False
) -> dict[str, Callable[[], Run]]:
    """For each peer what makes its call; making it raises where the peer cannot. Those of `integers` round
    activations to 8 bits too, but for cuBLASLt, which is given integers and leaves scales out."""
    of_integers = {
        "torchao int8 x int8": lambda: _torchao(shape, x, "Int8DynamicActivationInt8WeightConfig"),
        "cuBLASLt int8": lambda: _integers(shape, x),
    }
    return (of_integers if integers else {}) | {
        "cuBLAS": lambda: _plain(shape, x),
        "torchao int8": lambda: _torchao(shape, x, "Int8WeightOnlyConfig"),
        "torchao int4": lambda: _torchao(
            shape,
            x,
            "Int4WeightOnlyConfig",
            group_size=128,
            int4_packing_format="tile_packed_to_4d",
        ),
        "Marlin": lambda: _marlin(shape, x),
    }


def _linear(shape: tuple[int, int], x: Tensor, dtype: torch.dtype) -> nn.Linear:
    outs, width = shape
    return nn.Linear(width, outs, bias=False, device=x.device, dtype=dtype).requires_grad_(False)


def _plain(shape: tuple[int, int], x: Tensor) -> Run:
    made = _linear(shape, x, x.dtype)
    return lambda: made(x)


def _integers(shape: tuple[int, int], x: Tensor) -> Run:
    """It takes more than 16 rows."""
    weight = torch.randint(-127, 128, shape, device=x.device, dtype=torch.int8)
    given = torch.randint(-127, 128, x.shape, device=x.device, dtype=torch.int8)
    return lambda: torch._int_mm(given, weight.T)


def _torchao(shape: tuple[int, int], x: Tensor, config: str, **options: Any) -> Run:
    """Compiled, as torchao asks for. Its int4 kernel takes bfloat16."""
    from torchao import quantization

    dtype = torch.bfloat16 if "Int4" in config else x.dtype
    model, given = nn.Sequential(_linear(shape, x, dtype)), x.to(dtype)
    quantization.quantize_(model, getattr(quantization, config)(**options))
    made = torch.compile(model, fullgraph=True, dynamic=False)

    def run() -> Any:
        with torch.no_grad():
            return made(given)

    return run


def _marlin(shape: tuple[int, int], x: Tensor) -> Run:
    """The authors' own kernel, github.com/IST-DASLab/marlin: float16, groups of 128."""
    import marlin

    outs, width = shape
    layer = marlin.Layer(width, outs, groupsize=128).to(x.device)
    layer.B.random_()
    layer.s.fill_(1 / 256)
    given = x.half()
    return lambda: layer(given)
