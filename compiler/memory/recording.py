"""The calls of torch that something makes on the meta device, written down in their order.

What is no operator of torch's, such as the launch of a kernel, says so itself (`launched`): it then is a call
of tensors that writes into some of them and gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

#: Calls that only hold for the strides that a value had here: written in place, it may have others.
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}

#: Calls that allocate within, and what torch says they are made of.
_MADE_OF = get_decompositions([aten._safe_softmax, aten.embedding])


@dataclass
class Call:
    """A call with its arguments, and what it gave."""

    target: Any
    args: Any
    kwargs: Any
    given: Any


class Recording(TorchDispatchMode):
    """The calls that are made of torch, and what comes of them; `device` is where they are to run."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.calls: list[Call] = []
        self.given: Any = None

    def __torch_dispatch__(
        self, target: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if target in _MADE_OF:
            with self:
                return _MADE_OF[target](*args, **kwargs)
        if target in _VIEWS:
            target, args = aten.reshape.default, args[:2]
        given = target(*args, **kwargs)
        self.calls.append(Call(target, args, kwargs, given))
        return given


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recorded(device: torch.device) -> Iterator[Recording]:
    """What is called within."""
    found = Recording(device)
    token = _recording.set(found)
    try:
        with torch.no_grad(), found:
            yield found
    finally:
        _recording.reset(token)


def launched(call: Callable[..., None], tensors: Sequence[Tensor]) -> None:
    """Writes down a call of tensors that torch does not see; nothing where nothing is recorded."""
    recording = _recording.get()
    if recording is not None:
        recording.calls.append(Call(call, tuple(tensors), {}, None))


def runs_on(tensor: Tensor) -> torch.device:
    """Where what is called with a tensor runs: without numbers, where what is recorded is to run."""
    recording = _recording.get()
    return tensor.device if recording is None else recording.device
