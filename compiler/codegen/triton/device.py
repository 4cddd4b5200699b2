"""The device that kernels run on: a CUDA device, or the CPU in Triton's interpreter."""

from __future__ import annotations

import os
from importlib import util

import torch

from ....errors import UnsupportedError
from .options import DEVICES, Device


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def without_kernels(kind: str) -> str:
    """Why no kernel runs on a device of this kind ("cpu", "cuda", ..), or "".

    Nothing runs on "meta" at all: kernels are generated for it as for a GPU, to see what they would give.
    """
    if kind not in ("cuda", "meta") and not (kind == "cpu" and interpreting()):
        return f"there are no kernels for {kind}"
    if util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'einfold[triton]'"
    return ""


def find_device() -> torch.device:
    """The device for kernels: the CPU under TRITON_INTERPRET=1, else the CUDA device."""
    if interpreting():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise UnsupportedError(
        "this artifact was compiled for Triton, which needs a CUDA device, and there is none here; "
        "run it with --engine reference (slow), or compile for onnx"
    )


def planned_device() -> torch.device:
    """The device that memory is planned for: the CUDA device, or where there is none one without numbers, for
    which no product is cut into parts to fill it."""
    return torch.device("meta") if free_memory() is None else find_device()


def free_memory() -> int | None:
    """Bytes of memory that the CUDA device has free; None where kernels run without one."""
    if interpreting() or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0])


def described(device: torch.device) -> Device:
    """What the choice of tiles must know of the device; where there is none, of a usual one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEVICES[90]
    found = torch.cuda.get_device_properties(device)
    return Device(
        found.major * 10 + found.minor,
        # What a block may ask for; the smaller figure is what it has without asking.
        int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)),
        found.multi_processor_count,
    )
