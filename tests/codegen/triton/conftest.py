from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

Ask = Callable[..., dict[str, Any]]

#: Tests that run or compile kernels; those that only generate source need no Triton.
needs_triton = pytest.mark.skipif(
    util.find_spec("triton") is None,
    reason="Triton is not installed: pip install 'einfold[triton]'",
)


@pytest.fixture(scope="session")
def plan_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of plans for the session."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def interpreting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Ask]]:
    """Asks a worker by its module's name. All are one process, since one takes seconds to begin."""
    with asking("tests.codegen.triton.any_worker", tmp_path_factory.mktemp("cache")) as ask:
        yield lambda module: partial(ask, worker=f"tests.codegen.triton.{module}")


@pytest.fixture(scope="session")
def interpreted(interpreting: Callable[[str], Ask]) -> Callable[..., dict[str, float]]:
    """Asks the worker to run a form; the errors of each way to run it."""
    ask = interpreting("worker")
    return lambda form, **request: ask(form=form, **request)["errors"]


@contextmanager
def asking(module: str, cache: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """A process with Triton's interpreter that answers requests, a JSON document a line."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "EINFOLD_CACHE": str(cache),
        "PYTHONWARNINGS": "ignore",
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    given, taken = worker.stdin, worker.stdout

    def ask(**request: Any) -> dict[str, Any]:
        given.write(json.dumps(request) + "\n")
        given.flush()
        line = taken.readline()
        assert line, f"the worker ended with {worker.poll()}"
        found: dict[str, Any] = json.loads(line)
        assert "failed" not in found, f"{found.get('failed')}\n{found.get('trace')}"
        return found

    yield ask
    worker.kill()  # to end by itself would take it seconds
    worker.communicate()
