"""Writes `attention.md`: every form of the catalogue, its passes before and after, fused or refused.

python docs/attention_table.py           writes the file
python docs/attention_table.py --check   ends with 1 where the file is not current
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

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


def render() -> str:
    """The whole file."""
    rows = ["| form | passes before | after | | reason |", "|---|---|---|---|---|"]
    example = ""
    with tempfile.TemporaryDirectory() as folder:
        for form in forms().FORMS:
            torch.manual_seed(0)
            report = explain_function(form.function, form.inputs(), Path(folder))
            reason = report.reason.replace("|", "\\|")
            rows.append(
                f"| {form.name} | {report.passes_before} | {report.passes_after} "
                f"| {report.status} | {reason} |"
            )
            if form.name == EXAMPLE:
                cascade = print_cascade(report.imported.cascade)
                plan = print_plan(report.folding.plans[0])
                example = f"```\n{cascade}```\n\nbecomes the plan\n\n```\n{plan}```\n"
    return "\n".join(
        [
            INTRODUCTION,
            *rows,
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
