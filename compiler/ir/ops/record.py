"""An operator as one class: its arguments, its meaning in plain torch, and the shapes of its results.

All else is made from these: the operator of `torch.ops.einfold` with its schema and its shape-only form, the
form that writes caches where they lie, and what a kernel is called with in the operator's place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from types import GenericAlias
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..registry import Registry

Call = TypeVar("Call", bound="Operator")


@dataclass(eq=False)
class Operator:
    """A call of an operator. Its fields are the arguments, in the order and by the names of the schema.

    They are tensors, sequences of them, texts, numbers, or absent ones (`| None`). A subclass is a dataclass
    too, and `OPERATORS.register` makes its operator.
    """

    name: ClassVar[str]
    """What it is called in `torch.ops.einfold` and in a graph text."""
    writes: ClassVar[tuple[str, ...]] = ()
    """The caches among the arguments that a call updates; their new states are results behind its own."""

    overwrites: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """For each result, arguments in whose memory it may be written where nothing else reads them then."""

    by_rows: ClassVar[tuple[str, ...]] = ()
    """Arguments of which row t of every result depends on row t alone (all axes but the last count rows),
    where it depends on nothing else but weights: some rows then give what they give among all."""

    def run(self) -> Any:
        """What it gives, but for the caches it writes, which it updates in place.

        Its annotation is that of the schema: a tensor, or several where it writes none.
        """
        raise NotImplementedError

    def shapes(self) -> Any:
        """Empty tensors as `run` gives them: here one like the first argument.

        Raises where arguments do not fit each other.
        """
        return torch.empty_like(getattr(self, fields(self)[0].name))

    @classmethod
    def overload(cls) -> torch._ops.OpOverload:
        """The operator as graphs call it."""
        found: torch._ops.OpOverload = getattr(torch.ops.einfold, cls.name).default
        return found

    @classmethod
    def standing_in(cls: type[Call], meaning: Callable[[Call], Any]) -> Callable[..., Any]:
        """A function of the operator's arguments and results, in its place: caches are written in place."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = cls(*args, **kwargs)
            return given.results(meaning(given))

        return call

    def results(self, out: Any) -> Any:
        """What the operator gives where its own result is `out`: the caches that it writes behind it."""
        if not self.writes:
            return out
        return (out, *(getattr(self, name) for name in self.writes))

    @classmethod
    def _pure(cls, *args: Any, **kwargs: Any) -> Any:
        given = cls(*args, **kwargs)
        copies = {name: getattr(given, name).clone() for name in cls.writes}
        given = replace(given, **copies)
        return given.results(given.run())

    @classmethod
    def _fake(cls, *args: Any, **kwargs: Any) -> Any:
        given = cls(*args, **kwargs)
        copies = {name: torch.empty_like(getattr(given, name)) for name in cls.writes}
        return replace(given, **copies).results(given.shapes())

    @classmethod
    def _signature(cls) -> inspect.Signature:
        hints = get_type_hints(cls)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(
                field.name,
                kind,
                annotation=hints[field.name],
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
            )
            for field in fields(cls)
        ]
        given = get_type_hints(cls.run)["return"]
        if cls.writes:
            given = GenericAlias(tuple, (given, *(Tensor for _ in cls.writes)))
        return inspect.Signature(parameters, return_annotation=given)


class _Operators(Registry[type[Operator]]):
    _made: ClassVar[set[type[Operator]]] = set()

    def register(self, thing: Any) -> Any:
        """Adds an operator, and makes it in torch; a decorator of dataclasses.

        One that was taken out and comes again is the same in torch, which graphs of before call.
        """
        super().register(thing)  # first: of two of a name, torch would take the second
        if thing in self._made:
            return thing
        self._made.add(thing)

        def pure(*args: Any, **kwargs: Any) -> Any:
            return thing._pure(*args, **kwargs)

        pure.__signature__ = thing._signature()  # type: ignore[attr-defined]
        made = torch.library.custom_op(f"einfold::{thing.name}", pure, mutates_args=())
        made.register_fake(thing._fake)
        return thing


#: Every operator, by its name.
OPERATORS = _Operators("operator", __package__)


def in_place() -> dict[Any, Callable[..., Any]]:
    """What stands for the operators that write caches where the caller lets these be written in place."""
    return {kind.overload(): kind.standing_in(kind.run) for kind in over_caches()}


def seen_through() -> dict[Any, Callable[..., Any]]:
    """What stands for the operators that write nothing, so that torch can derive by their arguments."""
    kinds = [kind for kind in OPERATORS.values() if not kind.writes]
    return {kind.overload(): kind.standing_in(kind.run) for kind in kinds}


def over_caches() -> list[type[Operator]]:
    """The operators that write a cache."""
    return [kind for kind in OPERATORS.values() if kind.writes]


def operator_of(target: object) -> type[Operator] | None:
    """The record of what a node calls; None where that is no operator of einfold's."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "einfold":
        return None
    return OPERATORS.get(target._schema.name.removeprefix("einfold::"))
