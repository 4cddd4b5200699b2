"""The stable core of the command line, as scripts use it: arguments in, stdout and an exit code out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from einfold.cli import main


def einfold(*arguments: str | Path, stdin: bytes = b"", code: int = 0) -> str:
    """Runs the command line in this process; gives stdout, or both streams where an error is expected."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["einfold", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")),
        mock.patch.dict("os.environ", {"COLUMNS": "200", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            found = 0
        except SystemExit as stop:
            found = int(stop.code or 0)
    assert found == code, f"exit {found}: {err.getvalue()}\n{out.getvalue()}"
    assert "Traceback" not in err.getvalue()
    return out.getvalue() if code == 0 else out.getvalue() + err.getvalue()


def as_json(*arguments: str | Path, **options: Any) -> Any:
    return json.loads(einfold(*arguments, "--json", **options))


def test_compile_run_eval_inspect_diff(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    made = as_json("compile", text_model, "-o", out, "--weights", "int8")
    assert made["manifest"]["recipe"]["weights"]["format"] == "int8"
    assert {p["name"] for p in made["passes"]} >= {
        "raise_rotary",
        "quantize_weights",
        "attach_cache",
    }
    assert all(0 < error < 0.02 for p in made["passes"] for error in p["measured"].values())

    ran = as_json(
        "run",
        out,
        "-p",
        "the pass key",
        "--max-new-tokens",
        "7",
        "--temperature",
        "0",
        "--ignore-eos",
    )
    assert len(ran["tokens"]) == 7
    assert isinstance(ran["text"], str)
    assert ran["timings"]["decode_tokens"] == 6
    (tmp_path / "prompt.txt").write_text("the pass key")
    plain = einfold(
        "run", out, "-f", tmp_path / "prompt.txt", "--max-new-tokens", "7", "--ignore-eos"
    )
    assert plain == ran["text"] + "\n"
    assert (
        einfold(
            "run", out, "-f", "-", "--max-new-tokens", "7", "--ignore-eos", stdin=b"the pass key"
        )
        == plain
    )
    chat = as_json(
        "run",
        out,
        "-p",
        "hi",
        "--chat",
        "--system",
        "be brief",
        "--max-new-tokens",
        "2",
        "--ignore-eos",
    )
    assert len(chat["tokens"]) == 2

    one = ("run", out, "-p", "hi", "--max-new-tokens", "2", "--ignore-eos")
    templated, raw = as_json(*one), as_json(*one, "--raw")
    assert templated["chat_template"] and not raw["chat_template"]
    assert templated["prompt_tokens"] > raw["prompt_tokens"]
    assert as_json(*one, "--chat")["tokens"] == templated["tokens"]

    text = tmp_path / "text.txt"
    text.write_text(
        "The pass key is 12. Remember it. What is the pass key? The pass key is 12.\n\f\nthe text"
    )
    measured = as_json("eval", out, "--against", text_model, "--text", text)
    assert measured["keys"] == 1
    assert measured["documents"] == 2
    assert measured["recall"] in (0.0, 1.0)
    assert measured["bytes"]["predicted"] == measured["bytes"]["measured"]
    assert measured["bytes"]["weights"] == made["manifest"]["weight_bytes"]
    assert abs(measured["perplexity"] / measured["reference_perplexity"] - 1) < 0.05
    assert 0 <= measured["kl"] < 0.05
    assert 0.8 < measured["top1"] <= 1

    text.write_text("nothing is asked here")
    assert as_json("eval", out, "--against", text_model, "--text", text)["recall"] is None

    shown = as_json("inspect", out)
    assert shown["manifest"] == made["manifest"]
    assert "quantize_weights" in einfold("inspect", out)
    graph = einfold("inspect", out, "--graph")
    assert graph.startswith("einfold.ir 1\n")
    assert as_json("diff", out, out)["same"] is True
    (tmp_path / "other.eir").write_text(graph.replace("silu", "relu"))
    changed = json.loads(einfold("diff", out, tmp_path / "other.eir", "--json", code=1))
    assert changed["same"] is False
    assert any("relu" in line for line in changed["lines"])


def test_fp32_is_exact_against_the_original(
    text_model: Path, text_artifact: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the pass key is hidden in the text of the model " * 5)
    measured = as_json("eval", text_artifact, "--against", text_model, "--text", text)
    assert measured["perplexity"] == pytest.approx(measured["reference_perplexity"], rel=1e-5)
    assert measured["kl"] < 1e-8
    assert measured["top1"] == 1.0


def test_one_flavour_against_the_other(
    text_model: Path, text_artifact: Path, tmp_path: Path
) -> None:
    einfold("compile", text_model, "-o", tmp_path / "portable", "--portable")
    text = tmp_path / "text.txt"
    text.write_text("the pass key is hidden in the text of the model " * 5)
    measured = as_json("eval", tmp_path / "portable", "--against", text_artifact, "--text", text)
    assert measured["kl"] < 1e-8
    einfold(
        "compile", text_model, "-o", tmp_path / "int8", "--weights", "int8"
    )  # nothing is solved
    measured = as_json("eval", tmp_path / "int8", "--against", text_artifact, "--text", text)
    assert measured["kl"] > 1e-6


def test_an_estimate_of_the_portable_flavour(text_model: Path, tmp_path: Path) -> None:
    """It stores zero points, and its attention holds all logits."""
    import einfold as package

    options = ("--weights", "int4:block=32")
    made = package.compile(
        text_model,
        tmp_path / "a",
        recipe={"calibration": {"tokens": 256}},
        weights="int4:block=32",
        portable=True,
        check=False,
    )
    plain = as_json("estimate", text_model, *options)
    told = as_json("estimate", text_model, *options, "--portable")
    assert told["weights"] == made.manifest.weight_bytes > plain["weights"]
    assert told["activations"] > plain["activations"]


def test_estimate_agrees_with_the_artifact(text_model: Path, text_artifact: Path) -> None:
    told = as_json("estimate", text_model, "--batch", "3")
    manifest = as_json("inspect", text_artifact)["manifest"]
    assert told["weights"] == manifest["weight_bytes"]
    assert told["cache"] == 3 * 256 * 512
    assert told["total"] == told["weights"] + told["cache"] + told["activations"]
    assert told["resident"] == told["total"] + told["runtime"] + told["process"]
    least = told["weights"] + told["process"]
    found = [
        as_json("estimate", text_model, "--budget", str(least + more))["largest_context"]
        for more in (0, 400_000, 100_000_000)
    ]
    assert found[0] == 0 < found[1] < found[2] == 256


def test_bench_passes_help_version(text_artifact: Path) -> None:
    speed = as_json(
        "bench",
        text_artifact,
        "--prompt-tokens",
        "16",
        "--context",
        "32",
        "--new-tokens",
        "2",
        "--repeat",
        "1",
    )
    assert speed["prefill_tokens_per_second"] > 0
    assert speed["decode_tokens_per_second"]["32"] > 0
    listed = as_json("passes", "--weights", "int4", "--portable")
    names = [row["name"] for row in listed]
    assert (
        names.index("fuse_linears")
        < names.index("quantize_weights")
        < names.index("explicit_zeros")
    )
    assert all(row["what"] for row in listed)
    assert einfold("--version").startswith("einfold 0.")
    for verb in (
        "compile",
        "run",
        "eval",
        "bench",
        "estimate",
        "inspect",
        "diff",
        "passes",
        "methods",
    ):
        assert "--json" in einfold(verb, "--help")
    compiling = " ".join(einfold("compile", "--help").split())
    assert "storage format" in compiling
    assert "Loading uses them only with --trust" in compiling.replace("│ │ ", "")
    for verb in ("run", "eval", "bench"):
        text = " ".join(einfold(verb, "--help").replace("│", " ").split())
        assert "machine code that nothing checks; without this they are ignored" in text


def test_a_triton_artifact(text_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = as_json("compile", text_model, "-o", out, "--target", "triton")
    assert any(name.startswith("kernels/") for name in made["manifest"]["files"])
    shown = " ".join(einfold("inspect", out).split())
    assert "target triton" in shown and "kernel kernels/attention_h4_kv2_d16_fp32.py" in shown
    found = as_json("run", out, "--ids", "5 6 7", "--max-new-tokens", "3", "--engine", "reference")
    assert len(found["tokens"]) == 3
    if not torch.cuda.is_available():
        assert made["check"]["check"].startswith("not run: ")
        says = einfold("run", out, "-p", "the", code=4)
        assert "needs a CUDA device" in says and "--engine reference" in says
        assert "needs a CUDA device" in einfold("bench", out, code=4)
    wrong = einfold("run", out, "-p", "the", "--engine", "onnx", code=7)
    assert "compiled for triton" in wrong
    other = tmp_path / "other"
    for more, says in (
        (("--cubins", "sm_90"), "add --target triton"),
        (("--target", "triton", "--cubins", "sm_90,sm_1"), "triton.cubins"),
        (("--target", "triton", "--portable"), "portable is for the target onnx"),
    ):
        assert says in einfold("compile", text_model, "-o", other, *more, code=7)
        assert not other.exists()


def test_recipe_file_and_options_over_it(text_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'context = 64\n[weights]\nformat = "int4"\nblock = 16\nsymmetric = false\nhead = "same"\n'
    )
    made = as_json(
        "compile", text_model, "-o", tmp_path / "a", "--recipe", recipe, "--weights", "int8"
    )
    resolved = made["manifest"]["recipe"]
    assert resolved["weights"] == {
        "format": "int8",
        "block": 16,
        "symmetric": False,
        "scales": "f32",
        "head": "same",
        "embedding": True,
        "bpw": None,
        "activations": "f32",
        "widths": "2+4+8",
        "solver": None,
        "rotate": None,
        "keep": False,  # of codes that a checkpoint brings: int8 was asked for
    }
    assert made["manifest"]["model"]["context"] == 64


def test_run_is_light(text_artifact: Path) -> None:
    """Running an ONNX artifact loads neither torch nor transformers nor sympy."""
    script = (
        "import sys, einfold; einfold.errors.EinfoldError;"
        "m = einfold.load(sys.argv[1]); m.generate('the', max_new_tokens=2);"
        "print([n for n in ('torch', 'transformers', 'sympy', 'onnx_ir', 'onnxscript') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(text_artifact)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_as_a_process(text_artifact: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "einfold",
        "run",
        str(text_artifact),
        "-p",
        "the",
        "--max-new-tokens",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    assert "tokens/s" in done.stderr
    broken = subprocess.run([*command, "--top-p", "9"], capture_output=True, text=True, check=False)
    assert broken.returncode == 7
    assert broken.stderr.startswith("error: top_p")
    assert broken.stdout == ""


def test_a_prompt_is_read_as_it_stands(text_artifact: Path, tmp_path: Path) -> None:
    """UTF-8 and line ends reach the tokenizer whole, from a file and from stdin alike."""
    prompt = "the naïve\r\ntext 日本"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    options = ("--max-new-tokens", "1", "--ignore-eos")
    want = as_json("run", text_artifact, "-p", prompt, *options)["prompt_tokens"]
    for file, stdin in ((tmp_path / "prompt.txt", b""), ("-", prompt.encode())):
        found = as_json("run", text_artifact, "-f", file, *options, stdin=stdin)
        assert found["prompt_tokens"] == want


def test_a_locale_that_cannot_write_the_text(text_artifact: Path) -> None:
    """Text comes out escaped, JSON as JSON, whatever stdout's encoding is."""
    command = [sys.executable, "-m", "einfold", "run", str(text_artifact), "-p", "the"]
    command += ["--max-new-tokens", "20", "--ignore-eos"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    plain = subprocess.run(command, capture_output=True, check=True, env=ascii_only)
    found = subprocess.run([*command, "--json"], capture_output=True, check=True, env=ascii_only)
    text = json.loads(found.stdout.decode("ascii"))["text"]
    assert not text.isascii()
    assert plain.stdout.decode("ascii") == text.encode("ascii", "backslashreplace").decode() + "\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_stdout_that_is_full(text_artifact: Path, form: tuple[str, ...], unbuffered: str) -> None:
    """Said once and with the code for it, whether the text stops at a write or at Python's end."""
    command = [sys.executable, "-m", "einfold", "inspect", str(text_artifact), *form]
    with open("/dev/full", "wb") as full:
        refused = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert refused.returncode == 74
    assert refused.stderr.startswith("error: the disk is full")
    assert len(refused.stderr.splitlines()) == 1


def test_names_with_brackets_are_no_markup(text_model: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "a[/b]", tmp_path / "m[x]"
    assert f"error: there is no artifact folder {out}" in einfold("inspect", out, code=5)
    shutil.copytree(text_model, model)
    assert einfold("compile", model, "-o", out, "--no-check").startswith(f"{out}: ")
    assert "m[x] (llama)" in einfold("inspect", out)


def test_the_current_folder_as_the_model(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_model)
    made = as_json("compile", ".", "-o", tmp_path / "out", "--no-check")
    assert made["manifest"]["model"]["source"] == text_model.name
