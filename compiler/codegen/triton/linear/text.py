"""What the texts of kernels share: how they are filled in, and the line that adds a bias."""

from __future__ import annotations

import textwrap
from typing import Any

from .kinds import LinearKind

#: A line that is left out.
_NOTHING = "# -"


def filled_in(text: str, **parts: Any) -> str:
    """A text with its parts, without the lines that stand for nothing."""
    lines = text.format(**parts).split("\n")
    return "\n".join(line for line in lines if line.strip() != _NOTHING)


def indented(lines: list[str], spaces: int) -> str:
    """Lines within a text."""
    return textwrap.indent("\n".join(lines or [_NOTHING]), " " * spaces)


def added(kind: LinearKind, at: str, axes: str = "") -> str:
    """The line that adds the bias."""
    if not kind.bias:
        return _NOTHING
    return f"found += tl.load(bias + {at}, mask=live, other=0.0).to(tl.float32){axes}"


def headed(kind: LinearKind, text: str) -> str:
    """A source with what it is of above it."""
    integers = "integers" if kind.integers else kind.multiplied
    return (
        "# y[b, n] = sum over k of x[b, k] * value[n, k] * scale[n, k's group]"
        f"{' + bias[n]' if kind.bias else ''}\n"
        f"# for weights in {kind.scheme}, activations in {kind.type}, products in {integers}.\n\n"
        f"import triton\nimport triton.language as tl\n\n\n{text}"
    )
