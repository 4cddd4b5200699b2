"""A small search over the tiles that the cost model thinks best, timed where the kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ....errors import stop_on
from .kernel import Kernel
from .launch import launch
from .options import Tiles
from .tiles import candidates, cost, fits

Measure = Callable[[Callable[[], object]], float]


def shortlist(kernel: Kernel, sizes: Mapping[str, int], count: int = 6) -> list[Tiles]:
    """The `count` cheapest tiles that fit, by the model, for sizes of a launch."""
    division, device = kernel.division, kernel.options.device
    known = {**kernel.sizes, **sizes}
    found = [
        (cost(division, kernel.types, known, tile), at, tile)
        for at, tile in enumerate(candidates())
        if fits(division, kernel.types, known, kernel.demand, device, tile)
    ]
    return [tile for _, _, tile in sorted(found)[:count]] or [kernel.tiles]


def autotune(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    measure: Measure,
    *,
    sizes: Mapping[str, int] | None = None,
    count: int = 6,
) -> tuple[Tiles, float]:
    """The fastest tiles of the shortlist for these inputs, and their time in the unit of `measure`.

    Tiles that a device refuses (for want of shared memory, say) are passed over; where it refuses all,
    the model's choice is returned with an infinite time.
    """
    shown = dict(sizes or {})
    for name, tensor in kernel.plan.inputs.items():
        shown.update(zip(tensor.ranks, inputs[name].shape, strict=True))
    best = (kernel.tiles, float("inf"))
    for tile in shortlist(kernel, shown, count):

        def run(tile: Tiles = tile) -> object:
            return launch(kernel, inputs, tiles=tile, sizes=sizes)

        try:
            run()
            taken = measure(run)
        except Exception as error:
            stop_on(error)
            # What Triton raises for a tile that does not fit differs between versions.
            continue
        if taken < best[1]:
            best = (tile, taken)
    return best
