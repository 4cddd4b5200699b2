"""Makes a long saved state of llama.cpp from a short one, so that no long prompt must be run.

The layout, little-endian (llama.cpp, src/llama-kv-cache.cpp, `state_write`), after a header of
a magic number and the sequence:

    u32 streams = 1, u32 cells
    cells times {i32 position, u32 sequences = 1, i32 sequence}
    u32 v_transposed = 0, u32 layers
    layers times {i32 type, u64 row bytes, cells times a row}  for K, then the same for V

llama.cpp checks counts, types and sizes when it reads this, so a changed format is refused.
"""

from __future__ import annotations

import struct

_HEADER = 8


def tile_state(state: bytes, cells: int, wanted: int) -> bytearray:
    """A state of `wanted` cells at positions 0, 1, .. whose rows repeat those of `state`.

    Raises ValueError where `state` is not laid out as above with `cells` cells.
    """
    out = bytearray(state[:_HEADER])
    streams, found = struct.unpack_from("<II", state, _HEADER)
    if (streams, found) != (1, cells):
        raise ValueError(f"expected 1 stream of {cells} cells, found {streams} of {found}")
    out += struct.pack("<II", 1, wanted)
    at = _HEADER + 8
    sequence = struct.unpack_from("<i", state, at + 8)[0]
    for position in range(wanted):
        out += struct.pack("<iIi", position, 1, sequence)
    at += 12 * cells
    transposed, layers = struct.unpack_from("<II", state, at)
    if transposed:
        raise ValueError("V is stored transposed: flash attention is off")
    out += state[at : at + 8]
    at += 8
    times, rest = divmod(wanted, cells)
    for _ in range(2 * layers):
        row = struct.unpack_from("<q", state, at + 4)[0]
        out += state[at : at + 12]
        at += 12
        rows = state[at : at + cells * row]
        out += rows * times + rows[: rest * row]
        at += cells * row
    if at != len(state):
        raise ValueError(f"{len(state) - at} bytes are left over")
    return out
