"""The README's own commands and snippets, run as they stand there on the shipped model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.test_cli import einfold
from tests.encoders.common import save_embedder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SNIPPETS = [body for kind, body in BLOCKS if kind == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for kind, body in BLOCKS
    if kind == "sh"
    for line in body.splitlines()
    if line.startswith("einfold ")
]
#: Set-up: what a fresh machine does, which the tests run in.
SETUP = ("make demo", "make test", "pip install")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped model where the README has its own, its documents cut to a few, and a tiny
    random encoder."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples" / "tiny_llama", folder / "path" / "to" / "model")
    save_embedder(folder / "path" / "to" / "encoder")
    text = folder / "path" / "to" / "model" / "eval.txt"
    text.write_text("\n\f\n".join(text.read_text().split("\n\f\n")[:2]))
    return folder


def test_every_line_of_a_shell_is_run_or_sets_up() -> None:
    lines = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines() if line]
    rest = [line for line in lines if not line.startswith(("einfold ", *SETUP))]
    assert rest == [] and len(COMMANDS) >= 4 and len(SNIPPETS) >= 3


def test_the_commands_in_their_order(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    said = [einfold(*shlex.split(command)[1:]) for command in COMMANDS]
    estimate, compiled, ran, measured, encoder, embedded = said
    assert "largest context" in estimate and "model.einfold: " in compiled
    assert len(ran.strip()) > 20 and "KL to the original" in measured
    assert "encoder.einfold: " in encoder and len(json.loads(embedded)["rows"]) == 2


def _names(here: Path) -> dict[str, Any]:
    """What the snippets take for given."""
    model = here / "path" / "to" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer("def read_lines(path):", return_tensors="pt")
    q = torch.randn(1, 4, 128, 32)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT / 32**0.5).softmax(-1) @ v

    return {
        "any_module": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(),
        "x": torch.randn(2, 8),
        "hf_model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
        "tokenizer": tokenizer,
        "inputs": {**tokens, "max_new_tokens": 4, "do_sample": False},
        "function": function,
        "inputs_of_function": (q, q, q),
    }


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_snippets(
    number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(here)
    names = _names(here)
    for name in ("model.einfold", "encoder.einfold", "out"):
        shutil.rmtree(name, ignore_errors=True)
    code = SNIPPETS[number]
    if "explain(function, *inputs)" in code:
        names["inputs"] = names.pop("inputs_of_function")
    if "import einfold" not in code:
        code = f"import einfold\n{code}"
    torch._dynamo.reset()
    exec(compile(code, f"README.md snippet {number}", "exec"), names)
    said = capsys.readouterr().out
    if "explain" in code:
        assert "passes" in said
        names["hf_model"].generate(**_names(here)["inputs"])
    if "export_onnx" in code:
        assert (here / "out" / "model.onnx").is_file() and len(said) > 40
