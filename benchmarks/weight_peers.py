"""einfold's weights beside llama.cpp's with an importance matrix, AutoRound's and llm-compressor's GPTQ.

python -m benchmarks.weight_peers --peers-python PYTHON --tools FOLDER [--keep FOLDER]
                                  [--only NAME ..] [--again]

All begin with the same model, SmolLM2-135M off its grid, and read the same text, which it wrote itself; what
each wrote is read by einfold, widened to float32 and judged as rows of `benchmarks.quality` are. `make
weight-peers` makes the peers' environment and tools. Each row is written to
benchmarks/results/weight-peers.json when it is measured; those that are there are left alone. With `--keep`
what peers write stays in a folder, and what is there is not made again: AutoRound takes more than an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import einfold
from einfold.compiler.calibrate.text import rows_of
from einfold.compiler.frontend.huggingface import find_model, read_config
from einfold.compiler.frontend.own_text import own_text, runs
from einfold.runtime.tokenizer import Tokenizer

from . import real_model
from .client import ROOT
from .quality.measure import Original, figures
from .quality.subjects import SUBJECTS, Subject
from .report import table

RESULTS = ROOT / "benchmarks" / "results"
FILE, PAGE = RESULTS / "weight-peers.json", RESULTS / "weight-peers.md"

#: Tokens that all are calibrated on: what einfold's solvers read by default.
_TOKENS = 16_384

#: What a name has of the table that head and embedding share.
_TABLE = ("embed_tokens", "token_embd", "lm_head")


@dataclass(frozen=True)
class Entry:
    """One file or folder that a tool writes, or weights of einfold by their text."""

    name: str
    llama: str = ""
    tool: str = ""
    options: tuple[int, ...] = ()

    @property
    def of_einfold(self) -> bool:
        return not (self.llama or self.tool)


def _of_llama(kind: str) -> Entry:
    return Entry(f"llama.cpp {kind}, importance matrix", llama=kind)


def _of_tool(title: str, tool: str, bits: int, group: int) -> Entry:
    return Entry(f"{title}, {bits} bits, group {group}", tool=tool, options=(bits, group))


ENTRIES = (
    *map(_of_llama, ("Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q3_K_M", "Q3_K_L")),
    *(
        _of_tool(title, tool, bits, group)
        for bits, group in ((4, 32), (4, 64), (3, 64))
        for title, tool in (
            ("llm-compressor GPTQ", "weights_llm_compressor"),
            ("AutoRound", "weights_autoround"),
        )
    ),
    Entry("decoupleq:bits=4,block=64,symmetric=false,scales=f16"),
    Entry("decoupleq:bits=4,block=64,symmetric=false,scales=f16,rotate=true"),
    Entry("decoupleq:bits=4,block=32,symmetric=false,scales=q8"),
    Entry("decoupleq:bits=4,block=32,symmetric=false,scales=q8,rotate=true"),
    Entry("decoupleq:bits=5,block=64,symmetric=false,scales=f16"),
    Entry("decoupleq:bits=3,block=64,symmetric=false,scales=f16"),
    # As many bits as IQ4_XS, Q4_K_S and Q4_K_M have here beside the table.
    *(
        Entry(f"decoupleq:bpw={bpw},block=64,symmetric=false,scales=f16,widths=3+4+5+6")
        for bpw in (4.44, 5.28, 5.54)
    ),
    Entry("decoupleq:bpw=4.8,block=64,symmetric=false,scales=f16"),
    Entry("gptq:bits=4,block=64,symmetric=false,scales=f16"),
    Entry("int4"),
)


@dataclass(frozen=True)
class Tools:
    """Where the peers' programs are, and what they read."""

    python: Path
    llama: Path
    folder: Path
    scratch: Path
    kept: Path

    def text(self) -> np.ndarray[Any, Any]:
        """The text that all are calibrated on, token ids [rows, tokens]: token by token the one that
        einfold has the model write where no other is given."""
        source = find_model(self.folder)
        config = read_config(source)
        shape = rows_of(_TOKENS, config.max_position_embeddings)
        running, name = runs(source, config), lambda: f"peers {self.folder.name}"
        ids: np.ndarray[Any, Any] = own_text(
            running, config.vocab_size, shape, name, lambda text, share: None
        ).numpy()
        return ids

    def made(self, entry: Entry) -> tuple[Path, dict[str, float]]:
        """What the entry's tool wrote, and the seconds that it took."""
        out = self.kept / re.sub(r"[^a-z0-9_]+", "-", entry.name.lower())
        told = out / "seconds.json"
        if not told.is_file():
            shutil.rmtree(out, ignore_errors=True)
            seconds = self._make(entry, out)
            told.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
        return _made_in(out), json.loads(told.read_text(encoding="utf-8"))

    def _make(self, entry: Entry, out: Path) -> dict[str, float]:
        """Has the entry's tool write into a folder."""
        start, used = time.perf_counter(), os.times()
        ids = self.text()
        if entry.llama:
            text = self.scratch / "text.txt"
            decode = Tokenizer(self.folder).decode
            text.write_text("\n\n".join(decode(row.tolist()) for row in ids), encoding="utf-8")
            tokenizer = real_model.gguf_file()
            given = [self.folder, tokenizer, text, self.llama, out, entry.llama]
            worker = "weights_llama"
        else:
            np.save(self.scratch / "ids.npy", ids)
            given = [self.folder, self.scratch / "ids.npy", out, *entry.options]
            worker = entry.tool
        command = [self.python, "-m", f"benchmarks.workers.{worker}", *given]
        # In a folder of its own: AutoRound leaves a cache where it runs.
        subprocess.run(
            [*map(str, command)], check=True, stdout=sys.stderr, cwd=self.scratch,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return _since(start, used)


def _since(start: float, used: os.times_result) -> dict[str, float]:
    """Seconds, of the clock and of the processors, children's too."""
    processors = sum(os.times()[:4]) - sum(used[:4])
    return {"made": time.perf_counter() - start, "processors": processors}


def _made_in(out: Path) -> Path:
    """The file of llama.cpp in a folder, or the folder of a checkpoint: this one, or one in it."""
    file = next((path for path in out.glob("*.gguf") if path.name != "imatrix.gguf"), None)
    return file or next(out.rglob("config.json")).parent


def stored_bytes(made: Path) -> dict[str, int]:
    """Bytes of all tensors as they lie in a checkpoint or an artifact, and without the table that head and
    embedding share."""
    if made.suffix == ".gguf":
        import gguf

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(made).tensors}
    else:
        sizes = {}
        for path in made.glob("*.safetensors"):
            with safe_open(path, "pt") as tensors:
                sizes |= {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118
    table = sum(size for name, size in sizes.items() if any(part in name for part in _TABLE))
    return {"weight_bytes": sum(sizes.values()), "body_bytes": sum(sizes.values()) - table}


def measure(entry: Entry, tools: Tools, subject: Subject, original: Original) -> dict[str, Any]:
    """Figures of one entry. Heads of checkpoints that leave theirs in float32 are said to be so."""
    recipe: dict[str, Any] = {"target": "onnx", "onnx": {"accuracy_level": 0}}
    artifact = tools.scratch / "artifact"
    if entry.of_einfold:
        start, used = time.perf_counter(), os.times()
        recipe |= {"weights": entry.name, "calibration": {"tokens": _TOKENS}}
        einfold.compile(subject.folder, artifact, recipe=recipe, check=False)
        made, seconds = artifact, _since(start, used)
    else:
        made, seconds = tools.made(entry)
        recipe |= {"weights": {"keep": False}}
        einfold.compile(made, artifact, recipe=recipe, check=False)
    found = figures(einfold.load(artifact), subject, original)
    found |= stored_bytes(made)
    return found | {"seconds": seconds, "date": date.today().isoformat()}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# Weights beside other tools'",
        "",
        "`make weight-peers`: SmolLM2-135M-Instruct off its grid, all calibrated on the same "
        f"{_TOKENS:,} tokens, which it wrote itself (64 rows of 256), judged over the second halves of 8 "
        "windows of 1,024 tokens of old prose and minutes, in products in float32. Bytes are of all tensors "
        "as they lie in the file; AutoRound and llm-compressor leave the table that head and embedding share "
        "in floats (in 8 bits it costs a KL of 0.001), so they are to be compared by the bytes without it. "
        "Seconds are of processors, the text's writing too.",
        "",
    ]
    head = "weights", "MB", "without the table", "KL", "KL, 99 %", "perplexity", "recall", "seconds"
    cells = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["kl"]):
        recall = ", ".join(f"{share:.2f}" for share in row["recall"].values())
        cells.append(
            [
                name,
                f"{row['weight_bytes'] / 1e6:.1f}",
                f"{row['body_bytes'] / 1e6:.1f}",
                f"{row['kl']:.3f}",
                f"{row['kl_p99']:.1f}",
                f"{row['perplexity']:.2f}",
                recall,
                f"{row['seconds']['processors']:.0f}",
            ]
        )
    return "\n".join([*lines, table([*head], cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--peers-python", type=Path, required=True, help="of the peers' environment"
    )
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama-quantize")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="what peers write stays there, and is taken from there",
    )
    parser.add_argument("--only", nargs="+", help="entries, by name")
    parser.add_argument("--again", action="store_true", help="measure what is there too")
    given = parser.parse_args()
    data = json.loads(FILE.read_text()) if FILE.is_file() else {"rows": {}}
    subject = SUBJECTS["off-grid"]()
    original = Original.of(subject)
    failed: list[str] = []
    for entry in ENTRIES:
        if given.only and entry.name not in given.only:
            continue
        if entry.name in data["rows"] and not given.again:
            continue
        print(entry.name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            kept = Path(scratch) if given.keep is None else given.keep
            tools = Tools(given.peers_python, given.tools, subject.folder, Path(scratch), kept)
            try:
                data["rows"][entry.name] = measure(entry, tools, subject, original)
            except Exception as error:  # a peer that fails is no reason to measure no other
                print(f"error: {entry.name}: {error}", file=sys.stderr, flush=True)
                failed.append(entry.name)
                continue
        FILE.write_text(json.dumps(data, indent=1) + "\n")
        PAGE.write_text(page(data["rows"]))
    if failed:
        sys.exit(f"error: not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
