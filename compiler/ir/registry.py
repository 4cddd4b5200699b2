"""Things of one kind by name: methods, storages, operators, targets.

A room is a package whose modules each bring one thing. It registers itself where it is defined, and the room
is read when a name is first asked for, so that adding a thing edits nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ...errors import IRError

T = TypeVar("T")
Thing = TypeVar("Thing", bound=Any)


def in_order(names: Iterable[str], first: tuple[str, ...]) -> list[str]:
    """Names by the alphabet, but for those that stand first."""
    place = {name: index for index, name in enumerate(first)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


class Registry(Mapping[str, T], Generic[T]):
    """What a room brings, by name. Reads like a dict; in the order of `order`, then by name.

    `what` is the word for one of them. `room` is the package whose modules are imported, and of its packages
    the modules called `module`, where they have one. `order` names those that stand first where the order is
    shown or counts.
    """

    def __init__(self, what: str, room: str, module: str = "", order: tuple[str, ...] = ()) -> None:
        self.what = what
        self._room = room
        self._module = module
        self._order = order
        self._found: dict[str, T] = {}
        self._read = False
        self._lock = threading.RLock()

    def register(self, thing: Thing) -> Thing:
        """Adds a thing under its `name`; a decorator of classes. Raises ValueError where that is taken."""
        name = str(thing.name)
        if self._found.get(name, thing) is not thing:
            raise ValueError(f"there are two of the {self.what} {name}")
        self._found[name] = thing
        return thing

    @contextmanager
    def with_one_more(self, thing: T) -> Iterator[T]:
        """Registers a thing for a while, as a test does."""
        self._all()
        self.register(thing)
        try:
            yield thing
        finally:
            del self._found[str(thing.name)]  # type: ignore[attr-defined]

    def find(self, name: str) -> T:
        """The thing of a name. Raises IRError with the names that there are."""
        found = self._all().get(name)
        if found is None:
            raise IRError(f"unknown {self.what} {name!r}; known: {', '.join(self)}")
        return found

    def read(self) -> None:
        """Imports the room now, where that is wanted for more than its things."""
        self._all()

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(in_order(self._all(), self._order))

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, T]:
        with self._lock:  # another thread waits for the whole room
            if not self._read:
                self._read = True  # first: modules of the room may ask while they are imported
                for found in pkgutil.iter_modules(importlib.import_module(self._room).__path__):
                    name = f"{self._room}.{found.name}"
                    if found.ispkg and self._module:
                        name = f"{name}.{self._module}"
                        if importlib.util.find_spec(name) is None:
                            continue
                    importlib.import_module(name)
            return self._found
