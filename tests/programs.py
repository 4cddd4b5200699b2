"""Small programs for tests: text in, text out."""

from __future__ import annotations

import re
from typing import Any

import torch

from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.printer import print_program
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.weights import Weight

HEADER = 'einfold.ir 1\nmodel architecture="test" vocabulary=11 context=64 hidden=8\n'


def program(body: str, seed: int = 0, **values: torch.Tensor) -> Program:
    """A program from its body (indented or not); weights are random, or given by name."""
    lines = [line.strip() for line in body.strip().splitlines()]
    generator = torch.Generator().manual_seed(seed)

    def load(name: str, declared: Weight) -> Weight:
        if name in values:
            return Weight.of(values[name])
        if declared.dtype.is_floating_point:
            return Weight.of(torch.randn(declared.shape, generator=generator, dtype=declared.dtype))
        return Weight.of(
            torch.randint(0, 16, declared.shape, generator=generator).to(declared.dtype)
        )

    return parse(HEADER + "\n".join(lines) + "\n", load, any_operator=True)


def calls(found: Program) -> list[str]:
    """The calls of a program, without types and with nodes renamed to %1, %2 .. in order of appearance."""
    names: dict[str, str] = {}
    lines = []
    for line in print_program(found).splitlines():
        if line.startswith(("input", "read")):
            node = line.split()[1]
            names[node] = "%" + re.sub(r'"', "", line.split()[2])
        elif line.startswith("call"):
            lines.append(line.removeprefix("call ").rpartition(" : ")[0])
    result = []
    for line in lines:
        node, _, call = line.partition(" = ")
        call = re.sub(r"%\w+", lambda m: names.get(m.group(), m.group()), call)
        names[node] = f"%{len(result) + 1}"
        result.append(call)
    return result


def run(found: Program, **inputs: Any) -> dict[str, torch.Tensor]:
    """Runs a program by the reference."""
    from einfold.compiler.ir.interpreter import Interpreter

    return Interpreter(found).run(inputs)
