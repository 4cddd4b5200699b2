"""Checkpoints of GPTQ, AWQ and AutoRound are the weights they stand for, as codes where a scheme has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.stored import StoredWeight, scheme_of
from einfold.errors import ModelError, UnsupportedError

from . import folders
from .test_compressed_tensors import decompress

PROBE = "model.layers.1.mlp.down_proj.weight"  # [64, 96]: groups of 64 leave half a one


def gptq(
    bits: int, group: int, zero: int | None, order: bool = False, less: int = 1
) -> folders.Pack:
    """Codes drawn at random; `zero` is the zero point of all groups, None for one each."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = weight.shape
        size = width if group == -1 else group
        groups = -(-width // size)
        codes = torch.randint(0, 1 << bits, (width, rows))
        zeros = torch.randint(1, 1 << bits, (groups, rows))
        if zero is not None:
            zeros[:] = zero
        scales = (torch.rand(groups, rows) * 0.1 + 0.01).half()
        index = torch.arange(width) // size
        if order:
            index = index[torch.randperm(width)]
        meant = (codes.float() - zeros.float()[index]) * scales.float()[index]
        parts = {
            "qweight": folders.stream(codes, bits),
            "qzeros": folders.stream((zeros - less).T, bits).T,
            "scales": scales,
            "g_idx": index.int(),
        }
        return parts, meant.T

    return pack


def options(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **more}


@pytest.mark.parametrize(
    ("bits", "group", "zero", "kept"),
    [
        (4, 32, 8, Grouped(4, 32)),
        (4, 32, None, Grouped(4, 32, symmetric=False)),
        (8, 16, 128, Grouped(8, 16)),
        (2, 64, None, Grouped(2, 64, symmetric=False)),
        (4, -1, 8, Grouped(4, 32)),  # a scale a row: blocks that divide 96, and 64
        (4, 48, 8, Grouped(4, 16)),
    ],
)
def test_gptq_is_kept(
    bits: int, group: int, zero: int | None, kept: Grouped, tmp_path: Path
) -> None:
    meant = folders.write(tmp_path, options(bits, group), gptq(bits, group, zero))
    found = folders.check(tmp_path, meant)
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == kept
    assert scheme_of(found.checkpoint["lm_head.weight"]) is None
    assert not found.notes


def test_gptq_as_it_is_and_three_bits(tmp_path: Path) -> None:
    form = options(checkpoint_format="gptq_v2")
    folders.check(tmp_path / "a", folders.write(tmp_path / "a", form, gptq(4, 32, None, less=0)))
    folders.check(tmp_path / "b", folders.write(tmp_path / "b", options(3), gptq(3, 32, 4)))
    # a zero point of 16 is on no grid of 4 bits
    found = folders.check(tmp_path / "c", folders.write(tmp_path / "c", options(), gptq(4, 32, 16)))
    assert found.checkpoint is not None and scheme_of(found.checkpoint[PROBE]) is None


def test_activation_order_is_unpacked(tmp_path: Path) -> None:
    meant = folders.write(tmp_path, options(desc_act=True), gptq(4, 32, 8, order=True))
    found = folders.check(tmp_path, meant)
    assert found.checkpoint is not None
    assert not any(isinstance(weight, StoredWeight) for weight in found.checkpoint.values())
    assert [note for note in found.notes if "activation order (g_idx) were unpacked" in note]


def test_what_older_exporters_add_is_passed_over(tmp_path: Path) -> None:
    meant = folders.write(tmp_path, options(), gptq(4, 32, 8))
    more = {
        f"{NAME}.bias": torch.zeros(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    folders.rewrite(tmp_path, lambda t: t.update(more))
    folders.check(tmp_path, meant)


def awq(group: int, zeros: bool = True) -> folders.Pack:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(codes: Tensor) -> Tensor:
        """Eight neighbours of a row in a word, as AutoAWQ's `WQLinear_GEMM` puts them there."""
        out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for column in range(codes.shape[1] // 8):
            for place in range(8):
                out[:, column] |= codes[:, column * 8 + order[place]].long() << (4 * place)
        return torch.where(out >= 1 << 31, out - (1 << 32), out).int()

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, width = weight.shape
        size = width if group == -1 else group
        groups = -(-width // size)
        codes = torch.randint(0, 16, (width, rows))
        middle = torch.randint(0, 16, (groups, rows)) if zeros else torch.full((groups, rows), 8)
        scales = (torch.rand(groups, rows) * 0.1 + 0.01).half()
        index = torch.arange(width) // size
        meant = (codes.float() - middle.float()[index]) * scales.float()[index]
        parts = {"qweight": words(codes), "qzeros": words(middle), "scales": scales}
        return parts, meant.T

    return pack


@pytest.mark.parametrize("group", [32, -1])
def test_awq_is_kept(group: int, tmp_path: Path) -> None:
    form = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
    }
    found = folders.check(tmp_path, folders.write(tmp_path, form, awq(group)))
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == Grouped(4, 32, symmetric=False)


def test_awq_as_compressed_tensors_converts_it(tmp_path: Path) -> None:
    """Another reader of the packing order, and its decompression, give the same numbers."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    parts, meant = awq(32)("m", torch.zeros(64, 96))
    converter = AutoAWQConverter(group_size=32)
    found = converter.process({f"m.{name}": value for name, value in parts.items()})
    config = converter._build_quant_config()
    (told,) = config.config_groups.values()
    parts = {name.removeprefix("m."): value for name, value in found.items()}
    parts["weight_scale"] = parts["weight_scale"].float()
    assert torch.equal(decompress(parts, told, config.format), meant)


def auto_round(form: str | None, bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": group,
        "data_type": "int",
        **({} if form is None else {"packing_format": form}),
        **more,
    }


@pytest.mark.parametrize(
    ("form", "pack"),
    [
        ("auto_round:auto_gptq", gptq(4, 32, None)),
        (None, gptq(4, 32, None)),
        ("auto_round", gptq(4, 32, None, less=0)),
        ("auto_round:gptqmodel", gptq(4, 32, None, less=0)),
        ("auto_round:auto_awq", awq(32)),
    ],
    ids=["gptq", "nothing", "own", "gptqmodel", "awq"],
)
def test_autoround_is_kept_by_its_packing(
    form: str | None, pack: folders.Pack, tmp_path: Path
) -> None:
    found = folders.check(tmp_path, folders.write(tmp_path, auto_round(form), pack))
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == Grouped(4, 32, symmetric=False)
    assert not found.notes


def test_autoround_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    own = PROBE.removesuffix(".weight")

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if module == NAME:  # 16 bits: it stays a float
            return {"weight": weight}, weight
        return (gptq(8, 16, 128) if module == own else gptq(4, 32, 8))(module, weight)

    more = {own: {"bits": 8, "group_size": 16}, NAME: {"bits": 16}, "model.+": {"bits": 16}}
    form = auto_round("auto_round:auto_gptq", extra_config=more, act_bits=8)
    found = folders.check(tmp_path, folders.write(tmp_path, form, pack))
    assert found.checkpoint is not None
    assert scheme_of(found.checkpoint[PROBE]) == Grouped(8, 16)
    assert scheme_of(found.checkpoint[f"{NAME}.weight"]) is None
    assert [note for note in found.notes if "act_bits" in note]


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (options(5), "5 bits in groups of 32 are not read"),
        (options(4, 0), "groups of 0 are not read"),
        (options("4"), "has bits '4'"),  # type: ignore[arg-type]
        (options(checkpoint_format="marlin"), "'marlin' is not read"),
        (options(dynamic={"a": {}}), "bits of their own"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
            "'gemv', are not read",
        ),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, "3 bits"),
        (auto_round("auto_round:fp8_static"), "'auto_round:fp8_static' is not read; auto_round:"),
        (auto_round("auto_round", data_type="mx_fp"), "its weights: data_type 'mx_fp'"),
        (auto_round("auto_round:auto_awq", 3), "3 bits"),
        (auto_round("auto_round", extra_config=["a"]), "no table of modules"),
        (auto_round("auto_round", extra_config={"a.*": {"bits": 8}}), "'a.*'"),
        (
            auto_round("auto_round", extra_config={"a": {"data_type": "nv_fp"}}),
            "a: data_type 'nv_fp' is not read",
        ),
    ],
)
def test_options_that_are_not_read(form: dict[str, Any], told: str, tmp_path: Path) -> None:
    folders.write(tmp_path, form, gptq(4, 32, 8))
    assert told in folders.refused(tmp_path, UnsupportedError)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("qzeros", None, "it has codes and no qzeros"),
        ("scales", lambda t: t[:1], "scales is float16 [1, 64] where a float [2, 64] was expected"),
        ("scales", lambda t: t * float("nan"), "scales that are not finite"),
        ("qweight", lambda t: t[0], "is no matrix"),
        ("qweight", lambda t: t[:4], "where"),
        ("g_idx", lambda t: t + 7, "none of its 2"),
        ("qzeros", lambda t: t.float(), "qzeros is float32"),
    ],
)
def test_a_damaged_checkpoint(part: str, change: Any, told: str, tmp_path: Path) -> None:
    folders.write(tmp_path, options(), gptq(4, 32, 8))

    def damage(tensors: dict[str, Tensor]) -> None:
        taken = tensors.pop(f"{NAME}.{part}")
        if change is not None:
            tensors[f"{NAME}.{part}"] = change(taken).contiguous()

    folders.rewrite(tmp_path, damage)
    found = folders.refused(tmp_path, ModelError)
    assert told in found and NAME in found


def test_weights_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    folders.write(tmp_path, options(), gptq(4, 32, 8))
    folders.rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if NAME in name])
    assert f"lacks 1 weights that its config asks for, {NAME}.weight" in folders.refused(
        tmp_path, ModelError
    )
    more = {f"{NAME}.bias": torch.ones(2), "model.other.weight": torch.zeros(2)}
    folders.rewrite(tmp_path, lambda t: t.update(more))
    assert "holds 2 weights that LlamaForCausalLM does not read" in folders.refused(
        tmp_path, ModelError
    )
    folders.write(tmp_path, options(), gptq(4, 32, 8))
    codes = torch.zeros(64, 64, dtype=torch.int8)
    folders.rewrite(tmp_path, lambda t: t.update({"lm_head.weight": codes[:1]}))
    assert "but the config asks for" in folders.refused(tmp_path, ModelError)
    folders.rewrite(tmp_path, lambda t: t.update({"lm_head.weight": codes.repeat(2, 1)}))
    assert "is int8 and has no scales" in folders.refused(tmp_path, ModelError)
