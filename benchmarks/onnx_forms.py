"""Every form of attention exported to ONNX, fused beside as written: `python -m benchmarks.onnx_forms`.

The catalogue of docs/attention_forms.py, and attention as modules have it (heads behind rows, from a
projection), each in both flavours, 512 queries over 512 keys. What is fused runs in turn with the same module
exported without the pass, and with a second copy of that: ratios are taken within rounds, each of which
begins with another one, and within what the two copies differ by (A/A) a ratio says nothing. With one thread
the processor's clock is read, so that waiting for a shared machine is not counted.

    python -m benchmarks.onnx_forms [--threads N] [--seconds S] [--out FOLDER] [FORM ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import onnxruntime
import torch
from torch import Tensor, nn

import einfold
from einfold.compiler.codegen.onnx.target import Onnx
from einfold.errors import EinfoldError

from .report import machine, table

DOCS = Path(__file__).parent.parent / "docs"
#: One row of eight heads of 64, two of them for keys and values where heads are grouped.
SIZES = {"B": 1, "H": 8, "K": 2, "S": 512, "T": 512, "D": 64}
FLAVOURS = ("ort", "portable")
PACKAGES = ("torch", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One form in one flavour. Without a ratio it is as written, for `reason`.

    `ratio` is the time of what was written over that of what is fused; `apart` has the quartiles of the same
    ratio between two copies of what was written.
    """

    form: str
    flavour: str
    reason: str = ""
    written: float = 0.0
    fused: float = 0.0
    ratio: float = 0.0
    apart: tuple[float, float] = (1.0, 1.0)
    rounds: int = 0

    @property
    def judged(self) -> str:
        """Whether it is faster or slower than the spread of two copies."""
        if not self.ratio:
            return "as written"
        low, high = self.apart
        return "slower" if self.ratio < low else "faster" if self.ratio > high else "as fast"


def heads_behind_rows(kv_heads: int, causal: bool, x: Tensor) -> Tensor:
    """Attention over parts of one projection [B, S, (H + 2 K) D], turned to heads and back."""
    batch, rows, _ = x.shape
    size = SIZES["D"]
    q, k, v = x.split([n * size for n in (SIZES["H"], kv_heads, kv_heads)], -1)
    q, k, v = (y.reshape(batch, rows, -1, size).transpose(1, 2) for y in (q, k, v))
    if kv_heads != SIZES["H"]:
        k, v = (y.repeat_interleave(SIZES["H"] // kv_heads, 1) for y in (k, v))
    scores = q @ k.mT / math.sqrt(size)
    if causal:
        place = torch.arange(rows)
        scores = scores.masked_fill(place > place[:, None], -math.inf)
    out: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, -1)
    return out


def catalogue() -> ModuleType:
    """The forms at the sizes of this benchmark."""
    spec = importlib.util.spec_from_file_location("forms_at_512", DOCS / "attention_forms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    vars(module).update(SIZES)
    return module


def cases(
    forms: Any,
) -> Iterator[tuple[str, Callable[..., Any], Callable[[], tuple[Tensor, ...]]]]:
    """(name, function, its inputs) of every form."""
    for form in forms.FORMS:
        yield form.name, form.function, form.inputs
    for kv_heads, grouped in ((SIZES["H"], ""), (SIZES["K"], ", grouped")):
        for causal, masked in ((False, ""), (True, ", causal")):
            width = (SIZES["H"] + 2 * kv_heads) * SIZES["D"]
            function = partial(heads_behind_rows, kv_heads, causal)
            yield (
                f"heads behind rows{grouped}{masked}",
                function,
                partial(lambda n: (torch.randn(SIZES["B"], SIZES["T"], n),), width),
            )


def left_because(module: nn.Module, inputs: tuple[Tensor, ...], flavour: str) -> str | None:
    """Why nothing of a module is fused; None where something is."""
    report = einfold.explain_export(module, inputs, portable=flavour == "portable")
    if any(item.status == "fused" for item in report.cascades):
        return None
    return "; ".join(item.reason for item in report.cascades) or "no reduction feeds a product"


@contextmanager
def without_fusion() -> Iterator[None]:
    """Modules are exported as they are written, for as long as this lasts."""
    with mock.patch.object(Onnx, "attention", return_value=None):
        yield


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measured(
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    flavour: str,
    threads: int,
    seconds: float,
) -> Row:
    """What is fused beside what was written and a second copy of that."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    portable = flavour == "portable"
    with tempfile.TemporaryDirectory() as folder:
        fused = einfold.export_onnx(module, Path(folder) / "fused", inputs, portable=portable)
        with without_fusion():
            written = einfold.export_onnx(
                module, Path(folder) / "written", inputs, portable=portable, check=False
            )
        runs = [session(path, threads) for path in (written, written, fused)]
    places = [int(node.name.rpartition("_")[2]) for node in runs[0].get_inputs()]
    names = [node.name for node in runs[0].get_inputs()]
    feeds = {n: inputs[at].numpy() for n, at in zip(names, places, strict=True)}
    for run in runs * 2:
        run.run(None, feeds)
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 9 or time.perf_counter() < end:
        spent = [0.0] * len(runs)
        for turn in range(len(runs)):
            at = (turn + len(times)) % len(runs)
            start = clock()
            runs[at].run(None, feeds)
            spent[at] = clock() - start
        times.append(spent)
    low, _, high = statistics.quantiles([first / second for first, second, _ in times], n=4)
    return Row(
        name,
        flavour,
        "",
        statistics.median(first for first, _, _ in times),
        statistics.median(last for _, _, last in times),
        statistics.median((first + second) / 2 / last for first, second, last in times),
        (low, high),
        len(times),
    )


def rows_of(wanted: list[str], threads: int, seconds: float) -> Iterator[Row]:
    forms = catalogue()
    for name, function, make in cases(forms):
        if wanted and name not in wanted:
            continue
        torch.manual_seed(0)
        inputs = forms.in_float32(make())
        module = forms.AsModule(function).eval()
        for flavour in FLAVOURS:
            try:
                reason = left_because(module, inputs, flavour)
                if reason is not None:
                    yield Row(name, flavour, reason)
                else:
                    yield measured(name, module, inputs, flavour, threads, seconds)
            except EinfoldError as error:
                yield Row(name, flavour, f"refused: {error}")


def render(rows: list[Row], found: dict[str, Any], threads: int) -> str:
    """The results as Markdown."""
    shape = ", ".join(f"{name} {size}" for name, size in SIZES.items())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"# Attention exported to ONNX, fused beside as written, {found['date']}",
        "",
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores, shared with other work; {threads} "
        f"thread{'s' if threads > 1 else ''}. {versions}. {shape}, float32.",
        "",
        "`ratio` is the time of what was written over that of what is fused, the median within rounds; A/A "
        "has the quartiles of the same between two copies of what was written, within which nothing differs.",
        "",
    ]
    timed = [row for row in rows if row.ratio]
    for flavour in FLAVOURS:
        ratios = [row.ratio for row in timed if row.flavour == flavour]
        slower = sum(row.judged == "slower" for row in timed if row.flavour == flavour)
        if ratios:
            lines.append(
                f"- {flavour}: {len(ratios)} forms fused, median ratio {statistics.median(ratios):.2f}, from "
                f"{min(ratios):.2f} to {max(ratios):.2f}; {slower} slower than the spread."
            )
    columns = ["form", "flavour", "written ms", "fused ms", "ratio", "A/A", "", "rounds"]
    lines += ["", table(columns, [_cells(row) for row in timed]), "", "## As written", ""]
    left = [
        [row.form, row.flavour, row.reason.replace("|", "\\|")] for row in rows if not row.ratio
    ]
    return "\n".join([*lines, table(["form", "flavour", "reason"], left)]) + "\n"


def _cells(row: Row) -> list[str]:
    return [
        row.form,
        row.flavour,
        f"{row.written * 1e3:.2f}",
        f"{row.fused * 1e3:.2f}",
        f"{row.ratio:.2f}",
        f"{row.apart[0]:.2f} to {row.apart[1]:.2f}",
        row.judged,
        str(row.rounds),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("forms", nargs="*", help="these alone; all without any")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form and flavour")
    parser.add_argument("--out", type=Path, help="a folder for onnx_forms.md and onnx_forms.json")
    options = parser.parse_args()
    found = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    rows = []
    for row in rows_of(options.forms, options.threads, options.seconds):
        rows.append(row)
        print(
            " | ".join(_cells(row)) if row.ratio else f"{row.form} | {row.flavour} | {row.reason}"
        )
    text = render(rows, found, options.threads)
    if options.out is None:
        print(text)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "onnx_forms.md").write_text(text, encoding="utf-8")
    data = {**found, "threads": options.threads, "sizes": SIZES, "rows": [asdict(r) for r in rows]}
    (options.out / "onnx_forms.json").write_text(
        json.dumps(data, indent=1) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
