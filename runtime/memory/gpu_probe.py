"""Measures what a plan for a GPU is made with. It has never run on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib import util

from ...errors import UnsupportedError

#: Bytes that are copied to the GPU, and read and written there.
_LINK, _MEMORY = 256 << 20, 512 << 20

#: Times that each is measured; the middle one counts.
_TIMES = 5


def measured_gpu() -> tuple[int, float, float] | None:
    """Bytes of the CUDA device's memory, bytes a second that it reads there, and that it copies from
    page-locked memory of this machine; None where there is no device, or no torch to ask for it. Raises
    OutOfMemoryError where the device has too little free, UnsupportedError where no memory is page-locked."""
    if util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from .cuda_copies import CudaCopies

    copies = CudaCopies(torch.device("cuda", torch.cuda.current_device()))
    source, reason = copies.on_host(_LINK)
    if reason:
        raise UnsupportedError(f"the system page-locks no memory to copy from ({reason})")
    target = copies.on_device(_LINK)
    block, other = (copies.on_device(_MEMORY) for _ in range(2))

    def seconds(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found = []
        for _ in range(_TIMES):
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return float(statistics.median(found))

    link = _LINK / seconds(lambda: target.copy_(source, non_blocking=True))
    memory = 2 * _MEMORY / seconds(lambda: other.copy_(block))  # a copy reads and writes
    copies.close()
    return torch.cuda.mem_get_info()[1], memory, link
