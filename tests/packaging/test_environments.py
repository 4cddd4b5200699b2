"""The other environments that the tests run in: what is installed there, and what is said of others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environments() -> Iterator[ModuleType]:
    spec = util.spec_from_file_location("environments", ROOT / ".ci" / "environments.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_oldest_of_each_package_is_the_end_of_its_range(environments: ModuleType) -> None:
    held = [Requirement(line) for line in environments.oldest_constraints().splitlines()]
    found = {each.name: str(each.specifier) for each in held}
    assert len(found) == len(held)
    project = environments.read_project()
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["onnx"], *extras["triton"]):
        asked = Requirement(line)
        version = found[asked.name].removeprefix("==")
        assert asked.specifier.contains(version)
        assert f">={version}" in line
    assert found["torch"] == "==2.10"
    assert {"numpy", "pytest"} <= found.keys()


def test_every_python_of_the_claim_is_run_or_said(environments: ModuleType) -> None:
    found, missing = environments.known()
    named = found.keys() | missing.keys()
    assert {"oldest", "python3.11", "python3.12", "python3.13"} <= named
    assert not found.keys() & missing.keys()
    assert "development" in missing[f"python3.{sys.version_info.minor}"]
    for name, environment in found.items():
        assert Path(environment.python).is_file()
        assert environment.folder.name == f".venv-test-{name}"


def test_names_that_there_are_not() -> None:
    script = [sys.executable, str(ROOT / ".ci" / "environments.py")]
    for name, said in (("python2.7", "is none of oldest"), ("python3.9", "python3.9 is")):
        done = subprocess.run([*script, name], capture_output=True, text=True)
        assert done.returncode == 2
        assert said in done.stderr
    done = subprocess.run([*script, "--list"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "oldest: not run" in done.stdout


@pytest.mark.slow
def test_what_failed_there_is_told(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of this Python over a folder with a test that passes and one that does not."""
    environment = environments.Environment("here", sys.executable, "")
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    environment.folder.mkdir()
    monkeypatch.setattr(environments.Environment, "make", lambda self: Path(sys.executable))
    (tmp_path / "test_one.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    first, *rest, last = environments.tested(environment, ["-p", "no:randomly"])
    assert first.startswith(f"Python 3.{sys.version_info.minor}") and "torch" in first
    assert rest == ["FAILED test_one.py::test_b - assert 0"]
    assert last.startswith("FAILED: 1 failed, 1 passed")
    *_, last = environments.tested(environment, ["-k", "test_a"])
    assert last.startswith("passed: 1 passed")


def test_what_cannot_be_installed_is_told(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    broken = environments.Environment("broken", str(tmp_path / "python"), "")
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    assert list(environments.tested(broken, [])) == ["not made: python ended with 3"]
    assert not (broken.folder / ".ready").exists()
