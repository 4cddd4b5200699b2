"""GPTQ, as AutoGPTQ and GPTQModel write it (Frantar et al., 2023, is how they choose the codes).

qweight int32 [M bits / 32, N]     a stream of codes down each column, low bits first
qzeros  int32 [G, N bits / 32]     zero points less one; as they are in checkpoint_format "gptq_v2"
scales  f16   [G, N]
g_idx   int32 [M]                  the group of each input; out of order with desc_act
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors
from ..coded_groups import Codes, in_groups, unpack_words
from ..huggingface import ModelSource

_BITS = (2, 3, 4, 8)


@FORMATS.register
class Gptq(CodedTensors):
    """Groups in order are kept; with activation order they are no blocks of inputs, and are unpacked."""

    name = "gptq"

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(source, config, options)
        self.bits, self.group = self.number("bits"), self.number("group_size")
        if self.bits not in _BITS or self.group == 0 or self.group < -1:
            raise self.unsupported(f"{self.bits} bits in groups of {self.group} are not read")
        if options.get("dynamic"):
            raise self.unsupported("modules with bits of their own (dynamic) are not read")
        form = options.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise self.unsupported(
                f"the checkpoint_format {form!r} is not read; gptq and gptq_v2 are"
            )
        self.less = int(form == "gptq")

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        if "qweight" not in parts:
            return {}
        qweight, qzeros, scales = (
            self.part(module, parts, name) for name in ("qweight", "qzeros", "scales")
        )
        index = parts.pop("g_idx", None)
        width, rows = self.size(module, qweight, 0, self.bits), self.axis(module, qweight, 1)
        group = width if self.group == -1 else self.group
        groups = -(-width // group)
        self.expect(module, "qweight", qweight, torch.int32, (width * self.bits // 32, rows))
        self.expect(module, "qzeros", qzeros, torch.int32, (groups, -(-rows * self.bits // 32)))
        self.expect(module, "scales", scales, None, (groups, rows))
        # read now: where they stand says whether a scheme holds the codes
        zeros = unpack_words(qzeros.load(), self.bits, rows).int().T + self.less
        symmetric = bool((zeros == 1 << (self.bits - 1)).all())
        order = None
        if index is not None:
            self.expect(module, "g_idx", index, torch.int32, (width,))
            order = index.load().long()
            if bool((order < 0).any() or (order >= groups).any()):
                raise self.damaged(module, f"g_idx names a group that is none of its {groups}")
            order = None if torch.equal(order, torch.arange(width) // group) else order
        if order is not None:
            self.note_once(
                "weights in activation order (g_idx) were unpacked: their groups are no blocks of inputs"
            )

        def load() -> Codes:
            codes = unpack_words(qweight.load().T, self.bits, width)
            return Codes(codes, scales.load().T.float(), None if symmetric else zeros, order)

        held = symmetric or int(zeros.max()) < 1 << self.bits
        where = f"{self.source.location}: {module}"
        weight = in_groups(
            where, (rows, width), self.bits, group, symmetric, order is None and held, load
        )
        return {"weight": weight}
