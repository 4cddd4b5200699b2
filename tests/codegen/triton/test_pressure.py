"""The estimate of registers beside what the assembler said: which tiles spill, and which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.aot_artifacts import kinds_of
from einfold.compiler.codegen.triton.attention.kernels import attention_kernel
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.kernel import Kernel
from einfold.compiler.codegen.triton.options import DEVICES, Device, Options, Tiles
from einfold.compiler.codegen.triton.pressure import holds
from einfold.compiler.codegen.triton.tiles import fits

from .test_plans import report_of

MOMENTS = "mean and variance under the attention"
CAUSAL = "linear attention, causal"
#: Form, type, precision, capability, tile, and the bytes that Triton 3.9 spills there at head size 128.
MEASURED = [
    ("softmax", "fp16", "ieee", 80, Tiles(128, 64, 8, 3), 8),
    ("softmax", "fp16", "ieee", 90, Tiles(128, 64, 8, 3), 0),
    ("softmax", "fp16", "ieee", 100, Tiles(128, 64, 8, 3), 0),
    (MOMENTS, "fp16", "ieee", 80, Tiles(64, 32, 8, 3), 636),
    (MOMENTS, "fp16", "ieee", 90, Tiles(64, 32, 8, 3), 2204),
    (MOMENTS, "fp16", "ieee", 100, Tiles(64, 32, 8, 3), 332),
    (MOMENTS, "fp16", "ieee", 90, Tiles(64, 16, 8, 2), 2100),
    (MOMENTS, "fp16", "ieee", 80, Tiles(32, 32, 4, 2), 456),
    (MOMENTS, "fp16", "ieee", 90, Tiles(32, 32, 8, 3), 0),
    ("softmax", "fp32", "tf32x3", 80, Tiles(128, 32, 8, 2), 11056),
    ("softmax", "fp32", "tf32x3", 80, Tiles(32, 32, 8, 3), 0),
    ("softmax", "fp32", "tf32x3", 90, Tiles(128, 32, 8, 3), 124),
    ("softmax", "fp32", "tf32x3", 90, Tiles(128, 16, 8, 3), 36),
    ("softmax", "fp32", "tf32x3", 100, Tiles(128, 16, 8, 2), 1348),
    ("softmax", "fp32", "tf32x3", 100, Tiles(64, 64, 8, 2), 220),
    ("softmax", "fp32", "tf32x3", 100, Tiles(64, 16, 8, 3), 52),
    ("softmax", "fp32", "ieee", 80, Tiles(128, 32, 8, 2), 15108),
    ("softmax", "fp32", "ieee", 90, Tiles(128, 16, 8, 3), 20),
    (CAUSAL, "fp32", "ieee", 80, Tiles(32, 16, 8, 2), 304),
    (CAUSAL, "fp32", "ieee", 80, Tiles(16, 16, 8, 3), 0),
]


def wide(form: str, real: str, precision: str, device: Device, cache: Path) -> Kernel:
    """The kernel of a form with head size 128 and a prefill of 4,096 tokens."""
    report = report_of(form, cache)
    (plan,) = report.folding.plans
    types = dict.fromkeys(plan.inputs, real)
    options = Options(device=device, precision=precision)
    roles = generate(plan, types, report.imported.sizes, options).division.roles
    sizes = {**report.imported.sizes, **dict.fromkeys(roles.lanes, 128)}
    sizes |= dict.fromkeys([roles.stream, *roles.rows], 4096)
    return generate(plan, types, sizes, options)


@pytest.mark.parametrize(
    ("form", "real", "precision", "capability", "tile", "spills"),
    MEASURED,
    ids=[f"{m[0]}-{m[2]}-{m[3]}-{m[4].rows}x{m[4].stream}x{m[4].warps}" for m in MEASURED],
)
def test_tiles_that_spill_are_not_taken(
    form: str,
    real: str,
    precision: str,
    capability: int,
    tile: Tiles,
    spills: int,
    plan_cache: Path,
) -> None:
    device = DEVICES[capability]
    kernel = wide(form, real, precision, device, plan_cache)
    found = holds(kernel.division, kernel.types, kernel.sizes, kernel.demand, device, tile)
    assert found == (spills <= 64)


def test_a_geforce_has_the_older_instruction_and_less_shared_memory(plan_cache: Path) -> None:
    device = Device(120, 99 * 1024, 170)
    kernel = wide("softmax", "fp16", "ieee", device, plan_cache)
    assert not device.asynchronous and DEVICES[100].asynchronous
    assert kernel.tiles.rows >= 64
    assert fits(kernel.division, kernel.types, kernel.sizes, kernel.demand, device, kernel.tiles)
    # Sides that pass through registers, three of them for each, take more than sides in shared memory.
    exact = wide("softmax", "fp32", "tf32x3", DEVICES[90], plan_cache)
    given = exact.division, exact.types, exact.sizes, exact.demand
    assert holds(*given, DEVICES[90], Tiles(128, 16, 8, 3))
    assert not holds(*given, device, Tiles(128, 16, 8, 3))


@pytest.mark.parametrize(
    ("kind", "head", "capability", "tile", "spills"),
    [
        ("float32", 64, 90, Tiles(128, 64, 8, 3), 68),
        ("sinks in a window", 64, 90, Tiles(128, 32, 8, 3), 0),
        ("KIVI, 4 bits", 64, 90, Tiles(128, 64, 8, 3), 132),
        ("KIVI, 4 bits", 64, 90, Tiles(128, 32, 8, 3), 0),
        ("GEAR", 64, 90, Tiles(128, 32, 8, 3), 72),
        ("GEAR", 64, 90, Tiles(128, 16, 8, 3), 0),
        ("GEAR", 64, 100, Tiles(64, 32, 8, 3), 0),
        ("KIVI, 4 bits", 128, 90, Tiles(64, 16, 8, 3), 132),
        ("KIVI, 4 bits", 128, 90, Tiles(128, 16, 8, 3), 48),
        ("MiKV, high bits", 128, 90, Tiles(128, 16, 8, 3), 36),
        ("GEAR", 128, 90, Tiles(64, 16, 8, 3), 328),
        ("GEAR", 128, 80, Tiles(32, 16, 8, 2), 100),
        ("GEAR", 128, 80, Tiles(16, 16, 4, 2), 0),
        ("float32", 256, 80, Tiles(16, 16, 4, 2), 248),
    ],
)
def test_tiles_of_artifacts_that_spill_are_not_taken(
    kind: str, head: int, capability: int, tile: Tiles, spills: int, plan_cache: Path
) -> None:
    """Grouped queries in float32 as tf32x3, over float32 and over codes."""
    device = DEVICES[capability]
    made = attention_kernel(kinds_of(head)[kind], "tested", (0,), 4096, device, plan_cache).kernel
    found = holds(made.division, made.types, made.sizes, made.demand, device, tile)
    assert found == (spills <= 64)


def test_where_no_tile_holds_the_rows_are_few_and_the_warps_many(plan_cache: Path) -> None:
    """Half the warps would spill 196 bytes instead of 84 on sm_80, three times as many on sm_90."""
    made = attention_kernel(kinds_of(256)["float32"], "tested", (0,), 4096, DEVICES[80], plan_cache)
    assert made.kernel.tiles == made.decode == Tiles(16, 16, 8, 1)
