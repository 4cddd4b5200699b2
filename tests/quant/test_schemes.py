"""The product's own schemes go through what holds for every scheme."""

from __future__ import annotations

from pathlib import Path

import pytest

from einfold.compiler.ir.quant.scheme import PRESETS, SCHEMES, Scheme, read_scheme
from einfold.compiler.ir.quant.schemes.grouped import Grouped
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
]


def test_every_scheme_is_tried() -> None:
    assert {type(scheme) for scheme in (*OWN, *STRUCTURED)} == set(SCHEMES.values())
    names = [
        "fp32",
        "fp16",
        "int8",
        "int4",
        "int2",
        "bitmod",
        "lowrank",
        "olive",
        "planes",
        "spqr",
        "trellis",
    ]
    assert list(PRESETS) == names


@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_text_bytes_and_graph(scheme: Scheme) -> None:
    common.check_text(scheme)
    common.check_bytes(scheme)
    common.check_graph(scheme)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("scheme", OWN, ids=str)
def test_onnx(scheme: Scheme, flavour: str, tmp_path: Path) -> None:
    reason = common.check_onnx(scheme, flavour, tmp_path)
    two_bits = isinstance(scheme, Grouped) and scheme.bits == 2
    assert ("no 2-bit weights" in reason) == (two_bits and flavour == "portable")
    assert not reason or two_bits or "odd number of groups" in reason


@pytest.mark.parametrize("name", list(PRESETS))
def test_recipe(name: str) -> None:
    common.check_recipe(PRESETS[name])


@pytest.mark.parametrize("options", [{"bits": 3}, {"block": 48}, {"block": 8}])
def test_impossible_options(options: dict[str, int]) -> None:
    with pytest.raises(IRError):
        Grouped(**options)


@pytest.mark.parametrize(
    "text", ["grouped(bits=4", "nothing", "grouped(bits=4,bytes=2)", "half(x=1)", ""]
)
def test_texts_of_no_scheme(text: str) -> None:
    with pytest.raises(IRError):
        read_scheme(text)
