"""Encoder-decoders are what transformers computes, and write what it writes, token for token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einfold
from einfold.runtime.sampling import Sampling

from ..quick import quick
from . import common

TOLERANCE, NEW = 1e-4, 24
Made = Callable[[str], Path]


def written(found: Any, given: dict[str, Any]) -> list[list[int]]:
    answers = found.generate_batch(
        common.arrays(given),
        max_new_tokens=NEW,
        ignore_eos=True,
        sampling=Sampling(repetition_penalty=common.PENALTY),
    )
    return [answer.tokens for answer in answers]


def answers(rows: int) -> Any:
    """Random tokens that were written, more of them than relative positions tell apart."""
    return np.random.default_rng(4).integers(3, common.VOCABULARY, (rows, 30))


def check(name: str, folder: Path, engine: str | None = None) -> None:
    """Logits of two rows, one with padding, and what is written behind one and two, with a cache."""
    model, found = common.build(name), einfold.load(folder, engine=engine, threads=1)
    given = common.inputs(name)
    expected = common.logits(model, given, answers(2))
    assert common.share(found.logits(common.arrays(given), answers(2)), expected) < TOLERANCE
    for rows in (1, 2):
        given = common.inputs(name, rows)
        tokens = written(found, given)
        assert tokens == common.greedy(model, given, NEW)
        assert len({*tokens[0]}) > 5


@pytest.mark.parametrize(
    ("name", "engine"),
    quick(
        product(["t5", "whisper", "bart"], ["onnx", "reference"]),
        ("whisper", "onnx"),
    ),
)
def test_what_transformers_computes_and_writes(name: str, engine: str, compiled_pair: Made) -> None:
    check(name, compiled_pair(name), engine)


def test_rows_that_end_leave_others_alone(compiled_pair: Made) -> None:
    """By then they have written different numbers of tokens, and positions go by each row's own."""
    found, given = einfold.load(compiled_pair("t5"), threads=1), common.inputs("t5", 3)
    whole = written(found, given)
    (end,) = {whole[0][3]} - {*whole[0][:3]}
    results = found.engine.generate(
        [found.start()] * 3,
        NEW,
        [end],
        Sampling(repetition_penalty=common.PENALTY),
        given=found.read(common.arrays(given)),
    )
    ends = [row.index(end) if end in row else NEW for row in whole]
    assert [result.tokens for result in results] == [
        row[:at] for row, at in zip(whole, ends, strict=True)
    ]
    assert len({*ends}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "whisper", "mbart"])
def test_the_portable_flavour(name: str, tmp_path: Path) -> None:
    model = common.save(name, tmp_path / "m")
    path = einfold.export_onnx(model, tmp_path / "out", portable=True)
    assert (path.parent / "encoder.onnx").is_file()
    check(name, path.parent)


@pytest.mark.slow
def test_a_model_in_memory_with_tied_weights(tmp_path: Path) -> None:
    """Its embedding lies in the file once, though both programs read it."""
    model = common.build("t5-tied")
    path = einfold.export_onnx(model, tmp_path / "out")
    found = einfold.load(path.parent)
    check("t5-tied", path.parent)
    manifest = found.artifact.manifest
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = 4 * (64 + 2 * 64 - 1) - 2 * 4 * 8  # by distance, in the place of buckets
    assert manifest.weight_bytes == 4 * (parameters + tables)
    assert found.artifact.weight_bytes() == manifest.weight_bytes
    given = found.read(common.arrays(common.inputs("t5-tied")))
    assert sum(array.nbytes for array in given.values()) == 2 * 11 * (2 * 2 * 4 * 64 + 1)
    assert manifest.cache_bytes == "1024*B*C + 1025*B*T"


@pytest.mark.slow
def test_int8_weights_and_cache_stay_near(tmp_path: Path) -> None:
    model = common.build("t5-tied", noise=0.05)
    folder = common.save("t5-tied", tmp_path / "m", noise=0.05)
    report = einfold.compile(folder, tmp_path / "out", weights="int8", cache="int8")
    assert report.calibration.startswith("2048 tokens")
    found = einfold.load(tmp_path / "out")
    assert found.artifact.weight_bytes() < 0.4 * 4 * report.manifest.model.parameters
    given = common.inputs("t5-tied")
    off = common.share(
        found.logits(common.arrays(given), answers(2)), common.logits(model, given, answers(2))
    )
    assert 1e-4 < off < 0.05
    assert report.check["same likeliest token as the artifact's graph"] == 1.0
    assert len(written(found, given)[1]) == NEW


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_onnxruntime_reads_an_int4_cache_as_the_reference_does(name: str, tmp_path: Path) -> None:
    """Beside numbers by distance, and without."""
    einfold.compile(common.save(name, tmp_path / "m"), tmp_path / "out", cache="int4")
    given = common.arrays(common.inputs(name))
    fast, slow = (
        einfold.load(tmp_path / "out", engine=engine, threads=1).logits(given, answers(2))
        for engine in ("onnx", "reference")
    )
    assert common.share(fast, slow) < TOLERANCE
