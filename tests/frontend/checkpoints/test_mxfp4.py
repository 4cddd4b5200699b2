"""Experts in MXFP4 are read a weight at a time, and kept where a scheme holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from einfold.compiler.driver import load_weights, trace
from einfold.compiler.ir.program import Program
from einfold.compiler.ir.quant.schemes.microscaling import MXFP4
from einfold.compiler.pipeline import PassRecord
from einfold.compiler.recipe import Recipe
from einfold.errors import ModelError

from ... import models
from . import folders


def write(folder: Path) -> dict[str, Tensor]:
    """A tiny GPT-OSS whose experts are codes; gives its weights."""
    model = models.build("gpt_oss", intermediate_size=64)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    tensors, meant = {}, {}
    for name, value in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = meant[name] = value.contiguous()
            continue
        experts, width, rows = value.shape
        codes = torch.randint(0, 16, (experts, rows, width // 32, 32))
        scales = torch.randint(118, 126, (experts, rows, width // 32))
        signs = torch.where(codes > 7, -1.0, 1.0)
        wide = torch.tensor(levels)[codes % 8] * signs * 2.0 ** (scales - 127)[..., None]
        meant[name] = wide.flatten(2).transpose(1, 2)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).byte()
        tensors[f"{name}_scales"] = scales.byte()
    save_file(tensors, folder / "model.safetensors")
    return meant


def test_weights_are_what_the_codes_stand_for(tmp_path: Path) -> None:
    folders.check(tmp_path, write(tmp_path))


@pytest.mark.slow
def test_kept_through_turns_and_the_order_of_gates(tmp_path: Path) -> None:
    """The pieces that a graph reads, gate and up apart, stand for what it reads where none are kept."""
    meant = write(tmp_path)

    def traced(keep: bool) -> tuple[Program, list[PassRecord]]:
        found = folders.check(tmp_path, meant)
        assert found.schemes == [MXFP4()]
        load_weights(found)
        recipe = {"target": "reference", "context": 16, "weights": {"keep": keep}}
        return trace(found, Recipe.build(recipe))

    program, records = traced(True)
    (kept,) = (record for record in records if record.name == "keep_codes")
    assert sum(note.action == "applied" for note in kept.notes) == 4  # two layers, two weights each
    other, _ = traced(False)
    stems = [name.removesuffix(".packed") for name in program.weights if name.endswith(".packed")]
    assert len(stems) == 4
    for stem in stems:
        pieces = {n: program.weights[f"{stem}.{n}"].load() for n in ("packed", "scales")}
        want = other.weights[stem].load()
        assert torch.equal(MXFP4().dequantize(pieces, want.shape[-1]), want)


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("scales", None, "it has codes and no down_proj_scales"),
        ("scales", lambda t: t * 0 + 255, "scales that no weight has"),
        ("blocks", lambda t: t[..., :8], "down_proj_blocks is"),
        ("scales", lambda t: t[:, :1], "where uint8"),
    ],
)
def test_a_damaged_checkpoint(part: str, change: Any, told: str, tmp_path: Path) -> None:
    write(tmp_path)
    name = f"model.layers.0.mlp.experts.down_proj_{part}"

    def damage(tensors: dict[str, Tensor]) -> None:
        taken = tensors.pop(name)
        if change is not None:
            tensors[name] = change(taken).contiguous()

    folders.rewrite(tmp_path, damage)
    assert told in folders.refused(tmp_path, ModelError)
