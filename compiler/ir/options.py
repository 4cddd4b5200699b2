"""Fields of policies and storages that are an option of a recipe alone, or stand in the text alone.

A method is typed once: its options are the fields of what it puts into the layout. Some are convenient for
a person and say nothing that the layout does not (a budget, of which the newest tokens are a part), others
follow from the model or from the options.
"""

from __future__ import annotations

from dataclasses import Field, field, fields
from typing import Any

_OPTION, _DERIVED, _STATED = ({"einfold": kind} for kind in ("option", "derived", "stated"))


def option(default: Any) -> Any:
    """A field that recipes may set and that others follow from: not in the text, and nothing goes by it."""
    return field(default=default, metadata=_OPTION, compare=False, kw_only=True)


def derived(default: Any = None) -> Any:
    """A field that stands in the text and that no recipe sets; None until it is settled."""
    return field(default=default, metadata=_DERIVED)


def later() -> Any:
    """An option that follows from others where it is not given."""
    return field(default=None)


def stated() -> Any:
    """The same, which every text says: one without it was written before there was a choice, and is none."""
    return field(default=None, metadata=_STATED)


def is_stated(found: Field[Any]) -> bool:
    """Whether a text without the field is none."""
    return found.metadata == _STATED


def missing(value: object) -> bool:
    """Whether a field waits to be settled."""
    return value is None


def options_of(kind: Any) -> list[Field[Any]]:
    """The fields of a dataclass that a recipe may set, those first that others follow from."""
    found = [each for each in fields(kind) if each.metadata != _DERIVED]
    return sorted(found, key=lambda each: each.metadata != _OPTION)


def values_of(made: Any) -> dict[str, Any]:
    """The options of a dataclass by name, as they are."""
    return {found.name: getattr(made, found.name) for found in options_of(type(made))}


class Options:
    """A dataclass whose fields are options."""

    def options(self) -> dict[str, Any]:
        """The options by name, as they are."""
        return values_of(self)


def text_fields(kind: Any) -> list[Field[Any]]:
    """The fields of a dataclass that stand in its text."""
    return [found for found in fields(kind) if found.metadata != _OPTION]


def settle(made: Any, **values: Any) -> None:
    """Sets fields that follow from others, while a frozen dataclass is made."""
    for name, value in values.items():
        object.__setattr__(made, name, value)
