"""Packing of few bits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from einfold.compiler.ir.quant.pack import pack_bits, unpack_bits


@given(st.sampled_from([2, 4, 8]), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bits_pack_and_unpack(bits: int, values: list[int]) -> None:
    codes = torch.tensor([value % (1 << bits) for value in values], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, len(values)), codes)
