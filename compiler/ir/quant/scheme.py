"""What a weight format is: a scheme, a frozen record from which everything about its bytes follows.

A scheme stores a weight [.., N, M], rows of M inputs in a stack or not, as named pieces [.., N, ...]. Its
text, pieces and bytes need no torch; its arithmetic is in torch, on rows [R, M] cut into groups [R, G, B].
A solver decides the codes (`compiler/solve`); a scheme says which codes there are and what they stand for:

    groups -> grid -> settle -> nearest -> pack

`values` says what codes stand for, `dequantize` what pieces do. A grid is named tensors [R, G, B], where an
axis over which nothing differs has length 1; what a solver chooses of it, it changes before `settle`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ....errors import IRError
from ..item_bytes import ITEM_BYTES
from ..record_text import read, show
from ..registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: Weights of the widest block: no row is much wider, and each is padded to whole blocks.
WIDEST = 1 << 16

#: A piece of a stored weight: its shape, and the type of its numbers.
Piece = tuple[tuple[int, ...], str]

#: Of each weight of an operator, by the argument's name: nodes of its pieces by name, and its shape.
Stored = Mapping[str, tuple[Mapping[str, Any], tuple[int, ...]]]


class Scheme:
    """Base of all schemes: frozen dataclasses whose fields are the options of the format."""

    name: ClassVar[str]

    operators: ClassVar[Mapping[str, str]] = {
        "linear": "stored_linear",
        "experts": "stored_experts",
        "embedding": "stored_embedding",
    }
    """Operators that read the pieces as they are, by the operator over a plain weight that each stands for.
    Other readers get the weight widened: `widened`."""

    shared: ClassVar[frozenset[str]] = frozenset()
    """Pieces of the weight as a whole, with no axis N, such as a scale for all of it."""

    by_itself: ClassVar[bool] = True
    """Whether each weight has its own code once the grid stands, so that a solver may choose one code after
    the other; otherwise `nearest` codes a group at once."""

    nearly_exact: ClassVar[bool] = False
    """Whether every matrix is stored so, whoever reads it, and no error is worth a measurement."""

    activations: ClassVar[str] = "f32"
    """What linears read where a recipe does not say: activations as they are, or in "int8"."""

    def __str__(self) -> str:
        return show(self)

    @property
    def coded(self) -> Scheme:
        """The scheme whose codes a solver chooses: this one, or that beside whose codes it stores more."""
        return self

    def beside(self, missed: Tensor, moment_MM: Tensor | None) -> dict[str, Tensor]:
        """The pieces beside those of `coded`, from what its codes miss of a weight [.., N, M], and from the
        mean of x xᵀ over the weight's inputs x, where that is known."""
        return {}

    def describe(self) -> str:
        """What the report says of a weight that is stored so."""
        return str(self)

    def adapted(self, **options: Any) -> Scheme:
        """This scheme with those of `options` that it has. Raises IRError where they are none of a format."""
        known = {field.name for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: v for name, v in options.items() if name in known})  # type: ignore[type-var]

    @property
    def integer_rows(self) -> bool:
        """Whether a row is integers of -128 to 127 times one scale, so that its products with activations in
        8 bits are of integers."""
        return False

    @property
    def fewest_rows(self) -> int:
        """Rows of an embedding below which storing it so saves next to nothing."""
        return 0

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        """What a weight of a shape is stored as, by the names of the pieces."""
        raise NotImplementedError

    def named(self, pieces: Iterable[T], shape: Sequence[int]) -> dict[str, T]:
        """Whatever stands for the pieces of a weight of a shape, in their order, by their names."""
        return dict(zip(self.pieces(tuple(shape)), pieces, strict=True))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of a shape."""
        return sum(math.prod(size) * ITEM_BYTES[kind] for size, kind in self.pieces(shape).values())

    def groups(self, rows_RM: Tensor) -> Tensor:
        """Rows, cut into the groups [R, G, B] that have a grid each; padded where they do not divide."""
        return rows_RM[:, None]

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        """The levels that each group may take, chosen by the range of its weights."""
        return {}

    def grid_for(self, groups_RGB: Tensor, importance_GB: Tensor) -> dict[str, Tensor]:
        """The same where what is missed of a weight counts as often as its column's importance says: of a
        scheme whose choices weigh errors, such as which weights are set apart."""
        return self.grid(groups_RGB)

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A grid as it can be stored: of a scale in float16 the number that float16 has. Settling twice
        changes nothing."""
        return dict(grid)

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """The codes [R, G, B] of the nearest levels of a settled grid. May overwrite nothing.

        Where each weight has a code `by_itself`, groups and grid may also be any columns of them.
        """
        raise NotImplementedError

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """The weights [R, G, B] that codes stand for, in float32: to the bit what `dequantize` gives."""
        raise NotImplementedError

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pieces of rows, from their codes and grid."""
        raise NotImplementedError

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        """The weight [.., N, width] that pieces stand for, in float32: the meaning of the format."""
        raise NotImplementedError

    def chosen(self, pieces: Mapping[str, Tensor], index: Any) -> dict[str, Tensor]:
        """The pieces of some rows, or of one weight of a stack."""
        return self.of_one(pieces, lambda piece: piece[index])

    def of_one(
        self, pieces: Mapping[str, Tensor], pick: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The same where something picks them out of each piece that is not all weights'."""
        return {name: p if name in self.shared else pick(p) for name, p in pieces.items()}

    def call(self, editor: Any, kind: str, given: Mapping[str, Any], stored: Stored) -> Any:
        """A node that does what the operator `kind` does over plain weights, from what is stored of them.

        `given`: that operator's arguments; `stored`: of those that are weights the pieces and the shape. An
        argument of the operator in `operators` that is called like a piece, a field of this scheme or an
        argument given gets it.
        """
        from torch import ops

        target = getattr(ops.einfold, self.operators[kind]).default
        known: dict[str, Any] = {**vars(self)}  # a piece may be called like an option
        known |= {_stem(name): value for name, value in given.items()}
        for name, (pieces, shape) in stored.items():
            prefix = f"{_stem(name)}_" if len(stored) > 1 else ""
            known |= {prefix + label: piece for label, piece in pieces.items()}
            known[f"{prefix}pieces"] = list(pieces.values())
            known |= {"width": shape[-1], "scheme": str(self)}
            known |= {"shape": list(shape), f"{prefix}shape": list(shape)}
        return editor.call(target, *(known.get(_stem(a.name)) for a in target._schema.arguments))

    def widened(self, editor: Any, pieces: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        """A node that gives the whole weight, for readers that have no operator over the pieces."""
        from torch import ops

        return editor.call(ops.einfold.dequantize.default, list(pieces.values()), str(self), shape)


def check_block(block: int, least: int = 16, whole: str = "whole rows") -> None:
    """Raises IRError for a block that no scheme with scales has; 0 stands for `whole`."""
    if block and (not least <= block <= WIDEST or block & (block - 1)):
        raise IRError(
            f"the block must be a power of two from {least} to {WIDEST}, or 0 for {whole}, not {block}"
        )


def _stem(name: str) -> str:
    """An argument's name without its shape suffix: `gate_up` for `gate_up_ENM`."""
    return re.sub(r"_[A-Z]+$", "", name)


SCHEMES: Registry[type[Scheme]] = Registry("weight scheme", "einfold.compiler.ir.quant.schemes")


def read_scheme(text: str) -> Scheme:
    """Reads what `str(scheme)` gives, evaluating nothing. Raises IRError for what is none."""
    return read(text, SCHEMES, "weight scheme")


@dataclass(frozen=True)
class Preset:
    """A weight format by the name that recipes and the command line know. `scheme` is None for weights that
    stay as they come.

    `bound`: how far logits may be from the original's for this rounding to explain it, as a share of their
    spread. It tells the same model, rounded, from one that has nothing to do with it (1.4, the square root
    of 2).
    """

    name: str
    scheme: Scheme | None
    bound: float


#: Integers in the order of their bits; they stand beside their schemes.
PRESETS: Registry[Preset] = Registry(
    "weight format",
    "einfold.compiler.ir.quant.schemes",
    order=("fp32", "fp16", "int8", "int6", "int5", "int4", "int3", "int2"),
)


def find_scheme(text: str) -> Scheme:
    """The scheme of a format by its name, or of a scheme's text. Raises IRError for neither."""
    preset = PRESETS.get(text)
    return preset.scheme if preset is not None and preset.scheme is not None else read_scheme(text)
