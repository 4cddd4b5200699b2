from __future__ import annotations

from einfold.compiler.ir.diff import diff_text
from einfold.compiler.ir.printer import print_program

from ..programs import program

A = """
    input %x "x" : f32[B, 4]
    call %y = aten.neg.default(%x) : f32[B, 4]
    output "y" = %y
"""


def test_equal_programs_have_no_difference() -> None:
    text = print_program(program(A))
    found = diff_text(text, text)
    assert found.same
    assert not found.counts


def test_a_change_is_counted_and_shown() -> None:
    found = diff_text(print_program(program(A)), print_program(program(A.replace("neg", "exp"))))
    assert found.counts == {"aten.exp.default": (0, 1), "aten.neg.default": (1, 0)}
    assert any(line.startswith("+call") and "aten.exp" in line for line in found.lines)
