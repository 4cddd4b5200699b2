"""Time on a CUDA device: events, a flushed L2, the median; and what the device can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

#: Cycles a microsecond of the fastest clock that a device may have.
_CYCLES = 2000


class Clock:
    """Times calls on the current device in microseconds.

    Before each call L2 is overwritten, and the device is kept busy for longer than the host needs to launch
    the call: an event before it is then reached when all of it is queued, and the time is the device's alone.
    """

    def __init__(self, repeats: int = 30, warmup: int = 5) -> None:
        self.repeats, self.warmup = repeats, warmup
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(4 * size, 64 << 20), dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        """The median time of a call with nothing of its inputs in L2."""
        busy = int(max(1000.0, 4 * self.host(run)) * _CYCLES)
        taken = []
        for _ in range(self.repeats):
            self.flush.zero_()
            torch.cuda._sleep(busy)
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) * 1000)
        return float(statistics.median(taken))

    def host(self, run: Callable[[], object]) -> float:
        """The median time that the host takes to launch a call, while the device waits."""
        for _ in range(self.warmup):
            run()
        taken = []
        for _ in range(self.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        return float(statistics.median(taken))


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source)) * 1e6


def matrix_rate(clock: Clock, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product; of int8 with sums in int32."""
    size = 8192
    if dtype == torch.int8:
        c, d = (
            torch.randint(-127, 128, (size, size), device="cuda", dtype=dtype) for _ in range(2)
        )
        return 2 * size**3 / clock(lambda: torch._int_mm(c, d.T)) * 1e6
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / clock(lambda: a @ b) * 1e6
