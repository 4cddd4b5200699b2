"""What users install: the wheel through the package links, in fresh environments, with and without extras."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from .. import models
from ..quick import quick
from .environment import clean_environment, closure, environment, install

ROOT = Path(__file__).parent.parent.parent
#: Folders and files of a checkout that a build reads.
SOURCES = ("compiler", "runtime", "einfold", "pyproject.toml", "README.md", "LICENSE")
#: Folders of a checkout, and where the package has them.
ROOMS = {"einfold": "einfold", "compiler": "einfold/compiler", "runtime": "einfold/runtime"}
LINKS = ("compiler/", "runtime/")
SUFFIXES = (".py", ".toml", ".txt", ".typed")

_BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""

#: What every environment does, in one process: FOLDER a model, OUT a folder to write to.
_COMMON = """
import sys
from pathlib import Path
from einfold.cli import main
out = Path(OUT)

def run(*arguments):
    sys.argv = ["einfold", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0

def missing(*names):
    from importlib.util import find_spec
    assert not [name for name in names if find_spec(name)], names

import einfold
assert Path(einfold.__file__).is_relative_to(sys.prefix), einfold.__file__
assert run("--version") == 0
"""

_NO_ONNX = """
missing("onnx", "onnx_ir", "onnxscript", "onnxruntime")
assert run("compile", FOLDER, "-o", out / "no") == 11
"""

#: What is done with each extra beside the common part.
DONE = {
    "": _NO_ONNX
    + """
missing("triton", "pytest")
assert run("passes", "--json") == 0
assert run("estimate", FOLDER, "--weights", "int4", "--json") == 0
assert run("compile", FOLDER, "-o", out / "a", "--target", "reference", "--weights", "int8", "--json") == 0
assert run("run", out / "a", "--ids", "5 6 7", "--max-new-tokens", "2", "--json") == 0
""",
    "onnx": """
missing("triton", "pytest")
assert run("compile", FOLDER, "-o", out / "a", "--weights", "int4", "--cache", "int8", "--json") == 0
assert run("run", out / "a", "--ids", "5 6 7", "--max-new-tokens", "2", "--json") == 0
import torch
einfold.export_onnx(torch.nn.Linear(4, 3), out / "module", example_inputs=(torch.ones(2, 4),))
""",
    "gguf": _NO_ONNX
    + """
missing("triton", "pytest")
import gguf
from einfold.compiler.frontend.checkpoints.gguf import FORMATS
assert "gguf" in FORMATS
""",
    "triton": _NO_ONNX
    + """
missing("pytest")
assert run("compile", FOLDER, "-o", out / "a", "--target", "triton", "--cubins", "sm_80", "--json") == 0
assert list((out / "a").rglob("*.cubin"))
""",
    "bench": """
missing("triton", "pytest")
import onnx, onnx_ir, onnxscript, onnxruntime
""",
    "dev": """
import hypothesis, mypy, onnxruntime, pytest, xdist
""",
}


def build(kind: str, source: Path, out: Path) -> Path:
    """The sdist or wheel that setuptools makes of a source tree, as pip would have it made."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, f"build_{kind}", out],
        cwd=source,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with the links; a build writes beside it."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=hidden)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build("wheel", source, source / "out")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    expected = set()
    for top, inside in ROOMS.items():
        for path in (ROOT / top).rglob("*"):
            name = path.relative_to(ROOT / top).as_posix()
            if path.suffix in SUFFIXES and not (top == "einfold" and name.startswith(LINKS)):
                expected.add(f"{inside}/{name}")
    assert {name for name in names(wheel) if ".dist-info/" not in name} == expected


def test_the_sdist_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    packed = build("sdist", source, source / "out")
    with tarfile.open(packed) as opened:
        opened.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    again = build("wheel", unpacked, tmp_path / "out")
    assert again.name == wheel.name and names(again) == names(wheel)


def metadata_of(wheel: Path) -> metadata.Distribution:
    [found] = metadata.distributions(path=[str(wheel)])
    return found


def test_every_extra_is_tried(wheel: Path) -> None:
    assert {"", *(metadata_of(wheel).metadata.get_all("Provides-Extra") or [])} == set(DONE)


@pytest.mark.parametrize("extra", quick(DONE, "onnx"))
def test_what_is_installed_runs(extra: str, wheel: Path, tmp_path: Path) -> None:
    try:
        linked = closure(metadata_of(wheel), extra)
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed here")
    python = environment(tmp_path / "venv", linked)
    install(python, f"{wheel}[{extra}]" if extra else str(wheel))
    folder = models.save("llama", tmp_path / "model")
    places = f"FOLDER, OUT = {str(folder)!r}, {str(tmp_path)!r}\n"
    done = subprocess.run(
        [python, "-c", places + _COMMON + DONE[extra]],
        cwd=tmp_path,
        env=clean_environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
