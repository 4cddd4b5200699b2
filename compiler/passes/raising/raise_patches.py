"""raise_patches: the convolution that cuts an image into patches, as a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ..base import Pass, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class RaisePatches(Pass):
    """A convolution whose windows lie side by side reads every pixel once: it is a linear over patches
    (Dosovitskiy et al. 2021, section 3.1), and is stored and quantized like one.

    Before: `%y = aten.conv2d(%x, %w, %b, [P, P]) : f32[B, O, h, w]` with %x [B, C, h*P, w*P], %w [O, C, P, P]
    After:  %x as patches [B, h, w, C*P*P], `aten.linear` with %w as [O, C*P*P], and [B, h, w, O] turned back
    """

    name = "raise_patches"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(aten.conv2d.default, aten.conv2d.padding):
            reason = _overlaps(node)
            if reason:
                result.skipped(f"%{node.name}", reason)
                continue
            with editor.before(node):
                new = _product(editor, node)
            result.applied(f"%{node.name}", "a linear over patches")
            editor.replace(node, new)
        remove_dead_nodes(program)
        return result


def _overlaps(node: fx.Node) -> str:
    """Why a convolution is no product over patches; "" where it is."""
    found = call_arguments(node)
    kernel, image = found["weight"].meta["val"].shape[2:], found["input"].meta["val"].shape
    bare = found["padding"] == "valid" or not any(found["padding"])
    plain = bare and set(found["dilation"]) == {1} and found["groups"] == 1
    if not plain or list(_pair(found["stride"])) != list(kernel):
        return "its windows do not lie side by side"
    if len(image) != 4 or not all(isinstance(size, int) for size in image[1:]):
        return "the size of its image is known only at run time"
    if any(size % part for size, part in zip(image[2:], kernel, strict=True)):
        return "its windows do not cover the image"
    return ""


def _pair(sizes: Any) -> tuple[int, int]:
    return (sizes[0], sizes[-1])


def _product(editor: Editor, node: fx.Node) -> fx.Node:
    found = call_arguments(node)
    image, weight, bias = found["input"], found["weight"], found["bias"]
    channels, height, width = image.meta["val"].shape[1:]
    down, right = weight.meta["val"].shape[2:]
    rows, columns, size = height // down, width // right, channels * down * right
    x = editor.call(aten.reshape.default, image, [-1, channels, rows, down, columns, right])
    x = editor.call(aten.permute.default, x, [0, 2, 4, 1, 3, 5])
    x = editor.call(aten.reshape.default, x, [-1, rows, columns, size])
    flat = editor.call(aten.reshape.default, weight, [-1, size])
    y = editor.call(aten.linear.default, x, flat, bias)
    return editor.call(aten.permute.default, y, [0, 3, 1, 2])
