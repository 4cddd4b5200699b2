"""Writes `attention.md`: every form of the catalogue, its passes before and after, and what it is on ONNX.

python docs/attention_table.py           writes the file
python docs/attention_table.py --check   ends with 1 where the file is not current
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from einfold import explain_export
from einfold.compiler.fuse.explain import explain_function
from einfold.compiler.ir.cascade.plan_text import print_plan
from einfold.compiler.ir.cascade.printer import print_cascade

HERE = Path(__file__).parent
TARGET = HERE / "attention.md"

INTRODUCTION = """\
# Attention as a cascade

Attention is not a pattern that einfold looks for. A graph of ATen operators is read as a *cascade*
([FuseMax](https://arxiv.org/abs/2406.10491)): statements over named ranks, each a map and perhaps a
reduction. A rank must be streamed as many times as completed reductions over it feed statements along it;
that number is the passes *before*. Folding rewrites each reduction so that it can be kept up to date while
the reductions that it depends on still move, with a correction that is derived and checked. Passes *after*
is what remains. What cannot be folded is refused, with the factor that prevents it.

Nothing below is annotated, matched by name or matched as a pattern. The forms are plain torch functions in
[attention_forms.py](attention_forms.py); this file is written by `make docs`.

Of the masks and score modifications of [attention-gym](https://github.com/meta-pytorch/attention-gym) (all of
`attn_gym/masks` and `attn_gym/mods` at its commit 7fdb85d, 2026-08-22), spelled in plain torch in
[tests/cascade/gym.py](../tests/cascade/gym.py), 30 of 30 fold to one pass; on ONNX the default flavour takes
24, the portable one 28, and the others stay as written for reasons that the same file has.
"""

ON_ONNX = """\

## On ONNX

`export_onnx` finds the same regions in a module and folds them
([fuse_attention](../compiler/passes/fusion/fuse_attention.py)). What fits becomes one
`einfold.softmax_attention` in the graph, and in the model `Attention`, or `MultiHeadAttention` in the default
flavour, where heads stand behind rows and nothing is hidden. These operators add what hides a score: NaN
behind a mask would reach its row, and a row that sees nothing would be 0 where softmax gives NaN. So where a
mask hides scores, the model looks at the result, and has the attention spelled out beside it.

Where rows see only what lies near or behind their own place (causal masks, windows, whether they are computed
from places or are tables of truth that the module holds), they are taken in up to eight blocks, each over the
keys that it may see: of causal scores, nearly half are never computed. A softcap is spelled out in such
blocks, for onnxruntime's own takes three times as long. Two products that are added become one of queries and
keys put side by side. The rest stays as written, for the reason given; how fast either is,
[benchmarks/results/onnx_forms.md](../benchmarks/results/onnx_forms.md) says.
"""

EXAMPLE = "softmax"


def forms() -> ModuleType:
    """The catalogue beside this file."""
    spec = importlib.util.spec_from_file_location("attention_forms", HERE / "attention_forms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def on_onnx(catalogue: Any, form: Any, portable: bool) -> str:
    """What a form is in a flavour, in float32: "fused", or why it is as written."""
    torch.manual_seed(0)
    inputs = catalogue.in_float32(form.inputs())
    report = explain_export(catalogue.AsModule(form.function), inputs, portable=portable)
    if any(item.status == "fused" for item in report.cascades):
        return "fused"
    reasons = (
        "; ".join(dict.fromkeys(item.reason for item in report.cascades))
        or "no reduction feeds a product"
    )
    return f"as written: {reasons}".replace("|", "\\|")


def render() -> str:
    """The whole file."""
    rows = ["| form | passes before | after | | reason |", "|---|---|---|---|---|"]
    exported = ["| form | default flavour | portable |", "|---|---|---|"]
    example = ""
    with tempfile.TemporaryDirectory() as folder:
        catalogue = forms()
        for form in catalogue.FORMS:
            torch.manual_seed(0)
            report = explain_function(form.function, form.inputs(), Path(folder))
            reason = report.reason.replace("|", "\\|")
            rows.append(
                f"| {form.name} | {report.passes_before} | {report.passes_after} "
                f"| {report.status} | {reason} |"
            )
            default, portable = (on_onnx(catalogue, form, flavour) for flavour in (False, True))
            exported.append(
                f"| {form.name} | {default} | {'the same' if portable == default else portable} |"
            )
            if form.name == EXAMPLE:
                cascade = print_cascade(report.imported.cascade)
                plan = print_plan(report.folding.plans[0])
                example = f"```\n{cascade}```\n\nbecomes the plan\n\n```\n{plan}```\n"
    return "\n".join(
        [
            INTRODUCTION,
            *rows,
            ON_ONNX,
            *exported,
            "\n## An example",
            "\n`torch.softmax(q @ k.mT, dim=-1) @ v` is the cascade\n",
            example,
        ]
    )


def main() -> int:
    """Writes the file, or checks it."""
    text = render()
    if "--check" in sys.argv[1:]:
        return 0 if TARGET.exists() and TARGET.read_text() == text else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
