"""The GPU benchmark's parts that need no GPU: the models' attention, their kernels, and the refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import einfold
from benchmarks.gpu import attention, linear, offload, pages
from benchmarks.gpu.forms import MODELS, Model, Shape, function_of, inputs_of, work
from benchmarks.gpu.linear_peers import peers as peers_of_products
from benchmarks.gpu.peers import flex_function
from einfold.compiler.codegen.reference.plan import run_plan
from einfold.compiler.codegen.triton.linear.kernels import rows_of
from einfold.compiler.ir.device import Device
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.quant.scheme import read_scheme

SMALL = [Shape(2, 9, 9), Shape(2, 1, 9)]


def small(model: Model) -> Model:
    window = None if model.window is None else 4
    return Model(
        model.name, 4, 2, 16, model.softcap, window, sinks=model.sinks, normed=model.normed
    )


@pytest.mark.parametrize("shape", SMALL, ids=["prefill", "decode"])
@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_the_plan_of_a_model_computes_its_attention(model: Model, shape: Shape) -> None:
    torch.manual_seed(0)
    model = small(model)
    report, kernel, given, inputs = attention.prepared(model, shape, "cpu", torch.float32)
    assert report.passes_after == 1
    # Each program has the queries of one KV head of one row of the batch.
    roles = kernel.division.roles
    assert [report.imported.sizes[rank] for rank in roles.grid] == [2, 2]
    assert kernel.division.ahead == () and kernel.division.after == ()
    (found,) = run_plan(kernel.plan, given, report.imported.sizes).values()
    expected = function_of(model, shape)(*inputs)
    torch.testing.assert_close(
        found.float().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SMALL, ids=["prefill", "decode"])
@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_flex_attention_computes_the_same(model: Model, shape: Shape) -> None:
    torch.manual_seed(0)
    model = small(model)
    inputs = inputs_of(model, shape, "cpu", torch.float32)
    found = flex_function(model, shape, "cpu")(*inputs)
    torch.testing.assert_close(found, function_of(model, shape)(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_heads_can_be_checked_apart(model: Model) -> None:
    torch.manual_seed(0)
    report, kernel, given, _ = attention.prepared(small(model), SMALL[0], "cpu", torch.float32)
    ranks = attention.free_ranks(kernel)
    sizes = report.imported.sizes
    assert sorted(sizes[rank] for rank in ranks) == [2, 2, 2], "batch, KV heads, heads of each"
    (all_of_it,) = run_plan(kernel.plan, given, sizes).items()
    for last in (False, True):
        part = attention._cut(kernel.plan, given, ranks, last)
        (found,) = run_plan(kernel.plan, part, {**sizes, **dict.fromkeys(ranks, 1)}).values()
        expected = attention._cut(kernel.plan, dict([all_of_it]), ranks, last)[all_of_it[0]]
        torch.testing.assert_close(found, expected)


def test_what_must_be_done_is_counted() -> None:
    moved, done = work(Model("one", 1, 1, 64), Shape(1, 1, 128))
    assert moved == 2 * 64 * (2 * 128 + 2)
    assert done == 4 * 64 * 128


def test_products_have_schemes_pieces_and_bytes() -> None:
    found = linear.forms()
    assert {"grouped", "qserve"} <= {form.scheme.name for form in found} and len(found) > 7
    for form in found:
        scheme = form.scheme
        pieces = linear.random_pieces(scheme, (40, 300), "cpu")
        kind = form.kind("fp32")
        weight = linear.ready(kind, pieces, 300)
        whole = scheme.dequantize(pieces, 300)
        assert weight.rows == 40
        if form.integers:
            widest = (
                whole / (pieces["units"] if "units" in pieces else pieces["scales"][:, 0])[:, None]
            )
            assert float(widest.abs().max()) < 128.5, "kernels have int8"
        else:
            assert torch.equal(rows_of(scheme, kind.layout(300), weight), whole)
        x = torch.randn(3, 300)
        expected = (form.read(x) @ whole.double().T).float()
        assert linear.error_of(form, pieces, x, expected) < 1e-5
        assert linear.error_of(form, pieces, x, expected + 1) > 1e-2
    (one,) = linear.forms("grouped(bits=2")
    assert one.scheme == read_scheme("grouped(bits=2,block=64,symmetric=1)")
    four = linear.moved(read_scheme("grouped(bits=4,block=128,symmetric=1)"), (4096, 4096), 1, 2)
    assert four == 4096 * 4096 // 2 + 4096 * 32 * 4 + 2 * 8192


def test_the_roofline_of_a_prompt_is_its_operations() -> None:
    bench = linear.Bench(None, torch.float16, 2e12, 5e14, 1e15)  # type: ignore[arg-type]
    form = linear.Form(read_scheme("qserve"), True)
    nbytes = linear.moved(form.scheme, (4096, 4096), 1, 2)
    assert bench.least(form, (4096, 4096), 1) == pytest.approx(nbytes / 2e12 * 1e6)
    assert bench.least(form, (4096, 4096), 2048) == pytest.approx(2 * 2048 * 4096**2 / 1e15 * 1e6)


def test_a_peer_that_is_missing_says_so_where_it_is_made() -> None:
    shape, x = (32, 16), torch.randn(2, 16)
    found = peers_of_products(shape, x)
    assert found["cuBLAS"]()().shape == (2, 32)
    assert "torchao int8 x int8" not in found
    of_integers = peers_of_products(shape, torch.randn(32, 16), integers=True)
    assert (
        of_integers["cuBLASLt int8"]()().dtype == torch.int32 and found.keys() < of_integers.keys()
    )
    with pytest.raises(ImportError, match="marlin"):
        found["Marlin"]()


@pytest.mark.parametrize("cache", ["fp16", "i8"])
def test_pages_are_checked_against_the_operator(cache: str) -> None:
    """The slots of a table of its pages are those that it reads, and what is expected of these its result."""
    torch.manual_seed(0)
    step = pages.Step(Model("small", 4, 2, 16), cache, 2, 61, Quest(4, 0.25, 12))
    call = pages.call_of(step, "cpu")
    out = call.run()  # writes the new token
    wanted = pages.reference_slots(step, call)
    held = wanted.unflatten(2, (-1, 4)).any(3)
    table = {"pages": held.nonzero()[:, 2].view(2, 2, -1), "chosen": held[:, 0].sum(1)}
    assert table["chosen"].tolist() == [4, 4]
    found = pages.read_slots(step, table, call.slots)
    assert torch.equal(found & call._visible(), wanted)
    torch.testing.assert_close(pages.exact(call, found).float(), out, rtol=1e-4, atol=1e-5)
    made = pages.kernels(step, torch.device("cpu"))
    assert made.listed.kind.page == 4 and made.choosing.kind.scaled == (cache == "i8")
    size = {"fp16": 2, "i8": 1}[cache]
    assert step.moved() == (2 * 2 * 2 * 16 * size * 16, 2 * 2 * 2 * 16 * size * 16)
    assert {"all slots"} <= set(pages.peers(made, call))
    assert [each.cache for each in pages.steps(cache, 4)] == [cache] * len(pages.LENGTHS)


class Stepping:
    """A model whose steps copy 100 bytes each, and take no time."""

    def __init__(self) -> None:
        self.engine, self.runner, self.fetched = self, self, 0

    def step(self, *given: object) -> None:
        self.fetched += 100

    def generate(self, prompt: list[int], max_new_tokens: int, ignore_eos: bool) -> None:
        for _ in range(max_new_tokens):
            self.runner.step(prompt)


def test_a_budget_holds_the_part_of_the_weights_that_is_asked_for(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    einfold.compile(model_folder("llama"), out, target="triton", recipe="int4", check=False)
    device = Device(gpu_bandwidth=1e3, link_bandwidth=10.0, gpu_source="measured")
    whole = offload.planned(out, offload.budget_of(out, 1.0), device)
    assert not whole.tiers.streamed and whole.tiers.peak == whole.tiers.budget
    part = offload.planned(out, offload.budget_of(out, 0.8), device)
    assert 0.2 <= part.tiers.fetched / sum(p.held for p in whole.tiers.pieces) < 1
    assert part.step.disk == part.tiers.fetched / 10.0
    run = offload.timed(Stepping(), 5)
    assert run.copied == 100.0 and run.seconds < 1
    cells = offload.row(part, offload.Run(2 * part.step.seconds, 5.0), 10.0, "none").split(" | ")
    assert cells[5] == "2.00x" and cells[7] == "none |"
    assert "10.0 GB/s" in offload.heading("a GPU", "tiny", Device(link_bandwidth=1e10))[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [attention, linear, pages, offload])
def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__])
    assert script.main() == 1
    assert "No CUDA device" in capsys.readouterr().err
