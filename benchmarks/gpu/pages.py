"""Checks attention over pages that a query chooses on a CUDA device, and times it beside reading everything.

    python -m benchmarks.gpu.pages [--cache fp16] [--page 4] [--out FILE]

Nothing here has run on a GPU yet: it was written, and its parts without a device were tested, on CPUs.
A row is one layer's step of one new token: keys written, bounds renewed, pages scored, the best taken,
attention over these. The table also goes to benchmarks/results, row by row.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from einfold.compiler.codegen.triton.attention.bound_pages import attend_bounded
from einfold.compiler.codegen.triton.attention.bound_slots import over_all_slots
from einfold.compiler.codegen.triton.attention.choosing import ChoosingKernel, choose
from einfold.compiler.codegen.triton.attention.choosing_kinds import ChoosingKind
from einfold.compiler.codegen.triton.attention.choosing_source import choosing_source
from einfold.compiler.codegen.triton.attention.kernels import AttentionKernel, attention_kernel
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.device import described
from einfold.compiler.codegen.triton.dtypes import DTYPES
from einfold.compiler.ir.kv.read.pages.choosing import statistics_of
from einfold.compiler.ir.kv.read.quest.reader import Quest
from einfold.compiler.ir.ops.attention import masked_attention, stored
from einfold.compiler.ir.ops.bounded import BoundedAttention

from .clock import Clock, copy_bandwidth
from .forms import MODELS, Model
from .table import Table, beside, first_line, has_device, versions

#: Rows of a batch, and tokens that each of them has.
LENGTHS = [(1, 8192), (1, 32768), (1, 131072), (16, 8192)]
#: Types of slots, and the largest error against float64, relative to the largest value: queries are float32.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-5, "i8": 1e-5}


@dataclass(frozen=True)
class Step:
    """One step of a layer: a model's heads, the type of slots, rows and their tokens, the reader."""

    model: Model
    cache: str
    batch: int
    tokens: int
    reader: Quest

    @property
    def kind(self) -> AttentionKind:
        """The kind of attention over all slots."""
        model, size = self.model, self.model.head_size
        return AttentionKind(
            kv_heads=model.kv_heads,
            group=model.heads // model.kv_heads,
            key_size=size,
            value_size=size,
            scale=size**-0.5,
            window=0,
            softcap=0.0,
            sinks=False,
            query="fp32",
            cache=self.cache,
            scaled=self.cache == "i8",
        )

    def moved(self) -> tuple[int, int]:
        """Bytes that must be read of bounds, and of keys and values in the pages that are chosen."""
        each = self.batch * self.model.kv_heads * 2 * self.model.head_size
        each *= DTYPES[self.cache].itemsize
        return each * -(-self.tokens // self.reader.page), each * self.reader.reads(self.tokens)


@dataclass(frozen=True)
class Made:
    """The kernels of a step: over all slots, over pages, and what chooses these."""

    whole: AttentionKernel
    listed: AttentionKernel
    choosing: ChoosingKernel


def kernels(step: Step, device: torch.device) -> Made:
    """Generated with tiles by the cost model."""
    kind, read = step.kind, step.reader
    both = [
        attention_kernel(replace(kind, page=page), "k", (0,), step.tokens, described(device))
        for page in (0, read.page)
    ]
    chooses = ChoosingKind(
        kind.kv_heads, kind.group, kind.key_size, kind.scale, "fp32", kind.cache, kind.scaled, read.text
    )  # fmt: skip
    return Made(both[0], both[1], ChoosingKernel(chooses, "c", (0,), choosing_source(chooses)))


def call_of(step: Step, device: str) -> BoundedAttention:
    """The call of the step's operator: random rows of one length, of which the new token is the last."""
    model, page = step.model, step.reader.page
    slots, size = -(-step.tokens // page) * page, model.head_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def cache() -> Tensor:
        full = random(step.batch, model.kv_heads, slots, size)
        return (full * 40).to(torch.int8) if step.cache == "i8" else full.to(DTYPES[step.cache])

    keys, scale = cache(), torch.full((model.kv_heads, size), 1 / 40, device=device)
    bounds = torch.nn.functional.pad(statistics_of(step.reader, keys), (0, 0, 0, 1))
    return BoundedAttention(
        q_BSHD=random(step.batch, 1, model.heads, size) * 3,
        k_BSKD=random(step.batch, 1, model.kv_heads, size),
        v_BSKD=random(step.batch, 1, model.kv_heads, size),
        key_cache_BKCD=keys,
        value_cache_BKCD=cache(),
        bounds_BKPE=bounds,
        used_B=torch.full((step.batch,), step.tokens - 1, device=device),
        count_BK=None,
        sinks_H=None,
        positions_BS=None,
        cos_PR=None,
        sin_PR=None,
        key_scale_KD=scale if step.cache == "i8" else None,
        value_scale_KD=scale if step.cache == "i8" else None,
        layer=0,
        scale=step.kind.scale,
        window=0,
        softcap=0.0,
        interleaved=False,
        read=step.reader.text,
    )


def read_slots(step: Step, table: dict[str, Tensor], slots: int) -> Tensor:
    """Which slots [B, K, C] a table of pages stands for, those without a token too."""
    pages, page = table["pages"].long(), step.reader.page
    entry = torch.arange(pages.shape[2], device=pages.device)
    listed = (entry < table["chosen"][:, None])[:, None].expand(pages.shape)
    found = torch.zeros(*pages.shape[:2], slots // page, dtype=torch.bool, device=pages.device)
    return found.scatter(2, pages, listed).repeat_interleave(page, 2)


def exact(call: BoundedAttention, slots_BKC: Tensor) -> Tensor:
    """Attention over these slots in float64, [B, 1, H, D]."""
    keys, values = (
        stored(cache, scale).double() for cache, scale in zip(call.caches, call.scales, strict=True)
    )
    seen = slots_BKC[:, :, None] & call._visible()[:, None]
    return masked_attention(call.q_BSHD.double(), keys, values, seen, None, call.scale, 0.0)


def reference_slots(step: Step, call: BoundedAttention) -> Tensor:
    """Which slots [B, K, C] the operator reads, the new token written."""
    q_BKGSD = call.q_BSHD.transpose(1, 2).unflatten(1, (step.model.kv_heads, -1)) * call.scale
    found = call.chosen(step.reader, q_BKGSD, call.key_cache_BKCD, call._visible())
    return found[:, :, 0]


@dataclass(frozen=True)
class Bench:
    """What all rows share: the clock, and the bytes a second that a copy moves."""

    clock: Clock
    bandwidth: float

    def row(self, step: Step) -> str:
        """One row of the table; what fails stands in its place with the reason."""
        torch.cuda.empty_cache()
        name = f"{step.model.name} | {step.cache} | {step.batch} x {step.tokens}"
        try:
            return f"| {name} | {self._measured(step)} |"
        except Exception as error:
            return f"| {name} | {first_line(error)} | | | | | | |"

    def _measured(self, step: Step) -> str:
        call, made = call_of(step, "cuda"), kernels(step, torch.device("cuda"))
        attend = attend_bounded(made.whole, made.listed, made.choosing)
        query = call.q_BSHD.unflatten(2, (step.model.kv_heads, -1))[:, 0]

        def run() -> Tensor:
            return attend(call)

        found, table = run(), choose(made.choosing, call, query)
        mine, theirs = read_slots(step, table, call.slots), reference_slots(step, call)
        other = float((mine & call._visible() & ~theirs).sum() / theirs.sum())
        wanted = exact(call, mine)
        wrong = float((found.double() - wanted).abs().max() / wanted.abs().max())
        wrong = wrong if math.isfinite(wrong) else math.inf
        verdict = f"{wrong:.1e}" if wrong <= TOLERANCE[step.cache] else f"**{wrong:.1e}**"
        taken, host = self.clock(run), self.clock.host(run)
        chosen = self.clock(lambda: choose(made.choosing, call, query))
        bounds, pages = (nbytes / self.bandwidth * 1e6 for nbytes in step.moved())
        others = beside(peers(made, call), self.clock, taken)
        return (
            f"{verdict} | {other:.2%} | {taken:.0f} | {host:.0f} | {(bounds + pages) / taken:.0%} | "
            f"{chosen:.0f} ({bounds / chosen:.0%}) | {others}"
        )


def peers(made: Made, call: BoundedAttention) -> dict[str, Callable[[], object]]:
    """What reads everything: the same kernel over all slots, and torch's attention over halves of them."""
    found: dict[str, Callable[[], object]] = {
        "all slots": lambda: over_all_slots(made.whole, call, None)
    }
    if call.key_scale_KD is None:
        query = call.q_BSHD.transpose(1, 2).half()
        keys, values = (cache.half() for cache in call.caches)
        found["SDPA in fp16"] = lambda: scaled_dot_product_attention(
            query, keys, values, scale=call.scale, enable_gqa=True
        )
    return found


def steps(cache: str, page: int) -> list[Step]:
    """What is measured: Llama-3-8B's layer with slots of a type, by the reader's defaults."""
    return [Step(MODELS[0], cache, batch, tokens, Quest(page)) for batch, tokens in LENGTHS]


def heading(bench: Bench, name: str, page: int) -> list[str]:
    """What stands above the rows."""
    return [
        f"# Attention over chosen pages on {name}",
        "",
        f"{versions()}, {Quest(page).text}, float32 queries. Copy {bench.bandwidth / 1e12:.2f} TB/s, "
        "measured.",
        "",
        "Times are medians on the device with L2 flushed, without the host's launch, which stands beside "
        "them. The roofline is the bytes of all bounds and of the chosen pages at the copy's bandwidth, that "
        "of the choice the bytes of bounds alone. The error is that of attention over the pages that the "
        "kernels chose, against float64; beside it the share of slots that the operator does not choose. A "
        "peer at 1.20x takes 1.20 times as long; it reads everything.",
        "",
        "| model | slots | rows x tokens | error | others | µs | host µs | roofline | choice, µs | peers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


def main() -> int:
    """Runs the benchmark; without a CUDA device it says so and measures nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cache", choices=sorted(TOLERANCE), help="only slots of this type")
    parser.add_argument("--page", type=int, default=Quest().page, help="slots of a page")
    parser.add_argument("--out", type=Path, help="where the table goes")
    options = parser.parse_args()
    if not has_device():
        return 1
    clock = Clock()
    bench = Bench(clock, copy_bandwidth(clock))
    caches = [options.cache] if options.cache else list(TOLERANCE)
    table = Table("pages", "-".join(caches), options.out)
    table.add(*heading(bench, torch.cuda.get_device_name(), options.page))
    for cache in caches:
        for step in steps(cache, options.page):
            table.add(bench.row(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
