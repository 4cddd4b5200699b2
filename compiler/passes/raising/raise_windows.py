"""raise_windows: a convolution along time, as a product over windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Editor, Program, call_arguments, remove_dead_nodes
from ..base import Pass, PassResult

aten = torch.ops.aten

#: Taps of a kernel at most: each frame is held so many times.
_TAPS = 8


@dataclass(frozen=True)
class RaiseWindows(Pass):
    """A convolution of few taps over frames of a sound is a linear over windows of it (Whisper's first two
    layers; Radford et al. 2022, section 2.2), and is stored and quantized like one.

    Before: `%y = aten.conv1d(%x, %w, %b, [s], [p]) : f32[B, O, n]` with %x [B, C, L], %w [O, C, K]
    After:  %x as windows [B, n, C*K], `aten.linear` with %w as [O, C*K], and [B, n, O] turned back
    """

    name = "raise_windows"

    def run(self, program: Program) -> PassResult:
        result, editor = PassResult(), Editor(program)
        for node in program.nodes(aten.conv1d.default):
            reason = _unfit(node)
            if reason:
                result.skipped(f"%{node.name}", reason)
                continue
            with editor.before(node):
                new = _product(editor, node)
            result.applied(f"%{node.name}", "a linear over windows")
            editor.replace(node, new)
        remove_dead_nodes(program)
        return result


def _unfit(node: fx.Node) -> str:
    """Why a convolution is left; "" where it is a product over windows."""
    found = call_arguments(node)
    frames, taps = found["input"].meta["val"].shape, found["weight"].meta["val"].shape[-1]
    if found["groups"] != 1:
        return "its channels are convolved in groups"
    if taps > _TAPS:
        return f"it has {taps} taps, more than {_TAPS}: its windows would hold each frame as often"
    if len(frames) != 3 or not all(isinstance(size, int) for size in frames[1:]):
        return "its number of frames is known only at run time"
    return ""


def _product(editor: Editor, node: fx.Node) -> fx.Node:
    found = call_arguments(node)
    x, weight = found["input"], found["weight"]
    (stride,), (padding,), (apart,) = found["stride"], found["padding"], found["dilation"]
    _, channels, taps = weight.meta["val"].shape
    count = int(node.meta["val"].shape[2])
    if padding:
        x = editor.call(aten.constant_pad_nd.default, x, [padding, padding])
    frames = [
        editor.call(
            aten.slice.Tensor, x, 2, tap * apart, tap * apart + (count - 1) * stride + 1, stride
        )
        for tap in range(taps)
    ]
    windows = editor.call(aten.stack.default, frames, -1)
    windows = editor.call(aten.permute.default, windows, [0, 2, 1, 3])
    windows = editor.call(aten.reshape.default, windows, [-1, count, channels * taps])
    flat = editor.call(aten.reshape.default, weight, [-1, channels * taps])
    y = editor.call(aten.linear.default, windows, flat, found["bias"])
    return editor.call(aten.permute.default, y, [0, 2, 1])
