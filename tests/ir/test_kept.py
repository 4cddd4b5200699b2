"""The user's cache folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from einfold.compiler.fuse import timings
from einfold.compiler.ir.kept import cache_home, read, read_json, write, write_json

CPU = torch.device("cpu")


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number which no account has."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("EINFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    folder = cache_home()
    write_json(folder / "plans" / "x.json", {"a": 1})
    assert not (folder / "plans").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_home() == Path("/somewhere/einfold")
    monkeypatch.setenv("EINFOLD_CACHE", "/elsewhere")
    assert cache_home() == Path("/elsewhere")


def seal(data: bytes) -> bytes:
    return data + b"\neinfold %s\n" % blake3(data).hexdigest().encode()


def nothing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    path.write_bytes(b" " + path.read_bytes())


@pytest.mark.parametrize(
    "harm",
    [nothing, folder, pipe, link, circle, huge, cut, one_bit, longer],
    ids=lambda f: f.__name__,
)
def test_only_what_was_written_is_read(harm: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert write_json(path, {"a": [1.5, "text"]})
    assert read_json(path) == {"a": [1.5, "text"]}
    harm(path)
    assert read_json(path) is None
    if harm is not folder:  # whatever stands there is replaced
        assert write_json(path, {"a": 2})
        assert read_json(path) == {"a": 2}


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"1", b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_sealed_and_no_table(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(seal(text))
    assert read(tmp_path / "x", 1 << 20) == text
    assert read_json(tmp_path / "x") is None


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def full(file: Any) -> None:
        file.write(b"1")
        with open("/dev/full", "wb") as nowhere:
            nowhere.write(b"1")

    def fails(file: Any) -> None:
        raise ValueError("of the writer's own")

    assert not write(tmp_path / "x", full)
    with pytest.raises(ValueError, match="writer's own"):
        write(tmp_path / "x", fails)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert not write_json(tmp_path / "file" / "x.json", {})


def test_what_a_killed_process_left_half_written_goes_after_a_while(tmp_path: Path) -> None:
    young, old = tmp_path / ".x.json.1.tmp", tmp_path / ".x.json.2.tmp"
    for left in (young, old):
        left.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    write_json(tmp_path / "x.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.json.1.tmp", "x.json"]


@pytest.mark.parametrize(
    "seconds",
    [
        None,
        [],
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": -1.0},
        {"a": 0.0},
        {"a": True},
        {"a": "1.0"},
        {"a": None},
        {"a": [1.0]},
    ],
)
def test_times_that_are_none_are_measured_again(
    seconds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    timings.keep("region", CPU, {"a": 1.0})
    assert timings.known("region", CPU) == {"a": 1.0}
    (path,) = (tmp_path / "choices").iterdir()
    data = read_json(path)
    assert data is not None
    path.write_bytes(seal(json.dumps(data | {"seconds": seconds}).encode()))
    assert timings.known("region", CPU) == {}
    path.write_bytes(seal(json.dumps(data | {"key": "another"}).encode()))
    assert timings.known("region", CPU) == {}
