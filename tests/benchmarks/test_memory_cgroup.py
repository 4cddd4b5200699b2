"""Budgets of benchmarks are kept by the system too: of either version of cgroups."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import memory_cgroup
from benchmarks.memory_cgroup import Group, cgroup


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    """A folder as the unified tree stands before any group has a controller."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    return tmp_path


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """The same of version 1, which may stand beside a unified tree."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "cgroup.procs").write_text("")
    (tmp_path / "cgroup.controllers").write_text("")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are not the kernel's are not empty, and stay."""
    monkeypatch.setattr(memory_cgroup.time, "sleep", lambda _: None)


def _swap(path: Path, name: str) -> None:
    """What a system that counts swap has in each group; a plain folder has it not."""
    (path / name).write_text("")


def test_version_2_limits_memory_and_swap_and_tells_its_peak(version_2: Path) -> None:
    with cgroup(1 << 20, version_2) as group:
        assert (version_2 / "cgroup.subtree_control").read_text() == "+memory"
        assert (group.path / "memory.max").read_text() == "1048576"
        assert not (group.path / "memory.swap.max").exists()
        _swap(group.path, "memory.swap.max")
        group.limit(2 << 20)
        assert (group.path / "memory.max").read_text() == "2097152"
        assert (group.path / "memory.swap.max").read_text() == "0"
        (group.path / "memory.peak").write_text("123\n")
        assert group.peak() == 123


def test_version_1_comes_before_a_unified_tree_without_its_controller(version_1: Path) -> None:
    with cgroup(1 << 20, version_1) as group:
        assert group.path.parent == version_1 / "memory"
        _swap(group.path, "memory.memsw.limit_in_bytes")
        group.limit(2 << 20)
        assert (group.path / "memory.limit_in_bytes").read_text() == "2097152"
        assert (group.path / "memory.memsw.limit_in_bytes").read_text() == "2097152"
        (group.path / "memory.max_usage_in_bytes").write_text("456\n")
        assert group.peak() == 456


def test_a_machine_without_them_is_told_so(tmp_path: Path) -> None:
    for controllers, said in ((None, "cgroup.controllers"), ("cpu pids\n", "`memory` is not one")):
        if controllers:
            (tmp_path / "cgroup.controllers").write_text(controllers)
        match = f"no memory cgroup can be made under .*{said}"
        with pytest.raises(OSError, match=match), cgroup(1 << 20, tmp_path):
            pass


def _taken(size: int, group: Group) -> int:
    """How a process that fills so many bytes in the group ends."""
    words = [sys.executable, "-c", f"bytearray({size})"]
    return subprocess.run(words, preexec_fn=group.enter, check=False).returncode


def test_the_system_ends_what_passes_its_limit() -> None:
    with ExitStack() as stack:
        try:
            group = stack.enter_context(cgroup(64 << 20))
        except OSError as error:
            pytest.skip(str(error))
        assert _taken(8 << 20, group) == 0
        assert 8 << 20 < group.peak() <= 64 << 20
        assert _taken(128 << 20, group) == -9
    assert not group.path.exists()
