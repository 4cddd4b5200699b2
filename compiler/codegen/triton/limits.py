"""What compiled kernels may use, by the version of Triton that compiles them and by target.

A version is added with the figures that its own run gives (`make aot`): a new compiler that spills more, or
that loses the matrix instructions of a target, is then seen and not taken for granted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ahead import INSTRUCTIONS, Compiled
from .kernel import Kernel
from .options import DEVICES


@dataclass(frozen=True)
class Limits:
    """Limits of one version on one target: `spills` in bytes a thread, `shared` in bytes a block.

    `matrix` is the instruction that products of at least `rows` rows use; fewer rows may use an older one.
    `wide` is the limit on spills of float32 as tf32x3 at head sizes above 128: the two halves of 16 queries
    of 256 numbers alone are 256 registers, so no tile is small enough there (none is in the loop on sm_80).
    """

    spills: int
    shared: int
    matrix: str
    rows: int = 16
    wide: int = 96

    def spills_of(self, kernel: Kernel) -> int:
        """The limit on spills for this kernel."""
        split = any(product.split for product in kernel.demand.products)
        roles = kernel.division.roles
        lanes = [kernel.sizes[rank] for rank in roles.lanes if rank not in roles.walked]
        return max(self.spills, self.wide if split and max(lanes, default=0) > 128 else 0)


#: By version (major.minor) and capability. Spills on sm_80 are stored ahead of the loop; those on sm_90 and
#: sm_100 come with float32 as tf32x3. 3.6 has more of them at the same tiles: 184 bytes on sm_90 for heads of
#: 128 over int8, 108 on sm_80 for heads of 256, where 3.9 has 76 and 96 at most. The highest of 3.9 are of
#: artifacts at head size 128, where the machine code was looked at: ZipCache on sm_90, 76 bytes, nothing of
#: it in the loop; float32 on sm_100, 120 bytes, of 59 stores and loads one is in the loop.
LIMITS = {
    "3.6": {
        80: Limits(64, DEVICES[80].shared_bytes, "mma.sync", wide=108),
        90: Limits(184, DEVICES[90].shared_bytes, "wgmma.mma_async", 64),
        100: Limits(96, DEVICES[100].shared_bytes, "tcgen05.mma", 64),
    },
    "3.9": {
        80: Limits(64, DEVICES[80].shared_bytes, "mma.sync"),
        90: Limits(80, DEVICES[90].shared_bytes, "wgmma.mma_async", 64),
        100: Limits(128, DEVICES[100].shared_bytes, "tcgen05.mma", 64),
    },
}


def limits_of(version: str, capability: int) -> Limits:
    """The limits for a version of Triton; those of the newest one listed for one that is not."""
    short = ".".join(version.split(".")[:2])
    newest = max(LIMITS, key=lambda name: [int(part) for part in name.split(".")])
    return LIMITS.get(short, LIMITS[newest])[capability]


def exceeded(kernel: Kernel, made: Compiled, limits: Limits) -> list[str]:
    """What of a compiled function is outside its limits, a phrase each; nothing where all is within."""
    found = []
    allowed = limits.spills_of(kernel)
    if made.spills > allowed:
        found.append(f"{made.spills} spilled bytes, {allowed} allowed")
    if made.shared > limits.shared:
        found.append(f"{made.shared} bytes of shared memory, {limits.shared} allowed")
    # Exact float32 has no matrix instruction.
    exact = kernel.dot == "fp32" and kernel.options.precision == "ieee"
    if "tl.dot(" in kernel.functions[made.kind].text and not exact:
        few = made.tiles.rows < limits.rows
        if not any(name in made.matrix for name in (INSTRUCTIONS if few else (limits.matrix,))):
            found.append(f"no {'matrix instruction' if few else limits.matrix}")
    return found
