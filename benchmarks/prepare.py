"""Makes the forms of a model that the engines read, once, in a folder that is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import ROOT, WorkerError, environment
from .entries import EINFOLD, Form

#: Name of the file inside a form's folder that the engine is given, where it is not the folder.
GGUF = "model-q4_0.gguf"


@dataclass(frozen=True)
class Kitchen:
    """Where models are kept, and the two Python environments that make them."""

    cache: Path
    own: str
    peers: str
    threads: int
    tell: Callable[[str], None]

    def model(self, shape: str) -> Path:
        """The Hugging Face folder of a shape."""
        return self._once(
            self.cache / shape / "hf",
            f"random weights of {shape}",
            lambda out: [self.own, "-m", "benchmarks.shapes", shape, str(out)],
        )

    def form(self, shape: str, form: Form) -> Path:
        """What an engine is told to load. Raises WorkerError where it cannot be made."""
        model = self.model(shape)
        if form.kind == "hf":
            return model
        name = form.folder
        if form.kind == EINFOLD:
            # Another state of the compiler is another artifact.
            name += f"-{source_digest()}"
        folder = self._once(
            self.cache / shape / name, f"{form.folder} of {shape}", self._maker(model, form)
        )
        return folder / GGUF if form.kind == "gguf" else folder

    def _maker(self, model: Path, form: Form) -> Callable[[Path], list[str]]:
        if form.kind == EINFOLD:
            if "quarter" in form.options:
                return lambda out: [
                    *(self.own, "-m", "benchmarks.quarter_heads", str(model), str(out)),
                    *("--recipe", form.options[0]),
                ]
            return lambda out: [
                *(self.own, "-m", "einfold", "compile", str(model), "-o", str(out)),
                *("--recipe", form.options[0]),
            ]
        if form.kind == "genai":
            scratch = str(self.cache / "genai-scratch")
            return lambda out: [
                *(self.peers, "-m", "onnxruntime_genai.models.builder"),
                *("-m", model.name, "-i", str(model), "-o", str(out), "-c", scratch),
                *("-p", "int4", "-e", "cpu", "--extra_options", *form.options),
            ]
        return lambda out: [
            *(self.peers, "-m", "benchmarks.gguf_convert", str(model), str(out / GGUF)),
            str(self.threads),
        ]

    def _once(self, out: Path, what: str, command: Callable[[Path], list[str]]) -> Path:
        """Runs a command that fills a folder, unless an earlier run has finished it."""
        if out.is_dir():
            return out
        self.tell(f"making {what}")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if not {"einfold", "benchmarks.quarter_heads"} & set(command(part)):
            part.mkdir()
        log = out.with_name(f"{out.name}.log")
        started = time.perf_counter()
        with log.open("wb") as stream:
            code = subprocess.run(
                command(part),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(self.cache, self.threads),
                check=False,
            ).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise WorkerError(f"{what} cannot be made: {last[0]}")
        part.rename(out)
        self.tell(f"made {what} in {time.perf_counter() - started:.0f} s")
        return out


def source_digest() -> str:
    """A short hash of the sources that decide what an artifact holds."""
    digest = hashlib.sha256()
    for top in ("compiler", "einfold/recipes", "benchmarks/recipes"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def installed(python: str, module: str) -> bool:
    """Whether an environment has a package. Nothing of it is imported but what its parents need."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return subprocess.run([python, "-c", probe, module], check=False, cwd=ROOT).returncode == 0


def default_cache() -> Path:
    """Folder for models of some gigabytes: outside the checkout, so that a clean keeps them."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "einfold-bench"


def own_python() -> str:
    return sys.executable
