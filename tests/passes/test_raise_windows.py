"""raise_windows: a convolution along time becomes a linear over windows; one of many taps stays."""

from __future__ import annotations

import pytest
import torch

from einfold.compiler.ir.printer import print_program
from einfold.compiler.passes.raising.raise_windows import RaiseWindows

from ..programs import program, run

TEXT = """
    weight @w : f32[5, 3, TAPS]
    weight @b : f32[5]
    input %x "x" : f32[B, 3, 12]
    read %w "w" : f32[5, 3, TAPS]
    read %b "b" : f32[5]
    call %y = aten.conv1d.default(%x, %w, %b, [STRIDE], [PAD], [APART]) : f32[B, 5, COUNT]
    output "y" = %y
"""


def text(**sizes: int) -> str:
    found = TEXT
    for name, size in sizes.items():
        found = found.replace(name, str(size))
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {"TAPS": 3, "STRIDE": 1, "PAD": 1, "APART": 1, "COUNT": 12},
        {"TAPS": 3, "STRIDE": 2, "PAD": 1, "APART": 1, "COUNT": 6},
        {"TAPS": 4, "STRIDE": 3, "PAD": 0, "APART": 2, "COUNT": 2},
        {"TAPS": 1, "STRIDE": 1, "PAD": 0, "APART": 1, "COUNT": 12},
    ],
)
def test_few_taps_are_a_linear(sizes: dict[str, int]) -> None:
    found = program(text(**sizes))
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    want = run(found, x=x)["y"]
    assert RaiseWindows().run(found).changed
    printed = print_program(found)
    assert "conv1d" not in printed and f": f32[B, 5, {sizes['COUNT']}]" in printed
    assert "aten.linear" in printed
    torch.testing.assert_close(run(found, x=x)["y"], want)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("TAPS", "9"), "9 taps, more than 8"),
        (("[B, 3, 12]", "[B, 3, S]"), "known only at run time"),
        (("[5, 3, TAPS]", "[5, 1, TAPS]"), "in groups"),
    ],
)
def test_others_stay(change: tuple[str, str], reason: str) -> None:
    body = TEXT.replace(*change)
    if reason == "in groups":
        body = (
            body.replace("[APART])", "[APART], 3)").replace("[5, 1", "[6, 1").replace("[5]", "[6]")
        )
        body = body.replace("[B, 5", "[B, 6")
    count = {"9 taps, more than 8": "4"}.get(reason, "S - 2" if "run time" in reason else "10")
    for name, size in (("TAPS", "3"), ("STRIDE", "1"), ("PAD", "0"), ("APART", "1")):
        body = body.replace(name, size)
    found = program(body.replace("COUNT", count))
    result = RaiseWindows().run(found)
    assert not result.changed
    assert reason in result.notes[0].what
