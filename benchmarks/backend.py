"""`backend="einfold"` beside `backend="inductor"`: `python -m benchmarks.backend`.

Attention as models write it, and two models of one layer that generate. Both backends run each case in
turn, the first of a round changing with the round, and ratios are taken within rounds, since what else the
machine does hits both alike: above 1, einfold is faster. Compile seconds are of the first call, cold with
empty caches of plans, choices and Inductor, and again with what the first compilation left on disk. All is
run by one thread and timed by the processor, child processes (the C++ compiler) included, so that waiting
for a shared machine is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

# Compiled by this process, so that the seconds of the compiler are those of its children.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from torch import Tensor

from .report import machine, slug, table

HEADS, GROUPS, WIDTH = 16, 2, 64
#: Never slower than this share of Inductor's speed.
TARGET = 0.95
SHAPES = {"prefill": (512, 512), "decode": (1, 1024)}
BACKENDS = ("inductor", "einfold")
#: Whole models: tokens of the prompt, and tokens that are generated.
MODELS, PROMPT, NEW = ("gemma2", "gpt_oss"), 256, 16

Run = Callable[[], Tensor]


def processor() -> float:
    """Seconds that this process and those it waited for have spent on the processor."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@dataclass(frozen=True)
class Row:
    """One case: seconds by backend, and the ratio of speeds."""

    case: str
    shape: str
    lowering: str
    ratio: float
    rounds: int
    seconds: dict[str, float]
    cold: dict[str, float]
    again: dict[str, float]


def expanded(x: Tensor) -> Tensor:
    """Grouped heads repeated, as transformers' eager attention does."""
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, GROUPS, t, d).reshape(b, h * GROUPS, t, d)


def scores(q: Tensor, k: Tensor) -> Tensor:
    found: Tensor = q @ expanded(k).transpose(2, 3) * WIDTH**-0.5
    return found


def softmax_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(scores(q, k) + mask, dim=-1) @ expanded(v)


def softcap(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.tanh(scores(q, k) / 50) * 50 + mask
    return torch.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ expanded(v)


def sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    sink = torch.arange(HEADS, dtype=q.dtype).reshape(1, -1, 1, 1)
    s = torch.cat([scores(q, k) + mask, sink.expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    s = s - s.max(dim=-1, keepdim=True).values
    return torch.softmax(s, dim=-1)[..., :-1] @ expanded(v)


def alibi(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    slopes = torch.exp2(-torch.arange(1, HEADS + 1) * 8 / HEADS)
    row = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    away = torch.arange(k.shape[2])[None, :] - row
    return torch.softmax(scores(q, k) + slopes[:, None, None] * away + mask, dim=-1) @ expanded(v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def sdpa_on_repeated_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, expanded(k), expanded(v), mask)


CASES: list[Callable[..., Tensor]] = [
    sdpa,
    sdpa_on_repeated_heads,
    softmax_written_out,
    softcap,
    sinks,
    alibi,
]


def inputs_of(queries: int, keys: int) -> list[Tensor]:
    """q, k, v, and a mask with transformers' finite lowest value."""
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, queries, WIDTH)
    k, v = (torch.randn(1, HEADS // GROUPS, keys, WIDTH) for _ in range(2))
    live = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return [q, k, v, torch.where(live, 0.0, torch.finfo(torch.float32).min)[None, None]]


def of_function(case: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> Run:
    """The case compiled, with code of its own so that no backend's guards are asked for the other."""
    own = FunctionType(case.__code__.replace(), globals(), case.__name__)
    compiled = torch.compile(own, backend=backend, dynamic=False)
    return lambda: compiled(*inputs)


def of_model(family: str, backend: str) -> Run:
    """A random model of a real family generates greedily behind a prompt, with a static cache."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "sliding_window": 128,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    if family == "gpt_oss":
        model = GptOssForCausalLM(
            GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2)
        )
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**common))
    model.eval().compile(backend=backend)
    ids = torch.randint(3, 4096, (1, PROMPT))

    def run() -> Tensor:
        out = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, cache_implementation="static"
        )
        assert isinstance(out, Tensor)
        return out

    return run


@contextmanager
def empty_caches() -> Iterator[None]:
    """No plan, choice or kernel on disk, for as long as this lasts."""
    from torch._inductor.utils import fresh_cache

    kept = os.environ.get("EINFOLD_CACHE")
    with tempfile.TemporaryDirectory() as folder, fresh_cache():
        os.environ["EINFOLD_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("EINFOLD_CACHE")
            if kept is not None:
                os.environ["EINFOLD_CACHE"] = kept


def compiled(make: Callable[[str], Run], backend: str) -> tuple[Run, float, float, Tensor]:
    """A run, the seconds of its first call with empty caches and with full ones, and what it gave."""
    from einfold.compiler.fuse import decide

    seconds = []
    with empty_caches():
        for _ in range(2):
            torch._dynamo.reset()
            decide.forget()
            run = make(backend)
            start = processor()
            result = run()
            seconds.append(processor() - start)
    return run, seconds[0], seconds[1], result


def measure(name: str, shape: str, make: Callable[[str], Run], limit: float) -> Row:
    """Compile seconds, and seconds a call of both backends, run in turn."""
    from einfold import backend

    backend.clear_reports()
    runs, cold, again, results = {}, {}, {}, {}
    for side in BACKENDS:
        runs[side], cold[side], again[side], results[side] = compiled(make, side)
    torch.testing.assert_close(results["einfold"], results["inductor"], rtol=1e-3, atol=1e-4)
    # The first compilation and the second have a report each; the graphs of one are what counts.
    reports = backend.reports()[len(backend.reports()) // 2 :]
    lowerings = sorted({c.lowering for report in reports for c in report.cascades})
    times: dict[str, list[float]] = {side: [] for side in BACKENDS}
    end = time.process_time() + limit
    while time.process_time() < end or len(times["einfold"]) < 15:
        turn = BACKENDS if len(times["einfold"]) % 2 else BACKENDS[::-1]
        for side in turn:
            start = time.process_time()
            runs[side]()
            times[side].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["inductor"], times["einfold"], strict=True)]
    return Row(
        name,
        shape,
        ", ".join(lowerings),
        statistics.median(ratios),
        len(ratios),
        {side: statistics.median(values) for side, values in times.items()},
        cold,
        again,
    )


def cases(wanted: list[str]) -> Iterator[tuple[str, str, Callable[[str], Run]]]:
    """Name, shape, and what makes a run for a backend, of the cases asked for."""
    for case in CASES:
        for shape, sizes in SHAPES.items():
            if not wanted or case.__name__ in wanted:
                yield case.__name__, shape, partial(of_function, case, inputs_of(*sizes))
    for family in MODELS:
        if not wanted or family in wanted:
            yield family, "generate", partial(of_model, family)


def markdown(rows: list[Row]) -> str:
    """The figures as a page."""
    found = machine()
    models = (
        f" Models: one random layer of width 512, prompt {PROMPT}, {NEW} new tokens, static cache."
        if any(row.case in MODELS for row in rows)
        else ""
    )
    lines = [
        [
            row.case,
            row.shape,
            f"{row.ratio:.2f}",
            "met" if row.ratio >= TARGET else "not met",
            row.lowering,
            *(f"{row.cold[side]:.1f}" for side in BACKENDS),
            *(f"{row.again[side]:.1f}" for side in BACKENDS),
            str(row.rounds),
        ]
        for row in rows
    ]
    head = [
        "case",
        "shape",
        "speed",
        f">= {TARGET}",
        "runs as",
        "inductor cold s",
        "einfold cold s",
    ]
    head += ["inductor again s", "einfold again s", "rounds"]
    return "\n\n".join(
        [
            f"# The backend beside Inductor, {date.today()}",
            f"{found['cpu']} (family-model {found['family']}), {found['cores']} cores, "
            f"shared with other work; one thread. torch {torch.__version__}.",
            "Speed is Inductor's time over einfold's, the median of ratios within rounds. Compile seconds "
            "are of the first call: cold with empty caches, and again with what that left on disk. All "
            "seconds are the processor's, the C++ compiler's included.",
            table(head, lines),
            f"Attention: {HEADS} query heads on {HEADS // GROUPS} of {WIDTH}, float32; prefill 512 queries "
            f"and keys, decode one query and 1024 keys.{models}\n",
        ]
    )


def write(rows: list[Row], folder: Path) -> None:
    """The page and the figures so far, so that a run that is cut short leaves what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"backend-{date.today()}-{slug(machine())}"
    path.with_suffix(".md").write_text(markdown(rows))
    data = {"machine": machine(), "rows": [vars(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


def joined(files: list[Path]) -> list[Row]:
    """The figures that runs of some cases left, which must be of this machine, as those of one page."""
    rows = []
    for file in files:
        data = json.loads(file.read_text())
        if data["machine"] != machine():
            raise SystemExit(
                f"{file} was measured on another machine; join figures where they were"
            )
        rows += [Row(**row) for row in data["rows"]]
    return rows


def main() -> None:
    """Runs the cases, prints a line for each, and writes the page and the figures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help="names of cases; all without any")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured seconds a case")
    parser.add_argument("--out", type=Path, help="a folder for the page and the figures")
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="measure nothing; one page of these figures",
    )
    options = parser.parse_args()
    if options.join:
        write(joined(options.join), options.out or Path())
        return
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for side in BACKENDS:  # imports, and the compiler's own start
            torch.compile(lambda x: x + 1, backend=side)(torch.ones(2))
        for name, shape, make in cases(options.cases):
            row = measure(name, shape, make, options.seconds)
            rows.append(row)
            print(
                f"{name}, {shape}: {row.ratio:.2f} in {row.rounds} rounds; compile s cold "
                f"{row.cold['inductor']:.1f}, {row.cold['einfold']:.1f}; again "
                f"{row.again['inductor']:.1f}, {row.again['einfold']:.1f}; {row.lowering}",
                flush=True,
            )
            if options.out:
                write(rows, options.out)


if __name__ == "__main__":
    main()
