"""Steps captured as CUDA graphs: a step's launches go out by one call. It has never run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class CudaGraphs:
    """The `Capture` of memory/captured.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Raises RuntimeError where the run waits for the device, or asks for what tensors hold."""
        graph = torch.cuda.CUDAGraph()
        # Torch leaves its own stream current where a capture fails. What other threads ask of CUDA meanwhile
        # is none of it, so their calls need not fail.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay
