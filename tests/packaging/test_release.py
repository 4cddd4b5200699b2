"""What keeps a release from being one is found, and the tools of a commit are those of `make check`."""

from __future__ import annotations

import gzip
import importlib.util
import io
import re
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import einfold

ROOT = Path(__file__).parent.parent.parent

METADATA = b"""Metadata-Version: 2.4
Name: einfold
Version: 1.2.0
License-Expression: Apache-2.0
License-File: LICENSE
Project-URL: Source, https://example.invalid/einfold
Description-Content-Type: text/markdown

# einfold
"""


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "release_check", ROOT / ".ci" / "release_check.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changelog", "said"),
    [
        ("# Changelog\n\n## 1.2.0 (2027-01-31)\n\n## 1.1.0 (2026-01-01)\n", ""),
        ("# Changelog\n\n## 1.2.0 (unreleased)\n", "a release has its date there"),
        ("# Changelog\n\n## 1.1.0 (2026-01-01)\n", "begins with 1.1.0 (2026-01-01)"),
        ("# Changelog\n", "begins with nothing"),
    ],
)
def test_changelog(release: ModuleType, changelog: str, said: str) -> None:
    faults = release.faults_of_changelog(changelog, "1.2.0")
    assert len(faults) == bool(said)
    assert said in "".join(faults)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b"", b"", ""),
        (b"1.2.0", b"1.3.0", "version"),
        (b"text/markdown", b"text/plain", "Markdown"),
        (b"License-File: LICENSE\n", b"", "license"),
        (b"Project-URL: Source, https://example.invalid/einfold\n", b"", "project.urls"),
        (b"Apache-2.0", b"Apache 2, or so", "license-expression"),
        (b"Name: einfold\n", b"", "name"),
    ],
)
def test_metadata(release: ModuleType, before: bytes, after: bytes, said: str) -> None:
    faults = release.faults_of_metadata(METADATA.replace(before, after, 1), "1.2.0")
    assert bool(faults) == bool(said)
    assert said in "".join(map(str, faults))


def test_an_archive_is_the_same_whenever_it_was_packed(release: ModuleType) -> None:
    def packed(names: list[str], moment: int) -> bytes:
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.uname = 3, moment, f"user{moment}"
                archive.addfile(member, io.BytesIO(b"abc"))
        return gzip.compress(plain.getvalue(), mtime=moment)

    one = release.without_times(packed(["b", "a"], 5), 9)
    assert one == release.without_times(packed(["a", "b"], 6), 9)
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        assert [(m.name, m.mtime, m.size) for m in archive] == [("a", 9, 3), ("b", 9, 3)]


def test_the_version_is_the_one_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{einfold.__version__}"' in text


def test_hooks_take_the_versions_of_the_constraints() -> None:
    pinned = set((ROOT / "constraints.txt").read_text("utf-8").splitlines())
    hooks = re.findall(r'"(\S+==\S+)"', (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert hooks and set(hooks) <= pinned
