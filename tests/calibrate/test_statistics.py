"""Statistics that a model shows on a sample, against plain attention over the whole of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from einfold.compiler.calibrate import stream as streaming
from einfold.compiler.calibrate.observer import Observer
from einfold.compiler.calibrate.observers.attention_mass import AttentionMass
from einfold.compiler.calibrate.observers.key_values import KeyValues, similarity
from einfold.compiler.calibrate.observers.retrieval_heads import (
    RetrievalHeads,
    kv_scores,
    probe_period,
    repeated_tokens,
)
from einfold.compiler.calibrate.sites import Site, attention
from einfold.compiler.calibrate.statistics import Statistics, digest_of
from einfold.compiler.calibrate.stream import attention_weights, stream
from einfold.compiler.ir import kept
from einfold.compiler.ir.interpreter import Interpreter
from einfold.compiler.ir.locks import lock
from einfold.compiler.ir.program import Program
from einfold.errors import CalibrationError

from ..programs import program

#: Two layers of attention over an embedding; the second sees the first's output.
BODY = """
    weight @e : f32[11, 16]
    weight @p : f32[64, 16]
    input %ids "input_ids" : i64[B, S]
    input %pos "position_ids" : i64[B, S]
    read %e "e" : f32[11, 16]
    read %p "p" : f32[64, 16]
    call %h = einfold.embedding(%ids, %e) : f32[B, S, 16]
    call %hp = einfold.embedding(%pos, %p) : f32[B, S, 16]
    call %hs = aten.add.Tensor(%h, %hp) : f32[B, S, 16]
    call %q = aten.unflatten.int(%hs, -1, [4, 4]) : f32[B, S, 4, 4]
    call %k = aten.slice.Tensor(%q, 2, 0, 2) : f32[B, S, 2, 4]
    call %o = einfold.attention(%q, %k, %k, none, 0, 0.5, 0, 0.0) : f32[B, S, 4, 4]
    call %q2 = aten.add.Tensor(%o, %q) : f32[B, S, 4, 4]
    call %k2 = aten.slice.Tensor(%q2, 2, 1, 3) : f32[B, S, 2, 4]
    call %o2 = einfold.attention(%q2, %k2, %k, none, 1, 0.5, 5, 3.0) : f32[B, S, 4, 4]
    call %y = aten.add.Tensor(%o2, %q2) : f32[B, S, 4, 4]
    output "y" = %y
"""

THREE = BODY.replace(
    '    output "y" = %y',
    "    call %o3 = einfold.attention(%y, %k2, %k, none, 2, 0.5, 0, 0.0) : f32[B, S, 4, 4]\n"
    '    output "y" = %o3',
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short sample takes several blocks of rows."""
    monkeypatch.setattr(streaming, "_BLOCK", 4 * 24 * 5)


class Whole(Observer):
    """Keeps a layer's weights whole."""

    def begin(self, site: Site, *values: Any) -> None:
        self.parts: list[Tensor] = []

    def block(self, start: int, weights_BHST: Tensor) -> None:
        assert start == sum(part.shape[2] for part in self.parts)
        self.parts.append(weights_BHST)

    def end(self) -> dict[str, Tensor]:
        assert len(self.parts) > 1
        return {"weights": torch.cat(self.parts, dim=2)}


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_blocks_of_rows(window: int, sinks: bool) -> None:
    q, k = torch.randn(1, 24, 4, 8), torch.randn(1, 24, 2, 8)
    sink = torch.randn(4) if sinks else None
    blocks = [weights for _, weights in attention_weights(q, k, sink, 0.3, window, 2.0)]
    eye = torch.eye(24)[None, :, None].expand(1, -1, 2, -1)  # values that give the weights away
    want = torch.ops.einfold.attention(q, k, eye, sink, 0, 0.3, window, 2.0)
    torch.testing.assert_close(torch.cat(blocks, 2).transpose(1, 2), want)


def test_head_scores_are_the_attention_to_earlier_repeats() -> None:
    tokens = repeated_tokens(6, 11)
    assert tokens.shape == (1, 24) and len(set(tokens[0, :6].tolist())) == 6
    found = stream(program(BODY), tokens, [Whole(), RetrievalHeads(6)])
    for layer in (0, 1):
        weights = found[f"layer-{layer}"]["weights"][0]
        for name, offset in (("echo", 0), ("induction", 1)):
            want = torch.zeros(4)
            for i in range(6, 24):
                earlier = [j for j in range(i) if (i - j) % 6 == 0]
                want += weights[:, i, [j + offset for j in earlier]].sum(1)
            torch.testing.assert_close(found[f"layer-{layer}"][name], want / 18)


def test_a_head_that_copies_has_an_induction_score_of_one() -> None:
    """Keys of the tokens after the query's own: attention by hand, not by a model."""
    tokens, head = repeated_tokens(6, 11), RetrievalHeads(6)
    site, kv = attention(program(BODY))[0], torch.empty(1, 24, 1, 4)
    head.begin(site, torch.empty(1, 24, 2, 4), kv, kv)
    weights = torch.zeros(1, 2, 24, 24)
    for i in range(6, 24):
        weights[0, 0, i, i - 5] = 1  # one behind the same token, one repeat ago
        weights[0, 1, i, i - 6] = 1
    head.block(0, weights[:, :, :10])
    head.block(10, weights[:, :, 10:])
    found = head.end()
    assert found["induction"].tolist() == [1, 0] and found["echo"].tolist() == [0, 1]
    assert kv_scores(found["echo"], 1).tolist() == [1]
    assert tokens.shape[1] == 24


def test_mass_saliency_and_ranges() -> None:
    ids = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(0))
    found = stream(program(BODY), ids, [Whole(), AttentionMass(), KeyValues()])
    weights, mass = found["layer-0"]["weights"], found["layer-0"]["mass"]
    torch.testing.assert_close(mass.sum(1), torch.ones(4))
    torch.testing.assert_close(mass[:, 0], weights.diagonal(0, 2, 3).mean((0, 2)))
    near = sum(weights.diagonal(-d, 2, 3).sum((0, 2)) for d in (2, 3)) / 48
    torch.testing.assert_close(mass[:, 2], near)
    received = weights.reshape(2, 2, 2, 24, 24).mean(2).sum(2) / torch.arange(24, 0, -1)
    torch.testing.assert_close(found["layer-0"]["saliency"], received)
    assert found["layer-1"]["mass"][:, 4:].sum() == 0  # behind the window of 5
    samples = [found[name]["value_sample"] for name in ("layer-0", "layer-1")]
    torch.testing.assert_close(similarity(samples), torch.ones(2, 2))  # both layers have one value
    assert similarity([samples[0], samples[0][:, :4]])[0, 1] == 0
    assert bool((found["layer-0"]["key_max"] >= found["layer-0"]["key_mean"]).all())


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    ids = repeated_tokens(6, 11)
    want = stream(program(BODY), ids, [RetrievalHeads(6)])
    seen: list[str] = []

    class Interrupted(RetrievalHeads):
        def begin(self, site: Site, *values: Any) -> None:
            seen.append("begin")
            if len(seen) == 2:
                raise KeyboardInterrupt
            super().begin(site, *values)

    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        stream(program(BODY), ids, [Interrupted(6)], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0.pt", "progress.pt"]
    got = stream(program(BODY), ids, [Interrupted(6)], folder)
    assert len(seen) == 3  # the first layer was not read again
    for layer, name in (("layer-0", "echo"), ("layer-1", "echo"), ("layer-1", "induction")):
        torch.testing.assert_close(got[layer][name], want[layer][name], rtol=0, atol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0.pt", "layer-1.pt"]
    again = stream(program(BODY), ids, [Interrupted(6)], folder)
    assert len(seen) == 3 and again.keys() == want.keys()


def damaged(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def of_another(folder: Path, name: str, data: bytes) -> None:
    """Whole, and of another folder: another model or text."""
    other = folder.with_name("another")
    kept.write(folder / name, lambda file: torch.save({"of": other.name, "value": {}}, file))


def unsealed(folder: Path, name: str, data: bytes) -> None:
    """As whoever knows the format might write it, with numbers that are none."""
    nothing = {"echo": torch.full((2,), float("nan")), "induction": torch.full((2,), torch.inf)}
    torch.save({"of": folder.name, "value": nothing}, folder / name)


def gone(folder: Path, name: str, data: bytes) -> None:
    (folder / name).unlink()


def pipe(folder: Path, name: str, data: bytes) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def link(folder: Path, name: str, data: bytes) -> None:
    (folder / name).rename(folder / "aside")
    (folder / name).symlink_to(folder / "aside")


@pytest.mark.parametrize("name", ["layer-0.pt", "layer-1.pt", "progress.pt"])
@pytest.mark.parametrize("harm", [damaged, of_another, unsealed, gone, pipe, link])
def test_what_was_kept_and_is_damaged_is_measured_again(
    name: str, harm: Callable[[Path, str, bytes], None], tmp_path: Path
) -> None:
    """Of three layers two were measured before the run was interrupted."""
    body, ids, folder = THREE, repeated_tokens(6, 11), tmp_path / "kept"
    want = stream(program(body), ids, [RetrievalHeads(6)])
    begun: list[int] = []

    class Counted(RetrievalHeads):
        def begin(self, site: Site, *values: Any) -> None:
            begun.append(1)
            if len(begun) == 3:
                raise KeyboardInterrupt
            super().begin(site, *values)

    with pytest.raises(KeyboardInterrupt):
        stream(program(body), ids, [Counted(6)], folder)
    assert sorted(p.name for p in folder.iterdir()) == ["layer-0.pt", "layer-1.pt", "progress.pt"]
    harm(folder, name, (folder / name).read_bytes()[:200])
    got = stream(program(body), ids, [Counted(6)], folder)
    assert len(begun) == 3 + 3  # all of them: what is behind a gap needs what is before it
    for layer, found in want.items():
        for key, value in found.items():
            torch.testing.assert_close(got[layer][key], value, rtol=0, atol=0)
    assert len(stream(program(body), ids, [Counted(6)], folder)) == 3
    assert len(begun) == 3 + 3


def test_two_that_measure_at_once(tmp_path: Path) -> None:
    """The second one keeps nothing, and disturbs nothing."""
    ids, folder = repeated_tokens(6, 11), tmp_path / "kept"
    folder.mkdir()
    with lock(folder / "lock"):
        assert len(stream(program(BODY), ids, [KeyValues()], folder)) == 2
        assert [path.name for path in folder.iterdir()] == ["lock"]
    stream(program(BODY), ids, [KeyValues()], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0.pt", "layer-1.pt"]


def test_a_disk_that_fills_while_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(value: object, file: Any) -> None:
        real(value, file)
        with open("/dev/full", "wb") as nowhere:
            nowhere.write(b"1")

    monkeypatch.setattr(torch, "save", full)
    folder = tmp_path / "kept"
    assert len(stream(program(BODY), repeated_tokens(6, 11), [KeyValues()], folder)) == 2
    assert not list(folder.iterdir())


def test_what_was_measured_is_found_again_by_model_graph_and_text(tmp_path: Path) -> None:
    told: list[str] = []

    def statistics(model: str | None) -> Statistics:
        ids = torch.arange(22).reshape(2, 11) % 11
        named = None if model is None else lambda: model
        return Statistics(
            lambda: (ids, "a text"), named, tmp_path, lambda text, share: told.append(text)
        )

    def measured(model: str | None, found: Program) -> int:
        told.clear()
        statistics(model).of(found, AttentionMass(), KeyValues())
        return len(told)

    assert measured("a", program(BODY)) == 2
    assert measured("a", program(BODY)) == 0
    assert measured("b", program(BODY)) == 2
    assert measured("a", program(BODY.replace("5, 3.0", "6, 3.0"))) == 2
    assert measured(None, program(BODY)) == 2  # a model without a name is measured each time
    assert len(list(tmp_path.iterdir())) == 3
    one = statistics("a")
    assert len(one.of(program(BODY), AttentionMass(), KeyValues())) == 2
    one.of(program(BODY), RetrievalHeads(16))
    assert one.read == ["22 tokens of a text", "16 random tokens, 4 times"]


def test_weights_are_held_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are read between two sites: no reader keeps any."""
    shared: list[object] = []
    real = Interpreter.__init__

    def seen(self: Interpreter, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        shared.append(self._kept)

    monkeypatch.setattr(Interpreter, "__init__", seen)
    stream(program(BODY), repeated_tokens(6, 11), [KeyValues()])
    assert shared == [None]


def test_a_state_of_an_older_form_is_measured_again(tmp_path: Path) -> None:
    ids, folder = repeated_tokens(6, 11), tmp_path / "kept"
    want = stream(program(BODY), ids, [KeyValues()], folder)
    (folder / "layer-1.pt").unlink()
    state = {"of": folder.name, "value": {"behind": "attention", "values": {}}}
    kept.write(folder / "progress.pt", lambda file: torch.save(state, file))
    got = stream(program(BODY), ids, [KeyValues()], folder)
    for layer, found in want.items():
        assert all(torch.equal(got[layer][name], value) for name, value in found.items())


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(stream(program(BODY), repeated_tokens(6, 11), [KeyValues()], blocked / "kept")) == 2


def test_numbers_that_are_not_finite_are_refused() -> None:
    table = torch.randn(11, 16)
    table[3, 12] = float("nan")
    with pytest.raises(CalibrationError, match="the queries of layer 0 are not finite"):
        stream(program(BODY, e=table), torch.tensor([[1, 3]]), [KeyValues()])


def test_a_context_without_room_for_the_probe_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match="a probe of 8 in a context of 64 tokens is too short"
    ):
        probe_period(8, 64)


def test_a_model_in_memory_is_named_by_its_weights() -> None:
    def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": torch.arange(6.0), "b": torch.ones(2, 3)} | changes

    same = {"b": torch.ones(3, 2).T, "a": torch.arange(6.0)}
    assert digest_of(state()) == digest_of(same) == digest_of(dict(reversed(state().items())))
    others = [
        state(a=torch.arange(6.0) + torch.tensor([0, 0, 0, 0, 0, 1e-6])),
        state(a=torch.arange(6.0).reshape(2, 3)),
        state(a=torch.arange(6.0).half()),
        state(a=torch.arange(6.0).bfloat16()),
        state(c=torch.zeros(0)),
        state(c=torch.tensor(True)),
    ]
    assert len({digest_of(state()), *map(digest_of, others)}) == 1 + len(others)
