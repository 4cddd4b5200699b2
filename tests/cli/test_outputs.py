"""Where a compile writes: nothing of the user's is lost, and nothing half-made is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from einfold.cli import common
from einfold.cli.common import _umask, whole_file
from einfold.compiler.artifact import clear_leftovers, staged
from einfold.errors import OutputError

from ..quick import rarely
from .test_bad_input import compile_refused, refused
from .test_cli import einfold


def test_outputs_that_exist(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    einfold("compile", text_model, "-o", out)
    before = (out / "manifest.json").read_bytes()
    refused("compile", text_model, "-o", out, code=6, says="exists already")
    assert (out / "manifest.json").read_bytes() == before
    einfold("compile", text_model, "-o", out, "--force", "--weights", "int8")
    assert (out / "manifest.json").read_bytes() != before
    # --force never deletes what is no artifact, and a failed compile leaves the old one.
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused("compile", text_model, "-o", precious, "--force", code=6, says="no einfold artifact")
    assert (precious / "thesis.txt").read_text() == "years of work"
    before = (out / "manifest.json").read_bytes()
    refused("compile", tmp_path / "absent", "-o", out, "--force", code=3, says="no model folder")
    assert (out / "manifest.json").read_bytes() == before


def test_outputs_that_cannot_be_written(text_model: Path, tmp_path: Path) -> None:
    refused("compile", text_model, "-o", "/proc/out", code=6, says="/proc")
    (tmp_path / "file").write_text("")
    refused("compile", text_model, "-o", tmp_path / "file" / "out", code=6, says="is a file")


def test_dumps_that_cannot_be_written(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_refused(text_model, out, "--dump", "/proc/x", code=6, says="the dump folder /proc/x")
    compile_refused(text_model, out, "--dump", str(out / "d"), code=6, says="lies in the output")


def test_the_current_folder_is_not_replaced(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("compile", text_model, "-o", ".", "--force", code=6, says="holds the current folder")


def test_folders_around_the_output_are_made_and_unmade(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "no" / "such" / "out"
    refused("compile", tmp_path / "absent", "-o", out, code=3, says="no model folder")
    assert not (tmp_path / "no").exists()
    einfold("compile", text_model, "-o", out)
    assert (out / "manifest.json").is_file()


def test_killed_between_two_renames(text_model: Path, tmp_path: Path) -> None:
    """A compile killed after it moved the old artifact aside: the next one finds the old one again."""
    out = tmp_path / "out"
    einfold("compile", text_model, "-o", out)
    dead = subprocess.Popen(["true"])
    dead.wait()
    out.rename(tmp_path / f".out.einfold-{dead.pid}-old")
    refused("compile", text_model, "-o", out, code=6, says="exists already")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_only_leftovers_of_dead_compiles_are_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    others = [".a*.einfold-mine", f".ab.einfold-{dead.pid}"]  # somebody's own, another output's
    for name in (*others, f".a*.einfold-{dead.pid}", f".a*.einfold-{'0' * 16}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".a*.einfold-{'1' * 16}-lock").touch()
    with staged(tmp_path / "a*", force=False) as alive:
        clear_leftovers(tmp_path / "a*")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*others, alive.name, f"{alive.name}-lock"}
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a*"}


def test_what_appeared_while_compiling_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def compile_for_long() -> None:
        with staged(out, force=False):
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(OutputError, match="exists already"):
        compile_for_long()
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(text_model: Path, tmp_path: Path) -> None:
    from einfold.compiler import driver

    real = driver.write_weights

    def full(*arguments: Any) -> None:
        real(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(driver, "write_weights", full):
        compile_refused(text_model, tmp_path / "out", code=74, says="the disk is full")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.EFBIG, "File too large"), 6, "cannot write"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/model/x"),
            74,
            "/model/x: Permission",
        ),
    ],
)
def test_errors_of_the_system_name_the_right_file(
    error: OSError, code: int, says: str, text_model: Path, tmp_path: Path
) -> None:
    from einfold.compiler import driver

    with mock.patch.object(driver, "write_weights", side_effect=error):
        compile_refused(text_model, tmp_path / "out", code=code, says=says)


def hanging_compile(model: Path, out: Path) -> subprocess.Popen[str]:
    """A compile in a process of its own, stopped where it would write the weights."""
    script = (
        "import signal, time; from einfold.compiler import driver\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "def hang(*a, **k):\n"
        "    print('staged', flush=True); time.sleep(60)\n"
        "driver.write_weights = hang\n"
        "from einfold.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "compile", str(model), "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "staged\n"
    return process


def test_a_killed_compile_leaves_only_a_folder_that_the_next_clears(
    text_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = hanging_compile(text_model, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    left = list(tmp_path.glob(".out.einfold-*"))
    assert [path.is_dir() for path in sorted(left)] == [True, False]  # the folder and its lock
    einfold("compile", text_model, "-o", out)
    assert out.is_dir()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGINT, "interrupted\n"),
        rarely(signal.SIGTERM, ""),
        rarely(signal.SIGHUP, ""),
    ],
)
def test_an_interrupted_compile_cleans_up(
    number: signal.Signals, says: str, text_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = hanging_compile(text_model, out)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert err == says
    assert not list(tmp_path.glob(".out*"))


def test_a_bar_is_for_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever wants colours in a log wants no frames of a bar there."""
    from einfold.cli.common import progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress() as tell:
        tell("compiling", 0.5)
    assert capsys.readouterr().err == ""


def test_long_work_is_told_by_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    for quiet in (False, True):
        with common.progress(quiet) as tell:
            for seconds in (0, 29, 31, 50, 60, 95):
                clock[0] = seconds
                tell(f"solving part {seconds}", seconds / 100)
        clock[0] = 0.0
    assert capsys.readouterr().err.splitlines() == [
        " 31% after 0:31: solving part 31",
        " 95% after 1:35: solving part 95",
    ]


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "page.html", tmp_path / "link"
    path.write_bytes(b"before")
    path.chmod(0o640)
    link.symlink_to(path)

    def interrupted() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_file(path) as stream:
        stream.writelines(interrupted())
    assert path.read_bytes() == b"before"
    with whole_file(link) as one, whole_file(path) as two:  # two at once write two files
        one.write(b"one")
        two.write(b"two")
    assert path.read_bytes() == b"one"
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    with whole_file(tmp_path / "new") as stream:
        stream.write(b"new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "new", "page.html"]


def test_a_pipe_stays_one_and_a_folder_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with whole_file(pipe) as stream:
            stream.write(b"page")
        assert os.read(reader, 9) == b"page"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    for folder in (tmp_path, Path("."), Path("/")):
        with pytest.raises(OutputError, match="Is a directory"), whole_file(folder) as stream:
            stream.write(b"page")
