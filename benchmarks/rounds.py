"""The order of a run: load everything, warm it, then rounds in which every engine takes its turn.

What the machine does meanwhile (other tenants, heat) hits all engines of a round alike, so ratios
are taken within rounds. Each figure is appended to a journal as it comes; a run that was cut short
goes on from it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .client import Worker, WorkerError, python_of
from .core_distance import core_distance
from .entries import BANDWIDTH, Entry
from .prepare import Kitchen, installed

#: Slots behind a context, for warm and timed steps.
ROOM = 40


@dataclass(frozen=True)
class Measure:
    """One figure: a prefill of `tokens`, or decoding `tokens` behind `context`."""

    tokens: int
    context: int | None = None

    @property
    def name(self) -> str:
        return f"pp{self.tokens}" if self.context is None else f"d{self.context}"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    measures: tuple[Measure, ...]
    rounds: int
    loads: int
    seconds: float | None = None
    """No round of a shape is begun that would end later than this after the shape's start."""


@dataclass
class Journal:
    """Records of a run, one JSON object a line."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def open(path: Path, resume: bool) -> Journal:
        """Starts a journal, or goes on with the one of a run that was cut short."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume or not path.exists():
            path.write_text("")
            return Journal(path)
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        path.write_text("".join(lines))  # without a last line that was cut
        return Journal(path, [json.loads(line) for line in lines])

    def add(self, **record: Any) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def has(self, **fields: Any) -> bool:
        return any(fields.items() <= record.items() for record in self.records)


def turns(entries: Sequence[Entry], measure: Measure, number: int) -> list[Entry]:
    """The order of the engines in a round: each round begins with another one, so that none is always
    the first after a pause. The bandwidth is read first."""
    able = [e for e in entries if measure.context is None or measure.context <= e.longest]
    reads = [e for e in able if e.name == BANDWIDTH]
    engines = [e for e in able if e.name != BANDWIDTH]
    start = number % max(1, len(engines))
    return reads + engines[start:] + engines[:start]


@dataclass
class Run:
    """One shape measured with all entries."""

    shape: str
    plan: Plan
    entries: list[Entry]
    kitchen: Kitchen
    journal: Journal
    tell: Callable[[str], None]
    workers: dict[str, Worker] = field(default_factory=dict)

    def __call__(self) -> None:
        started = time.monotonic()
        try:
            self._load_all()
            self._warm_all()
            self._rounds(started)
        finally:
            for worker in self.workers.values():
                worker.close()

    def _load_all(self) -> None:
        """Loads every engine several times over, in turns; the last process of each is kept."""
        paths = dict(self._paths())
        for number in range(self.plan.loads):
            for entry in [e for e in self.entries if e.name in paths]:
                times = min(self.plan.loads, entry.loads or self.plan.loads)
                if number < times:
                    self.tell(f"loading {entry.name} ({number + 1} of {times})")
                    with self._guard(entry):
                        self._load(entry, paths[entry.name], number)
                    if entry.name not in self.workers:
                        del paths[entry.name]  # it failed

    def _load(self, entry: Entry, path: str, number: int) -> None:
        if entry.name in self.workers:
            self.workers.pop(entry.name).close()
        threads, cache = self.kitchen.threads, self.kitchen.cache
        python = python_of(entry, self.kitchen.own, self.kitchen.peers)
        log = self.journal.path.with_suffix(f".{entry.worker}.log")
        worker = self.workers[entry.name] = Worker(entry, python, threads, cache, log)
        answer = worker.ask("load", model=path, threads=threads, options=entry.options)
        self.journal.add(
            shape=self.shape,
            entry=entry.name,
            measure="load",
            round=number,
            start=worker.start_seconds,
            versions=worker.versions,
            **answer,
        )

    def _paths(self) -> Iterator[tuple[str, str]]:
        """What each entry loads; entries that cannot be had are noted and left out."""
        for entry in self.entries:
            if entry.form is None:
                yield entry.name, ""
                continue
            python = python_of(entry, self.kitchen.own, self.kitchen.peers)
            if entry.requires and not installed(python, entry.requires):
                self._skip(entry, f"{entry.requires} is not installed")
                continue
            try:
                yield entry.name, str(self.kitchen.form(self.shape, entry.form))
            except WorkerError as error:
                self._skip(entry, str(error))

    def _warm_all(self) -> None:
        """Runs each measure once, untimed, the shortest context first, and notes the peak of memory
        behind it: longer contexts are filled later, so that they don't count."""
        prompts = [m for m in self.plan.measures if m.context is None]
        decodes = sorted((m for m in self.plan.measures if m.context), key=lambda m: m.context or 0)
        for entry in self._alive():
            with self._guard(entry):
                self.tell(f"warming {entry.name}")
                for measure in [*prompts, *decodes[:1]]:
                    self._fill(entry, measure)
                    self._time(entry, measure)
                peak = self.workers[entry.name].peak_bytes()
                self.journal.add(shape=self.shape, entry=entry.name, measure="memory", bytes=peak)
                for measure in decodes[1:]:
                    if entry in turns([entry], measure, 0):
                        self.tell(f"filling {measure.context} tokens for {entry.name}")
                        self._fill(entry, measure)

    def _rounds(self, started: float) -> None:
        longest = 0.0
        for number in range(self.plan.rounds):
            begun = time.monotonic()
            limit = self.plan.seconds
            if number and limit is not None and begun - started + longest > limit:
                self.tell(f"stopped after {number} rounds: no time for another")
                return
            key = {"shape": self.shape, "measure": "round", "round": number}
            if not self.journal.has(**key):
                self.journal.add(**key, busy=os.getloadavg()[0], apart=core_distance())
            for measure in self.plan.measures:
                self._round(measure, number)
            longest = max(longest, time.monotonic() - begun)

    def _round(self, measure: Measure, number: int) -> None:
        self.tell(f"round {number + 1} of {self.plan.rounds}: {measure.name}")
        for entry in turns(self._alive(), measure, number):
            key = {
                "shape": self.shape,
                "entry": entry.name,
                "measure": measure.name,
                "round": number,
            }
            if self.journal.has(**key):
                continue
            with self._guard(entry):
                seconds = self._time(entry, measure)
                self.journal.add(**key, seconds=seconds, tokens=measure.tokens)

    def _fill(self, entry: Entry, measure: Measure) -> None:
        if measure.context is not None and entry.name != BANDWIDTH:
            self.workers[entry.name].ask("fill", context=measure.context, room=ROOM)

    def _time(self, entry: Entry, measure: Measure) -> float:
        worker = self.workers[entry.name]
        if measure.context is None or entry.name == BANDWIDTH:
            answer = worker.ask("prefill", tokens=measure.tokens)
        else:
            answer = worker.ask("decode", context=measure.context, tokens=measure.tokens)
        return float(answer["seconds"])

    def _alive(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.name in self.workers]

    def _guard(self, entry: Entry) -> _Guard:
        return _Guard(self, entry)

    def _skip(self, entry: Entry, reason: str) -> None:
        reason = reason.replace(str(self.kitchen.cache), "CACHE")
        self.tell(f"{entry.name} is left out: {reason}")
        self.journal.add(shape=self.shape, entry=entry.name, measure="skipped", reason=reason)


@dataclass(frozen=True)
class _Guard:
    """One engine that fails is left out from then on; the others go on."""

    run: Run
    entry: Entry

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, WorkerError):
            return False
        self.run._skip(self.entry, str(error))
        worker = self.run.workers.pop(self.entry.name, None)
        if worker is not None:
            worker.close()
        return True
