"""AutoRound, as the package auto-round writes it: the tensors of GPTQ or of AWQ, by its `packing_format`.

    auto_round:auto_gptq                  GPTQ's, zero points less one
    auto_round, auto_round:gptqmodel      GPTQ's, zero points as they are
    auto_round:auto_awq                   AWQ's

`extra_config` gives modules bits and groups of their own; those with 16 bits are floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors
from ..huggingface import ModelSource
from .awq import Awq
from .gptq import Gptq

#: The reader of each packing, and what it is told beside bits and groups.
_PACKINGS: Mapping[str, tuple[type[CodedTensors], Mapping[str, Any]]] = {
    "auto_round:auto_gptq": (Gptq, {"checkpoint_format": "gptq"}),
    "auto_round": (Gptq, {"checkpoint_format": "gptq_v2"}),
    "auto_round:gptqmodel": (Gptq, {"checkpoint_format": "gptq_v2"}),
    "auto_round:auto_awq": (Awq, {"version": "gemm", "zero_point": True}),
}

#: What a module may have of its own that says how its tensors are read.
_OWN = ("bits", "group_size")


@FORMATS.register
class AutoRound(CodedTensors):
    """Kept as those of its packing are."""

    name = "auto-round"

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(source, config, options)
        form = options.get("packing_format") or "auto_round:auto_gptq"
        if form not in _PACKINGS:
            raise self.unsupported(
                f"its packing_format {form!r} is not read; {', '.join(_PACKINGS)} are"
            )
        self.packing = form
        every = options.get("extra_config") or {}
        if not isinstance(every, dict) or not all(isinstance(own, dict) for own in every.values()):
            raise self.unsupported("its extra_config is no table of modules and what is theirs")
        told = {key: options[key] for key in (*_OWN, "data_type", "act_bits") if key in options}
        self.readers = {"": self._reader("its weights", told)}
        for module, own in every.items():
            if own.get("bits") == 16:
                continue
            if not re.fullmatch(r"[\w.]+", module):
                raise self.unsupported(
                    f"modules by an expression (extra_config, {module!r}) are not read"
                )
            self.readers[module] = self._reader(module, told | own)

    def _reader(self, module: str, told: Mapping[str, Any]) -> CodedTensors:
        kind = told.get("data_type", "int")
        if kind != "int":
            raise self.unsupported(f"{module}: data_type {kind!r} is not read; 'int' is")
        if (told.get("act_bits") or 16) < 16:
            self.note_once(
                "the checkpoint asks for activations in few bits too (act_bits): they stay floats"
            )
        reader, more = _PACKINGS[self.packing]
        made = reader(self.source, self.config, {**told, **more})
        made.notes = self.notes
        return made

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        return self.readers.get(module, self.readers[""]).weights(module, parts)
