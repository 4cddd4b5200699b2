"""Tiny checkpoints in codes, written from the formats' public definitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from einfold.compiler.driver import Input, open_model
from einfold.errors import EinfoldError

from ... import models

#: Gives the tensors that a linear is stored as, by their endings, and the weight that they stand for.
Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def write(
    folder: Path, options: Mapping[str, Any], pack: Pack, name: str = "llama", **changes: Any
) -> dict[str, Tensor]:
    """A checkpoint whose linears, but for the head, are packed; gives the weights that it stands for."""
    model = models.build(name, **changes)
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    tensors: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    linears = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for key, value in model.state_dict().items():
        module, _, ending = key.rpartition(".")
        if module in linears - {"lm_head"} and ending == "weight":
            parts, meant[key] = pack(module, value)
            tensors |= {f"{module}.{part}": t.contiguous() for part, t in parts.items()}
        else:
            tensors[key] = meant[key] = value.contiguous()
    save_file(tensors, folder / "model.safetensors")
    return meant


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of a checkpoint in place."""
    from safetensors.torch import load_file

    tensors = {
        name: value.clone() for name, value in load_file(folder / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def check(folder: Path, meant: Mapping[str, Tensor]) -> Input:
    """The checkpoint's weights are those that it stands for, to the bit."""
    found = open_model(folder)
    assert found.checkpoint is not None
    for name, value in meant.items():
        assert torch.equal(found.checkpoint[name].load().float(), value.float()), name
    return found


def read_all(path: Path) -> None:
    """Opens a checkpoint and reads each of its weights."""
    found = open_model(path)
    assert found.checkpoint is not None
    for weight in found.checkpoint.values():
        weight.load()


def refused(folder: Path, kind: type[EinfoldError]) -> str:
    """What a checkpoint is refused with."""
    with pytest.raises(kind) as caught:
        read_all(folder)
    told = str(caught.value)
    assert "\n" not in told and str(folder) in told
    return told


def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes down the first axis as int32 words: a stream of bits, low bits first, one word at a time."""
    each = (codes.numpy()[..., None] >> np.arange(bits)) & 1  # [count, columns, bits]
    flat = each.transpose(1, 0, 2).reshape(codes.shape[1], -1).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    words = np.packbits(flat, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.copy()).T
