"""What was measured of a region and its lowerings, kept on disk beside the plans.

A measurement holds for the region's text, the class of its sizes, the version of torch and the machine:
the processor and the number of threads, or the GPU. A file is named by the hash of all of these, has them as
text too, and is read as numbers by name; nothing in it is evaluated.
"""

from __future__ import annotations

import hashlib
import math
import platform
from functools import lru_cache
from pathlib import Path

import torch

from ..ir.kept import cache_home, read_json, write_json

#: Part of every key: raised whenever a lowering or the way of measuring changes.
VERSION = 3


def known(key: str, device: torch.device) -> dict[str, float]:
    """Seconds a call by lowering; empty where nothing was measured."""
    text = _text(key, device)
    data = read_json(_path(text)) or {}
    seconds = data.get("seconds")
    if data.get("key") != text or not isinstance(seconds, dict):
        return {}  # absent or of another make: measured again and written anew
    right = all(type(value) is float and 0 < value < math.inf for value in seconds.values())
    return seconds if right else {}


def keep(key: str, device: torch.device, seconds: dict[str, float]) -> None:
    """Remembers a measurement, where the cache's folder can be written."""
    text = _text(key, device)
    write_json(_path(text), {"key": text, "seconds": seconds})


def _path(text: str) -> Path:
    name = hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
    return cache_home() / "choices" / f"{name}.json"


def _text(key: str, device: torch.device) -> str:
    machine = f"{_processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return f"{VERSION}\ntorch {torch.__version__}\n{machine}\n{key}"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return f"{platform.machine()} {model} {torch.backends.cpu.get_cpu_capability()}"
