"""Weights that are read in every step: the same numbers as where all stay, and every fault told."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import einfold
from einfold.compiler.codegen.onnx.attention_bytes import product_bytes, widened_bytes
from einfold.compiler.codegen.onnx.cut import Extent, _tables, largest_group
from einfold.compiler.codegen.onnx.cut_model import CutModel
from einfold.compiler.codegen.onnx.streaming import StreamingRunner
from einfold.compiler.codegen.target import TARGETS
from einfold.compiler.memory.tiers import TierPlan
from einfold.errors import ArtifactError, DiskError, OutOfMemoryError, RecipeError, UnsupportedError
from einfold.runtime.artifact import Artifact
from einfold.runtime.cache import Cache

from ... import models
from ...greedy import all_logits
from ...quick import rarely
from .in_parts import RESIDENT, TEXT, check_as_resident


def laid_out(path: Path, pinned: set[str]) -> TierPlan:
    load = TARGETS["onnx"]().in_parts(Artifact.open(path)).load(512, 1 << 30)
    return TierPlan(load.pieces, frozenset(pinned), load.fixed, 1 << 40)


@contextmanager
def streaming(
    path: Path, *pinned: str, chunk: int = 16
) -> Iterator[tuple[einfold.Model, StreamingRunner]]:
    """A model whose weights are read in every step, but for those of some super-ops."""
    model = einfold.load(path, threads=1, chunk=chunk)
    runner = StreamingRunner(CutModel.of(model.artifact), laid_out(path, set(pinned)), 1)
    model.engine.runner = runner
    try:
        yield model, runner
    finally:
        runner.close()


@RESIDENT
def test_logits_and_tokens_are_those_of_resident_weights(
    name: str, weights: str, artifact: Callable[..., Path]
) -> None:
    path = artifact(name, weights)
    with streaming(path, "layer 1") as (model, runner):
        check_as_resident(model, path)
        assert runner.reader is not None
        assert runner.reader.counts.items > 0


@pytest.mark.parametrize("cache", ["f32", "int8"])
def test_layers_that_read_the_cache_of_another_find_it(cache: str, tmp_path: Path) -> None:
    """What one super-op wrote there, another reads."""
    path = tmp_path / "artifact"
    einfold.compile(models.save("gemma4", tmp_path / "model"), path, cache=cache, check=False)
    with streaming(path, "layer 1") as (model, _):
        check_as_resident(model, path)


def test_a_wide_head_is_taken_apart(wide_head: Path) -> None:
    names = [op.name for op in CutModel.of(Artifact.open(wide_head)).ops]
    assert names[:4] == ["embedding", "layer 0", "layer 1", "head"]
    assert names[4:] == [f"head part {i + 1}/{len(names) - 4}" for i in range(len(names) - 4)]
    assert len(names) > 6
    whole = einfold.load(wide_head, threads=1)
    with streaming(wide_head) as (model, _):
        assert np.array_equal(all_logits(model, TEXT), all_logits(whole, TEXT))


def test_every_step_reads_what_the_plan_says(wide_head: Path) -> None:
    plan = laid_out(wide_head, {"layer 1"})
    assert all(piece.nbytes for piece in plan.streamed)
    with streaming(wide_head, "layer 1") as (model, runner):
        model.generate(TEXT[:5], max_new_tokens=4, ignore_eos=True)  # a step of five, three of one
        assert runner.reader is not None
        items = len(plan.streamed)
        assert 4 * items <= runner.reader.counts.items <= 4 * items + 2  # no more is read ahead
        largest = max(piece.nbytes for piece in plan.streamed)
        assert 4 * plan.fetched <= runner.fetched
        assert (
            runner.fetched <= 1.05 * 4 * plan.fetched + 2 * largest + 4 * items * 2 * 4096
        )  # whole pages
        assert runner.reader.nbytes <= plan.buffers + 2 * 4096 * 20  # spans end within pages


def test_what_attention_takes_is_planned_for(artifact: Callable[..., Path], tmp_path: Path) -> None:
    """Of int8 slots what is widened of them in a chunk, of float32 a token's logits and weights: more the
    longer the context."""

    def activations(path: Path, chunk: int, capacity: int) -> int:
        return CutModel.of(Artifact.open(path)).load(chunk, 0, capacity).fixed.activations

    plain, path = artifact("llama", "int4"), tmp_path / "int8"
    einfold.compile(models.save("llama", tmp_path / "model"), path, cache="int8", check=False)
    layer = Artifact.open(path).manifest.layout().layers[0]
    heads = 2 * len(layer.groups[0].heads)
    more = activations(plain, 64, 4096) - activations(plain, 64, 0)
    assert more == product_bytes(heads, 4096) == 8 * heads * 4096
    more = activations(path, 64, 4096) - activations(path, 64, 0)
    assert more == widened_bytes(len(layer.groups[0].heads), 0, layer.key_size, 0, 4096) > 0
    assert activations(path, 8, 4096) == activations(path, 8, 0)


@pytest.mark.parametrize("name", ["gemma2", rarely("gpt_oss")])
def test_logits_that_are_capped_or_beside_sinks_are_planned_for(
    name: str, artifact: Callable[..., Path]
) -> None:
    """GroupQueryAttention holds all of a step's, for one layer at a time."""
    path = artifact(name, "int4")
    cut = CutModel.of(Artifact.open(path))
    more = cut.load(64, 0, 4096).fixed.activations - cut.load(64, 0, 0).fixed.activations
    kv_heads = len(cut.artifact.manifest.layout().layers[0].groups[0].heads)
    heads = kv_heads * largest_group(node for op in cut.ops for node in op.nodes)
    assert more == 4 * 64 * heads * 4096


def test_tables_of_positions_are_looked_up_only_where_positions_are_given() -> None:
    extent = {name: Extent(name, 0, 64, (8, 2), 1) for name in ("cos", "sin")}
    with_rows = helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "places"], ["y"])
    without = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["z"])
    assert _tables([with_rows], extent, {}) == {"cos", "sin"}
    assert _tables([without], extent, {}) == _tables([with_rows, without], extent, {}) == set()


def test_a_budget_pins_some_and_tokens_stay(wide_head: Path) -> None:
    """By the public road: the smallest budget is said by one that is smaller."""
    with pytest.raises(RecipeError) as told:
        einfold.plan(wide_head, memory=1000)
    least = int(str(told.value).split("too small: ")[1].split(" are needed")[0].replace(",", ""))
    plan = einfold.plan(wide_head, memory=least)
    assert plan.tiers.streamed
    assert plan.tiers.peak <= least
    model = einfold.load(wide_head, threads=1, memory=least)
    assert model.plan is not None
    assert model.plan.tiers == plan.tiers
    whole = einfold.load(wide_head, threads=1)
    found, wanted = (
        m.generate(TEXT, max_new_tokens=5, ignore_eos=True).tokens for m in (model, whole)
    )
    assert found == wanted
    model.engine.runner.close()  # type: ignore[attr-defined]


def test_a_budget_that_cannot_do_is_refused_before_weights_are_read(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artifact, "check_weights", None)
    with pytest.raises(RecipeError, match="a budget of 1,000 bytes is too small"):
        einfold.load(wide_head, memory=1000)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are counted in /proc")
def test_a_load_that_fails_leaves_no_file_open(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise MemoryError

    monkeypatch.setattr(StreamingRunner, "_session", full)
    model, plan = CutModel.of(Artifact.open(wide_head)), laid_out(wide_head, {"layer 1"})
    for _ in range(2):
        with suppress(MemoryError):
            StreamingRunner(model, plan, 1)
    gc.collect()
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    weights = (wide_head / "weights.safetensors").resolve()
    assert weights not in opened


@pytest.mark.parametrize("size", [4096, None])
def test_weights_changed_while_running_are_told(
    size: int | None, wide_head: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    shutil.copytree(wide_head, path)
    file = path / "weights.safetensors"
    with streaming(path) as (model, _):
        model.generate(TEXT[:5], max_new_tokens=2, ignore_eos=True)
        if size is None:
            file.write_bytes(bytes(file.stat().st_size))
            os.utime(file, ns=(1, 1))
        else:
            os.truncate(file, size)
        for _ in range(2):
            with pytest.raises(ArtifactError, match="changed after it was opened"):
                model.generate(TEXT[:5], max_new_tokens=4, ignore_eos=True)


def test_a_read_that_fails_ends_the_step(wide_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(wide_head) as (model, runner):
        assert runner.reader is not None

        def fail(*_: object) -> object:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(runner.reader.file, "read", fail)
        with pytest.raises(DiskError, match="Input/output error"):
            model.generate(TEXT[:5], max_new_tokens=4, ignore_eos=True)


def test_damaged_weights_are_refused(wide_head: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(wide_head, path)
    with (path / "weights.safetensors").open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match="do not match the manifest's hash"):
        einfold.load(path, threads=1, memory=1 << 30)


def test_what_has_no_room_is_refused_before_it_is_made(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with streaming(wide_head) as (model, runner):
        most = runner.most_logits
        together = [TEXT[:2]] * (most + 1)
        with pytest.raises(
            OutOfMemoryError, match=f"the logits of {most} rows at once, not of {most + 1}"
        ):
            model.generate_batch(together, max_new_tokens=2)
        runner.plan = replace(runner.plan, fixed=replace(runner.plan.fixed, cache=1000))
        monkeypatch.setattr(Cache, "allocate", None)
        with pytest.raises(OutOfMemoryError, match="left 1,000 for it; load for a larger context"):
            model.generate(TEXT, max_new_tokens=2)
        with pytest.raises(OutOfMemoryError, match="left 1,000 for it"):
            list(model.logits(TEXT))


def test_a_step_gives_few_rows_of_logits_where_there_is_little_room(wide_head: Path) -> None:
    with streaming(wide_head) as (model, runner):
        wanted = all_logits(model, TEXT)
        few = 5 * 16 * model.engine.vocabulary
        runner.plan = replace(runner.plan, fixed=replace(runner.plan.fixed, activations=few))
        found = list(model.logits(TEXT))
        assert [len(rows) for _, rows in found] == [5] * 8
        np.testing.assert_allclose(np.concatenate([rows for _, rows in found]), wanted, atol=1e-3)


def test_a_step_that_was_broken_off_is_followed_by_a_whole_one(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = einfold.load(wide_head, threads=1)
    wanted = whole.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
    with streaming(wide_head) as (model, runner):
        session, calls = runner._session, [0]

        def interrupted(*arguments: object, **named: object) -> object:
            calls[0] += 1
            if calls[0] in (3, 5, 7):  # more often than there are buffers
                raise KeyboardInterrupt
            return session(*arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(runner, "_session", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True)
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted


def test_a_model_that_cannot_be_cut_is_told(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Artifact.read

    def odd(self: Artifact, name: str) -> bytes:
        from onnx import ModelProto

        proto = ModelProto.FromString(read(self, name))
        for node in proto.graph.node:  # a product that does not say how many rows it has
            kept = [a for a in node.attribute if a.name != "N" or node.op_type != "MatMulNBits"]
            del node.attribute[:]
            node.attribute.extend(kept)
        return bytes(proto.SerializeToString())

    monkeypatch.setattr(Artifact, "read", odd)
    with pytest.raises(ArtifactError, match=r"the graph of .* cannot be run"):
        CutModel.of(Artifact.open(wide_head))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", "spqr", r"holds weights in spqr, .* no budget can be promised"),
        ("head", "spqr", r"holds weights in spqr, .* no budget can be promised"),
        ("activations", "int8", r"activations in 8 bits .*: all must be resident"),
    ],
)
def test_formats_that_are_unpacked_by_way_of_more_are_refused(
    key: str, value: str, says: str, wide_head: Path
) -> None:
    found = Artifact.open(wide_head)
    weights = found.manifest.recipe["weights"] | {key: value}
    recipe = found.manifest.recipe | {"weights": weights}
    changed = found.manifest.model_copy(update={"recipe": recipe})
    with pytest.raises(UnsupportedError, match=says):
        CutModel.of(replace(found, manifest=changed))


def test_other_targets_and_kinds_are_refused(artifact: Callable[..., Path]) -> None:
    path = artifact("llama", "int4")
    with pytest.raises(UnsupportedError, match="reference holds all of its weights in memory"):
        einfold.load(path, engine="reference", memory=1 << 30)
    with pytest.raises(UnsupportedError, match=r"less than a byte, .* compile without --portable"):
        einfold.plan(artifact("llama", "int4", portable=True), memory=1 << 30)
    with pytest.raises(RecipeError, match="a context above 1"):
        einfold.plan(path, memory=1 << 30, context=1)
    with pytest.raises(RecipeError, match="context is what memory leaves room for; give both"):
        einfold.load(path, context=64)
