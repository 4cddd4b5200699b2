"""A scheme that lives wholly here passes what every scheme passes; the product knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.pack import pack_bits, unpack_bits
from einfold.compiler.ir.quant.scheme import PRESETS, SCHEMES, Piece, Preset, Scheme, read_scheme
from einfold.errors import IRError

from ..programs import calls
from . import common


@dataclass(frozen=True)
class Ternary(Scheme):
    """-s, 0 or s in 2 bits; s, in float16, is the mean magnitude in a group of what is not 0."""

    group: int = 8

    name = "toy_trits"

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        lead, groups = shape[:-1], -(-shape[-1] // self.group)
        return {
            "trits": ((*lead, groups, self.group // 4), "u8"),
            "scale": ((*lead, groups), "f16"),
        }

    def groups(self, rows_RM: Tensor) -> Tensor:
        padded = functional.pad(rows_RM, (0, -rows_RM.shape[-1] % self.group))
        return padded.unflatten(-1, (-1, self.group))

    def grid(self, groups_RGB: Tensor) -> dict[str, Tensor]:
        size = groups_RGB.abs().sum(-1, keepdim=True)
        return {
            "scale": (size / (groups_RGB != 0).sum(-1, keepdim=True).clamp(min=1)).clamp(min=1e-4)
        }

    def nearest(self, groups_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return (groups_RGB / grid["scale"]).round().clamp(-1, 1) + 1

    def settle(self, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"scale": grid["scale"].half().float()}

    def values(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        return (codes_RGB - 1) * grid["scale"]

    def pack(self, codes_RGB: Tensor, grid: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"trits": pack_bits(codes_RGB, 2), "scale": grid["scale"].squeeze(-1).half()}

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        trits = unpack_bits(pieces["trits"], 2, self.group).float() - 1
        return (trits * pieces["scale"].float()[..., None]).flatten(-2)[..., :width]


TOY = Preset("ternary8", Ternary(), float("inf"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with SCHEMES.with_one_more(Ternary), PRESETS.with_one_more(TOY):
        yield


@pytest.mark.parametrize("scheme", [Ternary(), Ternary(group=16)], ids=str)
def test_text_bytes_and_graph(scheme: Ternary) -> None:
    common.check_text(scheme)
    common.check_bytes(scheme)
    common.check_graph(scheme)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_onnx(flavour: str, tmp_path: Path) -> None:
    assert common.check_onnx(Ternary(), flavour, tmp_path) == ""


def test_recipe() -> None:
    common.check_recipe(TOY)


def test_pieces_are_read_as_they_are_stored_or_widened() -> None:
    found: Program = common.stored(Ternary())
    told = [call for call in calls(found) if '"toy_trits(group=8)", [600, 40])' in call]
    assert [call.partition("(")[0] for call in told] == [
        "einfold.stored_embedding",
        "einfold.stored_linear",
    ]  # head and embedding share
    assert [call.partition("(")[0] for call in calls(found) if "experts" in call] == [
        "einfold.stored_experts"
    ]
    assert not any(call.startswith("einfold.dequantize") for call in calls(found))
    assert found.weights["e.trits"].dtype == torch.uint8


def test_pieces_that_are_none_of_the_scheme_are_refused() -> None:
    wrong = [torch.zeros(2, 1, 2, dtype=torch.uint8), torch.zeros(2, 1)]
    with pytest.raises(IRError, match="has other pieces than these"):
        torch.ops.einfold.dequantize(
            [piece.to("meta") for piece in wrong], "toy_trits(group=8)", [2, 8]
        )


def test_without_registration_it_is_unknown() -> None:
    del SCHEMES._found["toy_trits"]
    try:
        with pytest.raises(IRError, match="unknown weight scheme 'toy_trits"):
            read_scheme("toy_trits(group=8)")
    finally:
        SCHEMES.register(Ternary)
