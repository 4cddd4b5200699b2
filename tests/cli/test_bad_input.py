"""Bad input gets one clear sentence and a non-zero exit, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from einfold import load
from einfold.errors import RecipeError

from .. import models
from .test_cli import einfold


@pytest.fixture
def model(text_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_model, tmp_path / "model"))


def refused(*arguments: str | Path, code: int, says: str) -> None:
    """The exit code, one sentence that says this, and the same sentence as JSON."""
    text = einfold(*arguments, code=code)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert says in errors[0]


def compile_refused(model: Path | str, out: Path, *more: str, code: int, says: str) -> None:
    refused("compile", model, "-o", out, *more, code=code, says=says)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_refused(tmp_path / "absent", out, code=3, says="there is no model folder")
    compile_refused("~no such user/m", out, code=3, says="there is no model folder ~no such user/m")
    (tmp_path / "empty").mkdir()
    compile_refused(tmp_path / "empty", out, code=3, says="is empty")
    (tmp_path / "empty" / "note.txt").write_text("x")
    compile_refused(tmp_path / "empty", out, code=3, says="has no config.json")
    compile_refused(tmp_path / "empty" / "note.txt", out, code=3, says="is a file")


def test_configs_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", model / "config.json"
    original = json.loads(config.read_text())
    config.write_text("{broken")
    compile_refused(model, out, code=3, says="config.json")
    config.write_text(json.dumps({}))
    compile_refused(model, out, code=3, says="names no model_type")
    config.write_text(json.dumps(original | {"model_type": "perceptron9"}))
    compile_refused(model, out, code=4, says="architecture 'perceptron9'")
    config.write_text(json.dumps(original | {"intermediate_size": 80}))
    compile_refused(model, out, code=3, says="but config.json asks for [")
    config.write_text(json.dumps(original | {"num_hidden_layers": 3}))
    compile_refused(model, out, code=3, says="lacks")


def test_architectures_without_a_hook_name_the_layer(tmp_path: Path) -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    compile_refused(
        tmp_path / "bloom", tmp_path / "out", code=4, says="architecture 'bloom' cannot be compiled"
    )


def test_weights_that_are_damaged(model: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", model / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-100])
    compile_refused(model, out, code=3, says="truncated or damaged")
    weights.write_bytes(original[:20])
    compile_refused(model, out, code=3, says="cut off in its header")
    weights.write_bytes(b"\xff" * 8 + original[8:])
    compile_refused(model, out, code=3, says="model.safetensors")
    weights.write_bytes(original[:8] + b"!" + original[9:])
    compile_refused(model, out, code=3, says="header of")
    weights.write_bytes(original)
    state = load_file(weights)
    state.pop("model.norm.weight")
    save_file(state, weights, metadata={"format": "pt"})
    compile_refused(model, out, code=3, says="model.norm.weight")
    weights.unlink()
    weights.mkdir()
    compile_refused(model, out, code=3, says="model.safetensors: Is a directory")
    weights.rmdir()
    weights.symlink_to("nowhere")
    compile_refused(model, out, code=3, says="model.safetensors: No such file")
    weights.unlink()
    compile_refused(model, out, code=3, says="holds no *.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    compile_refused(model, out, code=3, says="pickled weights can run code")


def test_a_shard_that_is_missing(model: Path, tmp_path: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"},
    }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    compile_refused(
        model, tmp_path / "out", code=3, says="lacks the weight file model-00002.safetensors"
    )


def test_nan_weights_are_not_shipped(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    compile_refused(model, tmp_path / "out", code=1, says="not finite")
    einfold("compile", model, "-o", tmp_path / "out", "--no-check")
    refused("eval", tmp_path / "out", "--against", model, code=13, says="not finite")


@pytest.mark.parametrize("weights", ["int4", "gptq:bits=4", "hqq:bits=3"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_weights_that_no_scale_can_stand_for(
    model: Path, tmp_path: Path, number: str, weights: str
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    state = load_file(model / "model.safetensors")
    state[name][3, 5] = float(number)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text"
    text.write_text("the text of a model " * 200)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'weights = "{weights}"\n[calibration]\ntext = "{text}"\ntokens = 256\n')
    says = f"the weight {name} has numbers that are infinite or none at all (NaN)"
    options = ("--recipe", recipe, "--no-check")
    compile_refused(model, tmp_path / "out", *map(str, options), code=3, says=says)


def test_a_calibration_text_that_is_too_short(model: Path, tmp_path: Path) -> None:
    text, recipe = tmp_path / "text", tmp_path / "r.toml"
    text.write_text("few")
    recipe.write_text(f'weights = "gptq"\n[calibration]\ntext = "{text}"\n')
    says = "tokens; 256 are needed at least, so give a longer one"
    compile_refused(model, tmp_path / "out", "--recipe", str(recipe), code=10, says=says)


def test_recipes(text_model: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "r.toml"
    for text, says in (
        ("speed = 9\n", "unknown key 'speed'"),
        ("[weights]\nbits = 4\n", "weights has an unknown key 'bits'; fp32 has no options"),
        ('[weights]\nformat = "int99"\n', "weights.format"),
        ('weights = "int4:blocks=64"\n', "weights has an unknown key 'blocks'; int4 takes block"),
        ('weights = "int4:block=17"\n', "weights: the block must be"),
        ('weights = "nf4:block=1048576"\n', "from 16 to 65536, or 0 for whole rows"),
        ('weights = "planes:block=0"\n', "a multiple of 8 up to 65536, not 0"),
        ('weights = "mxfp4:block=64"\n', "mxfp4 has no options"),
        ('weights = "nothing"\n', "weights is a format or a solver, not 'nothing'"),
        ('weights = "gptq:format=fp16"\n', "weights.solver gptq chooses codes, and fp16 has none"),
        ('weights = "gptq:damping=much"\n', "weights.solver.damping"),
        ("[weights\n", "not valid TOML"),
        ("context = 1\n", "context"),
        ('cache = "int8"\n', "cache is a table, [cache], not 'int8'"),
        ("[cache]\nprune = 5\n", "cache.prune is a table, [cache.prune], not 5"),
        ('[cache.prune]\nmethod = ["h2o"]\n', "cache.prune.method is one of"),
        ("context = 100000\n", "longer than the 256 tokens"),
        ('[weights]\nformat = "int4"\nblock = 48\n', "power of two"),
    ):
        recipe.write_text(text)
        compile_refused(text_model, out, "--recipe", str(recipe), code=7, says=says)
    compile_refused(
        text_model, out, "--recipe", str(tmp_path / "absent.toml"), code=7, says="no recipe file"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("context = " + "9" * 5000, "not valid TOML"),
        ("context = 1e400", "finite number"),
        ("[cache.prune]\nmethod = 'snapkv'\ntokens = nan", "finite number"),
        ("a" * 10**5 + " = 1", "unknown key 'aaa"),
        ("context = '" + "x" * 10**5 + "'", "found 'xxx"),
        ("#" * (1 << 21), "a recipe has 1,048,576 at most"),
        ("'\x1b[31m' = 1", "not valid TOML"),
    ],
)
def test_recipes_that_are_no_recipes(
    text: str, says: str, text_model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    refused("estimate", text_model, "--recipe", recipe, code=7, says=says)
    said = einfold("estimate", text_model, "--recipe", recipe, code=7)
    assert len(said) < 700 and "\x1b" not in said


def test_a_recipe_that_is_a_pipe_is_not_waited_for(text_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        refused("estimate", text_model, "--recipe", path, code=7, says="is no regular file")


def test_prompts(text_artifact: Path, tmp_path: Path) -> None:
    refused("run", text_artifact, "-p", "word " * 300, code=8, says="compiled for a context of 256")
    refused(
        "run",
        text_artifact,
        "--ids",
        "5 9999",
        code=8,
        says="token 9999 at position 1 is out of range",
    )
    refused("run", text_artifact, "--ids", "5 x", code=8, says="--ids takes numbers")
    refused("run", text_artifact, code=8, says="give one prompt")
    refused("run", text_artifact, "-f", tmp_path / "absent", code=8, says="cannot read the prompt")
    refused("run", text_artifact, "-p", "x\udcff", code=8, says="not valid UTF-8 at character 1")
    refused("run", text_artifact, "--ids", "1 2", "--chat", code=8, says="--chat needs a prompt of")
    refused("run", text_artifact, "-p", "x", "--chat", "--raw", code=8, says="exclude each other")
    refused(
        *("run", text_artifact, "-p", "x", "--raw", "--system", "y"),
        code=8,
        says="--system needs the chat template",
    )
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    refused("run", text_artifact, "-f", tmp_path / "latin1", code=8, says="cannot read the prompt")
    refused("run", text_artifact, "-p", "x", "--top-p", "7", code=7, says="top_p")
    refused("run", tmp_path, "-p", "x", code=5, says="no einfold artifact")
    error = json.loads(einfold("run", tmp_path, "-p", "x", "--json", code=5).partition("error:")[0])
    assert error["kind"] == "ArtifactError"


def test_evaluations(text_artifact: Path, text_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    refused(
        "eval", text_artifact, "--against", text_model, "--text", empty, code=8, says="is empty"
    )
    refused("eval", text_artifact, "--against", tmp_path, code=3, says="config.json")
    other = models.save("llama", tmp_path / "other")
    text = tmp_path / "t.txt"
    text.write_text("some words")
    refused("eval", text_artifact, "--against", other, "--text", text, code=3, says="another model")


def test_numbers_out_of_range(text_model: Path, text_artifact: Path) -> None:
    for command in (
        ("run", text_artifact, "-p", "x", "--threads", "-3"),
        ("run", text_artifact, "-p", "x", "--threads", "100000"),
        ("run", text_artifact, "-p", "x", "--chunk", "0"),
        ("bench", text_artifact, "--context", "-3"),
        ("eval", text_artifact, "--against", text_model, "--window", "0"),
        ("estimate", text_model, "--context", "-5"),
        ("estimate", text_model, "--chunk", "0"),
        ("diff", text_artifact, text_artifact, "--context", "-4"),
    ):
        assert "Invalid value" in einfold(*command, code=2)
    refused(
        "estimate", text_model, "--context", "100000", code=7, says="longer than the 256 tokens"
    )
    with pytest.raises(RecipeError, match="threads"):
        load(text_artifact, threads=100_000)


def test_sizes(text_model: Path) -> None:
    refused("estimate", text_model, "--budget", "much", code=7, says="is no size")
    refused(
        "estimate", text_model, "--budget", "9" * 400, code=7, says="more than a machine can have"
    )
