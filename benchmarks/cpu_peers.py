"""einfold beside other engines on this machine's CPU: `python -m benchmarks.cpu_peers`.

See benchmarks/README.md. Progress goes to stderr, the table to stdout and to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import date
from pathlib import Path

from .client import ROOT, WorkerError
from .entries import Entry, choose
from .prepare import Kitchen, default_cache, own_python
from .report import data, machine, markdown, slug
from .rounds import Journal, Measure, Plan, Run
from .shapes import SHAPES

RESULTS = ROOT / "benchmarks" / "results"

#: Timed steps by context: fewer where each takes long.
#: The longest leaves room to go on in a context of 32,768.
STEPS = {128: 32, 4096: 24, 16384: 12, 32000: 8}


def plan(arguments: argparse.Namespace) -> Plan:
    """What the options ask for."""
    minutes = arguments.minutes
    seconds = None if minutes is None else 60 * minutes / len(arguments.shapes)
    if arguments.tiny:
        return Plan((Measure(32), Measure(4, 16), Measure(4, 64)), 2, 2, seconds)
    contexts = [c for c in STEPS if c <= (4096 if arguments.quick else 16384)]
    measures = (Measure(512), *(Measure(STEPS[c], c) for c in contexts))
    if arguments.contexts:
        measures = tuple(Measure(STEPS[c], c) for c in arguments.contexts)
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    short = arguments.quick or arguments.contexts
    return Plan(measures, rounds, 1 if short else 3, seconds)


def able(entries: list[Entry], shape: str) -> list[Entry]:
    """The entries that are run on a shape."""
    return [entry for entry in entries if SHAPES[shape].small or not entry.small]


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu_peers", description=__doc__)
    parser.add_argument("--shapes", help="comma between; default: qwen2.5-0.5b,llama-3.2-1b")
    parser.add_argument("--entries", default="", help="words in the names wanted, comma between")
    parser.add_argument("--rounds", type=int, help="rounds of each shape (5, quick 2)")
    parser.add_argument("--minutes", type=float, help="begin no round that would end later")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--contexts", type=int, nargs="+", choices=STEPS, help="decode at these alone, no prefill"
    )
    parser.add_argument("--quick", action="store_true", help="the small shape up to 4,096 tokens")
    parser.add_argument("--tiny", action="store_true", help="try the benchmark, not the engines")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the last run of that name"
    )
    parser.add_argument("--name", help="name of the results; default: date and machine")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--peers-python",
        default=os.environ.get("EINFOLD_PEERS_PYTHON", own_python()),
        help="interpreter that has the peers (or $EINFOLD_PEERS_PYTHON); default: this one",
    )
    arguments = parser.parse_args(words)
    small = ["tiny"] if arguments.tiny else ["qwen2.5-0.5b"]
    chosen = small if arguments.tiny or arguments.quick else [*small, "llama-3.2-1b"]
    arguments.shapes = arguments.shapes.split(",") if arguments.shapes else chosen
    for shape in arguments.shapes:
        if shape not in SHAPES:
            parser.error(f"no shape is called {shape!r}; there are: {', '.join(SHAPES)}")
    try:
        arguments.entries = choose([w for w in arguments.entries.split(",") if w])
    except ValueError as error:
        parser.error(str(error))
    if os.sep in arguments.peers_python:
        # Workers run in the checkout's folder. Not resolved: a link is what makes it that environment's.
        arguments.peers_python = os.path.abspath(arguments.peers_python)
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    found = machine()
    cache = arguments.cache.resolve()
    kitchen = Kitchen(cache, own_python(), arguments.peers_python, arguments.threads, tell)
    if arguments.prepare:
        return prepare(kitchen, arguments)
    name = arguments.name or f"{date.today()}-{slug(found)}{'-tiny' if arguments.tiny else ''}"
    journal = Journal.open(cache / "runs" / f"{name}.jsonl", arguments.resume)
    for shape in arguments.shapes:
        tell(f"shape {shape}")
        entries = able(arguments.entries, shape)
        Run(shape, plan(arguments), entries, kitchen, journal, tell)()
    page = markdown(journal.records, found, f"CPU, {name}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{name}.md").write_text(page, encoding="utf-8")
    plain = json.dumps(data(journal.records, found), indent=1)
    (arguments.results / f"{name}.json").write_text(plain + "\n", encoding="utf-8")
    print(page)
    return 0


def prepare(kitchen: Kitchen, arguments: argparse.Namespace) -> int:
    """Makes every model that a run with these options loads."""
    failed = 0
    for shape in arguments.shapes:
        for form in {e.form: None for e in able(arguments.entries, shape) if e.form}:
            try:
                kitchen.form(shape, form)
            except WorkerError as error:
                failed = 1
                kitchen.tell(str(error))
    return failed


if __name__ == "__main__":
    sys.exit(main())
