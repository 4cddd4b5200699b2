"""What a machine is, in the numbers that a plan is made with: a TOML file in the user's cache folder."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path

from ...errors import RecipeError, pass_on
from .kept import cache_home


@dataclass(frozen=True)
class Device:
    """Bandwidths in bytes a second, memory in bytes."""

    cores: int = 2
    ram: int = 8 << 30
    ram_bandwidth: float = 20e9
    """Reading memory, by all cores."""
    disk_bandwidth: float = 0.5e9
    """Reading a file past the system's page cache, in order."""
    pack_bandwidth: float = 0.5e9
    """Weights as in the file, brought into the order that the engine computes with."""
    source: str = "defaults"
    """Where the numbers are from: `defaults`, or when they were measured."""
    gpu_memory: int = 24 << 30
    gpu_bandwidth: float = 1e12
    """Reading the GPU's memory."""
    link_bandwidth: float = 24e9
    """Copying from page-locked memory of the machine to the GPU's."""
    gpu_source: str = "defaults"
    """Where the numbers of the GPU are from."""

    def gpu(self) -> Device:
        """The GPU as a device by itself: its memory in the place of the machine's, which stands behind it in
        the place of the disk, at the other end of the link."""
        return replace(
            self,
            ram=self.gpu_memory,
            ram_bandwidth=self.gpu_bandwidth,
            disk_bandwidth=self.link_bandwidth,
            source=self.gpu_source,
        )


#: What is assumed of a machine that was not measured: a laptop's cores over a SATA disk, and of a GPU a card
#: of 24 GiB on sixteen lanes of PCI Express 4.
ASSUMED = Device()


def device_file() -> Path:
    """Where `einfold device probe` writes what it measured."""
    return cache_home() / "device.toml"


def write_device(device: Device, path: Path) -> None:
    """Writes a description, replacing one that is there."""
    lines = [f"{field.name} = {_toml(getattr(device, field.name))}" for field in fields(device)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


def read_device(path: Path | None = None) -> Device | None:
    """The description in a file, or what was measured of this machine; None where it never was.

    Raises RecipeError for a file that is none.
    """
    file = path or device_file()
    if path is None and not file.is_file():
        return None
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        pass_on(error)
        raise RecipeError(f"{file} is no description of a device: {error}") from error
    known = {field.name: field for field in fields(Device)}
    for key, value in found.items():
        if key not in known:
            raise RecipeError(f"{file} has the unknown key {key!r}; known are {', '.join(known)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < inf
        text = known[key].type == "str"
        if not (isinstance(value, str) if text else number):
            wanted = "a text" if text else "a number above 0"
            raise RecipeError(f"{file}: {key} must be {wanted}, not {value!r}")
    return Device(**found)


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
