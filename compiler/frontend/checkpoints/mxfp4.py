"""MXFP4, as GPT-OSS has its experts: 4-bit floats, a power of two for 32 of them.

    X_blocks  uint8 [E, N, G, 16]   two codes (E2M1) a byte, the first one in the low nibble
    X_scales  uint8 [E, N, G]       E8M0: 2^(code - 127)
The model has X as [E, M, N], rows and columns exchanged.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.2 and 6.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import ModelError
from ...ir.quant.schemes.microscaling import MXFP4
from ...ir.stored import StoredWeight, TurnedWeight
from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors

_SCHEME = MXFP4()

#: The largest scale under which float32 has every level.
_HIGHEST = 252


@FORMATS.register
class Mxfp4(CodedTensors):
    """All codes are kept."""

    name = "mxfp4"

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        names = [n.removesuffix("_blocks") for n in parts if n.endswith("_blocks")]
        return {name: self._weight(module, name, parts) for name in names}

    def _weight(self, module: str, name: str, parts: dict[str, Weight]) -> Weight:
        blocks, scales = (
            self.part(module, parts, f"{name}_{part}") for part in ("blocks", "scales")
        )
        if len(blocks.shape) != 4 or blocks.shape[-1] != MXFP4.block // 2:
            raise self.damaged(module, f"{name}_blocks is {list(blocks.shape)}")
        self.expect(module, f"{name}_blocks", blocks, torch.uint8, blocks.shape)
        self.expect(module, f"{name}_scales", scales, torch.uint8, blocks.shape[:-1])
        where = f"{self.source.location}: {module}.{name}"

        def checked() -> Tensor:
            codes = scales.load()
            if bool((codes > _HIGHEST).any()):
                raise ModelError(
                    f"{where} has scales that no weight has; the checkpoint is damaged"
                )
            return codes

        experts, rows, groups, _ = blocks.shape
        shape = (experts, rows, groups * MXFP4.block)
        pieces = {"packed": blocks, "scales": Weight(scales.shape, torch.uint8, checked)}
        return TurnedWeight.around(StoredWeight.holding(_SCHEME, shape, pieces))
