"""Compiles the kernel of every form for sm_80, sm_90 and sm_100 with no GPU, and writes what came out.

    python benchmarks/aot.py                 all forms, to benchmarks/results/aot.md
    python benchmarks/aot.py softmax ALiBi   these, to the terminal

Shapes are those of a prefill with head size 128 in float16. It takes minutes: `make aot`.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from einfold.compiler.codegen.triton import Kernel, Options, generate
from einfold.compiler.codegen.triton.ahead import MATRIX, Compiled
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.explain import explain_function
from einfold.errors import UnsupportedError

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "benchmarks" / "results" / "aot.md"
CAPABILITIES = (80, 90, 100)
KINDS = {"real": "fp16", "integer": "i8", "bool": "i1"}
#: Traced at a length that is cheap to trace; tiles are chosen for one that is usual.
TRACED, USUAL = 256, 4096
#: Whose parts and merges are compiled too, for one query: one of each shape of state.
IN_PARTS = {
    "GQA by reshaped queries",
    "sinks by concatenation",
    "log-sum-exp as an output",
    "mean and variance under the attention",
    "K/V dequantized, per token",
    "linear attention",
}


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


def kernels(form: Any, capability: int, queries: int = USUAL) -> Iterator[Kernel]:
    """The kernels of a form, one a plan, with tiles for a device of this capability."""
    torch.manual_seed(0)
    report = explain_function(form.function, form.inputs())
    for plan in report.folding.plans:
        types = {name: KINDS[tensor.kind] for name, tensor in plan.inputs.items()}
        sizes = {
            rank: (USUAL if rank == plan.rank else queries) if size == TRACED else size
            for rank, size in report.imported.sizes.items()
        }
        yield generate(plan, types, sizes, Options(device=DEVICES[capability]))


def functions(form: Any, capability: int) -> Iterator[Compiled]:
    """A form's single pass with tiles for a prefill, and for some a part and a merge for one query."""
    for kernel in kernels(form, capability):
        yield kernel.compile_ahead(capability)
    if form.name in IN_PARTS:
        for kernel in kernels(form, capability, 1):
            yield kernel.compile_ahead(capability, "part")
            yield kernel.compile_ahead(capability, "merge")


def row(name: str, compiled: Compiled) -> str:
    """One line of the table."""
    tiles = compiled.tiles
    shape = f"{tiles.rows} x {tiles.stream}" if compiled.kind != "merge" else f"{tiles.rows}"
    matrix = ", ".join(f"{count} {each}" for each, count in compiled.matrix.items()) or "none"
    return (
        f"| {name} | {compiled.kind} | sm_{compiled.capability} | {shape} | {tiles.warps} | {tiles.stages} "
        f"| {compiled.registers} | {compiled.shared / 1024:.0f} | {compiled.spills} | {matrix} "
        f"| {compiled.seconds:.1f} |"
    )


HEAD = (
    "| form | kernel | target | rows x stream | warps | stages | registers | shared KiB | spilled bytes "
    "| matrix instructions | seconds |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


ABOUT = """# Kernels compiled ahead of time

Written by `make aot` with Triton {version}: every form of [the catalogue](../../docs/attention.md), as
float16 (int8 where it is quantized) with head size 128, compiled with no GPU. A `whole` has tiles for {usual}
queries and keys, a `part` and its `merge` for one query. Spilled bytes are the stores that `ptxas -v` counts;
matrix instructions are counted in the PTX. **No kernel of this table has run on a GPU yet**: it shows that
they compile and what they use, not how fast they are.

{count} functions in {seconds:.0f} s on two shared cores; {lacking} that stream lack the newest matrix
instruction of their target, {spilling} spill.
"""


def main() -> int:
    """Writes the table, or prints the rows of the forms that are named."""
    warnings.simplefilter("ignore")
    import triton

    wanted = set(sys.argv[1:])
    forms = catalogue(B=1, H=8, K=2, S=TRACED, T=TRACED, D=128).FORMS
    rows: list[str] = []
    refused: dict[str, str] = {}
    compiled: list[Compiled] = []
    start = time.perf_counter()
    for form in forms:
        if wanted and form.name not in wanted:
            continue
        for capability in CAPABILITIES:
            try:
                for compiled_kernel in functions(form, capability):
                    compiled.append(compiled_kernel)
                    rows.append(row(form.name, compiled_kernel))
                    print(rows[-1], flush=True)
            except UnsupportedError as error:
                refused[form.name] = str(error)
    if wanted:
        return 0
    lacking = [c for c in compiled if c.kind != "merge" and MATRIX[c.capability] not in c.matrix]
    spilling = sum(c.spills > 0 for c in compiled)
    seconds = time.perf_counter() - start
    text = ABOUT.format(
        version=triton.__version__,
        usual=USUAL,
        count=len(compiled),
        seconds=seconds,
        lacking=len(lacking),
        spilling=spilling,
    )
    text += "\n" + "\n".join([HEAD, *rows]) + "\n"
    if refused:
        text += "\n## Without a kernel\n\n" + "".join(
            f"- {n}: {why}\n" for n, why in refused.items()
        )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
