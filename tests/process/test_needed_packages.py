"""What each part does without: no onnx where nothing is written in it, no torch to run (docs/adr/0004)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import einfold

ONNX = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
#: What only compiling needs.
COMPILING = (
    "torch",
    "transformers",
    "sympy",
    "omnimalloc",
    "onnx_ir",
    "onnxscript",
    "triton",
    "ortools",
)

#: Runs command lines one after the other, in a process where the packages in argv[1] cannot be imported.
_VERBS = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None: as where it is not installed
from einfold.cli import main

def run(*arguments):
    sys.argv = ["einfold", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
"""

#: A step of the model with a cache made for it, as `generate` of transformers takes it.
_CACHE_FOR = """
import einfold, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
with einfold.cache_for(model, prune="streaming_llm:recent=16", cache="int8") as cache:
    ids = torch.arange(3, 27)[None]
    made = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
assert made.shape == (1, 26), made.shape
"""


#: What reading an artifact's cache imports: every policy, storage and reader.
_LAYOUT = """
from einfold.compiler.ir.kv.keep.policy import POLICIES
from einfold.compiler.ir.kv.read.reader import READERS
from einfold.compiler.ir.kv.store.storage import STORAGES
print([len(list(room)) > 1 for room in (POLICIES, READERS, STORAGES)])
"""


def without(packages: Sequence[str], script: str) -> str:
    """What a process writes to stdout where `packages` cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", _VERBS + script, ",".join(packages)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def verbs(*lines: Sequence[str | Path], code: int = 0) -> str:
    """A script that runs command lines, each of which ends with `code`."""
    calls = [f"assert run(*{[str(word) for word in line]!r}) == {code}" for line in lines]
    return "\n".join(calls) + "\n"


def test_a_cache_is_laid_out_without_what_compiles() -> None:
    assert without(COMPILING, _LAYOUT).strip() == "[True, True, True]"


@pytest.mark.slow
def test_no_onnx_but_for_the_target_onnx(text_model: Path, tmp_path: Path) -> None:
    kernels, graph = tmp_path / "kernels", tmp_path / "graph"
    script = verbs(
        ["passes", "--json"],
        ["methods", "--json"],
        ["estimate", text_model, "--weights", "int4", "--json"],
        ["compile", text_model, "-o", kernels, "--target", "triton", "--cache", "int8", "--json"],
        ["compile", text_model, "-o", graph, "--target", "reference", "--weights", "int8"],
        ["inspect", kernels, "--json"],
        ["run", graph, "-p", "the", "--max-new-tokens", "2", "--json"],
    )
    without(ONNX, script + _CACHE_FOR.replace("FOLDER", repr(str(text_model))))
    assert (kernels / "manifest.json").is_file()


@pytest.mark.slow
def test_the_target_onnx_names_its_extra(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    script = verbs(["compile", text_model, "-o", out, "--json"], code=11)
    assert "einfold[onnx]" in without(ONNX, script)
    assert not out.exists()


def test_packed_tokens_need_no_torch(text_model: Path, tmp_path: Path) -> None:
    """A prompt that settles, and tokens that are packed as others come."""
    quant = "turboquant:group=8,residual=8,slack=4"
    einfold.compile(text_model, tmp_path / "a", quant=quant)
    run = ["run", tmp_path / "a", "-p", "the " * 20, "--max-new-tokens", "20", "--json"]
    assert "tokens" in without(COMPILING, verbs(["inspect", tmp_path / "a"], run))


def test_an_onnx_artifact_runs_without_what_compiles(text_artifact: Path) -> None:
    script = verbs(
        ["--version"],
        ["inspect", text_artifact, "--json"],
        ["run", text_artifact, "-p", "the", "--max-new-tokens", "2", "--json"],
    )
    assert "tokens" in without(COMPILING, script)
