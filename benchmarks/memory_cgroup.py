"""A memory cgroup: a limit on a process from outside, which counts the pages of the files that it reads too.

Of version 1, mounted beside other controllers, or of version 2, the unified tree, whichever the machine has.
Only a user who may write there, mostly root, can make one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Where systems mount their cgroups.
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version calls the files of a group."""

    limit: str
    peak: str
    swap: str
    swap_and_memory: bool
    """Whether the limit on swap is of both together."""


_VERSION_1 = _Files(
    "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes", True
)
_VERSION_2 = _Files("memory.max", "memory.peak", "memory.swap.max", False)


class Group:
    """A cgroup that is there while it is used."""

    def __init__(self, path: Path, files: _Files) -> None:
        self.path, self._files = path, files

    def enter(self) -> None:
        """Puts the process that calls it into the group; between fork and exec too."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def limit(self, size: int) -> None:
        """Holds what is in the group to `size` bytes, none of them in swap."""
        (self.path / self._files.limit).write_text(str(size), encoding="ascii")
        swap = self.path / self._files.swap
        if swap.exists():  # a system that counts no swap has no such file
            swap.write_text(str(size if self._files.swap_and_memory else 0), encoding="ascii")

    def peak(self) -> int:
        """The most bytes that the group held; Linux below 5.19 does not tell it of version 2 (OSError)."""
        return int((self.path / self._files.peak).read_text(encoding="ascii"))


@contextmanager
def cgroup(size: int, mount: Path = MOUNT) -> Iterator[Group]:
    """A memory cgroup of so many bytes, gone at the end; raises OSError where none can be."""
    try:
        parent, files = _parent(mount)
        path = parent / f"einfold-bench-{os.getpid()}"
        path.mkdir()
    except OSError as error:
        raise OSError(
            f"no memory cgroup can be made under {mount}: {error}; run this as a user who may write "
            "there, where no process is in the way (version 2 wants the parent of a group empty)"
        ) from error
    try:
        group = Group(path, files)
        group.limit(size)
        yield group
    finally:
        for _ in range(50):  # the kernel takes its time with what a process leaves
            with suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.1)


def _parent(mount: Path) -> tuple[Path, _Files]:
    """The group that ours is made in: the top one, since one in between may have a limit of its own."""
    if (mount / "memory" / "cgroup.procs").exists():
        return mount / "memory", _VERSION_1
    has = (mount / "cgroup.controllers").read_text(encoding="ascii").split()
    if "memory" not in has:
        raise OSError(f"its controllers are {', '.join(has) or 'none'}, and `memory` is not one")
    enabled = mount / "cgroup.subtree_control"
    if "memory" not in enabled.read_text(encoding="ascii").split():
        enabled.write_text("+memory", encoding="ascii")
    return mount, _VERSION_2
