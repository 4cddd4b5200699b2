"""AWQ, as AutoAWQ writes it in its version "gemm" (Lin et al., 2024, is how it scales before it rounds).

qweight int32 [M, N / 8]     eight codes of 4 bits of neighbouring outputs, in the order below
qzeros  int32 [G, N / 8]     zero points likewise
scales  f16   [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors
from ..coded_groups import Codes, in_groups, unpack_words
from ..huggingface import ModelSource

#: Which of eight outputs each nibble of a word is for, the lowest first.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@FORMATS.register
class Awq(CodedTensors):
    """Kept, with zero points."""

    name = "awq"

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(source, config, options)
        bits = self.number("bits" if "bits" in options else "w_bit")
        self.group = self.number("group_size" if "group_size" in options else "q_group_size")
        self.zeros = options.get("zero_point") is not False
        version = str(options.get("version") or "gemm").lower()
        if bits != 4 or version != "gemm" or self.group == 0 or self.group < -1:
            raise self.unsupported(
                f"{bits} bits in groups of {self.group}, version {version!r}, are not read; 4 bits in the "
                'version "gemm" are'
            )

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        if "qweight" not in parts:
            return {}
        qweight, scales = (self.part(module, parts, name) for name in ("qweight", "scales"))
        qzeros = parts.pop("qzeros", None) if self.zeros else None
        parts.pop("qzeros", None)
        width, rows = self.axis(module, qweight, 0), self.size(module, qweight, 1, 4)
        group = width if self.group == -1 else self.group
        groups = -(-width // group)
        self.expect(module, "qweight", qweight, torch.int32, (width, rows // 8))
        self.expect(module, "scales", scales, None, (groups, rows))
        if qzeros is not None:
            self.expect(module, "qzeros", qzeros, torch.int32, (groups, rows // 8))

        def load() -> Codes:
            zeros = None if qzeros is None else _unpack(qzeros.load(), rows).T
            return Codes(_unpack(qweight.load(), rows).T, scales.load().T.float(), zeros)

        where = f"{self.source.location}: {module}"
        return {"weight": in_groups(where, (rows, width), 4, group, qzeros is None, True, load)}


def _unpack(words: Tensor, rows: int) -> Tensor:
    """Codes [.., N] in the order of the outputs."""
    nibbles = unpack_words(words, 4, rows).unflatten(-1, (-1, 8))
    found: Tensor = nibbles[..., torch.tensor(_ORDER).argsort()].flatten(-2)
    return found
