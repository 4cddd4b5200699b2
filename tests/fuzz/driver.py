"""Feeds seeds to a worker, and begins a new one where it hung, was ended by a signal, or went.

    python -m tests.fuzz.driver --target onnx --count 5000

Prints every fault with its seed, and at the end how the rest ended. Exits with 1 where there was one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

#: Seconds that one artifact may take.
PATIENCE = 20

ROOT = Path(__file__).parent.parent.parent


class Worker:
    def __init__(self, target: str, base: Path, out: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "EINFOLD_CACHE": str(out / "cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", target, str(base), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        self.errors: collections.deque[str] = collections.deque(maxlen=20)
        for stream, put in (
            (self.process.stdout, self.answers.put),
            (self.process.stderr, self.errors.append),
        ):
            threading.Thread(target=self._read, args=(stream, put), daemon=True).start()

    def _read(self, stream: Any, put: Any) -> None:
        for line in stream:
            put(line)
        put("")

    def ask(self, seed: int, patience: float) -> dict[str, Any]:
        """How the artifact of a seed ended; the worker is gone where it did not answer."""
        assert self.process.stdin is not None
        fault = {"seed": seed, "said": "", "ended": "fault", "seconds": 0.0}
        try:
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=patience)
        except queue.Empty:
            self.stop()
            return fault | {"why": f"no answer in {patience} s"}
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            return fault | {"why": f"the process ended with {code}: {''.join(self.errors)[-800:]}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def fuzz(target: str, base: Path, out: Path, seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """How the mutation of each seed ended; the first waits for the worker's imports too."""
    worker, patience = Worker(target, base, out), PATIENCE + 120.0
    try:
        for seed in seeds:
            answer = worker.ask(seed, patience)
            patience = PATIENCE
            if answer["ended"] == "fault" and worker.process.poll() is not None:
                worker, patience = Worker(target, base, out), PATIENCE + 120.0
            yield answer
    finally:
        worker.stop()


def compiled(target: str, folder: Path) -> Path:
    """A tiny artifact to mutate: two layers, one of them with a window."""
    import einfold

    from .. import models

    model = models.save("llama", folder / "model", vocab_size=300)
    models.save_tokenizer(model)
    out = folder / f"base-{target}.einfold"
    einfold.compile(model, out, target=target, check=False)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=("onnx", "reference", "triton"), required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    ended: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = compiled(options.target, Path(folder))
        seeds = range(options.first, options.first + options.count)
        for answer in fuzz(options.target, base, Path(folder), seeds):
            ended[answer["ended"]] += 1
            slowest = max(slowest, answer["seconds"])
            if answer["ended"] == "fault":
                print(f"seed {answer['seed']}: {answer['said']}: {answer['why']}", flush=True)
    print(f"{options.target}: {dict(sorted(ended.items()))}, slowest {slowest:.1f} s")
    sys.exit(1 if ended["fault"] else 0)


if __name__ == "__main__":
    main()
