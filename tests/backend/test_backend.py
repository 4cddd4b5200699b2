"""The contract with torch: found by name, gradients untouched, updates in order, options checked."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einfold
from einfold import backend
from einfold.errors import RecipeError

from .conftest import QUICK
from .test_forms import inputs_of, plain, softcap


def test_torch_finds_it_by_its_entry_point() -> None:
    assert "einfold" in torch.compiler.list_backends()
    (point,) = metadata.entry_points(group="torch_dynamo_backends", name="einfold")
    assert point.load() is backend.einfold


def test_a_graph_that_needs_gradients_goes_to_inductor_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(backend, "_inductor", lambda gm, *rest: given.append(gm) or gm.forward)
    inputs = [x.requires_grad_() for x in inputs_of(plain)]
    compiled = torch.compile(plain, backend="einfold")
    compiled(*inputs).sum().backward()
    mine = [x.grad for x in inputs]
    (report,) = backend.reports()
    assert not report.cascades
    assert "gradients" in report.skipped["fusion"]
    targets = {str(node.target) for node in given[0].graph.nodes}
    assert not any("aten" in target for target in targets), "the graph is Dynamo's own"
    for x in inputs:
        x.grad = None
    plain(*inputs).sum().backward()
    for x, grad in zip(inputs, mine, strict=True):
        torch.testing.assert_close(x.grad, grad)


def test_parameters_without_gradients_are_fused(run: Callable[..., Any]) -> None:
    q, k, v = inputs_of(plain)
    run(plain, q.requires_grad_(), k, v)  # under no_grad
    assert backend.reports()[0].fused == 1


class Cache(nn.Module):
    """A static cache: keys and values are written in place, and a counter moves on."""

    def __init__(self, heads: int, slots: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, heads, slots, width))
        self.register_buffer("values", torch.zeros(1, heads, slots, width))
        self.register_buffer("used", torch.zeros((), dtype=torch.long))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.attend(q)
        at = torch.arange(k.shape[2]) + self.used
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        self.used.add_(k.shape[2])
        return before, self.attend(q)

    def attend(self, q: Tensor) -> Tensor:
        live = torch.arange(self.keys.shape[2]) < self.used + 1
        scores = torch.where(live, q @ self.keys.transpose(2, 3), -1e30)
        return torch.softmax(scores, dim=-1) @ self.values


def test_reads_and_writes_of_a_cache_keep_their_order() -> None:
    """One attention reads the cache before it is written, one after; both are fused, none moves across."""
    torch.manual_seed(0)
    steps = [[torch.randn(1, 2, 3, 8) for _ in range(3)] for _ in range(3)]
    mine, theirs = Cache(2, 12, 8), Cache(2, 12, 8)
    compiled = torch.compile(mine, backend="einfold", options=QUICK)
    with torch.no_grad():
        for step in steps:
            for found, expected in zip(compiled(*step), theirs(*step), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [report.fused for report in backend.reports()] == [2]
    for name, buffer in mine.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name))
    assert int(mine.used) == 9


def test_a_read_does_not_cross_a_write() -> None:
    """What the attention read is overwritten before its result is used: it stays where it is."""

    def overwritten(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(2, 3)
        k.zero_()
        return torch.softmax(scores, dim=-1) @ v, k

    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    expected = torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v
    compiled = torch.compile(overwritten, backend="einfold", options=QUICK)
    with torch.no_grad():
        found, zeroed = compiled(q, k, v)
    torch.testing.assert_close(found, expected)
    assert not zeroed.any()
    (cascade,) = backend.reports()[0].cascades
    assert cascade.status == "refused"
    assert "in place" in cascade.reason


def test_no_graph_break_of_its_own(run: Callable[..., Any]) -> None:
    compiled = torch.compile(softcap, backend="einfold", fullgraph=True, options=QUICK)
    with torch.no_grad():
        compiled(*inputs_of(softcap))
    assert len(backend.reports()) == 1


def test_random_numbers_are_not_touched(run: Callable[..., Any]) -> None:
    inputs = inputs_of(softcap)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(softcap, *inputs)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_value_of_an_option_is_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match="option measure is 'sometimes'") as caught:
        run(plain, *inputs_of(plain), measure="sometimes")
    assert isinstance(caught.value.__cause__ or caught.value, (RecipeError, Exception))


def test_measured_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each kind of region is timed once; what is not faster than Inductor is left, and the report says so.

    Another process reads what was measured; another number of threads measures anew, and so does a process
    that finds the file damaged.
    """
    from einfold.compiler.fuse import decide, timings

    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    asked = []

    def timed(trial: Any, able: dict[str, Any], device: torch.device) -> dict[str, float]:
        asked.append(list(able))
        return {"as written": 1.0, **dict.fromkeys(able, 2.0)}

    monkeypatch.setattr(decide, "measured", timed)
    decide.forget()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(plain(q, k, v), k, v)

    inputs = inputs_of(plain)
    compiled = torch.compile(twice, backend="einfold", options={"rest": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), twice(*inputs))
    (report,) = backend.reports()
    both = ["sdpa", "one tile"]
    assert asked == [both]
    assert report.fused == 0
    assert all("left to Inductor" in cascade.reason for cascade in report.cascades)

    def again() -> int:
        decide.forget()
        torch._dynamo.reset()
        asked.clear()
        with torch.no_grad():
            torch.compile(twice, backend="einfold", options={"rest": "eager"})(*inputs)
        return len(asked)

    assert again() == 0
    (path,) = (tmp_path / "choices").iterdir()
    path.write_text(path.read_text()[:-5])
    assert again() == 1
    assert again() == 0
    monkeypatch.setattr(timings.torch, "get_num_threads", lambda: 77)
    assert again() == 1
    decide.forget()


def test_measuring_through_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real thing, once: the region as written and each lowering are compiled and timed."""
    from einfold.compiler.fuse import decide

    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    decide.forget()
    compiled = torch.compile(plain, backend="einfold", options={"rest": "eager"})
    inputs = inputs_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)
    (cascade,) = backend.reports()[0].cascades
    assert set(cascade.seconds) == {"as written", "sdpa", "one tile"}
    assert (cascade.status == "fused") == (cascade.lowering != "as written")
    decide.forget()


def test_the_public_name() -> None:
    assert callable(einfold.explain)
