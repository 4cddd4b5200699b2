"""`plan`, `device probe` and `run --memory`: what is told before loading is what happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from einfold import planning
from einfold.api import compile
from einfold.cli import running
from einfold.compiler.ir.device import Device, device_file, read_device, write_device
from einfold.compiler.memory.tiers import Load, TierPlan
from einfold.compiler.memory.timeline import seconds_of
from einfold.errors import RecipeError
from einfold.model import load
from einfold.planning import plan as planned
from einfold.runtime.memory import gpu_probe, probe
from einfold.runtime.memory.pages import UNIT, no_paging

from .. import models
from ..disks import needs_a_disk
from .test_cli import as_json, einfold

#: What scripts may rely on.
KEYS = {
    *(
        "artifact",
        "budget",
        "tokens",
        "chunk",
        "peak",
        "process",
        "cache",
        "activations",
        "buffers",
    ),
    *(
        "pinned",
        "fetched",
        "seconds",
        "tokens_a_second",
        "bound",
        "disk_seconds",
        "packing_seconds",
    ),
    *("compute_seconds", "super_ops", "device", "paged", "remark", "prompt_fetched", "experts"),
    *("spilled", "home", "shared"),
}


def smallest(artifact: Path) -> int:
    """Bytes of the least budget, as the refusal of a smaller one says."""
    said = einfold("plan", artifact, "--memory", "1MB", code=7)
    return int(said.split("too small: ")[1].split(" are needed")[0].replace(",", ""))


def test_a_plan_is_told_and_a_run_within_it_writes_the_same(
    wide_head: Path, tmp_path: Path
) -> None:
    least = smallest(wide_head)
    plan = as_json("plan", wide_head, "--memory", str(least))
    assert plan.keys() == KEYS
    assert plan["peak"] <= plan["budget"] == least
    assert (
        plan["fetched"]
        == sum(op["bytes"] for op in plan["super_ops"] if op["tier"] == "streamed")
        > 0
    )
    shown = einfold("plan", wide_head, "--memory", str(least))
    assert "layer 1" in shown
    assert "bound by" in shown
    assert planned(wide_head, memory=least).bound() in " ".join(shown.split())
    page = tmp_path / "plan.html"
    assert as_json("plan", wide_head, "--memory", str(least), "--page", page) == plan
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count("<svg") == 1
    assert all(f">{op['name']} is read: " in drawn for op in plan["super_ops"] if op["bytes"])
    missing = tmp_path / "none" / "plan.html"
    said = einfold("plan", wide_head, "--memory", str(least), "--page", missing, code=6)
    assert f"cannot write {missing}: No such file or directory" in said
    assert not [*tmp_path.glob(".*")]
    options = ("--ids", "5 6 7", "--max-new-tokens", "4", "--ignore-eos", "--threads", "1")
    within = (*options, "--memory", str(least))
    ran = as_json("run", wide_head, *within, "--context", str(plan["tokens"]))
    assert ran["tokens"] == as_json("run", wide_head, *options)["tokens"]
    assert ran["plan"]["fetched"] == plan["fetched"]


def test_a_run_leaves_room_for_its_prompt_and_answer(tmp_path: Path) -> None:
    """So it needs less than a plan that knows of no prompt."""
    model = models.save("llama", tmp_path / "model", max_position_embeddings=4096)
    out = tmp_path / "artifact"
    compile(model, out, recipe="int4", check=False)
    least = smallest(out)
    options = ("--ids", "5 6 7", "--max-new-tokens", "4", "--ignore-eos", "--threads", "1")
    want = as_json("run", out, *options)["tokens"]
    ran = as_json("run", out, *options, "--memory", str(least))
    assert ran["tokens"] == want
    assert ran["plan"]["tokens"] == 7
    room = as_json("plan", out, "--memory", str(least))["cache"] - ran["plan"]["cache"]
    less = str(least - room)
    assert room > 0 and as_json("run", out, *options, "--memory", less)["tokens"] == want
    said = einfold("run", out, *options, "--memory", less, "--context", "4096", code=7)
    assert "too small" in said


def test_a_run_spills_a_cache_that_has_no_room_and_says_what_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    model = models.save(
        "llama", tmp_path / "model", num_hidden_layers=6, max_position_embeddings=4096
    )
    out = tmp_path / "artifact"
    compile(model, out, recipe="int4", check=False)
    whole = as_json("plan", out, "--memory", "1GiB")
    assert whole["spilled"] is None
    memory = str(whole["process"] + whole["cache"] + whole["activations"] - 1_000_000)
    plan = as_json("plan", out, "--memory", memory)
    assert plan["peak"] <= plan["budget"] < whole["peak"]
    spilled = plan["spilled"]
    assert spilled.keys() == {"layers", "bytes", "held", "fetched", "written"}
    assert plan["cache"] == whole["cache"] - spilled["bytes"] + spilled["held"]
    assert spilled["bytes"] == len(spilled["layers"]) * whole["cache"] // 6
    assert spilled["written"] == spilled["bytes"] // 4096
    disk = plan["fetched"] + spilled["fetched"] + spilled["written"]
    assert plan["disk_seconds"] == pytest.approx(disk / plan["device"]["disk_bandwidth"])
    told = " ".join(einfold("plan", out, "--memory", memory).split())
    assert f"spilled to the disk {len(spilled['layers'])} layers of the cache, " in told
    assert "KV cache, 4,096 tokens, in memory" in told
    page = tmp_path / "plan.html"
    einfold("plan", out, "--memory", memory, "--page", page)
    drawn = page.read_text(encoding="utf-8")
    assert all(f">cache of layer {layer} is read: " in drawn for layer in spilled["layers"])
    options = ("--ids", " ".join(map(str, range(3, 103))), "--max-new-tokens", "4", "--ignore-eos")
    within = (*options, "--memory", memory, "--context", "4096")
    ran = as_json("run", out, *within)
    assert ran["tokens"] == as_json("run", out, *options)["tokens"]
    assert ran["plan"]["spilled"] == spilled
    assert min(ran["spilled"]["read"], ran["spilled"]["written"]) > 0
    said = list[str]()
    monkeypatch.setattr(running.err, "print", lambda text, **_: said.append(text))
    einfold("run", out, *within)
    assert "spilled " in said[0]
    assert said[-1].startswith("of spilled layers of the cache ")
    assert "spilled" not in as_json("run", out, *options)


@pytest.mark.skipif(bool(no_paging()), reason=no_paging())
def test_a_run_says_how_many_experts_were_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the plan how many it expects, and by what."""
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "artifact"
    compile(models.save("mixtral", tmp_path / "model"), out, recipe="int4", check=False)

    def streams(
        load: Load, budget: int, _: Device
    ) -> TierPlan:  # a model so small is pinned by any budget
        pinned = frozenset(piece.name for piece in load.paged if piece.choice is None)
        return TierPlan(load.paged, pinned, load.fixed, budget, True, room=UNIT, skew=load.skew)

    monkeypatch.setattr(planning, "place", streams)
    memory = ("--memory", "1GiB")
    plan = as_json("plan", out, *memory)
    assert plan["experts"].keys() == {"bytes", "held", "hit_rate", "measured"}
    assert (plan["experts"]["bytes"], plan["experts"]["measured"]) == (2 * UNIT, False)
    assert plan["fetched"] < plan["prompt_fetched"]
    told = " ".join(einfold("plan", out, *memory).split())
    assert "% of those that a token asks for (assumed)" in told
    options = ("--ids", "5 6 7", "--max-new-tokens", "4", "--ignore-eos", "--threads", "1")
    ran = as_json("run", out, *options, *memory)
    assert ran["tokens"] == as_json("run", out, *options)["tokens"]
    hits = ran["experts"]
    assert hits["asked"] == 2 * 3  # a unit a layer, of three steps of one token
    assert hits["rate"] == hits["held"] / hits["asked"]
    said = list[str]()
    monkeypatch.setattr(running.err, "print", lambda text, **_: said.append(text))
    einfold("run", out, *options, *memory)
    assert said[-1].startswith("50 % of the experts that tokens asked for were held: 3 of 6 units")
    assert "experts" not in as_json("run", out, *options)


def test_a_measured_device_decides_the_seconds(wide_head: Path, tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    slow = Device(disk_bandwidth=1e3, source="a test")
    write_device(slow, file)
    assert read_device(file) == slow
    memory = ("--memory", str(smallest(wide_head)))
    plan = as_json("plan", wide_head, *memory, "--device", file)
    assert plan["bound"] == "disk"
    assert plan["seconds"] == pytest.approx(plan["fetched"] / 1e3)
    assert plan["device"]["source"] == "a test"
    assert as_json("plan", wide_head, *memory)["device"]["source"] == "defaults"


def test_a_peak_above_the_devices_memory_is_told(wide_head: Path, tmp_path: Path) -> None:
    file, memory = tmp_path / "device.toml", smallest(wide_head)
    told = "of memory, less than the peak of"
    for ram in (memory - 1, memory):
        write_device(Device(ram=ram), file)
        plan = planned(wide_head, memory=memory, device=file)
        assert (told in plan.warning()) == (ram < memory)
    assert read_device() is None
    assert planned(wide_head, memory=memory).device.ram == probe.ram_size()


def test_weights_that_lie_in_memory_are_told(
    wide_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming them saves nothing; where none are streamed nothing is lost."""
    monkeypatch.setattr(planning, "held_in_memory", lambda folder: f"tmpfs with {folder}")
    told = f"{wide_head} is on tmpfs with {wide_head}, which is held in memory"
    assert told in planned(wide_head, memory=smallest(wide_head)).warning()
    assert planned(wide_head, memory=1 << 30).warning() == ""


@pytest.mark.parametrize(
    ("device", "told"),
    [
        (
            {"disk_bandwidth": 1e3},
            r"the disk: reading .* KiB takes [\d.]+ s, packing 0\.\d+ s, computing 0",
        ),
        ({"pack_bandwidth": 1e3}, r"packing: it takes [\d.]+ s, computing 0\.000 s, the disk 0"),
        ({"ram_bandwidth": 1e3}, r"computing: it takes [\d.]+ s, packing 0\.\d+ s, the disk 0"),
    ],
)
def test_what_bounds_a_token_is_one_line(
    device: dict[str, float], told: str, wide_head: Path, tmp_path: Path
) -> None:
    write_device(Device(**device), tmp_path / "device.toml")
    memory = smallest(wide_head)
    found = planned(wide_head, memory=memory, device=tmp_path / "device.toml").bound()
    assert re.match(told, found)
    assert "\n" not in found
    pinned = planned(wide_head, memory=1 << 30).bound()
    assert re.fullmatch(r"computing: it takes 0\.\d+ s, and the disk is not asked", pinned)


def test_probe_writes_what_plan_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_RAM", 1 << 20)
    monkeypatch.setattr(probe, "_DISK", probe.PIECE)
    found = as_json("device", "probe", "--at", tmp_path, "--threads", "1")
    assert found["file"] == str(device_file())
    known = read_device()
    assert known is not None
    assert known.source.startswith("measured ")
    assert min(known.ram_bandwidth, known.disk_bandwidth, known.pack_bandwidth, known.ram) > 0
    assert json.loads(json.dumps(found))["cores"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # the file that was read is gone
    assert "File exists" in einfold("device", "probe", "--at", device_file(), code=74)


def test_probe_keeps_what_was_measured_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs_a_disk(tmp_path)
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_RAM", 1 << 20)
    monkeypatch.setattr(probe, "_DISK", probe.PIECE)
    monkeypatch.setattr(gpu_probe, "measured_gpu", lambda: None)
    probing = ("device", "probe", "--at", tmp_path, "--threads", "1")
    assert as_json(*probing)["gpu_source"] == "defaults"
    monkeypatch.setattr(gpu_probe, "measured_gpu", lambda: (80 << 30, 3e12, 5e10))
    assert "GPU 3000 GB/s, link 50.0 GB/s" in " ".join(einfold(*probing).split())
    known = read_device()
    assert known is not None and known.gpu_source == known.source
    gpu = known.gpu()
    assert (gpu.ram, gpu.ram_bandwidth, gpu.disk_bandwidth) == (80 << 30, 3e12, 5e10)


def test_a_triton_artifact_is_planned_for_a_gpu(text_model: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "artifact", tmp_path / "plan.html"
    einfold("compile", text_model, "-o", out, "--target", "triton", "--no-check")
    within = ("--memory", str(smallest(out)))
    plan = as_json("plan", out, *within)
    assert plan.keys() == KEYS and plan["fetched"] > 0
    assert (plan["home"], plan["bound"]) == ("host", "link")
    shown = " ".join(einfold("plan", out, *within, "--page", page).split())
    for said in ("on the GPU", "copied in every step", ": link 0."):
        assert said in shown
    assert "from the disk" not in shown and "packing" not in shown
    drawn = page.read_text(encoding="utf-8")
    assert "the link above" in drawn and "the disk" not in drawn
    if not torch.cuda.is_available():
        said = einfold("run", out, "--ids", "5 6 7", *within, "--context", "4096", code=4)
        assert "needs a CUDA device" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cores = -1", "cores must be a number above 0, not -1"),
        ("ram_bandwidth = inf", "ram_bandwidth must be a number above 0, not inf"),
        ("link_bandwidth = 0", "link_bandwidth must be a number above 0, not 0"),
        ("gpu_source = 1", "gpu_source must be a text, not 1"),
        ("speed = 3", "unknown key 'speed'"),
        ("= 3", "no description of a device"),
    ],
)
def test_a_description_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_device(file)


def test_options_that_mean_nothing_are_refused(wide_head: Path) -> None:
    assert "give both" in einfold("run", wide_head, "--ids", "5", "--context", "64", code=7)
    assert "is no size" in einfold("run", wide_head, "--ids", "5", "--memory", "much", code=7)


def test_runs_and_loads_are_planned_for_the_device_that_is_given(
    wide_head: Path, tmp_path: Path
) -> None:
    """As `plan` is, so that what was told before is what is run."""
    slow = tmp_path / "slow.toml"
    write_device(Device(2, 1 << 40, 20_000_000_000, 1_000_000, source="made up"), slow)
    memory = str(smallest(wide_head))
    within = ("--memory", memory, "--device", slow)
    plan = as_json("plan", wide_head, *within)
    options = ("--ids", "5 6 7", "--max-new-tokens", "2", "--ignore-eos", "--threads", "1")
    ran = as_json("run", wide_head, *options, *within, "--context", str(plan["tokens"]))["plan"]
    assert ran["device"] == plan["device"] != as_json("plan", wide_head, *within[:2])["device"]
    assert ran["disk_seconds"] == plan["disk_seconds"] > 0.1
    model = load(wide_head, memory=int(memory), context=plan["tokens"], device=slow)
    assert model.plan is not None and model.plan.device == read_device(slow)
    model.engine.runner.close()
    said = einfold("run", wide_head, "--ids", "5", "--device", slow, code=7)
    assert "--device is what --memory is planned for; give both" in said
    with pytest.raises(RecipeError, match="device is what memory is planned for; give both"):
        load(wide_head, device=slow)


def test_seconds_are_those_with_the_waits(wide_head: Path) -> None:
    """Where there is room for less than a super-op ahead, engine and disk take turns."""
    plan = planned(wide_head, memory=smallest(wide_head))
    told = plan.data()
    assert plan.seconds == seconds_of(plan.tiers, plan.seen) > 1.01 * plan.step.seconds
    assert told["seconds"] == plan.seconds == 1 / told["tokens_a_second"]
    assert f"one waits for the other, {plan.seconds:.3f} s in all" in plan.bound()
