"""Experts in MXFP4 are read a weight at a time, and kept where a scheme holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from einfold.compiler.driver import load_weights, trace
from einfold.compiler.frontend.checkpoints import mxfp4
from einfold.compiler.ir.quant.scheme import Piece, Scheme
from einfold.compiler.ir.weights import Weight
from einfold.compiler.recipe import Recipe
from einfold.errors import ModelError

from ... import models
from . import folders


@dataclass(frozen=True)
class Kept(Scheme):
    """Stands for the scheme mxfp4, of which only the meaning of pieces is asked here."""

    name = "grouped"  # a name that texts of graphs can be read with

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        groups = shape[-1] // 32
        return {
            "packed": ((*shape[:-1], groups, 16), "u8"),
            "scales": ((*shape[:-1], groups), "u8"),
        }

    def dequantize(self, pieces: Mapping[str, Tensor], width: int) -> Tensor:
        return mxfp4.unpack(pieces["packed"], pieces["scales"])

    def widened(self, editor: Any, pieces: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        name, known = str(pieces["packed"].target), editor.program.weights
        found = {n: known[str(p.target)].load() for n, p in pieces.items()}
        return editor.weight(f"{name}.wide", Weight.of(self.dequantize(found, shape[-1])))


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


def test_unpacked_without_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxfp4, "kept_scheme", lambda: None)
    folders.check(tmp_path, write(tmp_path))


@pytest.mark.slow
def test_kept_through_turns_and_the_order_of_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces that a graph reads, gate and up apart, stand for what unpacked weights are there."""
    meant = write(tmp_path)
    monkeypatch.setattr(mxfp4, "kept_scheme", Kept)
    recipe = Recipe.build({"target": "reference", "context": 16})
    found = folders.check(tmp_path, meant)
    assert found.schemes == [Kept()]
    load_weights(found)
    program, records = trace(found, recipe)
    (kept,) = (record for record in records if record.name == "keep_codes")
    assert sum(note.action == "applied" for note in kept.notes) == 4  # two layers, two weights each
    monkeypatch.setattr(mxfp4, "kept_scheme", lambda: None)
    plain = folders.check(tmp_path, meant)
    load_weights(plain)
    other, _ = trace(plain, recipe)
    wide = [program.weights[n].load() for n in program.weights if n.endswith(".wide")]
    same = [other.weights[n].load() for n in other.weights if n.endswith("folded")]
    assert len(wide) == 4
    for weight in wide:
        assert any(weight.shape == each.shape and torch.equal(weight, each) for each in same)


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
