"""What is asked of CUDA, by one that only writes it down: no GPU is needed, and none is shown to work."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from einfold.compiler.ir.weights import Weight
from einfold.errors import OutOfMemoryError
from einfold.runtime.memory import cuda_copies, gpu_probe
from einfold.runtime.memory.cuda_copies import CudaCopies
from einfold.runtime.memory.device_ahead import Block, DeviceAhead

CPU = torch.device("cpu")


class Cuda:
    """In the place of `torch.cuda`: streams and events by name, and what was asked of which."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.registered: dict[int, int] = {}
        self.refuses = False
        self.current = "compute"
        self.events = 0

    def make_stream(self, device: Any) -> Stream:
        return Stream(self, "copies")

    def make_event(self, enable_timing: bool = False) -> Event:
        self.events += 1
        return Event(self, f"e{self.events}")

    def current_stream(self, device: Any) -> Stream:
        return Stream(self, self.current)

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def cudart(self) -> SimpleNamespace:
        return SimpleNamespace(
            cudaHostRegister=self.register,
            cudaHostUnregister=self.unregister,
            cudaGetErrorString=self.error_text,
        )

    def register(self, place: int, nbytes: int, flags: int) -> int:
        if self.refuses:
            return 2
        self.registered[place] = nbytes
        return 0

    def unregister(self, place: int) -> None:
        del self.registered[place]

    def error_text(self, code: int) -> str:
        return f"error {code}"

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def synchronize(self) -> None:
        self.asked.append("the host waits")

    def mem_get_info(self) -> tuple[int, int]:
        return 1, 80 << 30


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_event(self, event: Event) -> None:
        self._cuda.asked.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self._cuda.asked.append(f"the host waits for {self.name}")


class Event:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def record(self, stream: Stream | None = None) -> None:
        name = self._cuda.current if stream is None else stream.name
        self._cuda.asked.append(f"{self.name} behind {name}")

    def elapsed_time(self, end: Event) -> float:
        return 2.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", made.make_stream)
    monkeypatch.setattr(torch.cuda, "Event", made.make_event)
    for name in (
        *("current_stream", "stream", "cudart", "is_available", "current_device", "synchronize"),
        "mem_get_info",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def blocks(count: int) -> list[Block]:
    return [Block({"w": Weight.of(torch.full([3], float(n)))}) for n in range(count)]


def test_a_step_orders_the_streams_by_events_and_waits_for_neither(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = torch.Tensor.copy_

    def copied(target: Any, source: Any, non_blocking: bool = False) -> Any:
        if non_blocking:
            cuda.asked.append(f"copy on {cuda.current}")
        return copy(target, source)

    ahead = DeviceAhead(blocks(3), CudaCopies(CPU), 2)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    for index in range(3):
        with ahead.item(index) as weights:
            cuda.asked.append(f"read {weights['w'][0]:.0f}")
    assert cuda.asked == [
        *("e1 behind compute", "copies waits for e1", "copy on copies", "e2 behind copies"),
        *("copies waits for e1", "copy on copies", "e3 behind copies"),
        *("compute waits for e2", "read 0", "e4 behind compute"),
        *("copies waits for e4", "copy on copies", "e5 behind copies"),
        *("compute waits for e3", "read 1", "e6 behind compute"),
        *("copies waits for e6", "copy on copies", "e7 behind copies"),
        *("compute waits for e5", "read 2", "e8 behind compute"),
        *("copies waits for e8", "copy on copies", "e9 behind copies"),
    ]


def test_memory_of_the_host_is_locked_by_whole_pages_and_let_go(cuda: Cuda) -> None:
    copies = CudaCopies(CPU)
    memory, reason = copies.on_host(5000)
    assert (memory.numel(), memory.dtype, reason) == (5000, torch.uint8, "")
    assert cuda.registered == {memory.data_ptr(): 8192} and memory.data_ptr() % 4096 == 0
    copies.close()
    assert not cuda.registered and cuda.asked == ["the host waits for copies"]
    copies.on_host(100)
    del copies
    assert not cuda.registered, "what is forgotten lets go too"


def test_memory_that_cannot_be_locked_says_why(cuda: Cuda) -> None:
    cuda.refuses = True
    copies = CudaCopies(CPU)
    memory, reason = copies.on_host(5000)
    assert reason == "error 2" and memory.numel() == 5000
    copies.close()


def test_want_of_memory_on_the_device_is_einfolds_error(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    copies = CudaCopies(CPU)
    monkeypatch.setattr(cuda_copies.torch, "empty", none)
    with pytest.raises(OutOfMemoryError, match="the device has no 7 bytes left"):
        copies.on_device(7)


def test_a_gpu_is_measured_by_events_around_copies(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LINK", "_MEMORY"):
        monkeypatch.setattr(gpu_probe, name, 1 << 20)
    monkeypatch.setattr(torch, "device", lambda *given: CPU)
    assert gpu_probe.measured_gpu() == (80 << 30, 2 * (1 << 20) / 0.002, (1 << 20) / 0.002)
    assert not cuda.registered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_probe.measured_gpu() is None
