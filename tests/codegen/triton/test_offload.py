"""Triton artifacts within a memory budget: the plan, which needs no GPU, and runs over a simulated device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import einfold
from einfold.compiler.codegen.triton import in_parts, offload, target
from einfold.compiler.codegen.triton.cut import CutProgram, cut
from einfold.compiler.codegen.triton.in_parts import PROCESS, TritonInParts
from einfold.compiler.codegen.triton.offload import OffloadedRunner, copies_of
from einfold.compiler.ir.device import Device, write_device
from einfold.compiler.ir.interpreter import evaluate_cone
from einfold.compiler.ir.program import readers
from einfold.compiler.memory.arena import InArena
from einfold.errors import (
    ArtifactError,
    ArtifactWarning,
    IRError,
    OutOfMemoryError,
    RecipeError,
    UnsupportedError,
)
from einfold.planning import plan as planned
from einfold.runtime.artifact import Artifact
from einfold.runtime.program import read_program

from ...programs import program
from ...quick import rarely
from ...simulated_copies import ORDERS, Simulated
from .conftest import Ask, needs_triton
from .test_artifact import KIVI

CONTEXT = 32


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("offload_worker")


@pytest.fixture(scope="module")
def compiled(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = f"{name} {options}"
        if key not in made:
            out = tmp_path_factory.mktemp("offload") / name
            einfold.compile(
                model_folder(name), out, target="triton", check=False, recipe=dict(options)
            )
            made[key] = out
        return made[key]

    return get


def budget(folder: Path, part: float, chunk: int = 512) -> int:
    """Bytes for a part of what lies between the least budget and all weights on the device."""
    least = smallest(folder, chunk)
    whole = planned(folder, memory=1 << 40, context=CONTEXT, chunk=chunk).tiers.peak
    return int(least + part * (whole - least))


def smallest(folder: Path, chunk: int = 512) -> int:
    with pytest.raises(RecipeError) as refused:
        planned(folder, memory=1, context=CONTEXT, chunk=chunk)
    said = str(refused.value).split("too small: ")[1].split(" are needed")[0]
    return int(said.replace(",", ""))


INT3 = {"weights": {"format": "int3", "block": 32}}
INT4 = {"weights": {"format": "int4", "block": 32}}


@needs_triton
@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("llama", INT4, 0.0),
        ("llama", {}, 0.5),
        rarely("llama", {"weights": {"format": "fp16"}}, 0.2),
        rarely("llama", {"weights": {"format": "int8"}, "cache": {"storage": "int8"}}, 0.5),
        rarely("gpt2", {}, 0.0),
        rarely("gemma2", INT4, 0.3),
        rarely("gpt_oss", INT4, 0.0),
        rarely("mixtral", INT4, 0.5),
        rarely("gpt_neox", {}, 0.3),
    ],
)
def test_tokens_are_those_of_the_reference(
    interpreter: Ask, compiled: Callable[..., Path], name: str, options: dict[str, Any], part: float
) -> None:
    """Rows of unequal length and a prompt in chunks, twice, whatever lies where; and no more is copied, and
    no less, than the plan says."""
    folder = compiled(name, **options)
    for prompts, chunk in (([list(range(3, 13)), [7, 5, 90]], 64), ([list(range(3, 23))], 7)):
        memory = budget(folder, part, chunk)
        found = interpreter(
            artifact=str(folder),
            memory=memory,
            context=CONTEXT,
            prompts=prompts,
            new=4,
            chunk=chunk,
        )
        plan = found["plan"]
        assert found["found"] == found["again"] == found["expected"]
        assert plan["peak"] <= memory and plan["fetched"] > 0 and plan["home"] == "host"
        streamed = [op["held"] for op in plan["super_ops"] if op["tier"] == "streamed"]
        assert plan["fetched"] == sum(streamed)
        # Of the step that would come next two are under way.
        assert found["copied"] == found["steps"] * plan["fetched"] + sum(streamed[:2])
        told = plan["peak"] - plan["process"] - plan["cache"] - plan["activations"]
        assert found["on the device"] == told, (
            "weights on the device are those of the plan, to the byte"
        )
        assert not found["warnings"]


@needs_triton
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", INT4),
        rarely("llama", {"cache": {"storage": "int8"}}),
        rarely("llama", {"cache": {"quant": KIVI}}),
        rarely("gemma2", {}),
        rarely("gpt_oss", {}),
        rarely("mixtral", {}),
    ],
)
def test_steps_run_in_an_arena_that_the_plan_has_counted(
    interpreter: Ask, compiled: Callable[..., Path], name: str, options: dict[str, Any]
) -> None:
    """Bit by bit, and on the device nothing is allocated."""
    folder = compiled(name, **options)
    memory = budget(folder, 0.0, 16)
    found = interpreter(
        what="arena",
        artifact=str(folder),
        memory=memory,
        context=CONTEXT,
        chunk=16,
        prompt=list(range(3, 23)),
        new=4,
    )
    assert len(found["same"]) == 10 and all(found["same"])
    assert found["arena"] + found["rows"] <= found["activations"]
    assert found["blocks"] == [0] * 5
    # The cache of a run is smaller than that of the plan, which is of the whole context.
    assert found["arena"] + found["rows"] > 0.9 * found["activations"]


@needs_triton
@pytest.mark.parametrize("forgets", ORDERS)
def test_an_order_of_the_streams_that_is_left_out_is_seen(
    interpreter: Ask, compiled: Callable[..., Path], forgets: str
) -> None:
    folder = compiled("llama", **INT4)
    found = interpreter(
        artifact=str(folder),
        memory=budget(folder, 0.0),
        context=CONTEXT,
        prompts=[[3, 4, 5]],
        new=3,
        forgets=forgets,
    )
    assert found["kind"] == "RaceError" and "did not wait" in found["race"]


@needs_triton
def test_memory_that_is_not_locked_is_told_in_the_plan_and_beside(
    interpreter: Ask, compiled: Callable[..., Path]
) -> None:
    folder = compiled("llama", **INT4)
    found = interpreter(
        artifact=str(folder), memory=budget(folder, 0.0), context=CONTEXT, prompts=[[3, 4, 5]], new=3,
        unlocked="out of memory",
    )  # fmt: skip
    assert found["found"] == found["expected"]
    (warned,) = found["warnings"]
    said = "the system does not page-lock all of the weights (out of memory)"
    assert said in warned and "more slowly" in warned
    assert said in found["plan"]["remark"] and said in found["sentence"]


def test_a_plan_needs_no_gpu_and_has_the_keys_of_the_others(compiled: Callable[..., Path]) -> None:
    folder = compiled("llama", **INT4)
    least = smallest(folder)
    plan = planned(folder, memory=least, context=CONTEXT)
    found = plan.data()
    assert found["peak"] == found["budget"] == least and found["process"] == PROCESS
    assert (found["home"], found["bound"], found["paged"]) == ("host", "link", False)
    streamed = [op for op in found["super_ops"] if op["tier"] == "streamed"]
    assert found["buffers"] == 2 * max(op["held"] for op in streamed)
    assert found["disk_seconds"] == found["fetched"] / found["device"]["link_bandwidth"]
    assert found["packing_seconds"] == 0
    assert {op["name"]: op["tier"] for op in found["super_ops"]}["tables"] == "mapped"
    assert found["shared"] > 0, "tables of rotary positions"
    said = plan.sentence()
    assert "from the machine's memory to the GPU in every step, copied ahead" in said
    assert plan.bound().startswith("the link: copying ")
    assert "the link above" in plan.page() and "packs" not in plan.page()
    whole = planned(folder, memory=1 << 40, context=CONTEXT)
    assert whole.sentence().startswith("all weights are pinned") and whole.tiers.buffers == 0
    assert "the link is not asked" in whole.bound()
    with pytest.raises(
        RecipeError, match=r"weights of no super-op alone .* that of a GPU stays there\)$"
    ):
        planned(folder, memory=least - 1, context=CONTEXT)


def test_a_plan_warns_of_memory_that_is_not_there(
    compiled: Callable[..., Path], tmp_path: Path
) -> None:
    folder, path = compiled("llama", **INT4), tmp_path / "device.toml"
    memory = smallest(folder)

    def warned(**numbers: Any) -> str:
        write_device(Device(**numbers), path)
        return planned(folder, memory=memory, context=CONTEXT, device=path).warning()

    assert warned() == "" and warned(gpu_memory=1 << 20) == "", "what is assumed says nothing"
    assert "the GPU has 1.00 MiB of memory, less than the peak" in warned(
        gpu_memory=1 << 20, gpu_source="measured"
    )
    assert "the machine has 1.00 KiB of memory, less than" in warned(ram=1024)


def test_a_layer_is_as_many_super_ops_as_its_largest_call_leaves_room_for(
    compiled: Callable[..., Path],
) -> None:
    cut = TritonInParts.of(Artifact.open(compiled("llama", **INT4))).cut
    names, found = [op.name for op in cut.ops], cut.program
    assert names[-1] == "head"
    assert [name for name in names if name.startswith("layer 1")][:2] == [
        "layer 1",
        "layer 1 part 2",
    ]
    order = {node: at for at, node in enumerate(found.graph.nodes)}
    assert all(order[one.end] <= order[after.first] for one, after in pairwise(cut.ops))
    homes = [name for op in cut.ops for name in op.weights] + list(cut.shared)
    assert sorted(homes) == sorted(found.weights), "every weight has one home"
    for op in cut.ops:
        users = [user for name in op.weights for user in readers(found.graph, name)]
        assert all(order[op.first] <= order[user] < order[op.end] for user in users)


@pytest.mark.parametrize("weights", [INT4, {}, {"weights": {"format": "fp16"}}, rarely(INT3)])
def test_rows_are_looked_up_on_the_host_and_a_tied_weight_is_the_heads_alone(
    compiled: Callable[..., Path], weights: dict[str, Any]
) -> None:
    """As they are stored, whatever the program makes of the whole table."""
    ids = torch.tensor([[3, 90, 3]])
    found = read_program(Artifact.open(compiled("gemma2", **weights)))
    (call,) = (node for node in found.graph.nodes if "embedding" in str(node.target))
    (expected,) = evaluate_cone([call], {found.placeholder("input_ids"): ids}, found)
    names = {str(read.target) for read in found.graph.find_nodes(op="get_attr")}
    made = CutProgram.of(found)
    (lookup,) = made.lookups
    assert torch.equal(lookup.rows(ids), expected)
    assert names == set(found.weights), "the head reads it too"
    assert not [name for name in made.shared if "embed_tokens" in name]


def test_a_weight_whose_view_is_read_later_stays() -> None:
    """In the buffer of its super-op another would lie by then."""
    made = program("""
        weight @model.layers.0.a.w : f32[8, 8]
        weight @model.layers.1.b.w : f32[8, 8]
        weight @model.layers.2.c.w : f32[8, 8]
        input %x "x" : f32[B, 8]
        read %a "model.layers.0.a.w" : f32[8, 8]
        read %b "model.layers.1.b.w" : f32[8, 8]
        read %c "model.layers.2.c.w" : f32[8, 8]
        call %turned = aten.t.default(%a) : f32[8, 8]
        call %y0 = aten.mm.default(%x, %turned) : f32[B, 8]
        call %y1 = aten.mm.default(%y0, %b) : f32[B, 8]
        call %y2 = aten.mm.default(%y1, %c) : f32[B, 8]
        call %late = aten.mm.default(%y2, %turned) : f32[B, 8]
        output "late" = %late
    """)
    ops, shared = cut(made)
    assert [op.weights for op in ops] == [("model.layers.1.b.w",), ("model.layers.2.c.w",)]
    assert shared == ["model.layers.0.a.w"]


def test_a_gpu_with_too_little_room_is_given_a_budget(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, made = Artifact.open(compiled("llama", **INT4)), target.Triton()
    assert made.limit(artifact) is None, "nothing runs on a GPU here"
    for free, found in ((10 * PROCESS, None), (PROCESS, 2 * PROCESS)):
        monkeypatch.setattr(in_parts, "free_memory", lambda free=free: free)
        assert made.limit(artifact) == found
    copies = Simulated()
    monkeypatch.setattr(in_parts, "copies_of", lambda device: copies)
    monkeypatch.setattr(in_parts, "find_device", lambda: torch.device("cpu"))
    with pytest.warns(
        ArtifactWarning, match="no room in the 1,200,000,000 bytes that the GPU has for"
    ):
        model = einfold.load(artifact.folder)
    assert model.plan is not None and model.plan.tiers.budget == 2 * PROCESS


def test_a_gpu_with_no_room_for_the_least_is_asked_for_all(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """What a process takes is assumed: where even the least has no room by it, the device decides."""
    monkeypatch.setattr(in_parts, "free_memory", lambda: 0)

    def resident(*given: Any, **options: Any) -> Any:
        raise OutOfMemoryError("asked for all")

    monkeypatch.setattr(target.Triton, "runner", resident)
    with pytest.raises(OutOfMemoryError, match="asked for all"):
        einfold.load(compiled("llama", **INT4))
    assert not [each for each in recwarn if issubclass(each.category, ArtifactWarning)]


@needs_triton
def test_what_the_machine_has_no_room_for_is_not_locked(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Simulated()
    monkeypatch.setattr(in_parts, "copies_of", lambda device: copies)
    monkeypatch.setattr(in_parts, "find_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(offload, "ram_size", lambda: 1000)
    folder = compiled("llama", **INT4)
    with pytest.raises(
        OutOfMemoryError, match="kept in this machine's memory for the GPU, which has 1,000"
    ):
        einfold.load(folder, memory=smallest(folder), context=CONTEXT)


@pytest.fixture
def runner(compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> OffloadedRunner:
    """One whose weights are nearly all streamed."""
    monkeypatch.setattr(in_parts, "copies_of", lambda device: Simulated())
    monkeypatch.setattr(in_parts, "find_device", lambda: torch.device("cpu"))
    folder = compiled("llama", **INT4)
    found = einfold.load(folder, memory=smallest(folder), context=CONTEXT).engine.runner
    assert isinstance(found, OffloadedRunner)
    return found


@needs_triton
def test_what_the_plan_has_no_room_for_is_refused(runner: OffloadedRunner) -> None:
    runner.check_room(1, CONTEXT)
    with pytest.raises(OutOfMemoryError, match="load for a larger context"):
        runner.check_room(2, 256)
    with pytest.raises(OutOfMemoryError, match="has room for the logits of"):
        runner.check_room(runner.most_logits + 1, 0)


@needs_triton
def test_a_closed_runner_takes_no_step(runner: OffloadedRunner) -> None:
    runner.close()
    runner.close()
    with pytest.raises(ArtifactError, match="was closed"):
        runner.check_room(1, 2)
    with pytest.raises(ArtifactError, match="was closed"):
        runner._run({}, {})


@needs_triton
def test_weights_are_read_where_they_are_placed_or_not_at_all(runner: OffloadedRunner) -> None:
    """A weight that is read out of its turn would be loaded to the device beside the plan."""
    with pytest.raises(IRError, match="has no data here"):
        runner.interpreter.weight(runner._streamed[0].weights[0])


@needs_triton
def test_a_device_with_less_room_than_the_plan_takes_is_told(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_parts, "find_device", lambda: torch.device("cpu"))
    folder = compiled("llama", **INT4)
    for memory, says in (
        (smallest(folder), "no room for 2 buffers"),
        (1 << 40, "no room for the weights that the plan"),
    ):
        monkeypatch.setattr(in_parts, "copies_of", lambda device: Simulated(room=1000))
        with pytest.raises(OutOfMemoryError, match=says):
            einfold.load(folder, memory=memory, context=CONTEXT)


@needs_triton
def test_a_device_without_room_for_the_arena_is_told_and_may_be_asked_again(
    compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_parts, "copies_of", lambda device: Simulated())
    monkeypatch.setattr(in_parts, "find_device", lambda: torch.device("cpu"))
    folder = compiled("llama", **INT4)
    model = einfold.load(folder, memory=smallest(folder), context=CONTEXT)
    asked: list[int] = []

    def full(arena: InArena, nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(InArena, "_memory", full)
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match=r"^out of memory; `einfold estimate` tells"):
            model.generate([3, 4, 5], max_new_tokens=2)
    assert len(asked) == 2 and asked[0] == asked[1] > 0


def test_the_interpreter_has_no_memory_of_its_own_to_keep_within() -> None:
    with pytest.raises(UnsupportedError, match="Triton's interpreter runs without one"):
        copies_of(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_a_run_says_what_it_says_without_a_budget(
    compiled: Callable[..., Path],
) -> None:
    folder = compiled("llama", **INT4)
    with pytest.raises(UnsupportedError, match=r"needs a CUDA device, .* --engine reference"):
        einfold.load(folder, memory=smallest(folder), context=CONTEXT)
