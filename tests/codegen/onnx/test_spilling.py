"""A cache of which layers lie in a file: the same numbers as in memory, and every fault told."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.compiler.codegen.onnx import in_parts
from einfold.compiler.codegen.onnx.cut_model import CutModel
from einfold.compiler.codegen.onnx.packed_copy import NoCopyError
from einfold.compiler.codegen.onnx.paging import PagedRunner
from einfold.compiler.codegen.onnx.streaming import StreamingRunner
from einfold.compiler.ir.kv.keep.window import Window
from einfold.compiler.ir.kv.spill import TAIL, resident_bytes
from einfold.compiler.memory.placing import place
from einfold.compiler.memory.spill import Slots, Spill
from einfold.compiler.memory.tiers import Fixed, Load, Piece, TierPlan
from einfold.errors import ArtifactError, DiskError, EinfoldError, OutOfMemoryError, RecipeError
from einfold.runtime.artifact import Artifact
from einfold.runtime.memory import direct, slots_ahead
from einfold.runtime.memory.filesystem import held_in_memory
from einfold.runtime.memory.pages import no_paging
from einfold.runtime.memory.slots_ahead import SlotsAhead
from einfold.runtime.memory.spill_file import SpillFile

from ... import head_groups, models
from ...disks import needs_a_disk
from ...greedy import all_logits
from ...hostile import forge
from ...quick import quick, rarely
from .test_float_attention import take_products

#: Longer than what stays in memory of it.
TEXT = [3 + (7 * n) % 101 for n in range(2 * TAIL + 22)]
PROMPTS = [TEXT[:140], TEXT[5:70], TEXT[:1]]
CONTEXT = 256


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(direct, "_PAUSE", 0.001)


@contextmanager
def spilling(
    path: Path, chunk: int = 16, streamed: str = ""
) -> Iterator[tuple[einfold.Model, StreamingRunner]]:
    """A model of whose cache nothing is in memory that may lie in a file. Its weights are, but where they are
    `streamed`, as "pages" or "packed" in every step."""
    model = einfold.load(path, threads=1, chunk=chunk)
    parts = CutModel.of(model.artifact)
    load = parts.spilling(parts.load(512, 1 << 30), CONTEXT)
    assert not load.unspilled
    paged = streamed == "pages"
    plan = TierPlan(
        load.paged if paged else load.pieces,
        frozenset() if streamed else frozenset(piece.name for piece in load.pieces),
        load.fixed,
        1 << 40,
        paged=paged,
        spill=Spill(load.slots),
    )
    runner = (PagedRunner if paged else StreamingRunner)(parts, plan, 1)
    model.engine.runner, model.engine.make = runner, runner.make
    try:
        yield model, runner
    finally:
        runner.close()


def generated(model: einfold.Model, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    found = model.generate_batch(prompts, max_new_tokens=70, ignore_eos=True)
    return [row.tokens for row in found]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of a cache that is larger than all else of it."""
    folder = tmp_path_factory.mktemp("spilled")
    saved = models.save(
        "llama", folder / "model", num_hidden_layers=6, max_position_embeddings=4096
    )
    einfold.compile(saved, folder / "artifact", recipe="int4", check=False)
    return folder / "artifact"


QUEST = {"method": "quest", "page": 4, "share": 0.25, "tokens": 12, "skip_layers": 0}
LANDMARKS = QUEST | {"method": "shadowkv", "outliers": 3}


def tight(path: Path, chunk: int = 512) -> int:
    """A budget for all but a megabyte of the cache."""
    return einfold.plan(path, memory=1 << 40, chunk=chunk).tiers.fixed.total - 1_000_000


#: What a cache may be: the model, options of its compile, and layers of which something is spilled.
CACHES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "float32": ("llama", {}, [0, 1]),
    "int8": ("llama", {"cache": "int8"}, [0, 1]),
    "int4": ("llama", {"cache": "int4"}, [0, 1]),
    "a window that only attention has": ("gemma3", {}, [0, 1]),
    "int8, read by pages": ("llama", {"cache": "int8", "read": QUEST}, [0, 1]),
    "int8, read by landmarks": ("llama", {"cache": "int8", "read": LANDMARKS}, [0, 1]),
    "layers that read another's": ("gemma4", {}, [1]),
    "int8, layers that read another's": ("gemma4", {"cache": "int8"}, [1]),
    "experts": ("mixtral", {}, [0, 1]),
    "few tokens kept": ("llama", {"prune": "streaming_llm:recent=60"}, []),
    "a prompt that is compressed": ("llama", {"prune": "snapkv:tokens=48"}, []),
}


#: One of each road; the others are slow.
FEW = ("float32", "int4", "few tokens kept")


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    quick(CACHES.values(), *(CACHES[name] for name in FEW)),
    ids=CACHES,
)
def test_logits_and_tokens_are_those_of_a_cache_in_memory(
    name: str, options: dict[str, Any], layers: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    einfold.compile(models.save(name, tmp_path / "model"), out, check=False, **options)
    cut = CutModel.of(Artifact.open(out))
    assert [*cut.turns()] == layers
    if layers:
        _check_as_in_memory(out)


@pytest.mark.parametrize("name", ["llama", *map(rarely, ("gemma3", "gemma4"))])
def test_steps_that_go_by_products_read_what_is_spilled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over float32, all slots of a stage at once, those too that hold another layer's."""
    take_products(monkeypatch)
    out = tmp_path / "artifact"
    einfold.compile(models.save(name, tmp_path / "model"), out, check=False)
    _check_as_in_memory(out)


@pytest.mark.parametrize("int8", [rarely(False), True])
def test_heads_that_keep_a_window_stay_in_memory(
    int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head_groups.use(monkeypatch, Window(sinks=2, recent=20, slack=16, prefill="streaming"), int8)
    out = tmp_path / "artifact"
    einfold.compile(models.save("llama", tmp_path / "model"), out, check=False)
    _check_as_in_memory(out)


def _check_as_in_memory(path: Path) -> None:
    """By chunks of a prompt, by prompts together and one behind the other, and by tokens."""
    for chunk in (20, 512):
        whole = einfold.load(path, threads=1, chunk=chunk)
        with spilling(path, chunk) as (model, runner):
            assert np.array_equal(all_logits(model, TEXT), all_logits(whole, TEXT))
            assert generated(model) == generated(whole)
            assert generated(model, PROMPTS[:1]) == generated(whole, PROMPTS[:1])
            assert runner.spilled is not None
            assert runner.spilled.read > 0


@pytest.mark.parametrize("streamed", ["pages", "packed"])
def test_weights_may_be_streamed_beside(streamed: str, llama: Path) -> None:
    if streamed == "pages" and no_paging():
        pytest.skip(no_paging())
    wanted = generated(einfold.load(llama, threads=1, chunk=16))
    with spilling(llama, streamed=streamed) as (model, runner):
        assert generated(model) == wanted
        assert runner.fetched > 0
        assert runner.spilled is not None
        assert runner.spilled.read > 0


def test_each_slot_is_written_once_and_read_in_every_step(llama: Path) -> None:
    with spilling(llama) as (model, runner):
        assert runner.spilled is not None
        prompt, new = 2 * TAIL + 3, 2 * TAIL
        model.generate(TEXT[:prompt], max_new_tokens=1, ignore_eos=True)
        moved = runner.spilled.read, runner.spilled.written
        model.generate(TEXT[:prompt], max_new_tokens=1 + new, ignore_eos=True)
        token = sum(entry.token for entry in runner.plan.spill.slots)  # type: ignore[union-attr]
        # The first prompt is read again. Spans of a head end within pages, which belong to two writes.
        edges = 6 * 2 * 2 * 4096
        assert 4 * TAIL * token <= runner.spilled.written - moved[1] <= 4 * TAIL * token + 5 * edges
        steps = TAIL * (2 + 3) * TAIL * token  # what was stored before each of them
        assert runner.spilled.read - moved[0] >= steps
        assert runner.spilled.read - 2 * moved[0] <= 1.1 * steps + 2 * new * edges


def test_a_budget_spills_and_tokens_stay(llama: Path) -> None:
    """By the public road."""
    whole = einfold.plan(llama, memory=1 << 40, chunk=64)
    assert whole.tiers.spill is None
    budget = tight(llama, 64)
    model = einfold.load(llama, threads=1, memory=budget, chunk=64)
    assert model.plan is not None
    tiers = model.plan.tiers
    assert tiers.spill is not None
    assert tiers.peak <= budget
    assert tiers.cache == whole.tiers.fixed.cache
    found = generated(model, [TEXT[:70]])
    assert found == generated(einfold.load(llama, threads=1, chunk=64), [TEXT[:70]])
    cache = model.engine.cache
    assert cache is not None
    assert model.engine.runner._spilled is not None  # type: ignore[attr-defined]
    held = cache.nbytes + model.engine.runner._spilled.ahead.nbytes  # type: ignore[attr-defined]
    assert held < tiers.fixed.cache
    with pytest.raises(OutOfMemoryError, match="load for a larger context"):
        generated(model, [TEXT, TEXT] * 32)
    model.engine.runner.close()  # type: ignore[attr-defined]


def test_what_is_made_is_what_was_counted(llama: Path) -> None:
    """Bytes of the cache in memory, of one row and of several, whose stages a step of all of them takes."""
    for rows, capacity in ((1, 300), (3, 65), (2, 20)):
        with spilling(llama) as (model, runner):
            cache = model.engine.allocate(rows, capacity, capacity)
            model.engine.prefill(cache, [np.array(TEXT[:8])] * rows)
            one, every = np.full((rows, 1), 5), np.arange(rows)
            model.engine.step(cache, one, cache.lengths[:, None], every)
            assert runner._spilled is not None
            assert runner.plan.spill is not None
            held = cache.nbytes + runner._spilled.ahead.nbytes
            layout, layers = model.engine.layout, runner.plan.spill.layers
            wanted = resident_bytes(layout, layers, rows, capacity, capacity)
            assert (
                wanted - 2 * 2 * 4096 <= held <= wanted
            )  # two stages of two buffers, a page to spare
            assert held < cache.layout.bytes(rows, capacity) or capacity < 300


def test_no_file_is_left_and_none_is_seen(llama: Path, tmp_path: Path) -> None:
    with spilling(llama) as (model, _):
        generated(model, PROMPTS[:1])
        assert [*(tmp_path / "cache").iterdir()] == []
        assert opened(tmp_path / "cache") == 1
        cache = model.engine.allocate(1, CONTEXT, 8)
        assert opened(tmp_path / "cache") == 2  # each cache has its own
        del cache
        generated(model, PROMPTS[:1])
        assert opened(tmp_path / "cache") == 1
    model.engine.cache = None
    gc.collect()
    assert opened(tmp_path / "cache") == 0


def opened(folder: Path) -> int:
    """Files of a folder that this process has open."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.startswith(str(folder.resolve())) for link in links)


def test_where_there_are_no_nameless_files_one_is_unlinked(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = generated(einfold.load(llama, threads=1, chunk=16), PROMPTS[:1])
    monkeypatch.setattr(os, "O_TMPFILE", 0)
    with spilling(llama) as (model, _):
        assert generated(model, PROMPTS[:1]) == wanted
        assert [*(tmp_path / "cache").iterdir()] == []


def test_a_file_system_without_direct_reads_gives_the_same(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generated(einfold.load(llama, threads=1, chunk=16), PROMPTS[:1])
    monkeypatch.setattr(SpillFile, "_try_direct", lambda _: False)
    with spilling(llama) as (model, _):
        assert generated(model, PROMPTS[:1]) == wanted


def test_a_disk_that_is_full_is_told_before_a_prompt_is_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with spilling(llama) as (model, runner):
        wanted = generated(model, PROMPTS[:1])
        take, calls = os.posix_fallocate, list[int]()

        def full(*arguments: int) -> None:
            calls.append(1)
            if len(calls) == 5:
                raise OSError(28, "No space left on device")
            take(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            patch.setattr(runner, "_step", None)
            with pytest.raises(
                DiskError, match=r"the disk is full: .* no room for .* of the cache"
            ):
                generated(model, PROMPTS[:1])
        gc.collect()
        assert opened(tmp_path / "cache") == 0
        assert generated(model, PROMPTS[:1]) == wanted


@pytest.mark.parametrize("wrote", ["nothing", "a part"])
def test_a_disk_that_is_full_while_slots_are_spilled_is_told(
    wrote: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a quota ends. A step that gave nothing may be asked for again, and is then as if nothing had
    been."""
    with spilling(llama) as (model, runner):
        engine, write = model.engine, os.pwritev
        calls = list[int]()

        def full(descriptor: int, views: list[memoryview], place: int) -> int:
            calls.append(1)
            if len(calls) < 6:
                return write(descriptor, views, place)
            if wrote == "a part" and len(calls) == 6 and len(views[0]) > 4096:
                return write(descriptor, [views[0][:4096]], place)
            raise OSError(28, "No space left on device")

        cache = engine.allocate(1, CONTEXT, None)
        found = list[Any]()
        for place, token in enumerate(TEXT):
            step = (cache, np.array([[token]]), np.array([[place]]), np.zeros(1, np.int64))
            for _ in range(2 * (place == TAIL)):  # the first step that writes
                with monkeypatch.context() as patch:
                    patch.setattr(os, "pwritev", full)
                    with pytest.raises(DiskError, match=r"the disk is full: .*spilled-cache"):
                        engine.step(*step)
            found.append(engine.step(*step)[0].copy())
            cache.advance(1, runner.observed)
        steps = einfold.load(llama, threads=1, chunk=1)
        assert np.array_equal(np.array(found), all_logits(steps, TEXT))


#: What is broken of the system, what it gives instead, and what is said.
FAULTS: dict[str, tuple[str, int | OSError, str]] = {
    "a read that fails": ("preadv", OSError(5, "Input/output error"), "Input/output error, twice"),
    "a read that is short": ("preadv", 100, "ends before the .* was cut short; start the text"),
    "a read of nothing": ("preadv", 0, "ends before the .* was cut short; start the text"),
    "a write that fails": ("pwritev", OSError(5, "Input/output error"), "Input/output error"),
    "a write of nothing": ("pwritev", 0, "the disk is full: .*spilled-cache"),
}


#: The others are told where one of these is, or a full disk.
QUICK_FAULTS = ("a read that fails", "a read that is short", "a write of nothing")


@pytest.mark.parametrize(
    ("call", "gives", "says"),
    quick(FAULTS.values(), *(FAULTS[name] for name in QUICK_FAULTS)),
    ids=FAULTS,
)
def test_a_fault_of_the_disk_is_told_and_the_model_goes_on(
    call: str, gives: int | OSError, says: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spilling(llama) as (model, _):
        wanted = generated(model)

        def broken(*_: object) -> int:
            if isinstance(gives, OSError):
                raise OSError(*gives.args)
            return gives

        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, broken)
                for entry in (generated, lambda model: list(model.logits(TEXT))):
                    with pytest.raises(DiskError, match=says) as told:
                        entry(model)
                    assert str(told.value).endswith("ask for the same again")
            assert generated(model) == wanted


def test_a_file_that_was_cut_short_is_told(llama: Path) -> None:
    with spilling(llama) as (model, runner):
        wanted = generated(model, PROMPTS[:1])
        step, steps = runner._step, list[int]()

        def cut(*arguments: Any) -> Any:
            steps.append(1)
            if len(steps) == 20:
                os.ftruncate(runner._spilled._file._descriptor, 8192)  # type: ignore[union-attr]
            return step(*arguments)

        runner._step = cut  # type: ignore[method-assign]
        with pytest.raises(DiskError, match=r"was cut short; start the text again; the step gave"):
            generated(model, PROMPTS[:1])
        assert generated(model, PROMPTS[:1]) == wanted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_reads_and_dies_is_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_ahead, "_LOOK", 0.01)
    with spilling(llama) as (model, runner):
        taken, take = list[int](), SlotsAhead._take

        def dying(ahead: SlotsAhead) -> Any:
            taken.append(1)
            if len(taken) == 40:
                raise SystemExit
            return take(ahead)

        monkeypatch.setattr(SlotsAhead, "_take", dying)
        for _ in range(2):
            with pytest.raises(ArtifactError, match="read the spilled cache have ended; load"):
                generated(model)
        runner.close()
        with pytest.raises(ArtifactError, match="was closed"):
            generated(model)


def test_what_a_thread_meets_is_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with spilling(llama) as (model, _):
        wanted = generated(model)

        def odd(*_: object) -> None:
            raise ZeroDivisionError("odd")

        with monkeypatch.context() as patch:
            patch.setattr(SpillFile, "read", odd)
            with pytest.raises(ArtifactError, match="spilled-cache failed: ZeroDivisionError: odd"):
                generated(model)
        assert generated(model) == wanted


@pytest.mark.parametrize("where", ["within a turn", "between turns", "while slots are kept"])
def test_a_step_that_was_broken_off_is_followed_by_a_whole_one(
    where: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with spilling(llama) as (model, runner):
        wanted, calls = generated(model), list[int]()
        target: tuple[Any, str] = {
            "within a turn": (runner, "_run"),
            "between turns": (runner, "_buffers"),
            "while slots are kept": (SpillFile, "write"),
        }[where]
        act = getattr(*target)

        def interrupted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) % 31 == 0:
                raise KeyboardInterrupt
            return act(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(*target, interrupted)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    generated(model)
        assert generated(model) == wanted


def test_rows_are_not_copied_and_none_is_continued_that_was_not_read(llama: Path) -> None:
    with spilling(llama) as (model, _):
        cache = model.engine.allocate(1, CONTEXT, None)
        with pytest.raises(EinfoldError, match="lies in a file, and rows of it are not copied"):
            cache.copy()
        cache.assume(100)
        one = np.zeros((1, 1), np.int64)
        with pytest.raises(EinfoldError, match=r"is continued behind token 100, and .* holds 0"):
            model.engine.step(cache, one, one, np.zeros(1, np.int64))


def test_a_cache_folder_in_memory_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan, before anything is loaded, with the budget that does without."""
    budget = tight(llama)
    assert einfold.plan(llama, memory=budget).tiers.spill is not None
    shared = Path("/dev/shm")
    if held_in_memory(shared) == "":
        pytest.skip("there is no /dev/shm in memory")
    monkeypatch.setenv("EINFOLD_CACHE", str(shared / "einfold-test"))
    with pytest.raises(RecipeError, match=r"cannot be spilled: /dev/shm/einfold-test is on tmpfs"):
        einfold.plan(llama, memory=budget)
    with pytest.raises(DiskError, match=r"cannot be spilled: .* is on tmpfs"):
        SpillFile(shared / "einfold-test")
    assert not (shared / "einfold-test").exists()


def test_a_disk_without_room_is_refused_by_the_plan(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = tight(llama)
    found = os.statvfs(llama)
    small = os.statvfs_result((*tuple(found)[:4], 1, *tuple(found)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    with pytest.raises(
        RecipeError, match=r"of the cache can be spilled: it takes .* which has 4,096 free"
    ):
        einfold.plan(llama, memory=budget)


def test_a_manifest_with_a_layer_that_the_model_has_not_is_refused(
    llama: Path, tmp_path: Path
) -> None:
    path = forge.copy(llama, tmp_path / "forged")
    forge.edit(path, lambda data: data["cache"].append(data["cache"][0].replace("0.0", "9.0", 1)))
    for entry in (einfold.plan, einfold.load):
        with pytest.raises(ArtifactError, match=r"has a cache of layer 9 .* that no part of"):
            entry(path, memory=1 << 40)


def test_where_pages_cannot_be_had_more_is_spilled_if_it_must_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights that are packed in every step take more memory than their pages."""

    def refused(*_: object) -> None:
        raise NoCopyError("it is gone")

    monkeypatch.setattr(in_parts, "PagedRunner", refused)
    monkeypatch.setattr(in_parts, "StreamingRunner", lambda _, plan, threads: plan)
    names = [f"layer {index}" for index in range(8)]
    pieces = tuple(Piece(name, 300, 300) for name in names)
    slots = tuple(Slots(i, name, name, 1000, 10, 1004, 1, 1002) for i, name in enumerate(names))
    paged = tuple(Piece(name, 100, 100) for name in names)
    load = Load(pieces, Fixed(500, 8000, 50), paged, slots=slots)
    plan, wanted = place(load, 4250), place(replace(load, paged=(), remark="it is gone"), 4250)
    assert plan.paged
    assert plan.spill is not None
    assert wanted.spill is not None
    assert len(wanted.spill.layers) > len(plan.spill.layers)
    assert in_parts.OnnxInParts(Any, Any, ()).runner(plan) == wanted  # type: ignore[arg-type]


def test_a_batch_that_there_is_room_for_runs_behind_a_longer_text(llama: Path) -> None:
    """The stages of the longer cache are not counted on top, nor kept."""
    with spilling(llama) as (model, runner):
        sizes, plan = [(1, 1024), (6, TAIL)], runner.plan
        assert plan.spill is not None
        layout, layers = model.engine.layout, plan.spill.layers
        most = max(resident_bytes(layout, layers, *size, None) for size in sizes)
        runner.plan = replace(plan, fixed=replace(plan.fixed, cache=most))
        for rows, capacity in sizes:
            runner.check_room(rows, capacity)
            cache = model.engine.allocate(rows, capacity, None)
            one = np.zeros((rows, 1), np.int64)
            model.engine.step(cache, one, one, np.arange(rows))
            assert runner._spilled is not None
            assert cache.nbytes + runner._spilled.ahead.nbytes <= most


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be spilled there, set EINFOLD_CACHE to another"):
        SpillFile(tmp_path / "file")


def test_nothing_is_spilled_where_all_fits(llama: Path) -> None:
    model = einfold.load(llama, threads=1, memory=1 << 40)
    assert model.spilled is None
    assert model.engine.make.__name__ == "empty"
    model.engine.runner.close()  # type: ignore[attr-defined]
