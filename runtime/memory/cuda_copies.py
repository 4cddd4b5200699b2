"""Copies to a CUDA device on a stream of their own, from page-locked memory. It has never run on a GPU."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from ...errors import OutOfMemoryError
from .direct import aligned


class CudaCopies:
    """The `Copies` of device_ahead.py. What computes is the stream that is current where it is asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._locked: list[Tensor] = []

    def on_device(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"the device has no {nbytes:,} bytes left") from error

    def on_host(self, nbytes: int) -> tuple[Tensor, str]:
        """Memory of the system's own, registered as it is: torch's page-locked memory comes in powers of
        two."""
        memory = torch.from_numpy(aligned(nbytes))
        runtime = torch.cuda.cudart()
        failed = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(failed) == 0:
            self._locked.append(memory)
            return memory[:nbytes], ""
        # CUDA keeps the error for the next launch that asks for one: let that be this.
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)
        return memory[:nbytes], str(runtime.cudaGetErrorString(failed))

    def copy(self, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def computed(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy_behind(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def compute_behind(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def close(self) -> None:
        self._stream.synchronize()
        for memory in self._locked:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._locked = []

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or the interpreter ends
            self.close()
