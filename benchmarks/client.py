"""The parent's side of a worker: start it, ask it, look at its memory."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from .entries import EINFOLD, Entry

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """A worker that failed, in one sentence."""


class Worker:
    """One engine in a process of its own."""

    def __init__(self, entry: Entry, python: str, threads: int, cache: Path, log: Path) -> None:
        """Starts the process and waits until it has imported its engine (`start_seconds`)."""
        self.entry = entry
        self._log = log.open("ab")
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.workers.{entry.worker}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment(cache, threads),
        )
        self._rest = b""
        self.versions: dict[str, str] = self._answer(120)["versions"]
        self.start_seconds = time.perf_counter() - started

    def ask(self, kind: str, timeout: float = 900, **fields: Any) -> dict[str, Any]:
        """Asks one question. Raises WorkerError with what the engine says, or that it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": kind, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"the worker ended before {kind!r}; see its log") from None
        return self._answer(timeout)

    def peak_bytes(self) -> int:
        """Largest resident memory so far. From /proc: a child's `ru_maxrss` may be its parent's."""
        return peak_bytes(self._process.pid)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._process.kill()
                raise WorkerError(f"no answer within {timeout:.0f} s")
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                code = self._process.wait()
                raise WorkerError(f"the worker ended with code {code}; see its log")
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        data: dict[str, Any] = json.loads(line)
        if "error" in data:
            raise WorkerError(data["error"])
        return data


def environment(cache: Path, threads: int) -> dict[str, str]:
    """The environment of workers and of what makes their models: this checkout, no network."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        # Its pool of compilers would count as memory of this engine, and disturb the others.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def peak_bytes(pid: int) -> int:
    """VmHWM of a running process."""
    return status_bytes(pid, "VmHWM")


def status_bytes(pid: int, field: str) -> int:
    """A size from /proc/PID/status, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise WorkerError(f"/proc/{pid}/status has no {field}")


def python_of(entry: Entry, own: str, peers: str) -> str:
    """The interpreter of an entry: einfold's own for einfold and the bandwidth, else the peers'."""
    return own if entry.form is None or entry.form.kind == EINFOLD else peers
