"""What each storage of the weights costs in quality, measured on a trained model.

python -m benchmarks.quality [MODEL] [--text FILE] [--out FILE]

Compiles the model in every form below, measures each with what `einfold eval` measures, and the two ONNX
flavours of each form against each other. Prints a Markdown table; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import einfold
from einfold.evaluate.quality import Quality, evaluate

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Form:
    """One way to store and multiply the weights."""

    name: str
    weights: dict[str, Any]
    onnx: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        return {"weights": self.weights, "onnx": self.onnx}


def quantized(bits: str, block: int, level: int, **more: Any) -> Form:
    """A group-wise integer format; `level` is the accuracy level of its products."""
    extra = "".join(f", {key} {value}" for key, value in more.items())
    return Form(
        f"{bits}, block {block}{extra}, level {level}",
        {"format": bits, "block": block, **more},
        {"accuracy_level": level},
    )


FORMS = (
    Form("fp32", {}, {}),
    Form("fp16", {"format": "fp16"}, {}),
    quantized("int8", 32, 0),
    quantized("int8", 32, 4),
    quantized("int8", 128, 4),
    quantized("int4", 32, 0),
    quantized("int4", 32, 4),
    quantized("int4", 32, 4, head="same"),
    quantized("int4", 128, 0),
    quantized("int4", 128, 4),
    quantized("int4", 128, 4, head="same"),
)


def measure(model: Path, text: Path | None, form: Form, folder: Path) -> tuple[Quality, float]:
    """Quality against the original, and KL(portable || default flavour) in nats a token."""
    einfold.compile(model, folder / "ort", recipe=form.recipe)
    found = evaluate(einfold.load(folder / "ort"), model, text)
    portable = {"weights": form.weights, "onnx": {"portable": True}}
    einfold.compile(model, folder / "portable", recipe=portable)
    between = evaluate(
        einfold.load(folder / "ort"), folder / "portable", text or model / "eval.txt"
    )
    return found, between.kl


def table(rows: list[tuple[str, Quality, float]]) -> str:
    """The table in Markdown."""
    lines = [
        "| weights | bytes | perplexity | change | KL, nats a token | top-1 | recall | KL of flavours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found, between in rows:
        change = found.perplexity / found.reference_perplexity - 1
        recall = "-" if found.recall is None else f"{found.recall:.3f}"
        lines.append(
            f"| {name} | {found.bytes['weights']:,} | {found.perplexity:.3f} | {change:+.2%} "
            f"| {found.kl:.2e} | {found.top1:.4f} | {recall} | {between:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples" / "tiny_llama")
    parser.add_argument(
        "--text", type=Path, help="documents to read [default: the model's eval.txt]"
    )
    parser.add_argument("--out", type=Path, help="file to write the table to")
    given = parser.parse_args()
    rows = []
    for number, form in enumerate(FORMS):
        print(f"{number + 1}/{len(FORMS)} {form.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found, between = measure(given.model, given.text, form, Path(folder))
        rows.append((form.name, found, between))
    first = rows[0][1]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnxruntime", "torch"))
    page = (
        f"# Quality of weight formats: {given.model.name}\n\n"
        f"{date.today()}, {platform.machine()}, {versions}. {first.tokens:,} tokens in {first.documents} "
        f"documents, {first.keys} pass keys; the original in float32 has perplexity "
        f"{first.reference_perplexity:.3f} and recalls {first.reference_recall}.\n\n{table(rows)}\n\n"
        "Level 4 multiplies in int8, level 0 in float32. KL is against the original in float32. The last "
        "column compares the default ONNX flavour with the portable one (which always multiplies in "
        "float32) on the same rounded weights.\n"
    )
    print(page)
    if given.out is not None:
        given.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
