"""compressed-tensors checkpoints are the weights that they stand for, by its own decompression too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import einfold
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.stored import scheme_of
from einfold.compiler.solve.round_to_nearest import RoundToNearest
from einfold.errors import ModelError, RecipeError, UnsupportedError

from ... import models
from ...cli.test_cli import as_json
from ...cli.test_cli import einfold as command
from . import folders

PROBE = "model.layers.1.mlp.down_proj.weight"


def weights(
    bits: int = 4, group: int | None = 32, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        **more,
    }


def options(told: dict[str, Any], form: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": told}},
        "ignore": ["lm_head"],
        **more,
    }


def packed(
    bits: int, group: int | None, symmetric: bool = True, order: bool = False
) -> folders.Pack:
    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = weight.shape
        size = group or width
        groups = width // size
        codes = torch.randint(0, 1 << bits, (rows, width))
        zeros = torch.randint(0, 1 << bits, (rows, groups))
        scales = torch.rand(rows, groups) * 0.1 + 0.01
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        index = torch.arange(width) // size
        if order:
            index = index[torch.randperm(width)]
        parts = {
            "weight_packed": folders.stream(codes.T, bits).T,
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, width]),
        }
        if not symmetric:
            parts["weight_zero_point"] = folders.stream(zeros, bits)
        if order:
            parts["weight_g_idx"] = index.int()
        return parts, (codes - zeros[:, index]).float() * scales[:, index]

    return pack


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kept"),
    [
        (4, 32, True, Grouped(4, 32)),
        (4, 16, False, Grouped(4, 16, symmetric=False)),
        (8, None, True, Grouped(8, 32)),
        (2, 32, False, Grouped(2, 32, symmetric=False)),
    ],
)
def test_packed_integers_are_kept(
    bits: int, group: int | None, symmetric: bool, kept: Grouped, tmp_path: Path
) -> None:
    form = options(weights(bits, group, symmetric))
    meant = folders.write(tmp_path, form, packed(bits, group, symmetric))
    found = folders.check(tmp_path, meant)
    assert found.checkpoint is not None and not found.notes
    assert scheme_of(found.checkpoint[PROBE]) == kept
    own = decompressed(tmp_path)
    for name, value in meant.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0)


def decompress(parts: dict[str, Tensor], told: Any, form: str) -> Tensor:
    """What compressed-tensors itself makes of the tensors of one weight."""
    from compressed_tensors.compressors.base import BaseCompressor

    found: Tensor = BaseCompressor.get_value_from_registry(form).decompress(parts, told)["weight"]
    return found


def decompressed(folder: Path) -> dict[str, Tensor]:
    """What compressed-tensors itself makes of a folder's weights."""
    package = pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed"
    )
    told = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    found: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        module, _, ending = name.rpartition(".")
        modules.setdefault(module, {})[ending] = value
    groups = package.quantization.QuantizationConfig.model_validate(told).config_groups.values()
    for module, parts in modules.items():
        if "weight_scale" in parts:
            scheme = next((g for g in groups if module in g.targets), next(iter(groups)))
            parts = parts | {"weight": decompress(parts, scheme, scheme.format or told["format"])}
        prefix = f"{module}." if module else ""
        own = {ending: value for ending, value in parts.items() if ending in ("weight", "bias")}
        found |= {prefix + ending: value for ending, value in own.items()}
    return found


def test_three_bits_and_activation_order_are_unpacked(tmp_path: Path) -> None:
    folders.check(tmp_path / "a", folders.write(tmp_path / "a", options(weights(3)), packed(3, 32)))
    form = options(weights(actorder="group"))
    meant = folders.write(tmp_path / "b", form, packed(4, 32, order=True))
    found = folders.check(tmp_path / "b", meant)
    assert found.checkpoint is not None and scheme_of(found.checkpoint[PROBE]) is None
    assert "weight_g_idx" in found.notes[0]


def test_integers_in_bytes_and_activations(tmp_path: Path) -> None:
    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        scales = torch.rand(weight.shape[0], 1) + 0.01
        parts = {"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)}
        return parts, codes.float() * scales

    form = options(weights(8, None), "int-quantized", kv_cache_scheme={"num_bits": 8})
    form["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    found = folders.check(tmp_path, folders.write(tmp_path, form, pack))
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == Grouped(8, 32)
    for told in ("input_activations", "kv_cache_scheme", "scales of activations"):
        assert [note for note in found.notes if told in note]


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_float8_is_unpacked(strategy: str, tmp_path: Path) -> None:
    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = weight.shape
        codes = (weight * 8).to(torch.float8_e4m3fn)
        shape = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // 48), -(-width // 40))}
        scale = torch.rand(shape[strategy]) + 0.01
        each = scale.reshape(-1, 1) if strategy != "block" else scale
        if strategy == "block":
            each = each.repeat_interleave(48, 0)[:rows].repeat_interleave(40, 1)[:, :width]
        return {"weight": codes, "weight_scale": scale}, codes.float() * each

    told = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": [48, 40]}
    meant = folders.write(tmp_path, options(told, "float-quantized"), pack)
    found = folders.check(tmp_path, meant)
    assert found.checkpoint is not None and scheme_of(found.checkpoint[PROBE]) is None


def test_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return packed(8 if "down_proj" in module else 4, 32)(module, weight)

    form = options(weights(4))
    form["config_groups"] = {
        "a": {"targets": ["re:.*down_proj$"], "weights": weights(8)},
        "b": {"targets": ["re:.*(q|k|v|o|gate|up)_proj$"], "weights": weights(4)},
    }
    found = folders.check(tmp_path, folders.write(tmp_path, form, pack))
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == Grouped(8, 32)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (options(weights(), "marlin-24"), "format 'marlin-24' is not read"),
        (options(weights(), sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights"),
        (options(weights(), transform_config={"a": 1}), "transforms beside the weights"),
        (options({"num_bits": 4, "type": "float"}), "float of 4 bits"),
        (options(weights()) | {"config_groups": None}, "has no config_groups"),
        (options(weights()) | {"config_groups": {"a": {"targets": ["re:("]}}}, "is no expression"),
        (
            options(weights()) | {"config_groups": {"a": {"targets": ["x.y"]}}},
            "no group of config_groups",
        ),
    ],
)
def test_options_that_are_not_read(form: dict[str, Any], told: str, tmp_path: Path) -> None:
    folders.write(tmp_path, form, packed(4, 32))
    assert told in folders.refused(tmp_path, UnsupportedError)


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("weight_scale", None, "it has codes and no weight_scale"),
        ("weight_scale", lambda t: t[:, :1], "weight_scale is float32 [96, 1]"),
        ("weight_scale", lambda t: t / 0, "not finite"),
        ("weight_shape", lambda t: t * 0, "its weight_shape is [0, 0]"),
        ("weight_shape", lambda t: t.repeat(2), "is no pair"),
        ("weight_packed", lambda t: t[:, :3], "where int32 [96, 8] was expected"),
        ("weight_packed", lambda t: t.float(), "weight_packed is float32"),
    ],
)
def test_a_damaged_checkpoint(part: str, change: Any, told: str, tmp_path: Path) -> None:
    folders.write(tmp_path, options(weights()), packed(4, 32))

    def damage(tensors: dict[str, Tensor]) -> None:
        taken = tensors.pop(f"{NAME}.{part}")
        if change is not None:
            tensors[f"{NAME}.{part}"] = change(taken).contiguous()

    folders.rewrite(tmp_path, damage)
    found = folders.refused(tmp_path, ModelError)
    assert told in found and NAME in found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.save("llama", tmp_path_factory.mktemp("plain"))
    models.save_tokenizer(folder)
    return folder


def test_an_export_is_what_a_compile_would_store(plain: Path, tmp_path: Path) -> None:
    symmetric = False
    recipe = {"weights": {"format": "int4", "symmetric": symmetric}}
    report = einfold.export_checkpoint(plain, tmp_path / "out", recipe=recipe)
    assert report.nbytes == sum(
        t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    model = models.build("llama")
    own = decompressed(tmp_path / "out")
    scheme = Grouped(4, 32, symmetric)
    for name, value in model.state_dict().items():
        kind = Grouped(8, 32, symmetric) if name == "lm_head.weight" else scheme
        if name.endswith("_proj.weight") or name == "lm_head.weight":
            pieces = RoundToNearest().solve(value, kind, {}).pieces
            value = kind.dequantize(pieces, value.shape[-1])
        assert torch.equal(own[name], value), name
    # and it is read again, code by code
    found = folders.check(tmp_path / "out", own)
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == scheme
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = einfold.export_checkpoint(tmp_path / "out", tmp_path / "again")
    assert again.weights == report.weights
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "kind", "told"),
    [
        ({}, RecipeError, "stores no linear"),
        ({"weights": {"format": "fp16"}}, UnsupportedError, "scheme half"),
        ({"weights": {"format": "fp32", "keep": False}}, RecipeError, "stores no linear"),
        ({"weights": {"format": "int4", "block": 128}}, UnsupportedError, "do not divide"),
        (
            {"weights": {"format": "int4", "rotate": True}},
            UnsupportedError,
            "own model would read it as it was",
        ),
    ],
)
def test_what_is_not_exported(
    plain: Path, recipe: dict[str, Any], kind: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told):
        einfold.export_checkpoint(plain, tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_a_shared_head_is_exported_as_it_came(tmp_path: Path) -> None:
    models.save("llama", tmp_path / "a", tie_word_embeddings=True)
    assert "stores no linear" in command(
        "export-checkpoint", tmp_path / "a", "-o", tmp_path / "b", code=7
    )
    report = as_json("export-checkpoint", tmp_path / "a", "-o", tmp_path / "b", "--weights", "int8")
    assert "lm_head" not in report["weights"] and len(report["weights"]) == 14
    config = json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    folders.check(tmp_path / "b", decompressed(tmp_path / "b"))
