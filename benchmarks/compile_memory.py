"""Peak memory of a compile, as a share of the model's float32 size: `python -m benchmarks.compile_memory`.

Compiles a bfloat16 checkpoint in a process of its own, once for each weight format, check included.
Peaks are the kernel's own (VmHWM); pages of mapped files count in them although they can be dropped
at any time, so the largest anonymous memory, sampled from outside, is given beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from .client import ROOT, environment, status_bytes
from .prepare import Kitchen, default_cache, own_python
from .report import machine, slug, table
from .shapes import SHAPES

#: Peak over float32 size that a compile should stay under.
TARGET = 1.5

_SAMPLE_SECONDS = 0.05


@dataclass
class Peak:
    """What one compile took, in bytes."""

    weights: str
    parameters: int
    seconds: float
    before: int
    """Peak before compiling began: the libraries alone."""

    peak: int
    anonymous: int
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Resident memory at the beginning of each stage, and the peak up to there."""

    @property
    def ratio(self) -> float:
        return self.peak / (4 * self.parameters)

    @property
    def anonymous_ratio(self) -> float:
        return self.anonymous / (4 * self.parameters)


def child(model: Path, out: Path, weights: str) -> None:
    """Compiles; writes one JSON object a line as each stage begins."""
    import einfold
    import einfold.api

    pid, last = os.getpid(), ""

    def stage(name: str, share: float = 0.0) -> None:
        nonlocal last
        if name != last:
            last = name
            sizes = {key: status_bytes(pid, key) for key in ("VmRSS", "RssAnon", "VmHWM")}
            print(json.dumps({"stage": name, **sizes}), flush=True)

    stage("imported")
    report = einfold.compile(model, out, weights=weights, force=True, progress=stage)
    stage("finished")
    print(json.dumps({"parameters": report.manifest.model.parameters}), flush=True)


def measure(kitchen: Kitchen, shape: str, weights: str) -> Peak:
    """Compiles in a child and watches it."""
    model = kitchen.model(shape)
    out = kitchen.cache / shape / "compile-memory"
    log = (kitchen.cache / shape / "compile-memory.log").open("wb")
    words = [kitchen.own, "-m", "benchmarks.compile_memory", "--child", *map(str, (model, out))]
    started = time.perf_counter()
    with subprocess.Popen(
        [*words, weights],
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=ROOT,
        env=environment(kitchen.cache, kitchen.threads),
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        anonymous, said = 0, b""
        while process.poll() is None:
            try:
                anonymous = max(anonymous, status_bytes(process.pid, "RssAnon"))
            except Exception:  # it has ended meanwhile
                break
            said += process.stdout.read() or b""
            time.sleep(_SAMPLE_SECONDS)
        process.wait()
        said += process.stdout.read() or b""
    log.close()
    shutil.rmtree(out, ignore_errors=True)
    lines = [json.loads(line) for line in said.splitlines()]
    if process.returncode or not lines or "parameters" not in lines[-1]:
        raise SystemExit(f"the compile of {shape} to {weights} failed; see {log.name}")
    phases = lines[:-1]
    return Peak(
        weights,
        lines[-1]["parameters"],
        time.perf_counter() - started,
        phases[0]["VmHWM"],
        phases[-1]["VmHWM"],
        max(anonymous, *(phase["RssAnon"] for phase in phases)),
        phases,
    )


def markdown(peaks: list[Peak], shape: str, found: dict[str, str], title: str) -> str:
    """The figures as a page."""
    rows = [
        [
            peak.weights,
            f"{peak.peak / 1e9:.2f}",
            f"{peak.ratio:.2f}",
            f"{peak.anonymous_ratio:.2f}",
            f"{peak.before / 1e9:.2f}",
            f"{peak.seconds:.0f}",
            "met" if peak.ratio < TARGET else "not met",
        ]
        for peak in peaks
    ]
    head = ["weights", "peak GB", "of float32", "anonymous, of float32", "imports GB", "s"]
    widest = max(peaks, key=lambda peak: peak.peak)
    stages = [
        [phase["stage"], *(f"{phase[key] / 1e9:.2f}" for key in ("VmRSS", "RssAnon", "VmHWM"))]
        for phase in widest.phases
    ]
    return "\n\n".join(
        [
            f"# {title}",
            f"{found['cpu']} (family-model {found['family']}), {found['cores']} cores, "
            f"{found['memory']}. Python {found['python']}.",
            f"{SHAPES[shape].title} shape in bfloat16, {peaks[0].parameters:,} parameters, "
            f"{4 * peaks[0].parameters / 1e9:.2f} GB in float32; "
            f"target: peak < {TARGET} of that.",
            table([*head, f"< {TARGET}"], rows),
            f"Stages of {widest.weights}, GB as each begins:",
            table(["stage", "resident", "anonymous", "peak so far"], stages) + "\n",
        ]
    )


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--child"]:
        child(Path(words[1]), Path(words[2]), words[3])
        return 0
    parser = argparse.ArgumentParser(prog="benchmarks.compile_memory", description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=list(SHAPES))
    parser.add_argument("--weights", default="fp32,fp16,int8,int4", help="formats, comma between")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", help="name of the results; default: date and machine")
    arguments = parser.parse_args(words)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    own = own_python()
    kitchen = Kitchen(arguments.cache.resolve(), own, own, arguments.threads, tell)
    peaks = []
    for weights in arguments.weights.split(","):
        tell(f"compiling {arguments.shape} to {weights}")
        peaks.append(measure(kitchen, arguments.shape, weights))
        tell(f"peak {peaks[-1].ratio:.2f} of float32")
    found = machine()
    name = arguments.name or f"{date.today()}-{slug(found)}"
    page = markdown(peaks, arguments.shape, found, f"Memory of compiling, {name}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"compile-memory-{name}"
    target.with_suffix(".md").write_text(page, encoding="utf-8")
    data = {"shape": arguments.shape, "machine": found, "peaks": [vars(p) for p in peaks]}
    plain = json.dumps(data, indent=1)
    target.with_suffix(".json").write_text(plain + "\n", encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
