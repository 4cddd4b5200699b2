"""Bytes of a number, by the types that layouts and schemes name."""

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "u8": 1, "i16": 2, "i32": 4}
