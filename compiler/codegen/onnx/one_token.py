"""What attention of one new token over slots needs that is written out in products, whatever slots hold.

Such a branch runs beside an operator of onnxruntime's that takes steps of any size: which of the two runs is
decided in the graph, and both append to the same slots.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import Builder

#: Every slot is read, used or not; so many thirds of them must be used.
_USED_THIRDS = 2

#: Added to a logit, it leaves nothing of it. Not -inf, which may meet itself in a softmax by blocks.
HIDDEN = -1e30


def capped(builder: Builder, logits: ir.Value, softcap: float) -> ir.Value:
    """Logits as they are where the cap is 0."""
    if not softcap:
        return logits
    cap = builder.floats(softcap)
    return builder.op("Mul", builder.op("Tanh", builder.op("Div", logits, cap)), cap)


def appended(
    builder: Builder,
    cache: ir.Value,
    new_BSM: ir.Value,
    scale: ir.Value | None,
    used_B: ir.Value,
    kv_heads: int,
    size: int,
    one: bool = True,
) -> ir.Value:
    """The cache with new tokens in their slots, `one` or several; with a scale it is int8, as
    GroupQueryAttention rounds it."""
    if scale is not None:
        flat = builder.shared("Reshape", scale, builder.ints(-1))
        # It multiplies by the inverse, which may fall on the other side of an edge than dividing.
        scaled = builder.op("Mul", new_BSM, builder.shared("Reciprocal", flat))
        step, zero = builder.floats(1.0), builder.constant(0, np.int8)
        new_BSM = builder.op("QuantizeLinear", scaled, step, zero)
    if one:
        slots = builder.reshape(new_BSM, [0, kv_heads, 1, size])
    else:
        slots = builder.transpose(builder.reshape(new_BSM, [0, 0, kv_heads, size]), 0, 2, 1, 3)
    return builder.op("TensorScatter", cache, slots, used_B, axis=2)


def pays(
    builder: Builder, new: ir.Value, longest: ir.Value, slots: ir.Value, fewest: int
) -> ir.Value:
    """Whether a step is of one token behind so many, and most slots are in use: of its new tokens, the
    longest total length and the slots, each [1]."""
    used = builder.shared("Mul", longest, builder.ints(3))
    needed = builder.shared("Mul", slots, builder.ints(_USED_THIRDS))
    one = builder.shared("Equal", new, builder.ints(1))
    many = builder.shared("GreaterOrEqual", longest, builder.ints(fewest))
    full = builder.shared("GreaterOrEqual", used, needed)
    return builder.shared("And", builder.shared("And", one, many), full)


def hidden_slots(
    builder: Builder,
    used_B: ir.Value,
    slots: ir.Value,
    wanted: ir.Value,
    least: int = 1,
    window: int = 0,
) -> ir.Value:
    """[B, 1, 1, C]: 0 for slots up to the new token's, of a window the newest, far below for all others.

    One for all layers of a window, and of `least` slots where it is not wanted.
    """
    count = builder.shared("Where", wanted, slots, builder.ints(least))
    zero, one = (builder.constant(value, np.int64) for value in (0, 1))
    index = builder.shared("Range", zero, builder.shared("Squeeze", count), one)
    newest = builder.shared("Reshape", used_B, builder.ints(-1, 1, 1, 1))
    seen = builder.shared("LessOrEqual", index, newest)
    if window:
        oldest = builder.shared("Sub", newest, builder.ints(window))
        seen = builder.shared("And", seen, builder.shared("Greater", index, oldest))
    return builder.shared("Where", seen, builder.floats(0.0), builder.floats(HIDDEN))
