"""LoRA adapters in a folder, as PEFT writes them, merged into the weights that they are for.

W + s B A, where s is alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Hu et al., 2021, section 4.1;
Kalajdzievski, 2023). Computed and kept in float32: an adapter is often smaller than a step of bfloat16.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import ModelError, UnsupportedError, first_line, pass_on
from ..ir.stored import numbers
from ..ir.weights import Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."

#: Options of PEFT under which an adapter is more than W + s B A.
_MORE = ("use_dora", "use_qalora", "lora_bias", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class Adapter:
    """An adapter that is yet to be merged."""

    folder: Path
    options: dict[str, Any]

    @property
    def base(self) -> str:
        """The model that it was trained for: a folder, or an id of the hub."""
        named = str(self.options.get("base_model_name_or_path") or "")
        beside = self.folder / named
        return str(beside) if named and not Path(named).is_dir() and beside.is_dir() else named

    @property
    def beside_base(self) -> bool:
        """Whether the folder holds the model too."""
        return (self.folder / "config.json").is_file()

    def merged(
        self, state: Mapping[str, Tensor | Weight]
    ) -> tuple[dict[str, Tensor | Weight], str]:
        """(the weights with the adapter in them, what to say of it).

        Raises ModelError where the adapter is damaged or for another model.
        """
        try:
            parts = load_file(self.folder / WEIGHTS)
        except Exception as error:
            pass_on(error)
            raise ModelError(
                f"the adapter {self.folder / WEIGHTS} cannot be read: {first_line(error)}"
            ) from error
        merged, left = dict(state), dict(parts)
        layers = 0
        for key in parts:
            found = re.fullmatch(r"(.*)\.(lora_A\.weight|lora_embedding_A)", key)
            if found is None:
                continue
            module = found[1].removeprefix(_PREFIX)
            other = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            if other not in left:
                raise ModelError(f"the adapter {self.folder} holds {key} and no {other}")
            a, b = left.pop(key).float(), left.pop(other).float()
            weight = self._weight(merged, f"{module}.weight")
            delta = self._scale(module, len(a)) * (b @ a)
            if found[2] == "lora_embedding_A" or self.options.get("fan_in_fan_out"):
                delta = delta.T
            if delta.shape != weight.shape:
                raise ModelError(
                    f"the adapter {self.folder} changes {module} by {list(delta.shape)} numbers, but its "
                    f"weight has {list(weight.shape)}: it is for another model"
                )
            merged[f"{module}.weight"] = weight.detach().to("cpu", torch.float32) + delta
            layers += 1
        for key, tensor in left.items():  # modules and biases that were trained whole
            name = key.removeprefix(_PREFIX)
            if self._weight(merged, name).shape != tensor.shape:
                raise ModelError(f"the adapter {self.folder} brings {name} in another shape")
            merged[name] = tensor
        if not parts:
            raise ModelError(f"the adapter {self.folder / WEIGHTS} is empty")
        more = f", and {len(left)} weights that it brings whole" if left else ""
        return merged, f"the LoRA adapter {self.folder.name} was merged into {layers} weights{more}"

    def _weight(self, state: Mapping[str, Tensor | Weight], name: str) -> Tensor:
        if name not in state:
            raise ModelError(
                f"the adapter {self.folder} is for a weight {name}, which the model does not have"
            )
        return numbers(state[name])

    def _scale(self, module: str, rank: int) -> float:
        alpha = self.options.get("lora_alpha", 8)
        for pattern, value in dict(self.options.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if self.options.get("use_rslora") else rank)


def find_adapter(name: str | Path) -> Adapter | None:
    """The adapter in a folder, if there is one; ModelError and UnsupportedError where it is no plain LoRA."""
    folder = Path(name)
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        options = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        pass_on(error)
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    kind = options.get("peft_type") if isinstance(options, dict) else None
    more = [name for name in _MORE if isinstance(options, dict) and options.get(name)]
    if kind != "LORA" or more:
        raise UnsupportedError(
            f"{folder} holds an adapter ({', '.join([str(kind), *more])}) that is no plain LoRA: merge it "
            "with peft (merge_and_unload), save the model, and give that folder"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds {CONFIG} and no {WEIGHTS}")
    found = Adapter(folder, options)
    if not found.base and not found.beside_base:
        raise ModelError(
            f"{path} names no model that the adapter is for (base_model_name_or_path), and none is beside it"
        )
    return found
