"""raise_patches: a convolution over patches becomes a linear; one whose windows overlap stays."""

from __future__ import annotations

import pytest
import torch

from einfold.compiler.ir.printer import print_program
from einfold.compiler.passes.raising.raise_patches import RaisePatches

from ..programs import program, run

TEXT = """
    weight @w : f32[5, 3, 4, 2]
    weight @b : f32[5]
    input %x "x" : f32[B, 3, 8, 6]
    read %w "w" : f32[5, 3, 4, 2]
    read %b "b" : f32[5]
    call %y = aten.conv2d.default(%x, %w, %b, STRIDE) : f32[B, 5, ROWS, COLUMNS]
    output "y" = %y
"""


def text(stride: str, rows: int, columns: int) -> str:
    return (
        TEXT.replace("STRIDE", stride).replace("ROWS", str(rows)).replace("COLUMNS", str(columns))
    )


def test_windows_side_by_side_are_a_linear() -> None:
    found = program(text("[4, 2]", 2, 3))
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    want = run(found, x=x)["y"]
    result = RaisePatches().run(found)
    assert result.changed
    printed = print_program(found)
    assert "conv2d" not in printed and "aten.linear" in printed and ": f32[B, 5, 2, 3]" in printed
    torch.testing.assert_close(run(found, x=x)["y"], want)


@pytest.mark.parametrize(
    ("stride", "rows", "columns", "reason"),
    [
        ("[2, 2]", 3, 3, "do not lie side by side"),
        ("[4, 2], [2, 0]", 3, 3, "do not lie side by side"),
        ("[4, 2], [0, 0], [1, 2]", 2, 2, "do not lie side by side"),
    ],
)
def test_windows_that_overlap_or_leave_out_stay(
    stride: str, rows: int, columns: int, reason: str
) -> None:
    found = program(text(stride, rows, columns))
    result = RaisePatches().run(found)
    assert not result.changed
    assert reason in result.notes[0].what
