"""Types of values in the graph: a dtype and a shape whose dynamic dims have names.

Shapes are followed with torch's fake tensors; this module owns the named dims and their printing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from ...errors import IRError

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The dynamic dims that einfold names, with the sizes used while tracing. The sizes are distinct
#: primes so that a shape rule that mixes two dims up is caught by the numbers.
NAMED_DIMS = {"B": 3, "S": 17, "C": 101, "N": 7}


#: The most elements that a value may have at the sizes used while tracing, and the most that an expression
#: of sizes may hold: models stay far below, and texts that multiply sizes again and again end here.
_ELEMENTS, _POWER, _PARTS = 1 << 38, 8, 64


def check_size(value: Any) -> None:
    """Raises IRError for a value with more elements, or a size with a longer expression, than a model has."""
    if isinstance(value, (tuple, list)):
        for item in value:
            check_size(item)
    elif isinstance(value, torch.Tensor):
        count = 1
        for size in value.shape:
            check_size(size)
            count *= max(1, hint_of(size))
        if count > _ELEMENTS:
            raise IRError(f"it would have {count:,} elements")
    elif isinstance(value, torch.SymInt):
        _check_expression(value.node.expr)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise IRError("a size does not fit in 64 bits")


def hint_of(size: Any) -> int:
    """A size as a number: of one that varies, that of the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _check_expression(expression: Any) -> None:
    for parts, part in enumerate(sympy.preorder_traversal(expression)):
        number = part.is_Integer and abs(int(part)) >= 2**63
        power = part.is_Pow and not (part.exp.is_Integer and 0 < int(part.exp) <= _POWER)
        if parts > _PARTS or number or power:
            raise IRError("an expression of sizes is longer than any that a model has")


class Shapes:
    """The fake-tensor mode of one program, with its named dims."""

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        # What torch would find again `once` has found already, and keeping it takes as long as computing it.
        self.mode.cache_enabled = False
        self._dims: dict[str, torch.SymInt] = {}
        self._names: dict[str, str] = {}
        self._known: dict[Hashable, Any] = {}

    def dim(self, name: str) -> torch.SymInt:
        """The symbolic size called `name`, made on first use."""
        if name not in self._dims:
            size = NAMED_DIMS.get(name, 31 + 6 * len(self._dims))
            symbol = self.env.create_symbol(
                size,
                source=ConstantSource(name),
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
            )
            self._dims[name] = self.env.create_symintnode(symbol, hint=size)  # type: ignore[assignment]
            self._names[str(symbol)] = name
        return self._dims[name]

    def tensor(self, shape: Sequence[int | str], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of this shape; a string is a named dim."""
        sizes = [self.dim(size) if isinstance(size, str) else size for size in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype)

    def once(self, of: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """What `compute` gives for the types `of`; computed once for those that are alike.

        Layers of a model are alike, and a symbolic shape takes torch a millisecond. Values are shared:
        nothing writes to them, or tells two of them apart by which object they are.
        """
        try:
            key = _type_of(of)
            if key in self._known:
                return self._known[key]
        except TypeError:  # of what has no hash nothing is known
            return compute()
        value = compute()
        sized = [x for x in tree_leaves(value) if isinstance(x, (torch.Tensor, torch.SymInt))]
        if not free_unbacked_symbols(sized):  # each such size is a number of its own
            self._known[key] = value
        return value

    def describe(self, value: Any) -> str:
        """The printed type of a node's value: `f32[B, S, 64]`, `sym(B*S)`, `(f32[..], f32[..])`."""
        if isinstance(value, torch.Tensor):
            if value.dtype not in DTYPE_NAMES:
                raise IRError(f"dtype {value.dtype} has no name in the IR")
            sizes = ", ".join(self._size(size) for size in value.shape)
            return f"{DTYPE_NAMES[value.dtype]}[{sizes}]"
        if isinstance(value, torch.SymInt):
            return f"sym({self._size(value)})"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self.describe(item) for item in value) + ")"
        if isinstance(value, (bool, int, float)):
            return f"const({value})"
        raise IRError(f"a value of type {type(value).__name__} has no type in the IR")

    def evaluate(self, size: int | torch.SymInt, dims: Mapping[str, int]) -> int:
        """A size with the named dims replaced by numbers."""
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        values = {s: dims[self._names[str(s)]] for s in expression.free_symbols}
        return int(expression.subs(values))

    def _size(self, size: int | torch.SymInt) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expression = size.node.expr
        known = self._names
        if any(str(symbol) not in known for symbol in expression.free_symbols):
            raise IRError(f"the size {expression} is known only once the data are")
        names = {symbol: known[str(symbol)] for symbol in expression.free_symbols}
        return str(expression.xreplace({s: type(s)(n) for s, n in names.items()}))


def _type_of(value: Any) -> Hashable:
    """What a result's type may depend on; alike for two values only where it is the same for both."""
    if isinstance(value, torch.Tensor):
        places = (*value.shape, *value.stride(), value.storage_offset())
        constant = getattr(value, "constant", None)
        return ("tensor", value.dtype, constant, *map(_type_of, places))
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if isinstance(value, Mapping):
        return ("table", *((key, _type_of(each)) for key, each in value.items()))
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_type_of, value))
    return (type(value), value)  # for 1, 1.0 and True are equal
