"""A thin layer over onnx_ir: typed values, constants, and weights that lie in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ....errors import UnsupportedError
from ...ir.weights_file import Placement

CONTRIB = "com.microsoft"

DTYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


class Builder:
    """Collects nodes and initializers; `op` makes a node and gives its result."""

    def __init__(self, weights_file: str, placements: dict[str, Placement]) -> None:
        self.weights_file = weights_file
        self.placements = placements
        self.nodes: list[ir.Node] = []
        self._trunk = self.nodes
        self.initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._shared: dict[tuple[Any, ...], ir.Value] = {}
        self._count = 0

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """A node with one result."""
        return self.multi(
            kind, 1, *inputs, domain=domain, names=[name] if name else None, **attributes
        )[0]

    def multi(
        self,
        kind: str,
        results: int,
        *inputs: ir.Value | None,
        domain: str = "",
        names: Sequence[str | None] | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with several results; `names` gives the names of some."""
        kept = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(kind, list(inputs), kept, domain=domain, num_outputs=results)
        self._count += 1
        node.name = f"{kind}_{self._count}"
        for index, value in enumerate(node.outputs):
            given = names[index] if names is not None and index < len(names) else None
            value.name = given or f"{node.name}.{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def shared(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Like `op`, but an equal node that was made before is used again: it stands outside all branches."""
        key = (kind, domain, inputs, tuple(sorted((k, str(v)) for k, v in attributes.items())))
        if key not in self._shared:
            nodes, self.nodes = self.nodes, self._trunk
            self._shared[key] = self.op(kind, *inputs, domain=domain, **attributes)
            self.nodes = nodes
        return self._shared[key]

    def choose(
        self, condition: ir.Value, *branches: Callable[[], list[ir.Value]]
    ) -> list[ir.Value]:
        """An If: the results of the first of two branches where the condition holds, or of the second.

        A branch makes nodes when it is called, may read every value made before, and gives as many results
        as the other, each from a node of its own.
        """
        graphs = [self._branch(branch) for branch in branches]
        return self.multi(
            "If",
            len(graphs[0].outputs),
            condition,
            then_branch=graphs[0],
            else_branch=graphs[1],
        )

    def _branch(self, make: Callable[[], list[ir.Value]]) -> ir.Graph:
        nodes, self.nodes = self.nodes, []
        results = make()
        made, self.nodes = self.nodes, nodes
        self._count += 1
        return ir.Graph([], results, nodes=made, name=f"branch_{self._count}")

    def constant(self, value: Any, dtype: Any) -> ir.Value:
        """A small constant inside the model, one for each distinct value."""
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def filled(self, shape: tuple[int, int], value: int, dtype: ir.DataType) -> ir.Value:
        """A constant matrix of one 4- or 8-bit number, one for each shape."""
        key = (str(dtype), shape, value.to_bytes(1, "little"))
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            if dtype == ir.DataType.UINT8:
                tensor: ir.TensorProtocol = ir.tensor(np.full(shape, value, np.uint8), name=name)
            else:
                size = (math.prod(shape) + 1) // 2
                packed = np.full(size, value | value << 4, np.uint8)
                tensor = ir.PackedTensor(packed, dtype, shape=ir.Shape(shape), name=name)
            self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(list(values), np.int64)

    def floats(self, value: float | Sequence[float]) -> ir.Value:
        return self.constant(value, np.float32)

    def weight(
        self,
        name: str,
        *,
        shape: Sequence[int] | None = None,
        dtype: ir.DataType | None = None,
        start: int = 0,
        length: int | None = None,
    ) -> ir.Value:
        """A weight of the file, whole or in part (bytes from `start`), under another shape or dtype.

        Several initializers may show the same bytes; the file holds them once.
        """
        place = self.placements[name]
        shown = tuple(place.shape if shape is None else shape)
        kind = dtype or DTYPES[place.dtype]
        plain = start == 0 and shown == place.shape and dtype is None
        label = (
            name if plain else f"{name}[{start}:{'x'.join(map(str, shown))}:{kind.name.lower()}]"
        )
        if label not in self.initializers:
            tensor = ir.ExternalTensor(
                self.weights_file,
                place.offset + start,
                place.length - start if length is None else length,
                kind,
                shape=ir.Shape(shown),
                name=label,
            )
            self._initializer(label, tensor)
        return self.initializers[label]

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value

    # Shorthands that several lowerings share.

    def reshape(self, x: ir.Value, dims: Sequence[int]) -> ir.Value:
        """Reshape to constants, where 0 keeps a dim and -1 is what is left."""
        return self.op("Reshape", x, self.ints(*dims))

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        return self.op("Transpose", x, perm=list(perm))

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self.op("Cast", x, to=int(DTYPES[dtype]))

    def both(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Whether two truth values hold."""
        return self.op("And", one, other)

    def dim(self, x: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, int64 of shape [1]."""
        return self.shared("Shape", x, start=axis, end=axis + 1)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        return self.multi("Split", len(sizes), x, self.ints(*sizes), axis=axis)


def value_type(value: torch.Tensor, dims: Sequence[str | int]) -> tuple[ir.TensorType, ir.Shape]:
    """The ONNX type and shape of a graph input or output."""
    if value.dtype not in DTYPES:
        raise UnsupportedError(f"ONNX has no tensor type for {value.dtype}")
    return ir.TensorType(DTYPES[value.dtype]), ir.Shape(dims)
