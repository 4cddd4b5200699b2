"""Environments that hold what a package asks for and nothing else, linked from the one of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: list[str], extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that count for this machine and these extras."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
            yield requirement


def closure(wheel: metadata.Distribution, extra: str) -> list[metadata.Distribution]:
    """What a wheel with an extra leads to, itself left out; PackageNotFoundError for what is not here."""
    found = {canonicalize_name(wheel.name): wheel}
    seen: set[str] = set()
    waiting = [Requirement(f"{wheel.name}[{extra}]" if extra else wheel.name)]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras)
        if f"{name}{extras}" in seen:
            continue
        seen.add(f"{name}{extras}")
        if name not in found:
            found[name] = metadata.distribution(requirement.name)
        waiting += needed(found[name].requires or [], extras)
    return [distribution for distribution in found.values() if distribution is not wheel]


def link(distributions: list[metadata.Distribution], site: Path) -> None:
    """Links the files and folders of distributions into a folder of packages."""
    for distribution in distributions:
        record = (distribution.read_text("RECORD") or "").splitlines()
        for name in {line.partition(",")[0].partition("/")[0] for line in record}:
            if name not in ("..", "__pycache__") and not (site / name).exists():
                os.symlink(str(distribution.locate_file(name)), site / name)


def environment(folder: Path, distributions: list[metadata.Distribution]) -> Path:
    """A fresh virtual environment with links to `distributions` and no pip; gives its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    link(distributions, Path(site))
    return python


def install(python: Path, what: str) -> None:
    """Installs with pip, which takes nothing from elsewhere: a requirement that is missing is an error."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
            *("--no-index", "--disable-pip-version-check", "--no-compile", what),
        ],
        env=clean_environment(),
        check=True,
    )


def clean_environment() -> dict[str, str]:
    """The environment of the process without what would tell Python or pip of other packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PIP_", "EINFOLD"))
    }
