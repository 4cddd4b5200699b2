"""Kernels compiled ahead of time as files of an artifact, a function a GPU; no GPU is needed for it.

`NAME.sm_90.decode.cubin` is the code, `NAME.sm_90.decode.json` what Triton's loader wants to know of it, and
under "einfold" what it was made from and for: it is used for that alone (`trusted.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ....ir.program import Program
from .. import shipped
from ..ahead import compile_ahead
from ..options import DEVICES, Tiles, merge_tiles
from .kernels import SPLITS, AttentionKernel, attention_kernels
from .kinds import AttentionKind


@dataclass(frozen=True)
class Variant:
    """One compiled function: a generated one at fixed tiles and, for a split, a number of parts."""

    name: str
    kind: str
    tiles: Tiles
    parts: int

    @property
    def constants(self) -> dict[str, int]:
        """What a launch must ask for to be served by it."""
        tiles = self.tiles
        found = {"ROWS": tiles.rows, "num_warps": tiles.warps, "num_stages": tiles.stages}
        if self.kind != "merge":
            found["STREAM"] = tiles.stream
        return found if self.kind == "whole" else {**found, "PARTS": self.parts}


def variants(made: AttentionKernel) -> Iterator[Variant]:
    """What is compiled of a kernel: many new tokens at once, and one, in each number of parts.

    Pages are chosen for one token alone.
    """
    if not (isinstance(made.kind, AttentionKind) and made.kind.page):
        yield Variant("prefill", "whole", made.kernel.tiles, 1)
    yield Variant("decode", "whole", made.decode, 1)
    for parts in SPLITS[1:]:
        yield Variant(f"part{parts}", "part", made.decode, parts)
        yield Variant(f"merge{parts}", "merge", merge_tiles(made.decode), parts)


def compile_cubins(program: Program, architecture: str) -> dict[str, bytes]:
    """The files of all kernels of a program for a GPU such as "sm_90".

    Raises UnsupportedError without Triton, or where it refuses a kernel.
    """
    capability = int(architecture.removeprefix("sm_"))
    found: dict[str, bytes] = {}
    for made in attention_kernels(program, DEVICES[capability]):
        for variant in variants(made):
            compiled = compile_ahead(
                made.kernel, capability, variant.kind, variant.tiles, variant.parts
            )
            stem = stem_of(made, variant, architecture)
            found |= shipped.files_of(stem, compiled, key_of(made, variant))
    return found


def stem_of(made: AttentionKernel, variant: Variant, architecture: str) -> str:
    """The name of its two files in the artifact, without ending."""
    return f"{shipped.FOLDER}/{made.name}.{architecture}.{variant.name}"


def key_of(made: AttentionKernel, variant: Variant) -> dict[str, Any]:
    """What a compiled function must have been made from."""
    return shipped.key_of(made.kernel.source, variant.kind, variant.constants)
