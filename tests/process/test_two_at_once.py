"""Two at work on one output: in threads, processes and containers; and what a killed one leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from einfold.compiler.artifact import check_output, staged
from einfold.compiler.ir.locks import lock
from einfold.errors import OutputError

FILES = 6


def fill(out: Path, who: str, force: bool, moment: threading.Barrier | None = None) -> str:
    try:
        with staged(out, force) as folder:
            for number in range(FILES):
                if moment is not None:
                    moment.wait(10)
                (folder / f"file{number}").write_text(who)
            (folder / "manifest.json").write_text(who)
    except OutputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("force", [True, False])
def test_threads_with_one_output(tmp_path: Path, force: bool) -> None:
    """One of the two is put in place whole; without --force the other is refused."""
    out, said, moment = tmp_path / "out", [], threading.Barrier(2)
    threads = [
        threading.Thread(target=lambda who=who: said.append(fill(out, who, force, moment)))
        for who in "AB"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [path.read_text() for path in out.iterdir()]
    assert len(held) == FILES + 1 and len(set(held)) == 1
    refused = [text for text in said if text]
    assert len(refused) == (0 if force else 1)
    assert all("exists already" in text for text in refused)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CHILD = """
import os, sys, time
from pathlib import Path
from einfold.compiler import artifact
os.getpid = lambda: 1  # each container counts its own processes
with artifact.staged(Path(sys.argv[1]), True) as folder:
    print("staged", flush=True)
    sys.stdin.readline()
    (folder / "manifest.json").write_text("B")
"""


def child(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "staged\n"
    return process


def test_processes_with_one_number_and_one_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out = tmp_path / "out"
    process = child(out)
    assert fill(out, "A", force=True) == ""
    process.communicate("go on\n")
    assert process.returncode == 0
    assert {path.name: path.read_text() for path in out.iterdir()} == {"manifest.json": "B"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_one_leaves_is_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = child(out)
    check_output(out, force=False)
    assert len(list(tmp_path.iterdir())) == 2  # its folder and its lock: it is alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2
    check_output(out, force=False)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_and_handed_on(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def work(number: int) -> None:
        with lock(path, wait=True) as held:
            assert held
            order.append(number)
            time.sleep(0.001)
            order.append(number)

    with lock(path) as first, lock(path) as second:
        assert first and not second
    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(20))
    assert not path.exists()


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"), lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
