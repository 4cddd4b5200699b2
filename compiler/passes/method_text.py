"""Methods that a recipe chooses by name, with options: what such a table, or the text for it, means.

    method = "streaming_llm"
    recent = 508

is, as a text, `streaming_llm:recent=508`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...errors import IRError, RecipeError
from ..ir.options import options_of
from ..ir.registry import Registry, in_order


@dataclass(frozen=True)
class Method:
    """A method: whose fields are its options, and what is made of one, such as a pass."""

    kind: type[Any]
    step: Callable[[Any], Any] = lambda made: made

    @property
    def name(self) -> str:
        return str(getattr(self.kind, "method", "") or self.kind.name)

    @property
    def what(self) -> str:
        """What it does, in the words of its docstring."""
        return inspect.getdoc(self.kind) or ""

    def paragraph(self, begins: str) -> str:
        """The paragraph of the docstring that begins so, on one line; empty where there is none."""
        parts = self.what.split("\n\n")
        return next((" ".join(part.split()) for part in parts if part.startswith(begins)), "")

    def defaults(self) -> dict[str, Any]:
        """Its options and their defaults; None for one that follows from the others, or from the model."""
        found = {}
        for field in options_of(self.kind):
            inner: Any = field.default_factory
            if inner is MISSING:
                found[field.name] = field.default
            else:  # what the pass puts into the layout, whose options are the method's too
                found |= {each.name: each.default for each in options_of(inner)}
        return found

    def build(self, options: Mapping[str, Any]) -> Any:
        """What it is with options. Raises pydantic's ValidationError, and IRError for what cannot be."""
        own = dict(options)
        for field in options_of(self.kind):
            inner: Any = field.default_factory
            if inner is not MISSING:
                names = [each.name for each in options_of(inner)]
                taken = {name: own.pop(name) for name in names if name in own}
                own[field.name] = TypeAdapter(inner).validate_python(taken)
        return self.step(TypeAdapter(self.kind).validate_python(own))


class Family(Mapping[str, Method]):
    """The methods of a family as they are registered: passes, solvers, what is `given` to heads by a step.

    `order` names those that stand first where the order is shown.
    """

    def __init__(
        self,
        order: tuple[str, ...],
        passes: Registry[Any] | None = None,
        given: tuple[Registry[Any], Callable[[Any], Any]] | None = None,
    ) -> None:
        self._order, self._passes, self._given = order, passes, given

    def _all(self) -> dict[str, Method]:
        made = [Method(kind) for kind in (self._passes or {}).values()]
        if self._given is not None:
            kinds, step = self._given
            made += [Method(kind, step) for kind in kinds.values() if kind.method]
        named = {method.name: method for method in made}
        return {name: named[name] for name in in_order(named, self._order)}

    def __getitem__(self, name: str) -> Method:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def split_text(place: str, text: str) -> tuple[str, dict[str, str]]:
    """The name and the options of `NAME:key=value,..`. Raises ValueError where it is written otherwise."""
    name, colon, listed = text.strip().partition(":")
    found: dict[str, str] = {}
    for item in listed.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in found:
            raise ValueError(
                f"{place} is written NAME:key=value,key=value with each key once; "
                f"{item[:200]!r} in {text[:200]!r} is not"
            )
        found[key] = value
    return name, found


def read_method(place: str, text: str) -> dict[str, Any]:
    """The table that a text stands for. Raises ValueError where it is written otherwise."""
    name, options = split_text(place, text)
    return {"method": name, **options}


def built(place: str, known: Mapping[str, Method], table: Mapping[str, Any]) -> Any:
    """What a recipe's table asks for. Raises ValueError with a sentence for what is wrong in it, and
    RecipeError for options that do not go together."""
    options = dict(table)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in known:
        names = f"is one of {', '.join(known)}" if known else "has no name yet that it could be"
        raise ValueError(f"{place}.method {names}, not {method!r}")
    kind = known[method]
    fields = list(kind.defaults())
    for name in options:
        if name not in fields:
            takes = f"takes {', '.join(fields)}" if fields else "has no options"
            raise ValueError(f"{place} has an unknown key {name!r}; {method} {takes}")
    try:
        return kind.build(options)
    except IRError as error:
        raise RecipeError(f"{place}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([*place.split("."), *map(str, first["loc"])])
        raise ValueError(f"{where}: {first['msg']}, found {first.get('input')!r}") from error
