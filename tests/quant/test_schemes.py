"""The product's own schemes go through what holds for every scheme."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from einfold.compiler.ir.quant.scheme import PRESETS, SCHEMES, Scheme, read_scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.k_quants import KQuant
from einfold.compiler.ir.quant.schemes.qlora import NF4
from einfold.compiler.ir.quant.schemes.qserve import QServe
from einfold.compiler.ir.quant.schemes.small_floats import FP6, FP8
from einfold.compiler.ir.quant.schemes.ternary import Ternary
from einfold.errors import IRError

from . import common
from .test_structured import OWN as STRUCTURED

OWN: list[Scheme] = [
    *(
        preset.scheme
        for preset in PRESETS.values()
        if preset.scheme is not None and preset.scheme not in STRUCTURED
    ),
    Grouped(4, 16, symmetric=False),
    Grouped(8, 64, symmetric=False),
    Grouped(2, 32, symmetric=False),
    Grouped(2, 16, symmetric=False, scales="f16"),
    Grouped(3, 16, symmetric=False, scales="q8"),
    Grouped(4, 0, scales="q8"),
    Grouped(6, 32, symmetric=False, scales="f16"),
    Grouped(5, 16),
    FP6(mantissa=2, block=32),
    QServe(block=16),
    Ternary(block=64),
    *(KQuant(bits) for bits in (2, 3, 5, 6)),
]


def has_block(scheme: Scheme | None) -> bool:
    return isinstance(getattr(getattr(scheme, "coded", None), "block", None), int) and any(
        field.name in ("block", "base")
        for field in fields(scheme)  # type: ignore[arg-type]
    )


def test_every_scheme_is_tried() -> None:
    assert {type(scheme) for scheme in (*OWN, *STRUCTURED)} == set(SCHEMES.values())
    integers = ["int8", "int6", "int5", "int4", "int3", "int2"]
    others = {*PRESETS} - {"fp32", "fp16", *integers}
    assert list(PRESETS) == ["fp32", "fp16", *integers, *sorted(others)]


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_text_bytes_and_graph(scheme: Scheme) -> None:
    common.check_text(scheme)
    common.check_bytes(scheme)
    common.check_graph(scheme)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_onnx(scheme: Scheme, flavour: str, tmp_path: Path) -> None:
    reason = common.check_onnx(scheme, flavour, tmp_path)
    two_bits = "quantized_linear" in scheme.operators.values() and scheme.adapted(bits=2) == scheme
    assert ("no 2-bit weights" in reason) == (two_bits and flavour == "portable")
    assert not reason or two_bits or "odd number of groups" in reason


@pytest.mark.parametrize("name", list(PRESETS))
def test_recipe(name: str) -> None:
    common.check_recipe(PRESETS[name])


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Grouped, {"bits": 7}, "have 2, 3, 4, 5, 6, 8 bits, not 7"),
        (Grouped, {"block": 48}, "power of two from 16 to 65536, or 0 for whole rows, not 48"),
        (Grouped, {"block": 8}, "not 8"),
        (Grouped, {"block": 1 << 40}, "not 1099511627776"),  # to which every row would be padded
        (Grouped, {"scales": "f8"}, "in f32, f16, q8, not in 'f8'"),
        (NF4, {"block": 48}, "power of two"),
        (QServe, {"block": 0}, "the block must be that of groups within a row, such as 128, not 0"),
        (FP8, {"block": -16}, "power of two"),
        (FP6, {"mantissa": 4}, "2 or 3 bits of mantissa, not 4"),
        (KQuant, {"bits": 8}, "2, 3, 4, 5, 6 bits, not 8"),
        (Ternary, {"block": 16}, "power of two from 32 to 65536, or 0 for one scale, not 16"),
    ],
)
def test_impossible_options(kind: type[Scheme], options: dict[str, Any], says: str) -> None:
    with pytest.raises(IRError, match=says):
        kind(**options)


@pytest.mark.parametrize("block", [-1, 0, 1, 17, 1 << 20, 1 << 62])
@pytest.mark.parametrize("name", [n for n, preset in PRESETS.items() if has_block(preset.scheme)])
def test_blocks_that_no_format_has(name: str, block: int) -> None:
    """0 stands for whole rows, or one scale, where a format has these."""
    scheme = PRESETS[name].scheme
    assert scheme is not None
    if block == 0 and name not in ("planes", "qserve"):
        assert scheme.adapted(block=0).nbytes((4, 600)) > 0
        return
    with pytest.raises(IRError, match=f"the block must be .*, not {block}"):
        scheme.adapted(block=block)


@pytest.mark.parametrize(
    "text", ["grouped(bits=4", "nothing", "grouped(bits=4,bytes=2)", "half(x=1)", ""]
)
def test_texts_of_no_scheme(text: str) -> None:
    with pytest.raises(IRError):
        read_scheme(text)
