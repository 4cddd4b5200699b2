"""Matrices of tokens and channels as codes with scales by channel or by token; see `ir/kv/store/packed`."""

from __future__ import annotations

from torch import Tensor

from ..store.packed import Packed, Pieces, planes
from .affine import dequantize, quantize
from .bits import pack, unpack


def encode_by_channel(prefix: str, x_KGTD: Tensor, bits: int, group: int) -> Pieces:
    """Codes packed along time, scales for each `group` tokens of a channel."""
    grouped = x_KGTD.transpose(-1, -2).unflatten(-1, (-1, group))  # [K, G, D, T / group, group]
    codes, scale, zero = quantize(grouped, bits)
    flat = [plane.flatten(-2).transpose(-1, -2) for plane in pack(codes, bits)]
    return _named(prefix, bits, flat) | {
        f"{prefix}_scale": scale.squeeze(-1).transpose(-1, -2),
        f"{prefix}_zero": zero.squeeze(-1).transpose(-1, -2),
    }


def decode_by_channel(prefix: str, pieces: Pieces, bits: int, group: int) -> Tensor:
    """What `encode_by_channel` was given, [.., T, D]."""
    packed: list[Tensor] = [
        pieces[name].transpose(-1, -2).unflatten(-1, (-1, group * width // 8))
        for name, width in planes(prefix, bits)
    ]
    scale, zero = (
        pieces[f"{prefix}_{name}"].transpose(-1, -2).unsqueeze(-1) for name in ("scale", "zero")
    )
    return dequantize(unpack(packed, bits), scale, zero).flatten(-2).transpose(-1, -2)


def encode_by_token(prefix: str, x_KGTD: Tensor, bits: int, group: int) -> Pieces:
    """Codes packed along channels, scales for each `group` channels of a token."""
    codes, scale, zero = quantize(x_KGTD.unflatten(-1, (-1, group)), bits)
    return pack_codes(prefix, codes.flatten(-2), bits) | {
        f"{prefix}_scale": scale.squeeze(-1),
        f"{prefix}_zero": zero.squeeze(-1),
    }


def decode_by_token(prefix: str, pieces: Pieces, bits: int) -> Tensor:
    """What `encode_by_token` was given, [.., T, D]."""
    codes = unpack_codes(prefix, pieces, bits)
    scale, zero = pieces[f"{prefix}_scale"], pieces[f"{prefix}_zero"]
    grouped = codes.unflatten(-1, (scale.shape[-1], -1))
    return dequantize(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(-2)


def pack_codes(prefix: str, codes: Tensor, bits: int) -> Pieces:
    """The planes of codes, packed along the last axis."""
    return _named(prefix, bits, pack(codes, bits))


def unpack_codes(prefix: str, pieces: Pieces, bits: int) -> Tensor:
    """What `pack_codes` was given, as u8."""
    return unpack([pieces[name] for name, _ in planes(prefix, bits)], bits)


def _named(prefix: str, bits: int, packed: list[Tensor]) -> Pieces:
    names = [name for name, _ in planes(prefix, bits)]
    return dict(zip(names, packed, strict=True))


def in_granules(storage: Packed, x_KTD: Tensor) -> Tensor:
    """Tokens cut into granules, [K, G, T, D], f32."""
    cut: Tensor = x_KTD.float().unflatten(1, (-1, storage.granule))
    return cut
