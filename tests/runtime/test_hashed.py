"""A file is hashed once a process, and again when it may have been written since."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from einfold.compiler.ir.file_hash import file_hash
from einfold.runtime import hashed
from einfold.runtime.hashed import hashed_once


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"as it was")
    return path


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as written long enough ago."""
    monkeypatch.setattr(hashed, "_BLUR", 0)


def never(path: Path) -> str:
    raise AssertionError(f"{path} is hashed again")


def test_a_file_is_hashed_once(file: Path, old: None) -> None:
    found = hashed_once(file, file_hash)
    assert found == file_hash(file)
    assert hashed_once(file, never) == found
    os.link(file, file.with_name("other"))  # another name sets the time of the entry
    with pytest.raises(AssertionError, match="is hashed again"):
        hashed_once(file, never)


def test_a_file_that_was_changed_is_hashed_again_whatever_its_time_says(
    file: Path, old: None
) -> None:
    found, about = hashed_once(file, file_hash), file.stat()
    time.sleep(0.02)  # more than the clock's step
    file.write_bytes(b"as it is ")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    assert hashed_once(file, file_hash) != found


def test_a_file_that_was_written_just_now_is_hashed_again(file: Path) -> None:
    hashed_once(file, file_hash)
    with pytest.raises(AssertionError, match="is hashed again"):
        hashed_once(file, never)


def test_a_file_that_changes_while_it_is_read_is_hashed_again(file: Path, old: None) -> None:
    def late(path: Path) -> str:
        found = file_hash(path)
        path.write_bytes(b"later")
        return found

    hashed_once(file, late)
    assert hashed_once(file, file_hash) == file_hash(file)


def test_two_threads_hash_once(file: Path, old: None) -> None:
    begun, go, found = threading.Event(), threading.Event(), list[str]()

    def slow(path: Path) -> str:
        begun.set()
        go.wait(10)
        return file_hash(path)

    threads = [
        threading.Thread(target=lambda hash_of=hash_of: found.append(hashed_once(file, hash_of)))
        for hash_of in (slow, never)
    ]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert found == [file_hash(file)] * 2


def test_a_failure_is_not_kept_and_who_waits_tries_for_himself(file: Path, old: None) -> None:
    begun, go, found = threading.Event(), threading.Event(), list[str]()

    def failing(path: Path) -> str:
        begun.set()
        go.wait(10)
        raise KeyboardInterrupt

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            hashed_once(file, failing)

    threads = [
        threading.Thread(target=first),
        threading.Thread(target=lambda: found.append(hashed_once(file, file_hash))),
    ]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert found == [file_hash(file)]
    other = file.with_name("other")
    other.write_bytes(b"other")
    with pytest.raises(AssertionError):
        hashed_once(other, never)
    assert hashed_once(other, file_hash) == file_hash(other)
