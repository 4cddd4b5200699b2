"""Weights that are pages of a packed copy: the numbers of resident ones; copies made, kept and refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import onnxruntime as ort
import pytest
from onnx import helper

import einfold
from einfold import planning
from einfold.compiler.codegen.onnx import cut_model, packed_copy, paging, streaming
from einfold.compiler.codegen.onnx.cut import Extent, PackedWeight, SuperOp, _packed
from einfold.compiler.codegen.onnx.cut_model import CutModel
from einfold.compiler.codegen.onnx.in_parts import OnnxInParts
from einfold.compiler.codegen.onnx.packed_copy import PackedCopy
from einfold.compiler.codegen.onnx.paging import PagedRunner
from einfold.compiler.codegen.onnx.streaming import StreamingRunner
from einfold.compiler.ir.kept import read_json, write_json
from einfold.compiler.ir.locks import lock
from einfold.compiler.memory.tiers import TierPlan
from einfold.errors import ArtifactError, RecipeError
from einfold.runtime import artifact as runtime_artifact
from einfold.runtime.artifact import Artifact
from einfold.runtime.memory.direct import direct_hash
from einfold.runtime.memory.page_ahead import PageAhead
from einfold.runtime.memory.pages import UNIT, PagedFile, no_paging

from ... import models
from ...disks import needs_a_disk
from ...quick import quick
from .in_parts import RESIDENT, TEXT, check_as_resident
from .test_float_attention import take_products

pytestmark = pytest.mark.skipif(bool(no_paging()), reason=no_paging())


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of copies, of each test its own."""
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def laid_out(path: Path, *pinned: str, room: int = 0) -> TierPlan:
    load = CutModel.of(Artifact.open(path)).load(512, 1 << 30)
    assert load.paged, load.remark
    return TierPlan(load.paged, frozenset(pinned), load.fixed, 1 << 40, paged=True, room=room)


@contextmanager
def running(
    path: Path, *pinned: str, room: int = 0
) -> Iterator[tuple[einfold.Model, StreamingRunner]]:
    model = einfold.load(path, threads=1, chunk=16)
    runner = OnnxInParts.of(model.artifact).runner(laid_out(path, *pinned, room=room), 1)
    model.engine.runner = runner
    assert isinstance(runner, PagedRunner) or runner.plan.remark
    try:
        yield model, runner
    finally:
        runner.close()


@RESIDENT
def test_logits_and_tokens_are_those_of_resident_weights(
    name: str, weights: str, artifact: Callable[..., Path]
) -> None:
    path = artifact(name, weights)
    with running(path, "layer 1") as (model, runner):
        assert isinstance(runner, PagedRunner)
        check_as_resident(model, path)


#: Caches whose attention reads tables and small weights by other operators than GroupQueryAttention.
CACHES: dict[str, dict[str, Any]] = {
    "quest": {"read": {"method": "quest", "tokens": 12, "page": 4, "skip_layers": 1}},
    "int8, quest": {
        "storage": "int8",
        "read": {"method": "quest", "tokens": 12, "page": 4, "skip_layers": 1},
    },
    "int8, shadowkv": {
        "storage": "int8",
        "read": {"method": "shadowkv", "tokens": 12, "outliers": 2, "skip_layers": 1},
    },
    "int4": {"storage": "int4"},
    "turboquant": {"quant": "turboquant:group=8,residual=8,slack=8"},
    "kvzip": {"prune": {"method": "kvzip", "tokens": 32}},
}


@pytest.mark.parametrize(
    "cache", quick([*CACHES], "int8, quest", "turboquant"), ids=lambda name: name.replace(", ", "-")
)
def test_no_form_of_a_cache_keeps_weights_from_being_pages(cache: str, tmp_path: Path) -> None:
    """Nor does it read a table of rotary positions whole, or once for each layer."""
    path = tmp_path / "artifact"
    recipe = {"weights": "int8", "cache": CACHES[cache]}
    einfold.compile(models.save("llama", tmp_path / "model"), path, recipe=recipe, check=False)
    held = [extent.name for op in CutModel.of(Artifact.open(path)).ops for extent in op.weights]
    assert held and not [name for name in held if name.startswith("rotary.")]
    with running(path, "layer 1") as (model, runner):
        assert isinstance(runner, PagedRunner)
        check_as_resident(model, path)


def test_steps_that_go_by_products_are_those_of_resident_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over float32, in a branch of each layer."""
    take_products(monkeypatch)
    path = tmp_path / "artifact"
    einfold.compile(models.save("llama", tmp_path / "model"), path, recipe="int4", check=False)
    with running(path, "layer 1") as (model, runner):
        assert isinstance(runner, PagedRunner)
        check_as_resident(model, path)


def test_a_step_brings_what_it_reads_and_holds_no_more(wide_head: Path) -> None:
    """Of a streamed super-op the units are read in every step, from the disk; anonymous memory stays."""
    with running(wide_head, "layer 1") as (model, runner):
        assert isinstance(runner, PagedRunner)
        model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True)  # learns both kinds of steps
        before, own = runner.fetched, anonymous()
        model.generate(TEXT[:5], max_new_tokens=9, ignore_eos=True)
        streamed = [runner.copy.ops[p.name] for p in runner.plan.streamed]
        units = sum((place.end - place.start) // UNIT for place in streamed)
        assert units >= len(streamed) - 1  # a norm alone lies in the model
        assert 8 * units * UNIT <= runner.fetched - before <= 11 * units * UNIT
        assert anonymous() < own + (1 << 20)
        assert runner.reader is not None
        assert runner.reader.counts.items > 0


@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_a_step_reads_what_the_plan_says_and_nothing_else(weights: str, tmp_path: Path) -> None:
    """Bytes that threads bring, and those that the disk gave this process, are the plan's: nothing is read
    twice, or by faults of the run, where units have parts of several weights."""
    path, sizes = tmp_path / "artifact", {"hidden_size": 512, "intermediate_size": 1536}
    model = models.save("llama", tmp_path / "model", num_hidden_layers=3, **sizes)
    einfold.compile(
        model, path, recipe="int4" if weights == "int4" else {"weights": weights}, check=False
    )
    with running(path, "layer 1") as (model, runner):
        assert isinstance(runner, PagedRunner)
        model.generate(TEXT[:5], max_new_tokens=4, ignore_eos=True)  # learns both kinds of steps
        spent, before = [], settled(runner)
        for tokens in (2, 12):
            model.generate(TEXT[:5], max_new_tokens=tokens, ignore_eos=True)
            after = settled(runner)
            spent.append([new - old for new, old in zip(after, before, strict=True)])
            before = after
        units = runner.plan.fetched // UNIT
        assert units >= 4  # of three super-ops
        wanted = 10 * runner.plan.fetched
        for few, many in zip(*spent, strict=True):  # but for what is read ahead of the next step
            assert abs(many - few - wanted) <= max(0.03 * wanted, runner.plan.ahead)


def test_units_of_sums_alone_are_left_out_where_a_token_leaves_out_sums() -> None:
    """onnxruntime lays codes, sums and scales of a weight behind each other: in small ones a unit has all."""
    weight = Extent("w", 0, 3 * UNIT, (), 1)
    for nbytes, (first, last), count in (
        (10 * UNIT, (6 * UNIT, 8 * UNIT), 8),
        (10 * UNIT, (6 * UNIT - 1, 8 * UNIT + 1), 8),
        (10 * UNIT, (6 * UNIT + 1, 8 * UNIT - 1), 10),
        (10 * UNIT, (0, 0), 10),
        (UNIT, (UNIT // 2, 3 * UNIT // 4), 1),
    ):
        packed = ((PackedWeight(nbytes, (first, last)),),)
        op = SuperOp("op", (), (), (), (weight,), (), (), 0, packed, 0)
        assert cut_model._paged(op, sums=False).nbytes == count * UNIT
        assert cut_model._paged(op, sums=True).nbytes == nbytes


def settled(runner: StreamingRunner) -> tuple[int, int]:
    """Bytes brought and read from disks once all is there that is read ahead of a next step."""
    last = -1
    while last != runner.fetched:
        last = runner.fetched
        time.sleep(0.3)
    return last, disk_bytes()


def disk_bytes() -> int:
    """Bytes that disks gave this process."""
    with open("/proc/self/io", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("read_bytes"))


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("RssAnon"))


def test_what_is_learned_of_a_head_that_was_not_run_is_of_such_steps_alone(
    wide_head: Path,
) -> None:
    """The first chunks of a long prompt give no logits; a batch has several rows of them."""
    with running(wide_head) as (model, runner):
        ahead = runner.reader
        assert isinstance(ahead, PageAhead)
        heads = [n for n, piece in enumerate(runner.plan.streamed) if "part" in piece.name]
        assert heads
        model.generate(TEXT[:20], max_new_tokens=2, ignore_eos=True)  # 16 tokens are a chunk
        first = set(ahead._learned)
        model.generate_batch([TEXT[:5], TEXT[:4]], max_new_tokens=2, ignore_eos=True)
        for head in heads:
            kinds = [kind for kind, item in first if item == head]
            assert sorted(bool(ahead._learned[kind, head]) for kind in kinds) == [False, True, True]
            later = {kind for kind, item in ahead._learned if item == head} - {*kinds}
            assert later and all(ahead._learned[kind, head] for kind in later)


@pytest.mark.parametrize(
    "name",
    # The second has an expert that all tokens share, the third biases and a window.
    quick(["mixtral", "qwen2_moe", "gpt_oss"], "mixtral", "gpt_oss"),
)
def test_experts_that_stay_are_those_of_resident_weights(
    name: str, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tokens chose is brought and some of it stays, whatever comes between."""
    path = artifact(name, "int4")
    monkeypatch.setattr(paging, "_ENOUGH", 10)
    assert not CutModel.of(Artifact.open(path)).load(16, 1000).skew.measured
    with running(path, room=UNIT) as (model, runner):
        ahead = runner.reader
        assert isinstance(ahead, PageAhead) and isinstance(runner, PagedRunner)
        names = [piece.name for piece in runner.plan.streamed]
        assert {names[index] for index in ahead._routed} == {"layer 0 experts", "layer 1 experts"}
        check_as_resident(model, path)
        for _ in range(2):
            model.generate(TEXT, max_new_tokens=12, ignore_eos=True)
            assert ahead.staying == 1
        hits = runner.experts
        assert hits is not None
        assert 0.3 <= hits.rate <= 0.7 and hits.asked >= 2 * 22  # each layer's experts are one unit
        assert runner.plan.cached == UNIT
    skew = CutModel.of(Artifact.open(path)).load(16, 1000).skew
    assert skew.measured
    assert skew.hits(0.5) == pytest.approx(hits.rate)


def test_a_copy_is_made_once(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(wide_head) as (model, runner):
        wanted = model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
    key = packed_copy.key_of(model.artifact, runner._ops)
    assert [path.name for path in copies.iterdir()] == [key]
    assert key != packed_copy.key_of(model.artifact, runner._ops[::-1])  # cut otherwise
    monkeypatch.setattr(packed_copy, "_write_all", None)
    with running(wide_head) as (model, runner):
        assert isinstance(runner, PagedRunner)
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted


def test_another_version_of_onnxruntime_has_its_own_copy(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(wide_head):
        pass
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    with running(wide_head) as (_, runner):
        assert isinstance(runner, PagedRunner)
    assert len(list(copies.iterdir())) == 2
    monkeypatch.setattr(ort, "__version__", "9.9.10")
    with running(wide_head):  # no more than two are kept
        assert len(list(copies.iterdir())) == 2


def test_a_copy_that_onnxruntime_does_not_read_is_not_used(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another kernel packs: what it packs is not what was saved, and it holds that in memory."""
    with running(wide_head):
        pass
    monkeypatch.setattr(PagedFile, "is_mapped", lambda *_: False)
    with running(wide_head) as (model, runner):
        assert type(runner) is StreamingRunner
        assert "onnxruntime packed layer 0 anew" in runner.plan.remark
        model.generate(TEXT[:5], max_new_tokens=2, ignore_eos=True)


def test_weights_that_onnxruntime_holds_beside_the_copy_are_found_by_their_memory(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It maps what was saved even where it packs anew, so that mappings alone do not tell."""
    with running(wide_head):
        pass
    held = iter(range(0, 1 << 40, 64 << 20))
    monkeypatch.setattr(paging, "anonymous_bytes", lambda: next(held))
    with running(wide_head) as (_, runner):
        assert type(runner) is StreamingRunner
        assert "onnxruntime packed layer 0 anew" in runner.plan.remark


def test_nothing_is_hashed_twice(
    wide_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact's weights once a process, though the copy that is made of them asks too, and of a copy
    that was just written only what is read to load it."""
    hashed, checked, check = list[Path](), list[list[str]](), PackedCopy.check_packed

    def counted(path: Path) -> str:
        hashed.append(path)
        return direct_hash(path)

    def noted(copy: PackedCopy, names: list[str], stop: Event) -> None:
        checked.append(names)
        check(copy, names, stop)

    monkeypatch.setattr(runtime_artifact, "direct_hash", counted)
    monkeypatch.setattr(PackedCopy, "check_packed", noted)
    monkeypatch.setattr("einfold.runtime.hashed._BLUR", 0)  # the file was written just now
    path = tmp_path / "a"
    shutil.copytree(wide_head, path)
    plan = laid_out(wide_head)  # a model so small is pinned by any budget
    monkeypatch.setattr(planning, "place", lambda *_: plan)
    for _ in range(2):
        model = einfold.load(path, threads=1, memory=1 << 30)
        runner = model.engine.runner
        assert isinstance(runner, PagedRunner)
        runner.close()
    assert hashed == [(path / "weights.safetensors").resolve()]
    assert checked == [[], [piece.name for piece in plan.streamed]]


@pytest.mark.parametrize("pinned", [(), ("layer 1",)])
@pytest.mark.parametrize("where", ["packed", "others", "model", "short", "table", "gone"])
def test_a_damaged_copy_is_made_again(
    where: str, pinned: tuple[str, ...], wide_head: Path, copies: Path
) -> None:
    with running(wide_head, *pinned) as (model, runner):
        assert isinstance(runner, PagedRunner)
        wanted = model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
        place = runner.copy.ops["layer 1"]
        file, table = runner.copy.file, runner.copy.folder / "packed.json"
    places = {"packed": place.packed[0][0], "others": place.last - 99, "model": place.model[0]}
    assert place.packed[0][0] < place.loaded < place.last - 99
    if where in places:
        at = places[where] + 9
        with file.open("r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)
            stream.seek(at)
            stream.write(bytes([byte[0] ^ 1]))
    elif where == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif where == "gone":
        file.unlink()
    else:
        table.write_text(json.dumps({"ops": {}}), encoding="utf-8")
    with running(wide_head, *pinned) as (model, runner):
        assert isinstance(runner, PagedRunner)
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted
    assert len(list(copies.iterdir())) == 1


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_copy_is_made_of_no_artifact_that_changes_meanwhile(
    how: str, wide_head: Path, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hashes were right before its weights were packed, and its copy would be found by them."""
    path, write = tmp_path / "a", packed_copy._write_all
    shutil.copytree(wide_head, path)
    weights = path / "weights.safetensors"

    def changed(*arguments: Any) -> Any:
        if how == "written":
            with weights.open("r+b") as stream:
                stream.seek(-5, os.SEEK_END)
                stream.write(b"other")
        else:
            other = tmp_path / "other"
            shutil.copy2(weights, other)
            other.rename(weights)
        return write(*arguments)

    monkeypatch.setattr(packed_copy, "_write_all", changed)
    with (
        pytest.raises(ArtifactError, match="was changed while its weights were packed"),
        running(path),
    ):
        pass
    assert not [each for each in copies.iterdir() if each.is_dir()]


def test_who_is_interrupted_does_not_wait_for_the_check(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(wide_head):
        pass
    check, told = PackedCopy.check_packed, list[bool]()

    def slow(copy: PackedCopy, names: list[str], stop: Event) -> None:
        told.append(stop.wait(60))
        check(copy, names, stop)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PackedCopy, "check_packed", slow)
    monkeypatch.setattr(PagedRunner, "_packed_sessions", interrupted)
    with pytest.raises(KeyboardInterrupt), running(wide_head):
        pass
    assert told == [True]


def test_a_copy_is_made_of_no_damaged_artifact(
    wide_head: Path, copies: Path, tmp_path: Path
) -> None:
    """It would be found again by the hashes in the manifest when the artifact is whole."""
    path = tmp_path / "a"
    shutil.copytree(wide_head, path)
    with (path / "weights.safetensors").open("r+b") as stream:
        stream.seek(-5, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-5, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    parts = OnnxInParts.of(Artifact.open(path, verify=False))
    with pytest.raises(ArtifactError, match="do not match the manifest's hash"):
        parts.runner(laid_out(wide_head), 1)
    assert not copies.exists()


def test_where_there_is_no_room_weights_are_packed_in_every_step(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that streams says so, unless a copy is there already."""
    usage = shutil.disk_usage(wide_head)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 30))
    load = CutModel.of(Artifact.open(wide_head)).load(16, 1000)
    assert not load.paged
    assert "a packed copy takes 1 MiB on the disk of" in load.remark
    with pytest.raises(RecipeError) as told:
        einfold.plan(wide_head, memory=1000, context=64)
    least = int(str(told.value).split("too small: ")[1].split(" are needed")[0].replace(",", ""))
    plan = einfold.plan(wide_head, memory=least, context=64)
    assert plan.way().startswith("packed in every step: a packed copy takes 1 MiB")
    assert plan.way() in plan.sentence()
    monkeypatch.undo()
    made = laid_out(wide_head)
    assert made.paged


def test_a_cache_folder_in_memory_has_no_copy(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy there would take the memory that it is to save, also one that was made before."""
    with running(wide_head):
        pass
    monkeypatch.setattr(packed_copy, "held_in_memory", lambda folder: f"tmpfs at {folder}")
    load = CutModel.of(Artifact.open(wide_head)).load(16, 1000)
    assert not load.paged
    assert load.remark == (
        f"a packed copy would lie in memory, since {copies} is on tmpfs at {copies}; set EINFOLD_CACHE to a "
        "folder on a disk"
    )


def test_a_copy_that_cannot_be_written_is_told(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_copy, "_write_all", full)
    with running(wide_head) as (model, runner):
        assert type(runner) is StreamingRunner
        assert not runner.plan.paged
        assert "No space left on device" in runner.plan.remark
        model.generate(TEXT[:5], max_new_tokens=2, ignore_eos=True)
    assert not list(copies.iterdir())


@pytest.mark.parametrize("kind", [OSError, ArtifactError])
def test_a_copy_that_cannot_be_loaded_is_done_without(
    kind: type[Exception], wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made of it until then is gone before weights are packed instead."""
    with running(wide_head):
        pass
    alive, session = list[weakref.ref[Any]](), paging.session_of

    def some(*given: Any) -> Any:
        if len(alive) == 2:
            raise kind("it is gone")
        found = session(*given)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(paging, "session_of", some)
    left: list[int] = []
    monkeypatch.setattr(
        streaming, "one_heap", lambda: left.append(sum(each() is not None for each in alive))
    )
    with running(wide_head) as (_, runner):
        assert type(runner) is StreamingRunner
        assert runner.plan.remark == "the packed copy could not be loaded: it is gone"
    assert (len(alive), left) == (2, [0, 0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("start", -UNIT),
        ("start", 4096),
        ("end", 1 << 40),
        ("last", 0),
        ("packed", [[0, 1 << 40]]),
        ("model", [0, -1]),
        ("model", [1 << 40, 9]),
    ],
)
def test_a_table_of_places_that_cannot_be_is_none(key: str, value: object, wide_head: Path) -> None:
    """Memory is let go by them: outside of the file it is somebody else's."""
    with running(wide_head) as (model, runner):
        assert isinstance(runner, PagedRunner)
        copy, ops, artifact = runner.copy, runner._ops, model.artifact
    assert packed_copy.find(artifact, ops) == copy
    table = read_json(copy.folder / "packed.json")
    assert table is not None
    table["ops"]["layer 1"][key] = value
    assert write_json(copy.folder / "packed.json", table)
    assert packed_copy.find(artifact, ops) is None


def test_a_copy_that_another_process_made_meanwhile_is_taken(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(wide_head) as (model, runner):
        assert isinstance(runner, PagedRunner)
        copy, ops, artifact = runner.copy, runner._ops, model.artifact
    monkeypatch.setattr(packed_copy, "_write_all", None)
    assert packed_copy.make(artifact, ops, {}, None) == copy


def test_copies_are_made_one_after_the_other(wide_head: Path, copies: Path) -> None:
    with running(wide_head) as (model, runner):
        assert isinstance(runner, PagedRunner)
        ops, artifact = runner._ops, model.artifact
    came = threading.Event()

    def other() -> None:
        packed_copy.make(artifact, ops, {}, None)
        came.set()

    with lock(copies / ".lock", wait=True):
        thread = threading.Thread(target=other)
        thread.start()
        assert not came.wait(0.2)
    assert came.wait(10)
    thread.join()


def test_what_onnxruntime_saves_in_a_way_that_is_not_known_is_told(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(proto: object) -> object:
        raise KeyError("offset")

    monkeypatch.setattr(packed_copy, "_Tensor", other)
    with running(wide_head) as (_, runner):
        assert type(runner) is StreamingRunner
        assert "in a way that is not known here" in runner.plan.remark
    assert not list(copies.iterdir())


def test_a_cache_folder_that_may_not_be_looked_into_is_no_error(
    wide_head: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refused(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if str(path).startswith(str(copies)):
            raise PermissionError(13, "Permission denied")
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", refused)
    assert CutModel.of(Artifact.open(wide_head)).load(16, 1000).paged


def test_a_copy_that_changed_while_running_is_told(wide_head: Path) -> None:
    with running(wide_head) as (model, runner):
        assert isinstance(runner, PagedRunner)
        model.generate(TEXT[:5], max_new_tokens=2, ignore_eos=True)
        os.utime(runner.copy.file, ns=(1, 1))
        with pytest.raises(ArtifactError, match="changed after it was opened"):
            model.generate(TEXT[:5], max_new_tokens=2, ignore_eos=True)


def test_an_artifact_that_is_loaded_twice_runs_on_when_the_first_is_gone(wide_head: Path) -> None:
    first = OnnxInParts.of(Artifact.open(wide_head)).runner(laid_out(wide_head), 1)
    with running(wide_head) as (model, _):
        wanted = model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
        gone = weakref.ref(first)
        first.close()
        del first
        gc.collect()
        assert gone() is None
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted


def test_a_step_that_was_broken_off_is_followed_by_a_whole_one(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(wide_head) as (model, runner):
        wanted = model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens
        run, calls = runner._run, [0]

        def interrupted(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] in (3, 8, 12):
                raise KeyboardInterrupt
            return run(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(runner, "_run", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True)
        assert model.generate(TEXT[:5], max_new_tokens=3, ignore_eos=True).tokens == wanted


def test_a_budget_is_kept_by_the_public_road(wide_head: Path, copies: Path) -> None:
    """The plan and the run say the same; what is all pinned makes no copy."""
    whole = einfold.load(wide_head, threads=1, memory=1 << 31)
    assert whole.plan is not None
    assert (whole.plan.way(), whole.plan.tiers.paged) == ("", False)
    assert not copies.exists()


def test_weights_that_are_widened_are_packed_in_every_step(wide_head: Path) -> None:
    model = CutModel.of(Artifact.open(wide_head))
    cast = helper.make_node("Cast", [model.ops[1].weights[0].name], ["wide"])
    assert _packed(model.ops[1].weights, model.ops[1].nodes)
    assert not _packed(model.ops[1].weights, [*model.ops[1].nodes, cast])
    widened = replace(model, ops=(replace(model.ops[1], packed=()),))
    load = widened.load(16, 1000)
    assert not load.paged
    assert load.remark == "onnxruntime widens weights of layer 0 while it loads them"
