"""What a kernel can be asked to be, and the device that its tiles are chosen for."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """What the choice of tiles needs to know of a GPU: bytes and counts a multiprocessor.

    Source: the CUDA programming guide's table of compute capabilities.
    """

    capability: int
    shared_bytes: int
    multiprocessors: int
    registers: int = 65536
    registers_a_thread: int = 255

    @property
    def asynchronous(self) -> bool:
        """Whether matrix instructions read shared memory (wgmma, tcgen05); a GeForce of 12.0 has mma.sync."""
        return 90 <= self.capability < 120


#: Shared memory is what one block may have; multiprocessors are those of A100, H100 and B200.
DEVICES = {
    80: Device(80, 163 * 1024, 108),
    90: Device(90, 227 * 1024, 132),
    100: Device(100, 227 * 1024, 148),
}


@dataclass(frozen=True)
class Tiles:
    """Rows and streamed coordinates a tile, and how the compiler shares them out."""

    rows: int
    stream: int
    warps: int = 4
    stages: int = 2


def merge_tiles(tiles: Tiles) -> Tiles:
    """Tiles of a merge: few rows a program, since there are as many programs as that leaves."""
    return Tiles(min(tiles.rows, 16), 0, 4, 1)


@dataclass(frozen=True)
class Options:
    """How a plan becomes a kernel.

    `lazy` renews a free reference only when its source has moved by more than this; `static` takes the
    plan's static references; `precision` is for products of float32: "ieee" or "tf32x3". `tiles` are
    chosen by the cost model where they are not given.
    """

    lazy: float | None = None
    static: bool = False
    precision: str = "ieee"
    base_two: bool = True
    tiles: Tiles | None = None
    device: Device = field(default=DEVICES[90])
