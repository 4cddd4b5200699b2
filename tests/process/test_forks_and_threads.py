"""A child that was forked, and threads that compile: nothing hangs, and nothing is spoilt for the others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import einfold

#: A parent that has used every pool of threads there is, and children that do the same.
PARENT = """
import multiprocessing, os, sys, torch, einfold
onnx, model = sys.argv[1:]
ids = list(range(3, 60))

def load(): return einfold.load(onnx, threads=2).generate(ids, max_new_tokens=2).tokens
def plain(): return einfold.load(onnx, engine="reference").generate(ids, max_new_tokens=2).tokens
def estimated(): return einfold.estimate(model).weights
def of_parent(): return used.generate(ids, max_new_tokens=2).tokens

torch.set_num_threads(2)
used = einfold.load(onnx, threads=2)
works = [load, plain, estimated, of_parent]
want = {work.__name__: work() for work in works}
torch.exp(torch.randn(1000, 1000) @ torch.randn(1000, 1000))
fork = multiprocessing.get_context("fork")
for work in works:
    def child(): os._exit(0 if work() == want[work.__name__] else 3)
    process = fork.Process(target=child)
    process.start()
    process.join(60)
    print(work.__name__, "hangs" if process.is_alive() else process.exitcode, flush=True)
    process.kill()
"""


def test_a_forked_child_loads_computes_and_estimates(
    artifact: Callable[..., Path], text_model: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(artifact("llama")), str(text_model)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\n") == [
        "load 0",
        "plain 0",
        "estimated 0",
        "of_parent 0",
        "",
    ], done.stderr


@pytest.mark.slow
def test_threads_that_compile_estimate_export_and_load(
    text_model: Path, artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """torch.export and transformers change torch for the whole process: one at a time."""
    import torch

    made = artifact("llama")
    ids = list(range(3, 20))
    tokens = einfold.load(made, engine="reference").generate(ids, max_new_tokens=2).tokens
    size = einfold.estimate(text_model).weights
    layer = torch.nn.Linear(4, 4)
    wrong: list[str] = []

    def compiles(number: int) -> bool:
        einfold.compile(text_model, tmp_path / f"out{number}")
        return True

    def exports(number: int) -> bool:
        return einfold.export_onnx(layer, tmp_path / f"m{number}", (torch.zeros(2, 4),)).is_file()

    def estimates(number: int) -> bool:
        return einfold.estimate(text_model).weights == size

    def loads(number: int) -> bool:
        return (
            einfold.load(made, engine="reference").generate(ids, max_new_tokens=2).tokens == tokens
        )

    def run(work: Callable[[int], bool], number: int) -> None:
        try:
            if not work(number):
                wrong.append(f"{work.__name__}: another result")
        except BaseException as error:
            wrong.append(f"{work.__name__}: {error}")

    works = [compiles, estimates, exports, loads, estimates]
    threads = [threading.Thread(target=run, args=(w, n)) for n, w in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert estimates(0) and loads(0)  # and the process goes on


def test_one_lock_for_two_threads_and_none_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from einfold.compiler.ir.interrupts import tracing

    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with tracing(), tracing():
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
