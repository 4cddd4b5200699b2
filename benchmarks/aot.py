"""Compiles every kernel for sm_80, sm_90 and sm_100 with no GPU, and writes what came out.

    python -m benchmarks.aot [--out FILE]    all forms and artifacts, to benchmarks/results/aot.md
    python -m benchmarks.aot softmax ALiBi   these, to the terminal; "head sizes" and "artifacts" are too

What is compiled is kept in build/ under a hash of its source, so that a run that was cut short goes on where
it was, and a change compiles only what it touches. Exits with 1 where a kernel is outside the limits of
compiler/codegen/triton/limits.py. A first run takes a quarter of an hour and more: `make aot`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from einfold.compiler.codegen.triton.ahead import Compiled, compile_ahead, describe
from einfold.compiler.codegen.triton.generate import generate
from einfold.compiler.codegen.triton.kernel import Kernel
from einfold.compiler.codegen.triton.limits import exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES, Options, Tiles, merge_tiles
from einfold.compiler.fuse.explain import CascadeReport, explain_function
from einfold.errors import UnsupportedError

from .aot_artifacts import HEADS, functions_of, kinds_of

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "benchmarks" / "results" / "aot.md"
KEPT = ROOT / "build" / "aot.json"
CAPABILITIES = (80, 90, 100)
#: Traced at a length that is cheap to trace and that no head size has; tiles are chosen for a usual one.
TRACED, USUAL = 272, 4096
#: Whose parts and merges are compiled too, for one query: one of each shape of state.
IN_PARTS = {
    "GQA by reshaped queries",
    "sinks by concatenation",
    "log-sum-exp as an output",
    "mean and variance under the attention",
    "K/V dequantized, per token",
    "linear attention",
}
#: What is compiled in other types than float16.
TYPED = (
    "softmax",
    "sliding window",
    "softcap",
    "sinks by concatenation",
    "K/V dequantized, per token",
    "linear attention, causal",
)
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class Job:
    """One function to compile: the heading and name of its row, the kernel, "whole" and the like."""

    section: str
    name: str
    kernel: Kernel
    capability: int
    kind: str
    given: Tiles | None = None

    @property
    def tiles(self) -> Tiles:
        """The tiles of this function: `given`, or those that the kernel has for it."""
        usual = merge_tiles(self.kernel.tiles) if self.kind == "merge" else self.kernel.tiles
        return self.given or usual

    def key(self, version: str) -> str:
        """A hash of all that the compiler is given."""
        generated = self.kernel.functions[self.kind]
        described = describe(self.kernel, generated)
        helped = [self.kernel.functions[kind].helpers for kind in sorted(self.kernel.functions)]
        given = (generated.text, described, sorted(map(sorted, helped)), self.tiles)
        return blake2b(
            repr((version, self.capability, *given)).encode(), digest_size=12
        ).hexdigest()


def catalogue(**sizes: int) -> ModuleType:
    """The catalogue of forms at other sizes than its own."""
    spec = util.spec_from_file_location("attention_forms", ROOT / "docs" / "attention_forms.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["attention_forms"] = module
    spec.loader.exec_module(module)
    for name, size in sizes.items():
        setattr(module, name, size)
    return module


def forms(head: int = 128) -> list[Any]:
    """The forms of the catalogue at a head size."""
    found: list[Any] = catalogue(B=1, H=8, K=2, S=TRACED, T=TRACED, D=head).FORMS
    return found


def folded(form: Any) -> CascadeReport:
    """A form as it folds."""
    torch.manual_seed(0)
    return explain_function(form.function, form.inputs())


def kernels(
    report: CascadeReport,
    capability: int,
    real: str = "fp16",
    precision: str = "ieee",
    queries: int = USUAL,
) -> Iterator[Kernel]:
    """The kernels of a form, one a plan, with tiles for a device of this capability."""
    kinds = {"real": real, "integer": "i8", "bool": "i1"}
    for plan in report.folding.plans:
        types = {name: kinds[tensor.kind] for name, tensor in plan.inputs.items()}
        sizes = {
            rank: (USUAL if rank == plan.rank else queries) if size == TRACED else size
            for rank, size in report.imported.sizes.items()
        }
        options = Options(device=DEVICES[capability], precision=precision)
        yield generate(plan, types, sizes, options)


def jobs(wanted: set[str], refused: dict[str, str]) -> Iterator[Job]:
    """Every function of the table, in its order; `refused` takes the reason where there is no kernel."""
    named = [form for form in forms() if not wanted or form.name in wanted]
    reports = {}
    for form in named:
        try:
            reports[form.name] = folded(form)
            yield from _of_form(form.name, reports[form.name])
        except UnsupportedError as error:
            refused[form.name] = str(error)
    for name in TYPED:
        if name in reports:
            yield from _of_types(name, reports[name])
    if not wanted or "head sizes" in wanted:
        for size in HEAD_SIZES:
            plain = next(form for form in forms(size) if form.name == "softmax")
            yield from _of_size(size, folded(plain))
    if not wanted or "artifacts" in wanted:
        for size in HEADS:
            yield from _of_artifacts(size)


def _of_form(name: str, report: CascadeReport) -> Iterator[Job]:
    section = "float16, head size 128"
    for capability in CAPABILITIES:
        for kernel in kernels(report, capability):
            yield Job(section, name, kernel, capability, "whole")
        if name in IN_PARTS:
            for kernel in kernels(report, capability, queries=1):
                yield Job(section, name, kernel, capability, "part")
                yield Job(section, name, kernel, capability, "merge")


def _of_types(name: str, report: CascadeReport) -> Iterator[Job]:
    for real, precision in (("bf16", "ieee"), ("fp32", "tf32x3"), ("fp32", "ieee")):
        title = f"{name}, {real}" + (f" as {precision}" if real == "fp32" else "")
        for capability in CAPABILITIES:
            for kernel in kernels(report, capability, real, precision):
                yield Job("Other types, head size 128", title, kernel, capability, "whole")


def _of_size(size: int, report: CascadeReport) -> Iterator[Job]:
    section = "Other head sizes, plain softmax in float16"
    for capability in CAPABILITIES:
        for kernel in kernels(report, capability):
            yield Job(section, f"{size}, prefill", kernel, capability, "whole")
        for kernel in kernels(report, capability, queries=1):
            yield Job(section, f"{size}, decode", kernel, capability, "part")
            yield Job(section, f"{size}, decode", kernel, capability, "merge")


def _of_artifacts(size: int) -> Iterator[Job]:
    section = f"Artifacts, head size {size}"
    for name, kind in kinds_of(size).items():
        for capability in CAPABILITIES:
            for made, each in functions_of(kind, USUAL, capability):
                title = f"{name}, {'prefill' if each.name == 'prefill' else 'decode'}"
                yield Job(section, title, made.kernel, capability, each.kind, each.tiles)


def compiled(job: Job, version: str, kept: dict[str, Any]) -> dict[str, Any]:
    """What the compiler says of a function, from `kept` where it is known; raises UnsupportedError."""
    key = job.key(version)
    if key not in kept:
        made = compile_ahead(job.kernel, job.capability, job.kind, job.tiles)
        found = asdict(made)
        del found["ptx"], found["cubin"], found["metadata"]
        kept[key] = found
        KEPT.parent.mkdir(exist_ok=True)
        beside = KEPT.with_suffix(".part")
        beside.write_text(json.dumps(kept))
        beside.replace(KEPT)
    fields = {
        **kept[key],
        "tiles": Tiles(**kept[key]["tiles"]),
        "ptx": "",
        "cubin": b"",
        "metadata": {},
    }
    outside = exceeded(job.kernel, Compiled(**fields), limits_of(version, job.capability))
    return {**kept[key], "name": job.name, "section": job.section, "outside": outside}


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    tiles = found["tiles"]
    shape = f"{tiles['rows']} x {tiles['stream']}" if tiles["stream"] else f"{tiles['rows']}"
    matrix = ", ".join(f"{count} {each}" for each, count in found["matrix"].items()) or "none"
    return (
        f"| {found['name']} | {found['kind']} | sm_{found['capability']} | {shape} | {tiles['warps']} "
        f"| {tiles['stages']} | {found['registers']} | {found['shared'] / 1024:.0f} | {found['spills']} "
        f"| {matrix} | {found['seconds']:.1f} |"
    )


HEAD = (
    "| form | kernel | target | rows x stream | warps | stages | registers | shared KiB | spilled bytes "
    "| matrix instructions | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


ABOUT = """# Kernels compiled ahead of time

Written by `python -m benchmarks.aot` with Triton {version}: every form of
[the catalogue](../../docs/attention.md) (int8 where it is quantized) and of every kind of attention that a
[Triton artifact](../../docs/triton.md#artifacts) has, compiled with no GPU. A `whole` of a form has tiles for
{usual} queries and keys, that of an artifact's prefill for 512 queries; parts and merges, and all that an
artifact decodes with, have tiles for one query. Registers are those of a thread, shared memory is a block's;
spilled bytes are the stores a thread that `ptxas -v` counts; matrix instructions are counted in the PTX, and
those of three targets do different amounts of work. **Nothing here was run**: the table shows that kernels
compile and what they use, not how fast they are.

{count} functions, {seconds:.0f} s of compiling. {spilling} spill, {worst} bytes at most; the limits are
{limit} bytes on sm_80, sm_90 and sm_100, {wide} for float32 at head sizes above 128
([limits.py](../../compiler/codegen/triton/limits.py)). {outside}
"""


def text_of(rows: list[dict[str, Any]], refused: dict[str, str], version: str) -> str:
    """The table with what is said around it."""
    outside = [found for found in rows if found["outside"]]
    text = ABOUT.format(
        version=version,
        usual=USUAL,
        count=len(rows),
        seconds=sum(found["seconds"] for found in rows),
        spilling=sum(found["spills"] > 0 for found in rows),
        worst=max(found["spills"] for found in rows),
        limit=", ".join(str(limits_of(version, each).spills) for each in CAPABILITIES),
        wide=limits_of(version, CAPABILITIES[0]).wide,
        outside=f"{len(outside)} are outside their limits."
        if outside
        else "All are within limits.",
    )
    for section in dict.fromkeys(found["section"] for found in rows):
        lines = [HEAD, *(row(found) for found in rows if found["section"] == section)]
        text += f"\n## {section}\n\n" + "\n".join(lines) + "\n"
    if outside:
        text += "\n## Outside the limits\n\n" + "".join(f"- {_said(found)}\n" for found in outside)
    if refused:
        text += "\n## Without a kernel\n\n"
        text += "".join(f"- {name}: {why}\n" for name, why in refused.items())
    return text


def _said(found: dict[str, Any]) -> str:
    where = f"{found['name']}, {found['kind']}, sm_{found['capability']}"
    return f"{where}: {'; '.join(found['outside'])}"


def main() -> int:
    """Writes the table, or prints the rows of the forms that are named."""
    parser = argparse.ArgumentParser(description="Compiles every kernel with no GPU.")
    parser.add_argument("forms", nargs="*", help="only these, to the terminal")
    parser.add_argument("--out", type=Path, default=TARGET, help="where the table goes")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import triton

    version, wanted = triton.__version__, set(given.forms)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    refused: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for job in jobs(wanted, refused):
        try:
            rows.append(compiled(job, version, kept))
            print(row(rows[-1]), flush=True)
        except UnsupportedError as error:
            refused[f"{job.name}, {job.kind}, sm_{job.capability}"] = str(error)
    if rows and not wanted:
        beside = given.out.with_suffix(".part")
        beside.write_text(text_of(rows, refused, version))
        beside.replace(given.out)
    outside = [_said(found) for found in rows if found["outside"]]
    print("\n".join(outside), file=sys.stderr)
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
