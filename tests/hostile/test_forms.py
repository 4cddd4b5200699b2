"""Every form in which a model is stored loads again: the lists of the loader hold what the compiler emits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

import einfold

from .. import models

INTEGERS = {"cache": {"storage": "int8"}}
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "int8 cache in integers": (INTEGERS, False),
    "float16": ({"weights": {"format": "fp16"}}, False),
    "int8": ({"weights": {"format": "int8"}}, False),
    "int4": ({"weights": {"format": "int4"}}, False),
    "int2": ({"weights": {"format": "int2"}}, False),
    "int6": ({"weights": {"format": "int6"}}, False),
    "mxfp4": ({"weights": {"format": "mxfp4", "head": "same"}}, False),
    "int4, standard operators": ({"weights": {"format": "int4"}}, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context that is long enough for every special form of a step, and one KV head."""
    changes = {"vocab_size": 300, "max_position_embeddings": 8192, "num_key_value_heads": 1}
    folder = models.save("llama", tmp_path_factory.mktemp("long") / "model", **changes)
    models.save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_again(form: str, model: Path, tmp_path: Path) -> None:
    recipe, portable = FORMS[form]
    out = tmp_path / "out"
    einfold.compile(model, out, recipe=recipe | {"onnx": {"portable": portable}}, check=False)
    found = einfold.load(out, threads=1)
    assert len(found.generate([1, 5, 9], max_new_tokens=2, ignore_eos=True).tokens) == 2
    if recipe is INTEGERS:
        kinds = {
            node.op_type
            for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node
        }
        assert "Mod" in kinds
