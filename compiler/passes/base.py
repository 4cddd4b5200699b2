"""What a pass is: options, what it needs and promises, and one `run` that says what it did.

A pass is a frozen dataclass; its fields are its options. The tensor mathematics of a method lives in
pure functions beside the pass, without the graph.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from ...errors import IRError, RecipeError
from ..ir.program import Program


@dataclass(frozen=True)
class Note:
    """One thing that a pass did, or left alone and why.

    `action` is "applied" or "skipped"; `where` names a layer, node or weight; `bytes_saved` counts
    bytes of weights or cache that are gone (negative: bytes added).
    """

    action: str
    where: str
    what: str
    bytes_saved: int = 0


@dataclass
class PassResult:
    """Whether the graph changed, and the notes for the report."""

    changed: bool = False
    notes: list[Note] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Numbers that come out only when weights are written, such as the error of each weight."""

    def applied(self, where: str, what: str, bytes_saved: int = 0) -> None:
        self.changed = True
        self.notes.append(Note("applied", where, what, bytes_saved))

    def skipped(self, where: str, reason: str) -> None:
        self.notes.append(Note("skipped", where, reason))


class Pass:
    """Base of all passes. `requires` and `ensures` are names of facts about a program (`facts.py`).

    The manager checks on the program that `requires` hold before the pass and `ensures` after it.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool] = False
    """Whether it trains on a text; the model writes one where none is given."""

    def run(self, program: Program) -> PassResult:
        """Rewrites the program in place."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What it does, in the words of its docstring."""
        return inspect.getdoc(type(self)) or ""

    def options(self) -> dict[str, Any]:
        """The pass's options by name, for reports and manifests."""
        return {name: getattr(self, name) for name in getattr(self, "__dataclass_fields__", {})}


class GivenToHeads(Pass):
    """A pass with one field, the policy, storage or reader that it gives to heads: name, words and options of
    the pass are that thing's."""

    requires = frozenset({"cache planned"})

    @property
    def given(self) -> Any:
        """What heads are given."""
        [only] = super().options().values()
        return only

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.given.method)

    @property
    def what(self) -> str:
        return inspect.getdoc(type(self.given)) or ""

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = self.given.options()
        return found


def check_options(section: str, build: Callable[[], object]) -> None:
    """Builds what a pass will put into the layout; raises RecipeError with the sentence of what is wrong."""
    try:
        build()
    except IRError as error:
        raise RecipeError(f"{section}: {error}") from error


def check_lets_go(program: Program, who: str, kept: int, waiting: int, done: str) -> None:
    """Raises RecipeError where `kept` tokens and the `waiting` that may gather between moves are a whole
    context, so that none would ever leave the slots; `done` says what would be done to those that do."""
    context = program.model.context
    if kept + waiting >= context:
        raise RecipeError(
            f"{who} would leave {kept} tokens and up to {waiting} that wait as they are, but the context has "
            f"{context}: nothing would be {done}; keep fewer tokens, lower slack, or compile for a longer "
            "context"
        )


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer number in a weight's qualified name, such as 3 in `model.layers.3.mlp.up_proj.weight`."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def place_of(node: fx.Node) -> str:
    """A name for where a node stands: the weight that it reads or that its inputs read, else its own."""
    for source in (node, *node.all_input_nodes):
        if source.op == "get_attr":
            return str(source.target).removesuffix(".weight")
    return f"%{node.name}"


def common_stem(names: Iterable[str]) -> str:
    """The qualified prefix that all names share: `a.b` for `a.b.c.weight` and `a.b.d.weight`."""
    split = [name.split(".") for name in names]
    stem = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        stem.append(parts[0])
    return ".".join(stem)
