"""Folders that lie in memory are told from those on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from einfold.errors import DiskError
from einfold.runtime.memory import filesystem, probe
from einfold.runtime.memory.filesystem import held_in_memory


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table of mounts, as a test writes it: `N` is the number of the folder's device."""
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(filesystem, "_MOUNTS", table)
    monkeypatch.setattr(filesystem, "_BLOCKS", tmp_path / "blocks")
    return table


def number(folder: Path) -> str:
    device = os.stat(folder).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("tmpfs", "tmpfs"),
        ("ramfs", "ramfs"),
        ("hugetlbfs", "hugetlbfs"),
        ("ext4", ""),
        ("overlay", ""),
    ],
)
def test_a_file_system_is_told_by_its_mount(
    kind: str, found: str, mounted: Path, tmp_path: Path
) -> None:
    own = number(tmp_path)
    mounted.write_text(
        f"26 1 0:99999 / / rw - tmpfs tmpfs rw\n"
        f"27 1 {own} / {tmp_path} rw,relatime shared:3 - {kind} {kind} rw\n",
        encoding="utf-8",
    )
    assert held_in_memory(tmp_path) == found
    assert held_in_memory(tmp_path / "not" / "there") == found


@pytest.mark.parametrize(("device", "found"), [("zram0", "zram0"), ("ram3", "ram3"), ("vda1", "")])
def test_a_disk_that_is_memory_is_told_by_its_device(
    device: str, found: str, mounted: Path, tmp_path: Path
) -> None:
    own = number(tmp_path)
    mounted.write_text(f"27 1 {own} / / rw - ext4 /dev/{device} rw\n", encoding="utf-8")
    (tmp_path / "devices" / device).mkdir(parents=True)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / own).symlink_to(tmp_path / "devices" / device)
    assert held_in_memory(tmp_path) == found


def test_a_system_without_a_table_of_mounts_says_nothing(mounted: Path, tmp_path: Path) -> None:
    assert not mounted.exists()
    assert held_in_memory(tmp_path) == ""


def test_memory_is_not_measured_as_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "held_in_memory", lambda _: "tmpfs")
    with pytest.raises(DiskError, match=r"is on tmpfs, .* give a folder on the disk .* with --at"):
        probe.disk_bandwidth(tmp_path)
