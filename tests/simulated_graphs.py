"""CUDA graphs that are simulated in the memory of this process, for what captures runs.

As on a GPU nothing is computed while a run is captured, what asks for the numbers of a tensor fails, and what
is replayed are calls over the memory that they were captured with: no Python of the run's is asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from einfold.compiler.codegen.triton.starting import Launch

aten = torch.ops.aten

#: What asks for numbers, or how many there are.
_ASKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}


class SimulatedGraphs:
    """The `Capture` of compiler/memory/captured.py."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self._calls: list[list[Callable[[], Any]]] = []

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        calls = _Calls()

        def launch(launch: Launch, *tensors: Tensor) -> None:
            calls.made.append(partial(own, launch, *tensors))

        own = Launch.__call__
        with patch.object(Launch, "__call__", launch), calls:
            run()
        self.captured += 1
        self._calls.append(calls.made)

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for call in calls.made:
                    call()

        return replay

    def forget(self) -> None:
        """Lets go of the memory that was captured, of which a graph holds no more than the addresses."""
        for calls in self._calls:
            calls.clear()


class _Calls(TorchDispatchMode):
    """Torch's calls that compute something, each to be made again with the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        returns = func._schema.returns
        if func._schema.is_mutable:
            self.made.append(partial(func, *args, **kwargs))
            written = _written(func._schema, args, kwargs)
            given = tuple(written[min(each.alias_info.before_set)] for each in returns)
            return given[0] if len(given) == 1 else given or None
        given = func(*args, **kwargs)
        if not all(each.alias_info is not None for each in returns):  # else it only looks
            self.made.append(partial(_again, given, func, args, kwargs))
        return given


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call writes into, by its letter in the schema."""
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
    return {
        min(each.alias_info.before_set): given[each.name]
        for each in schema.arguments
        if each.alias_info is not None and each.alias_info.is_write and each.name in given
    }


def _again(given: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes a call whose results lie where they lay."""
    leaves = torch.utils._pytree.tree_leaves
    for old, new in zip(leaves(given), leaves(func(*args, **kwargs)), strict=True):
        old.copy_(new)
