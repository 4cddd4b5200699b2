"""compressed-tensors, the format of llm-compressor and vLLM.

    pack-quantized   weight_packed int32 [N, M bits / 32], a stream of codes along each row, low bits first;
                     weight_shape; weight_zero_point int32 [N bits / 32, G], a stream down each column
    naive-quantized  weight int8 [N, M], the code less 2^(bits-1); also called int-quantized
    float-quantized  weight float8 (e4m3) [N, M]
each with weight_scale [N, G], [N, 1] for a row, [1] for all of it, or one for each block of [N / b, M / b'].

Which module is stored how stands in `config_groups`, by names, expressions behind "re:", or classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import ModelError
from ...ir.weights import Weight
from ..checkpoint import FORMATS, CodedTensors
from ..coded_groups import Codes, in_groups, unpack_words
from ..huggingface import ModelSource

#: The longest expression among targets that is tried: what it may cost grows with it.
_LONGEST = 200

#: Formats that are read; mixed-precision names one in each group.
_READ = (
    "pack-quantized",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "mixed-precision",
    "dense",
)


_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


@FORMATS.register
class CompressedTensors(CodedTensors):
    """Integers are kept; float8 is unpacked. What is said of activations and of the cache is not read."""

    name = "compressed-tensors"
    dropped = dict.fromkeys(_ACTIVATIONS, "scales of activations") | dict.fromkeys(
        ("k_scale", "v_scale", "q_scale"), "scales of the KV cache"
    )

    def __init__(self, source: ModelSource, config: Any, options: Mapping[str, Any]) -> None:
        super().__init__(source, config, options)
        form = options.get("format")
        if form not in _READ:
            raise self.unsupported(f"its format {form!r} is not read; {', '.join(_READ)} are")
        if (options.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise self.unsupported("sparse weights (sparsity_config) are not read")
        if options.get("transform_config"):
            raise self.unsupported("transforms beside the weights (transform_config) are not read")
        groups = options.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise self.unsupported("its quantization_config has no config_groups")
        self.groups = list(groups.values())
        if any(group.get("input_activations") for group in self.groups):
            self.note_once(
                "the checkpoint asks for activations in few bits too (input_activations): they stay floats"
            )
        if options.get("kv_cache_scheme"):
            self.note_once(
                "the checkpoint asks for a KV cache in few bits (kv_cache_scheme), which is not read: the "
                "recipe says how the cache is stored"
            )

    def weights(self, module: str, parts: dict[str, Weight]) -> dict[str, Weight]:
        if "weight_packed" not in parts and "weight_scale" not in parts:
            return {}
        told = self._told(module)
        scale = self.part(module, parts, "weight_scale")
        if told["type"] == "float":
            return {"weight": self._float(module, parts, scale, told)}
        return {"weight": self._integers(module, parts, scale, told)}

    def _told(self, module: str) -> dict[str, Any]:
        """How the weight of a module is stored: the arguments of the first group that is for it."""
        fits = [g for g in self.groups if self._is_for(g.get("targets"), module)]
        named = [g for g in fits if module in (g.get("targets") or [])]
        told = (named or fits or [{}])[0].get("weights")
        if not isinstance(told, dict):
            raise self.unsupported(f"{module} is in codes, and no group of config_groups is for it")
        bits, kind = told.get("num_bits"), told.get("type", "int")
        integers = kind == "int" and isinstance(bits, int) and 1 <= bits <= 8
        if not integers and (kind, bits) != ("float", 8):
            raise self.unsupported(
                f"{module} is stored as {kind} of {bits} bits, which is not read"
            )
        return {**told, "type": kind}

    def _is_for(self, targets: Any, module: str) -> bool:
        """Classes fit any module: what is no linear has no codes, or is of a kind that is refused later."""
        for target in targets if isinstance(targets, list) else []:
            text = str(target)
            if not text.startswith("re:"):
                if text == module or "." not in text:
                    return True
            elif len(text) > _LONGEST:
                raise self.unsupported(
                    f"a target of {len(text)} characters in config_groups is not tried"
                )
            else:
                try:
                    if re.match(text[3:], module):
                        return True
                except re.error as error:
                    raise self.unsupported(
                        f"the target {text!r} is no expression: {error}"
                    ) from error
        return False

    def _integers(
        self, module: str, parts: dict[str, Weight], scale: Weight, told: Mapping[str, Any]
    ) -> Weight:
        bits = int(told["num_bits"])
        symmetric = told.get("symmetric", True) is not False
        packed = parts.pop("weight_packed", None)
        zeros = parts.pop("weight_zero_point", None)
        index = parts.pop("weight_g_idx", None)
        if packed is None:
            packed = self.part(module, parts, "weight")
            rows, width = self.axis(module, packed, 0), self.axis(module, packed, 1)
            self.expect(module, "weight", packed, torch.int8, (rows, width))
            streamed = False
        else:
            rows, width = self._shape(module, parts, packed, bits)
            streamed = True
        groups, group = self._groups(module, scale, rows, width, told)
        if not symmetric and zeros is None:
            raise self.damaged(module, "it is asymmetric and has no weight_zero_point")
        zeros = None if symmetric else zeros
        words = streamed and len(scale.shape) == 2
        if zeros is not None:
            wanted = (-(-rows * bits // 32), groups) if words else scale.shape
            kind = torch.int32 if words else torch.int8
            self.expect(module, "weight_zero_point", zeros, kind, tuple(wanted))
        order = self._order(module, index, width, group)

        def load() -> Codes:
            raw = packed.load()
            codes = (
                unpack_words(raw, bits, width) if streamed else self._unsigned(module, raw, bits)
            )
            middle = None
            if zeros is not None:
                given = zeros.load()
                middle = (
                    unpack_words(given.T, bits, rows).T if words else given.int() + (1 << bits - 1)
                )
            every = scale.load().float().reshape(-1, groups).expand(rows, groups)
            return Codes(codes, every, _each(middle, rows, groups), order)

        where = f"{self.source.location}: {module}"
        return in_groups(where, (rows, width), bits, group, symmetric, order is None, load)

    def _unsigned(self, module: str, codes: Tensor, bits: int) -> Tensor:
        half, whole = 1 << (bits - 1), codes.int()
        if bool((whole < -half).any() or (whole >= half).any()):
            raise self.damaged(module, f"it has codes that {bits} bits do not hold")
        return whole + half

    def _shape(
        self, module: str, parts: dict[str, Weight], packed: Weight, bits: int
    ) -> tuple[int, int]:
        """The shape that a packed weight says it has, which its words have to be enough for."""
        told = self.part(module, parts, "weight_shape")
        if told.shape != (2,) or told.dtype not in (torch.int64, torch.int32):
            raise self.damaged(module, "its weight_shape is no pair of numbers")
        rows, width = (int(size) for size in told.load())
        if rows < 1 or width < 1:
            raise self.damaged(module, f"its weight_shape is {[rows, width]}")
        self.expect(module, "weight_packed", packed, torch.int32, (rows, -(-width * bits // 32)))
        return rows, width

    def _groups(
        self, module: str, scale: Weight, rows: int, width: int, told: Mapping[str, Any]
    ) -> tuple[int, int]:
        """(scales of a row, weights that share one)."""
        size = told.get("group_size")
        grouped = told.get("strategy") == "group" or (isinstance(size, int) and size > 0)
        if not grouped:
            if scale.shape not in ((1,), (), (1, 1), (rows, 1), (rows,)):
                raise self.damaged(module, f"its weight_scale is {list(scale.shape)}")
            return 1, width
        if not isinstance(size, int) or size < 1:
            raise self.unsupported(f"{module} is in groups of {size!r}")
        groups = -(-width // size)
        self.expect(module, "weight_scale", scale, None, (rows, groups))
        return groups, size

    def _order(self, module: str, index: Weight | None, width: int, group: int) -> Tensor | None:
        if index is None:
            return None
        self.expect(module, "weight_g_idx", index, torch.int32, (width,))
        order = index.load().long()
        if bool((order < -1).any() or (order >= -(-width // group)).any()):
            raise self.damaged(module, "weight_g_idx names a group that there is not")
        if bool((order == -1).all()) or torch.equal(order, torch.arange(width) // group):
            return None
        self.note_once(
            "weights in activation order (weight_g_idx) were unpacked: their groups are no blocks of inputs"
        )
        return order

    def _float(
        self, module: str, parts: dict[str, Weight], scale: Weight, told: Mapping[str, Any]
    ) -> Weight:
        weight = self.part(module, parts, "weight")
        parts.pop("weight_zero_point", None)
        rows, width = self.axis(module, weight, 0), self.axis(module, weight, 1)
        self.expect(module, "weight", weight, torch.float8_e4m3fn, (rows, width))
        block = told.get("block_structure")
        if told.get("strategy") == "block":
            sizes = block if isinstance(block, list) and len(block) == 2 else [0, 0]
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise self.unsupported(f"{module} is in blocks of {block!r}")
            tall, wide = sizes
            self.expect(module, "weight_scale", scale, None, (-(-rows // tall), -(-width // wide)))
        else:
            _, wide = self._groups(module, scale, rows, width, told)
            tall = 1 if scale.shape[:1] == (rows,) else rows
        where = f"{self.source.location}: {module}"

        def load() -> Tensor:
            given = scale.load().float().reshape(-(-rows // tall), -1)
            if not bool(torch.isfinite(given).all()):
                raise ModelError(f"{where}: scales that are not finite; the checkpoint is damaged")
            given = given[torch.arange(rows) // tall]
            return weight.load().float() * given[:, torch.arange(width) // wide]

        return Weight((rows, width), torch.float32, load)


def _each(zeros: Tensor | None, rows: int, groups: int) -> Tensor | None:
    return None if zeros is None else zeros.reshape(-1, groups).expand(rows, groups)
