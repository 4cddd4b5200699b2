"""What a solver is: it decides the codes of a weight in a scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import ModelError
from ..ir.quant.scheme import Scheme
from ..ir.record_text import show
from ..ir.registry import Registry
from ..ir.types import DTYPES

#: Named tensors [R, G, B] of a grid, see `ir/quant/scheme.py`.
Grid = Mapping[str, Tensor]

#: Gives the codes [R, G, B] and the settled grid of groups [R, G, B].
Choice = Callable[[Tensor], tuple[Tensor, Grid]]

#: Numbers that are rounded at a time: bounds the memory of intermediates at some hundred megabytes. Solvers
#: that go column by column take a pass over all columns for each slab.
_SLAB = 1 << 22


@dataclass(frozen=True)
class Solved:
    """The pieces of a weight in a scheme, and |w - restored|_F / |w|_F where it was measured. With `channels`
    [M] it is w times these by column that is stored, and its inputs are to be divided by them."""

    pieces: dict[str, Tensor]
    error: float | None = None
    channels: Tensor | None = None

    def met(self, weight: Tensor) -> Tensor:
        """A weight of these channels as inputs that nothing divides meet it."""
        return weight if self.channels is None else weight / self.channels


_ERROR, _CHANNELS = "solver.error", "solver.channels"


def as_found(name: str, solved: Solved) -> dict[str, Tensor]:
    """What was solved of a weight as tensors by name, to be kept."""
    error = float("nan") if solved.error is None else solved.error
    found = {f"{name}.{label}": piece for label, piece in solved.pieces.items()}
    found[f"{name}.{_ERROR}"] = torch.tensor(error, dtype=torch.float64)
    if solved.channels is not None:
        found[f"{name}.{_CHANNELS}"] = solved.channels
    return found


def from_found(found: Mapping[str, Tensor], name: str, labels: Iterable[str]) -> Solved:
    """What `as_found` gave of a weight that is stored in pieces of these names."""
    error = float(found[f"{name}.{_ERROR}"])
    pieces = {label: found[f"{name}.{label}"] for label in labels}
    return Solved(pieces, None if error != error else error, found.get(f"{name}.{_CHANNELS}"))


class Solver:
    """Base of all solvers: frozen dataclasses whose fields are the options of the method."""

    name: ClassVar[str]

    observes: ClassVar[tuple[str, ...]] = ()
    """Observers of a weight's inputs, by name, whose findings it is given. They see the inputs twice: as the
    model has them whose weights were solved before, and as the original has them."""

    follows: ClassVar[bool] = False
    """Whether it is given the inputs of the model whose weights were solved before; the original's in both
    places otherwise, which takes half the time."""

    tunes: ClassVar[Literal["", "layers", "model"]] = ""
    """What it tunes together once weights are solved: nothing, each layer by `tune`, or all by `distill`."""

    @property
    def scales_channels(self) -> bool:
        """Whether it may want input channels scaled, where a norm in front can divide by the scales."""
        return False

    @property
    def reads(self) -> bool:
        """Whether a text has to be read through the model for it."""
        return bool(self.observes)

    @property
    def begun(self) -> Solver:
        """What solves the weights that it goes on from; itself where it tunes nothing."""
        return self

    def __str__(self) -> str:
        return show(self)

    def refuses(self, scheme: Scheme) -> str:
        """Why it cannot fill a scheme, in a sentence; "" where it can."""
        return ""

    def channels(
        self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Factors [M] by which columns are multiplied before the weight is stored; None: none. Asked only
        where a norm can divide by them."""
        return None

    def solve(self, weight: Tensor, scheme: Scheme, statistics: Mapping[str, Tensor]) -> Solved:
        """Stores a weight [.., N, M]; `statistics` are what the observers found of its inputs."""
        raise NotImplementedError

    def tune(self, layer: Layer) -> dict[str, Solved]:
        """The weights of a layer, stored by `begun`, as they are to be stored; those that stay may be left
        out."""
        return {}

    def distill(self, model: Whole) -> dict[str, Solved]:
        """The same of all weights of a model. Errors need not be told."""
        return {}


class Begun(NamedTuple):
    """A weight that a layer reads: its scheme, what was solved of it, and what that stands for, which is the
    original [N, M], its columns times the solved channels."""

    scheme: Scheme
    solved: Solved
    target: Tensor


class Layer(Protocol):
    """A layer of a model with the weights in it that can be tuned, and the text before it, in parts.

    Weights are by their names and [N, M], as inputs that nothing divides meet them. What is lost is what the
    layer's results are off those of the original model that reads the same text, squared, as a share of these
    squared, token by token; its mean.
    """

    weights: Mapping[str, Begun]
    parts: int

    def lost(self, weights: Mapping[str, Tensor], parts: Sequence[int]) -> float:
        """What is lost of some parts."""

    def slopes(self, weights: Mapping[str, Tensor], parts: Sequence[int]) -> dict[str, Tensor]:
        """What is lost of some parts, derived by the weights."""


class Stored(NamedTuple):
    """A weight of a model as it is stored: its scheme, what was solved of it, and the width of its rows."""

    scheme: Scheme
    solved: Solved
    width: int


class Whole(Protocol):
    """A model with the weights in it that can be tuned, and a text, in parts.

    Weights are [N, M], as inputs that nothing divides meet them. They are asked for by name where they are
    needed, so that those of one layer are held at a time. What is lost is KL(original || model) of the next
    token, in nats; its mean over tokens.
    """

    weights: Mapping[str, Stored]
    parts: int

    def lost(self, weight: Callable[[str], Tensor], parts: Sequence[int]) -> float:
        """What is lost of some parts; no finite number where the logits are none."""

    def slopes(self, weight: Callable[[str], Tensor], part: int) -> Iterator[tuple[str, Tensor]]:
        """What is lost of a part, derived by the weights, from the last layer to the first. A weight that is
        read in several places comes once for each: they add up."""

    def kept(self) -> dict[str, Tensor]:
        """What an interrupted run kept last; nothing where none did."""

    def keep(self, found: Callable[[], dict[str, Tensor]], done: int, left: int) -> None:
        """Tells of progress in steps, and keeps what is needed to go on, where some time went by."""


SOLVERS: Registry[type[Solver]] = Registry("solver", "einfold.compiler.solve")


def without_scales(solver: str, scheme: Scheme) -> str:
    """Why a solver that moves the scales of groups cannot fill a scheme, in a sentence; "" where it can."""
    codes = scheme.coded
    scales = codes.grid(torch.ones(2, 2, 16)).get("scales") if codes.by_itself else None
    if scales is not None and scales.shape[:2] == (2, 2):
        return ""
    return f"{solver} moves the scales of groups, and {codes.name} has none that a group may choose"


def finite(name: str, weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight, to be stored in a scheme. Raises ModelError where no scale can stand for its numbers."""
    return weight if scheme.nearly_exact else numbers_of(name, weight)


def numbers_of(name: str, weight: Tensor) -> Tensor:
    """The weight. Raises ModelError, with its name, where some of it is infinite or none."""
    # By the ends, which no number at all passes through: `isfinite` makes a copy of the weight.
    if weight.numel() and not all(bool(end.isfinite()) for end in weight.aminmax()):
        raise ModelError(
            f"the weight {name} has numbers that are infinite or none at all (NaN), which no scale can stand "
            "for; get the model anew, or keep weights as they come (format fp32)"
        )
    return weight


def completed(
    solved: Solved,
    scheme: Scheme,
    target: Tensor,
    moment_MM: Tensor | None,
    original: Tensor,
) -> Solved:
    """A weight whose codes were solved, with what the scheme stores beside them: of what they miss of the
    target. The error is that to the original."""
    if scheme.coded is scheme:
        return solved
    width = target.shape[-1]
    missed = target.float() - scheme.coded.dequantize(solved.pieces, width)
    pieces = solved.pieces | scheme.beside(missed, moment_MM)
    return Solved(pieces, relative_error(scheme.dequantize(pieces, width), original.float()))


def relative_error(restored: Tensor, weight: Tensor) -> float:
    """|w - restored|_F / |w|_F; 0 of a weight that is 0."""
    size = float(weight.norm())
    return float((restored - weight).norm()) / size if size else 0.0


def by_rows(
    weight: Tensor,
    scheme: Scheme,
    chosen: Choice,
    original: Tensor | None = None,
) -> Solved:
    """Stores a weight [.., N, M] a few rows at a time.

    `chosen` gives the codes [R, G, B] and the settled grid of the groups [R, G, B] of some rows in float32.
    The error is that to the `original`, where the weight is a target that was moved away from it.
    """
    measured = (weight if original is None else original).reshape(-1, weight.shape[-1])
    lead, width = weight.shape[:-1], weight.shape[-1]
    rows = weight.reshape(-1, width)
    pieces = {
        label: torch.empty(shape, dtype=DTYPES[kind])
        for label, (shape, kind) in scheme.pieces(tuple(weight.shape)).items()
    }
    flat = {
        label: piece if label in scheme.shared else piece.flatten(0, len(lead) - 1)
        for label, piece in pieces.items()
    }
    # What is of the whole weight follows from all of its rows.
    slabs = 1 if scheme.shared else max(1, -(-rows.numel() // _SLAB))
    step = max(1, -(-len(rows) // slabs))
    missed = total = 0.0
    for start in range(0, len(rows), step):
        values = rows[start : start + step].float()
        packed = scheme.pack(*chosen(scheme.groups(values)))
        for label, piece in packed.items():
            if label in scheme.shared:
                flat[label].copy_(piece)
            else:
                flat[label][start : start + step] = piece
        if not scheme.nearly_exact:
            restored = scheme.dequantize(packed, width)
            wanted = measured[start : start + step].float()
            missed += float((restored - wanted).square().sum(dtype=torch.float64))
            total += float(wanted.square().sum(dtype=torch.float64))
    if scheme.nearly_exact:
        return Solved(pieces)
    return Solved(pieces, math.sqrt(missed / total) if total else 0.0)
