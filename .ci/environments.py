"""Runs the tests in other environments than that of development, and says which were not to be had.

    make test-environments                  the oldest packages that are claimed, and every other Python
    make test-oldest                        the first of these alone
    python .ci/environments.py python3.12 -- tests/ir

What follows `--` goes to pytest. An environment is made once, as `.venv-test-NAME`, and again when the
requirements have changed; with a torch that was built for CUDA it takes some gigabytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent

#: Extras whose oldest packages are installed; tools for development are what they always are.
EXTRAS = ("onnx", "triton")

#: Pythons that are looked for.
MINORS = range(8, 20)


@dataclass(frozen=True)
class Environment:
    """A Python, and what pip is held to there."""

    name: str
    python: str
    constraints: str

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-test-{self.name}"

    def make(self) -> Path:
        """The environment's Python; packages are installed where they are not, or others than asked for."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        asked = hashlib.sha256(f"{self.python}\n{self.constraints}\n{project}".encode()).hexdigest()
        stamp, inside = self.folder / ".ready", self.folder / "bin" / "python"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == asked:
            return inside
        subprocess.run([self.python, "-m", "venv", "--clear", self.folder], check=True)
        held = self.folder / "constraints.txt"
        held.write_text(self.constraints, encoding="utf-8")
        pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", held]
        subprocess.run([*pip, "-e", f"{ROOT}[dev]"], check=True)
        stamp.write_text(asked, encoding="utf-8")
        return inside


def pinned() -> list[str]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def oldest_constraints() -> str:
    """Every package of the runtime at the lower end of its range; the rest as in development, where it can.

    What these packages ask for themselves is left to pip: an old one may not go with new ones.
    """
    project = read_project()
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for line in project["dependencies"]]
    asked += [Requirement(line) for extra in EXTRAS for line in extras[extra]]
    oldest = {canonicalize_name(each.name): lower_end(each.specifier) for each in asked}
    tools = {canonicalize_name(Requirement(line).name) for line in extras["dev"]}
    kept = [
        line
        for line in pinned()
        if canonicalize_name(Requirement(line).name) in tools - oldest.keys()
    ]
    return "\n".join([*(f"{name}=={version}" for name, version in oldest.items()), *kept]) + "\n"


def lower_end(specifier: SpecifierSet) -> str:
    """The version that a range begins with."""
    [found] = [each.version for each in specifier if each.operator == ">="]
    return found


def read_project() -> dict:  # type: ignore[type-arg]
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]  # type: ignore[no-any-return]


def pythons() -> dict[str, str]:
    """Every Python of this machine by its name: those that are found by it, and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for minor in MINORS:
        name = f"python3.{minor}"
        places = [shutil.which(name), *sorted(pyenv.glob(f"3.{minor}.*/bin/{name}"))]
        for place in filter(None, places):
            if runs(place, minor):
                found[name] = str(place)
    return found


def runs(python: str | Path, minor: int) -> bool:
    """Whether it is what its name says: pyenv's own commands are there for versions that are not chosen."""
    code = f"import sys, venv; sys.exit(sys.version_info[:2] != (3, {minor}))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def claimed(name: str) -> bool:
    """Whether the package says that it runs on a Python of this name."""
    return f"{name.removeprefix('python')}.0" in SpecifierSet(read_project()["requires-python"])


def known() -> tuple[dict[str, Environment], dict[str, str]]:
    """The environments that can be made here, and why others cannot."""
    there, here = pythons(), f"python3.{sys.version_info.minor}"
    found = {"oldest": Environment("oldest", sys.executable, oldest_constraints())}
    missing = {here: "is the Python of development: make test"}
    for minor in MINORS:
        name = f"python3.{minor}"
        if name == here or not (claimed(name) or name in there):
            continue
        if not claimed(name):
            missing[name] = "is not claimed"
        elif name not in there:
            missing[name] = "is not on this machine"
        else:
            # A torch that was built for CUDA, which an index may give there, asks for a Triton of its own.
            lines = [line for line in pinned() if not line.startswith("triton==")]
            found[name] = Environment(name, there[name], "\n".join(lines) + "\n")
    return found, missing


def versions(python: Path) -> str:
    """What an environment came to hold."""
    code = (
        "import platform, importlib.metadata as m; print('Python', platform.python_version() + ',', "
        "', '.join(f'{n} {m.version(n)}' for n in ('torch', 'triton', 'transformers', 'onnxruntime')))"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def tested(environment: Environment, options: Sequence[str]) -> Iterator[str]:
    """Makes an environment and runs the tests there; gives lines to print, the last with the outcome."""
    try:
        python = environment.make()
    except subprocess.CalledProcessError as error:
        yield f"not made: {Path(str(error.cmd[0])).name} ended with {error.returncode}"
        return
    yield versions(python)
    started = time.monotonic()
    command = [python, "-m", "pytest", "-n", "auto", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    log = environment.folder / "pytest.txt"
    log.write_text(done.stdout, encoding="utf-8")
    yield from (line for line in done.stdout.splitlines() if re.match("(FAILED|ERROR) ", line))
    counted = [
        line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)
    ]
    told = counted[-1].strip("= ") if counted else f"pytest ended with {done.returncode}, see {log}"
    yield f"{'passed' if done.returncode == 0 else 'FAILED'}: {told} ({time.monotonic() - started:.0f} s)"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="oldest, python3.12 and so on; all without"
    )
    parser.add_argument("--list", action="store_true", help="say which there are, and run nothing")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    asked = parser.parse_args(arguments[:split])
    found, missing = known()
    for name in asked.names:
        if name not in found:
            reason = missing.get(name, f"is none of {', '.join(found)}")
            parser.error(f"{name} {reason}")
    chosen = asked.names or list(found)
    outcomes = {}
    for name in [] if asked.list else chosen:
        print(f"{name}:", flush=True)
        for line in tested(found[name], arguments[split + 1 :]):
            print(f"  {line}", flush=True)
            outcomes[name] = line
    for name in found:
        print(f"{name}: {outcomes.get(name, 'not run')}")
    for name, reason in missing.items():
        print(f"{name}: not run, it {reason}")
    return int(any(not line.startswith("passed") for line in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
