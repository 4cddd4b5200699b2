"""What the C library keeps of the memory that this process let go of."""

from __future__ import annotations

import ctypes
import os


def give_back() -> None:
    """Gives back to the system what was let go of, which the C library keeps otherwise: 270 MB where
    onnxruntime has brought 100 million 3-bit codes into 4 bits."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc
        trim(0)
