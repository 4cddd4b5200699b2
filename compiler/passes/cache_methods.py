"""The methods that a recipe may choose for the KV cache, by name: one of each family at most.

A method is a policy, a storage or a reader that says so (`method`), given to all heads alike, or a pass of
its own. A recipe's table gives the method and its options, which are the fields of that or of the pass:

    [cache.prune]
    method = "streaming_llm"
    recent = 508

On the command line, and wherever a text stands for a table, the same is `streaming_llm:recent=508`
(`method_text.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..ir.kv.keep.policy import POLICIES
from ..ir.kv.read.reader import READERS
from ..ir.kv.store.storage import STORAGES
from ..ir.registry import Registry, in_order
from .base import Pass
from .kv_prune.keep import KeepByPolicy
from .kv_quant.pack import PackByStorage
from .kv_read.by_reader import ReadByReader
from .method_text import Method, built
from .methods import PRUNE, SHARE


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


def method_pass(family: str, table: Mapping[str, Any]) -> Pass:
    """The pass that a recipe's table asks for; `built` says what is raised."""
    made: Pass = built(f"cache.{family}", FAMILIES[family], table)
    return made


def resolved(family: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with every option spelled out, as the manifest keeps it."""
    step = method_pass(family, table)
    return {"method": step.name, **step.options()}
