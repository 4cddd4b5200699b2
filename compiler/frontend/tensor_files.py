"""The tensors of a folder of safetensors by name, each read when it is asked for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import ModelError, UnsupportedError, first_line, pass_on
from ..ir.mapped import read_again
from ..ir.weights import Weight

#: safetensors' names of types.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensors(folder: Path) -> dict[str, Weight]:
    """Raises ModelError for files that name a tensor twice or cannot be read; their lengths are checked by
    `huggingface.check_weight_files`."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [file for file in files if file.name in named]
    read_again(files)
    found: dict[str, Weight] = {}
    for file in files:
        for name, weight in _tensors(file).items():
            if name in found:
                raise ModelError(f"{folder} holds the tensor {name} in two files")
            found[name] = weight
    return found


def _tensors(file: Path) -> dict[str, Weight]:
    @cache
    def opened() -> Any:
        return safe_open(file, framework="pt")

    try:
        found = {}
        for name in opened().keys():  # noqa: SIM118 - it is no mapping
            part = opened().get_slice(name)
            found[name] = _tensor(file, opened, name, tuple(part.get_shape()), part.get_dtype())
        return found
    except Exception as error:
        if isinstance(error, UnsupportedError):
            raise
        pass_on(error)
        raise ModelError(f"{file} cannot be read: {first_line(error)}") from error


def _tensor(file: Path, opened: Any, name: str, shape: tuple[int, ...], kind: str) -> Weight:
    if kind not in _TYPES:
        raise UnsupportedError(f"{file}: tensor {name} is of the type {kind}, which is not read")

    def load() -> Tensor:
        try:
            tensor: Tensor = opened().get_tensor(name)
        except Exception as error:
            pass_on(error)
            raise ModelError(
                f"{file}: tensor {name} cannot be read: {first_line(error)}"
            ) from error
        return tensor

    return Weight(shape, _TYPES[kind], load)
