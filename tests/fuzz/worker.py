"""Loads mutated artifacts and takes a few tokens of each, in a process that may be ended at any time.

    python -m tests.fuzz.worker TARGET BASE FOLDER

Reads seeds from stdin, one a line, and answers each with a line of JSON: the seed, what was done, and how it
ended ("ran", an exit code with its sentence, or a fault). A fault is, too, what Python's audit hooks see and
no artifact may cause: a process, a connection, a file that is written, or one of the system's that is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from einfold.compiler.ir.kept import cache_home

LIMIT = 4 << 30

#: Exit codes that an artifact may end in.
CODES = {3, 4, 5, 7, 8, 12, 13, 74}


_FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rename",
    "os.mkdir",
}


class _Watch:
    """Notes events of Python's audit hooks that no artifact may cause."""

    def __init__(self) -> None:
        self.plans = cache_home() / "plans"
        self.active = False
        self.found: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _FORBIDDEN and not self._own(event, arguments):
            self.found.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.fsdecode(arguments[0]), int(arguments[2] or 0)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            secret = path.startswith(("/etc/hostname", "/etc/passwd"))
            if (writes and path != os.devnull and not self._kept(path)) or secret:
                self.found.append(f"opens {path}")

    def _own(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Whether einfold does it by itself: templates have a process, and the cache folder keeps plans."""
        if event == "subprocess.Popen":
            return str(arguments[1][-1]).endswith("render.py")
        paths = [argument for argument in arguments if isinstance(argument, (str, os.PathLike))]
        return event.startswith("os.") and bool(paths) and all(map(self._kept, paths))

    def _kept(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path is the folder of plans or beneath it: what a graph folds to is derived once."""
        return Path(path).is_relative_to(self.plans)


@contextlib.contextmanager
def _watched(watch: _Watch) -> Iterator[None]:
    watch.active = True
    try:
        yield
    finally:
        watch.active = False


def _try(folder: Path) -> tuple[str, str]:
    import einfold
    from einfold.errors import EinfoldError, recognise

    try:
        model = einfold.load(folder, threads=1)
        model.generate([1, 5, 9], max_new_tokens=3, ignore_eos=True)
        if model.artifact.has("tokenizer.json"):
            model.generate("the pass key", max_new_tokens=2)
            if model.has_chat_template:
                model.chat([{"role": "user", "content": "hi"}])
        return "ran", ""
    except BaseException as error:  # whatever it is must be said
        known = recognise(error)
        error = known if known is not None else error
        if (
            isinstance(error, EinfoldError)
            and error.exit_code in CODES
            and "\n" not in str(error).strip()
        ):
            return str(error.exit_code), str(error)[:300]
        return "fault", f"{type(error).__module__}.{type(error).__name__}: {str(error)[:600]}"


def main(target: str, base: Path, out: Path) -> None:
    from .mutators import mutate

    warnings.simplefilter("ignore")
    import einfold

    einfold.load(base, threads=1).generate(
        "the pass key", max_new_tokens=2
    )  # imports, before the limit
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    watch = _Watch()
    answers = os.fdopen(
        os.dup(1), "w", encoding="utf-8"
    )  # what libraries say on stdout is no answer
    os.dup2(2, 1)
    for line in sys.stdin:
        seed = int(line)
        folder = out / f"{target}.einfold"
        said = mutate(base, folder, target, seed)
        started = time.perf_counter()
        with _watched(watch):
            ended, why = _try(folder)
        if watch.found:
            ended, why = "fault", "; ".join(watch.found)
            watch.found.clear()
        answer = {
            "seed": seed,
            "said": said,
            "ended": ended,
            "why": why,
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
