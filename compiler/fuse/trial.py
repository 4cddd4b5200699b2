"""Which of several ways to compute a region is fastest: each compiled by Inductor, on random tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from ..frontend.dynamo import trace_function
from ..ir.types import hint_of
from .folded import Function
from .report import AS_WRITTEN

#: A trial ends after this many rounds or seconds, whichever comes first.
ROUNDS, SECONDS = 25, 1.0
#: Elements of the largest input beyond which results are not compared on random tensors.
LARGEST = 2**26


@dataclass(frozen=True)
class Trial:
    """A region as a module, its inputs at their hinted sizes, and which of them a lowering reads."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    reads: Sequence[int]


def hints_of(nodes: Sequence[fx.Node]) -> tuple[Any, ...]:
    """Random tensors like the nodes' values, sizes that vary at their hints.

    Drawn from a generator of their own, so that the program's random numbers are not touched.
    """
    random = torch.Generator().manual_seed(0)
    return tuple(_like(node.meta.get("val"), random) for node in nodes)


def _like(value: Any, random: torch.Generator) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value.node.hint
    if not isinstance(value, torch.Tensor):
        return value
    device = value.device if runs_here(value.device) else torch.device("cpu")
    shape, stride = [hint_of(s) for s in value.shape], [hint_of(s) for s in value.stride()]
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True) if size)
    if value.dtype == torch.bool:
        flat = torch.rand(reach, generator=random) < 0.8
    elif value.dtype.is_floating_point:
        flat = torch.randn(reach, generator=random, dtype=torch.float32).to(value.dtype)
    else:
        flat = torch.randint(0, 8, (reach,), generator=random).to(value.dtype)
    return flat.to(device).as_strided(shape, stride)


def runs_here(device: torch.device) -> bool:
    """Whether this machine computes on such a device."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def agrees(trial: Trial, function: Function) -> str:
    """Runs a lowering beside the region; a sentence on how they differ, or ""."""
    if any(isinstance(x, torch.Tensor) and x.numel() > LARGEST for x in trial.inputs):
        return ""
    with torch.no_grad(), tracing(None):
        expected = trial.module(*trial.inputs)
        found = function(*[trial.inputs[at] for at in trial.reads])
    for want, got in zip(expected, found, strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            return (
                f"it gives {got.dtype}{list(got.shape)} in place of {want.dtype}{list(want.shape)}"
            )
        half = want.dtype in (torch.float16, torch.bfloat16)
        tolerance = 3e-2 if half else 1e-4
        if not torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True):
            return "it does not agree with the region on random tensors"
    return ""


def measured(
    trial: Trial, lowerings: Mapping[str, Function], device: torch.device
) -> dict[str, float]:
    """Seconds a call of the region as written and of each lowering, compiled and run in turn.

    The least of each: what else the machine does only ever adds.
    """
    used = [trial.inputs[at] for at in trial.reads]
    runs = {AS_WRITTEN: _compiled(trial.module, trial.inputs)}
    runs |= {name: _compiled(function, used) for name, function in lowerings.items()}
    timed = _timed_on_gpu if device.type == "cuda" else _timed
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(timed(run))
            if time.perf_counter() > end:
                break
    return {name: min(values) for name, values in times.items()}


def _timed(run: Callable[[], Any]) -> float:
    # What one thread runs is timed by the processor, which counts nothing of what else the machine does.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _timed_on_gpu(run: Callable[[], Any], calls: int = 10) -> float:
    """Of calls one after the other, as a model makes them: the longer of launching and of running."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _compiled(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """A call of the function on these inputs, of which numbers are compiled in."""
    from torch._inductor.compile_fx import compile_fx

    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]

    def of_tensors(*given: torch.Tensor) -> Any:
        rest = iter(given)
        return function(*[next(rest) if isinstance(x, torch.Tensor) else x for x in inputs])

    with tracing(None), torch.no_grad():
        mode = FakeTensorMode()
        traced = trace_function(of_tensors, [mode.from_tensor(x) for x in tensors], mode)
        compiled: Any = compile_fx(traced, tensors)
    return lambda: compiled(*tensors)
