"""MXFP4, as GPT-OSS has its experts: 4-bit floats, a power of two for 32 of them.

    X_blocks  uint8 [E, N, G, 16]   two codes (E2M1) a byte, the first one in the low nibble
    X_scales  uint8 [E, N, G]       E8M0: 2^(code - 127)
The model has X as [E, M, N], rows and columns exchanged.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.2 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import ModelError
from ...ir.quant.scheme import SCHEMES, Scheme
from ...ir.stored import StoredWeight, TurnedWeight
from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors
from ..huggingface import ModelSource

_BLOCK = 32
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: The largest scale under which float32 has every level.
_HIGHEST = 252


@FORMATS.register
class Mxfp4(CodedTensors):
    """Codes are kept where there is a scheme mxfp4; otherwise a weight is unpacked when it is read."""

    name = "mxfp4"

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(source, config, options)
        self.scheme = kept_scheme()

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        names = [n.removesuffix("_blocks") for n in parts if n.endswith("_blocks")]
        return {name: self._weight(module, name, parts) for name in names}

    def _weight(self, module: str, name: str, parts: dict[str, Weight]) -> Weight:
        blocks, scales = (
            self.part(module, parts, f"{name}_{part}") for part in ("blocks", "scales")
        )
        if len(blocks.shape) != 4 or blocks.shape[-1] != _BLOCK // 2:
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
        shape = (experts, rows, groups * _BLOCK)
        if self.scheme is not None:
            pieces = {"packed": blocks, "scales": Weight(scales.shape, torch.uint8, checked)}
            return TurnedWeight.around(StoredWeight.holding(self.scheme, shape, pieces))
        turned = (experts, shape[2], rows)
        return Weight(
            turned, torch.float32, lambda: unpack(blocks.load(), checked()).transpose(1, 2)
        )


def kept_scheme() -> Scheme | None:
    """The scheme that holds such codes, where it is registered."""
    return SCHEMES["mxfp4"]() if "mxfp4" in SCHEMES else None


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weight [.., N, M] in float32."""
    levels = torch.tensor([*_LEVELS, *(-level for level in _LEVELS)])
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    power = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    found: Tensor = (levels[codes.int()] * power[..., None]).flatten(-2)
    return found
