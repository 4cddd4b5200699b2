"""Rotates the channels of heads around attention, where a storage asks for it before it makes codes.

    q, k -> q H, k H      the logits are as they were, for H is orthogonal
    v -> v H, o -> o H    likewise the sums of values, turned back

H is the Hadamard matrix of a head's size over the root of its size, which is symmetric and its own inverse
(`ir/quant/hadamard.py`: sizes that are no power of two by their largest factor that is one). What stands out
in one channel is spread over all of them, so that the numbers that share a scale are alike.

Source: QuaRot (Ashkboos et al. 2024, section 4, stages 1c and 1d): keys are turned behind their rotary
embedding, with which H does not commute. Differs: values are turned as they are cached and the output behind
attention, where the paper multiplies H into the weights of both projections; so weights are quantized as
without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.ops.linear import Linear
from ...ir.ops.rotary import RotaryEmbedding
from ...ir.program import Editor
from ...ir.quant.hadamard import hadamard
from ...ir.weights import Weight

#: What an attention's arguments say of rotary embeddings where there is none.
UNTURNED = {"positions_BS": None, "cos_PR": None, "sin_PR": None, "interleaved": False}


def rotated(editor: Editor, given: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The arguments of an attention with these parts of its heads rotated, q along with k.

    A rotary embedding that they name comes to stand in front. k and v may be None, of a layer that reads
    what another one cached.
    """
    found = dict(given)
    if "key" in parts:
        for name in ("q_BSHD", "k_BSKD"):
            if found[name] is not None:
                found[name] = _times(editor, turned(editor, given, given[name]))
        found |= UNTURNED
    if "value" in parts and found["v_BSKD"] is not None:
        found["v_BSKD"] = _times(editor, found["v_BSKD"])
    return found


def rotated_back(editor: Editor, out_BSHD: fx.Node, parts: Sequence[str]) -> fx.Node:
    """What attention gives, as it is of values that were not rotated."""
    return _times(editor, out_BSHD) if "value" in parts else out_BSHD


def turned(editor: Editor, given: dict[str, Any], x_BSHD: fx.Node) -> fx.Node:
    """q or k behind the rotary embedding that an attention's arguments name."""
    if given["positions_BS"] is None:
        return x_BSHD
    return editor.make(RotaryEmbedding, x_BSHD=x_BSHD, **{name: given[name] for name in UNTURNED})


def _times(editor: Editor, x_BSHD: fx.Node) -> fx.Node:
    """x H; all heads of a size read one weight."""
    value: torch.Tensor = x_BSHD.meta["val"]
    size, name = int(value.shape[-1]), f"hadamard.{value.shape[-1]}"
    if name in editor.program.weights:
        matrix = editor.read(name)
    else:
        matrix = editor.weight(name, Weight.of(hadamard(torch.eye(size)), value.dtype))
    return editor.make(Linear, x=x_BSHD, weight_NM=matrix, bias=None)
