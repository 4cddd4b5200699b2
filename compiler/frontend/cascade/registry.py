"""The registry of ATen operators: a handler reads a call and gives its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .context import Context

#: Gives a Value, or a tuple of them for operators with several results.
Handler = Callable[["Call"], Any]


class Call:
    """A call of an operator: `call.dim`, `call.self`, .. are its arguments by the schema's names."""

    def __init__(
        self,
        context: Context,
        name: str,
        arguments: dict[str, Any],
        sizes: Sequence[int],
        extents: Sequence[str],
        kind: str,
    ) -> None:
        self.context, self.name, self.arguments = context, name, arguments
        self.sizes, self.extents, self.kind = sizes, extents, kind

    def __getattr__(self, name: str) -> Any:
        return self.arguments.get(name)


HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers a handler for operators by their names in ATen."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def listed(value: int | Sequence[int]) -> list[int]:
    """One number or several as a list."""
    return [value] if isinstance(value, int) else list(value)
