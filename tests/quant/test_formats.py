"""What each format promises of its own: errors within a bound of its own, tables, what no scale can hold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einfold.compiler.ir.quant.levels import Levels, float_levels
from einfold.compiler.ir.quant.pack import pack_planes, unpack_planes
from einfold.compiler.ir.quant.scheme import PRESETS, Scheme, read_scheme
from einfold.compiler.ir.quant.schemes.grouped import SUPER, Grouped
from einfold.compiler.ir.quant.schemes.microscaling import E4M3, MXFP4, NVFP4, POWERS
from einfold.compiler.ir.quant.schemes.qlora import FP4, NF4
from einfold.compiler.ir.quant.schemes.small_floats import FP6, FP8
from einfold.compiler.passes.weight_quant.quantize_weights import QuantizeWeights
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import ModelError

from ..programs import program
from .common import LINEAR, restored

FORMATS: list[Scheme] = [
    *(Grouped(bits) for bits in (8, 6, 5, 4, 3, 2)),
    Grouped(3, 16, symmetric=False, scales="f16"),
    Grouped(5, 0, scales="q8"),
    Grouped(4, 32, symmetric=False, scales="q8"),
    *(p.scheme for p in PRESETS.values() if isinstance(p.scheme, Levels)),
    read_scheme("ternary(block=64)"),
]


def largest_gap(scheme: Scheme) -> float:
    """The farthest that a weight may be from a level, as a share of the largest weight of its group."""
    if isinstance(scheme, Grouped):
        # Half a step; where the scale is symmetric the other end of the range lacks one level.
        step = 1 / ((1 << scheme.bits) - 1) if not scheme.symmetric else 2 / (1 << scheme.bits)
        return step * (1.5 if not scheme.symmetric else 1.0)
    if isinstance(scheme, MXFP4):
        return 0.25  # from 6 to 8, which are cut; halfway between 4 and 6 is less
    if isinstance(scheme, Levels):
        levels = sorted(set(scheme.levels))
        return max(b - a for a, b in pairwise(levels)) / 2 / max(levels)
    return 1.0  # ternary: from the mean to the largest


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Rows of many sizes, with groups of zeros and outliers; none so small that a float16 scale is coarse."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, width, generator=generator) * 10.0 ** draw(st.integers(-1, 3))
    weight[:, : draw(st.integers(0, width))] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    return weight


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
@settings(max_examples=15, deadline=None)
@given(weight=weights())
def test_errors_stay_within_the_bound_of_the_format(scheme: Scheme, weight: torch.Tensor) -> None:
    back = restored(weight, scheme)
    assert bool(back.isfinite().all())
    groups = scheme.groups(weight)
    off = (scheme.groups(back) - groups).abs()
    bound = largest_gap(scheme) * groups.abs().amax(-1, keepdim=True)
    slack = 1.0 + 2.0**-4 * (scheme == NVFP4()) + 2.0**-10
    bound = bound * slack + 2.0**-13 * bound.amax()  # scales in 8 bits of short floats
    if "q8" in str(scheme):
        # A scale is off by half of a 127th of the largest beside it, for each of the steps that a code takes.
        unit = scheme.grid(groups)["scales"].abs().amax(1, keepdim=True) / 127
        bound = bound + 0.5 * unit * (1 << scheme.bits)  # type: ignore[attr-defined]
    assert bool((off <= bound).all())
    again = RoundToNearest().solve(back, scheme, {})
    if isinstance(scheme, (FP8, FP6, NF4, FP4)):
        assert again.error == pytest.approx(0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 0), (2, 0)]),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_planes_hold_every_code_densely(bits: tuple[int, int], count: int, seed: int) -> None:
    high, low = bits
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << (high + low), (3, 8 * count), generator=generator).to(torch.uint8)
    found = pack_planes(codes, high, low, ("packed", "low"))
    assert sum(plane.nbytes for plane in found.values()) == 3 * count * (high + low)
    if low:
        back = unpack_planes(found["packed"], found["low"], high, low, 8 * count)
        assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize(("block", "padded"), [(16, 576), (128, 640), (0, 576)])
def test_padding_is_accounted(bits: int, block: int, padded: int) -> None:
    """576 numbers in blocks of 128: five of them."""
    groups = padded // (block or padded)
    assert Grouped(bits, block).nbytes((3, 576)) == 3 * (padded * bits // 8 + 4 * groups)
    assert Grouped(bits, block, scales="f16").nbytes((3, 576)) == 3 * (
        padded * bits // 8 + 2 * groups
    )
    units = math.ceil(groups / SUPER)
    q8 = Grouped(bits, block, scales="q8").nbytes((3, 576))
    assert q8 == 3 * (padded * bits // 8 + groups + 4 * units)


@pytest.mark.parametrize("size", [1e-30, 3e-8, 1e-6, 1e5, 3e38])
@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_scales_that_do_not_fit_are_finite(scheme: Scheme, size: float) -> None:
    weight = torch.linspace(-1, 1, 192).reshape(2, 96) * size
    weight[0, :32] = 0
    back = restored(weight, scheme)
    assert bool(back.isfinite().all())
    assert float(back.abs().max()) <= 1.5 * size * 2 or "f16" in str(scheme)
    assert bool((back[0, :32] == 0).all()) or "q8" in str(scheme) or scheme.name == "ternary"


def test_quantized_scales_lose_little() -> None:
    weight = torch.randn(64, 896, generator=torch.Generator().manual_seed(0))

    def error(scheme: Scheme) -> float:
        return float((restored(weight, scheme) - weight).norm() / weight.norm())

    for scales in ("f16", "q8"):
        assert error(Grouped(4, scales=scales)) < 1.005 * error(Grouped(4))
    assert 2.1 * error(FP6()) > error(FP6(mantissa=2)) > 1.8 * error(FP6())


def test_tables() -> None:
    """Against torch's own types, and what the formats' papers say of them."""
    codes = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        torch.tensor(E4M3), codes.view(torch.float8_e4m3fn).float(), equal_nan=True
    )
    torch.testing.assert_close(
        torch.tensor(POWERS), codes.view(torch.float8_e8m0fnu).float(), equal_nan=True
    )
    assert float_levels(2, 1)[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert max(float_levels(2, 3)) == 7.5 and max(float_levels(3, 2)) == 28.0
    assert len(set(NF4().levels)) == 16 and len(set(FP4().levels)) == 15


def test_mxfp4_scale_is_that_of_the_specification() -> None:
    weight = torch.zeros(3, 32)
    weight[0, 0], weight[1, 0], weight[2, 0] = 6.0, -7.9, 8.0
    found = RoundToNearest().solve(weight, MXFP4(), {}).pieces
    assert found["scales"].flatten().tolist() == [127, 127, 128]
    assert MXFP4().dequantize(found, 32)[:, 0].tolist() == [6.0, -6.0, 8.0]


def test_nvfp4_keeps_one_scale_for_a_stack() -> None:
    weight = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    weight[1] *= 100
    found = RoundToNearest().solve(weight, NVFP4(), {}).pieces
    assert found["scale"].shape == (1,)
    assert float(found["scale"]) == pytest.approx(float(weight.abs().max()) / (6 * 448))
    one = NVFP4().dequantize(NVFP4().chosen(found, 2), 40)
    assert torch.equal(one, NVFP4().dequantize(found, 40)[2])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused_by_name(number: float) -> None:
    found = program(LINEAR)
    broken = found.weights["u.weight"].load().clone()
    broken[3, 5] = number
    from einfold.compiler.ir.weights import Weight

    found.weights.restore({"u.weight": Weight.of(broken)})
    QuantizeWeights(Grouped(4)).run(found)
    with pytest.raises(ModelError, match=r"the weight u\.weight has numbers that are infinite"):
        found.weights["u.packed"].load()
    assert bool(found.weights["e.scales"].load().isfinite().all())
