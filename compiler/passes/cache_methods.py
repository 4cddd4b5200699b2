"""The methods that a recipe may choose for the KV cache, by name: one of each family at most.

A method is a policy, a storage or a reader that says so (`method`), given to all heads alike, or a pass of
its own. A recipe's table gives the method and its options, which are the fields of that or of the pass:

    [cache.prune]
    method = "streaming_llm"
    recent = 508

On the command line, and wherever a text stands for a table, the same is `streaming_llm:recent=508`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...errors import IRError, RecipeError
from ..ir.kv.keep.policy import POLICIES
from ..ir.kv.read.reader import READERS
from ..ir.kv.store.storage import STORAGES
from ..ir.options import options_of
from ..ir.registry import Registry, in_order
from .base import Pass
from .kv_prune.keep import KeepByPolicy
from .kv_quant.pack import PackByStorage
from .kv_read.by_reader import ReadByReader
from .methods import PRUNE, SHARE


@dataclass(frozen=True)
class Method:
    """A method: whose fields are its options, and what makes a pass of one of them."""

    kind: type[Any]
    step: Callable[[Any], Pass] = lambda made: made

    @property
    def name(self) -> str:
        return str(self.kind.name if issubclass(self.kind, Pass) else self.kind.method)

    @property
    def what(self) -> str:
        """What it does, in the words of its docstring."""
        return inspect.getdoc(self.kind) or ""

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

    def build(self, options: Mapping[str, Any]) -> Pass:
        """The pass. Raises pydantic's ValidationError, and IRError for what cannot be."""
        own = dict(options)
        for field in options_of(self.kind):
            inner: Any = field.default_factory
            if inner is not MISSING:
                names = [each.name for each in options_of(inner)]
                taken = {name: own.pop(name) for name in names if name in own}
                own[field.name] = TypeAdapter(inner).validate_python(taken)
        return self.step(TypeAdapter(self.kind).validate_python(own))


class _Family(Mapping[str, Method]):
    """The methods of a family, as they are registered: passes, and what is `given` to heads by a step.

    `order` names those that stand first where the order is shown.
    """

    def __init__(
        self,
        order: tuple[str, ...],
        passes: Registry[type[Pass]] | None = None,
        given: tuple[Registry[Any], Callable[[Any], Pass]] | None = None,
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


#: The families in the order in which their passes run, with the reason for it in `pipeline.py`.
FAMILIES: Mapping[str, Mapping[str, Method]] = {
    "share": _Family(("cross_layer", "minicache", "cskv"), SHARE),
    "prune": _Family(
        ("streaming_llm", "razor_attention", "snapkv", "h2o", "ems"),
        PRUNE,
        (POLICIES, KeepByPolicy),
    ),
    "quant": _Family(("kivi", "gear", "zipcache", "mikv"), None, (STORAGES, PackByStorage)),
    "read": _Family((), None, (READERS, ReadByReader)),
}


def read_method(family: str, text: str) -> dict[str, Any]:
    """The table that `METHOD:key=value,..` stands for. Raises ValueError where it is written otherwise."""
    method, colon, listed = text.strip().partition(":")
    table: dict[str, Any] = {"method": method}
    if not colon:
        return table
    for item in listed.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in table:
            raise ValueError(
                f"cache.{family} is written METHOD:key=value,key=value with each key once; "
                f"{item!r} in {text!r} is not"
            )
        table[key] = value
    return table


def method_pass(family: str, table: Mapping[str, Any]) -> Pass:
    """The pass that a recipe's table asks for. Raises ValueError with a sentence for what is wrong in it, and
    RecipeError for options that do not go together."""
    known = FAMILIES[family]
    options = dict(table)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in known:
        names = f"is one of {', '.join(known)}" if known else "has no name yet that it could be"
        raise ValueError(f"cache.{family}.method {names}, not {method!r}")
    kind = known[method]
    fields = list(kind.defaults())
    for name in options:
        if name not in fields:
            raise ValueError(
                f"cache.{family} has an unknown key {name!r}; {method} takes {', '.join(fields)}"
            )
    try:
        return kind.build(options)
    except IRError as error:
        raise RecipeError(f"cache.{family}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("cache", family, *first["loc"])))
        raise ValueError(f"{where}: {first['msg']}, found {first.get('input')!r}") from error


def resolved(family: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every option spelled out, as the manifest keeps it."""
    step = method_pass(family, table)
    return {"method": step.name, **step.options()}
