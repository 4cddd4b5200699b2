"""`run` of an encoder: texts or arrays in, the results as JSON or in a file."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, PromptError, pass_on
from .common import err, print_json, whole_file
from .prompts import parse_ids, read_prompt

if TYPE_CHECKING:
    from ..encoder import Encoder
    from ..encoder_decoder import EncoderDecoder

#: Options of `run` that mean something for an encoder.
_TAKES = {
    "artifact",
    "prompt",
    "file",
    "ids",
    "output",
    "engine",
    "threads",
    "verify",
    "json",
    "debug",
}


def kind_of(artifact: Path) -> str:
    """The kind of an artifact's model, "" where there is no folder; raises ArtifactError where it is none, or
    damaged."""
    from ..compiler.ir.manifest import Manifest

    return Manifest.read(artifact).kind if artifact.is_dir() else ""


def run_encoder(
    artifact: Path,
    texts: list[str],
    file: Path | None,
    ids: str | None,
    output: Path | None,
    given: Mapping[str, str],
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    """`given` are the options of the command line, with the names of what they set."""
    strange = sorted(option for option, name in given.items() if name not in _TAKES)
    if strange:
        raise PromptError(
            f"{artifact} is an encoder, which reads its input at once and writes no text: "
            f"{', '.join(strange)} means nothing for it, leave it out"
        )
    if output is not None and output.suffix != ".npz":
        raise OutputError(f"--output writes a .npz, and {output} is called otherwise")
    from ..model import load

    started = time.perf_counter()
    model: Encoder = load(
        artifact, **{key: loading[key] for key in ("engine", "threads", "verify")}
    )
    loaded = time.perf_counter()
    inputs = read_inputs(model, texts, file, ids)
    results = model.run(inputs)
    seconds = {"load_seconds": loaded - started, "run_seconds": time.perf_counter() - loaded}
    if output is not None:
        _write(output, results)
    rows = [] if output is not None else _rows(model, inputs, results)
    if output is None or as_json:
        count = len(next(iter(inputs.values())))
        shapes = {name: list(array.shape) for name, array in results.items()}
        told = {"rows": rows} if output is None else {"output": str(output), "shapes": shapes}
        print_json({**told, "count": count, "timings": seconds})
    else:
        for name, array in results.items():
            err.print(f"{output}: {name} {list(array.shape)}", style="dim")


def read_inputs(
    model: Encoder | EncoderDecoder, texts: list[str], file: Path | None, ids: str | None
) -> dict[str, Any]:
    """The model's inputs by name, from what was given."""
    if texts and file is None and ids is None:
        return dict(model.tokens(texts))
    if file is not None and file.suffix in (".npz", ".npy") and not texts and ids is None:
        return _arrays(model, file)
    text = read_prompt(None if not texts else texts[0], file, ids)
    return dict(model.tokens([parse_ids(ids) if ids is not None else str(text)]))


def _arrays(model: Encoder | EncoderDecoder, file: Path) -> dict[str, Any]:
    """Arrays of a file; nothing in it is unpickled."""
    import numpy as np

    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {model.inputs[0].name: found}
        with found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        pass_on(error)
        raise PromptError(f"cannot read arrays from {file}: {error}") from error


def _rows(
    model: Encoder, inputs: Mapping[str, Any], results: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The results of each row; of those with a row for each token, none for padding."""
    mask = inputs.get("attention_mask")
    by_token = {entry.name for entry in model.outputs if entry.shape[1:2] == ("S",)}
    rows = []
    for place in range(len(next(iter(results.values())))):
        row: dict[str, Any] = {}
        if mask is not None:
            row["tokens"] = int((mask[place] > 0).sum())
        for name, array in results.items():
            value = array[place]
            seen = mask is not None and name in by_token
            row[name] = (value[mask[place] > 0] if seen and mask is not None else value).tolist()
        rows.append(row)
    return rows


def _write(output: Path, results: Mapping[str, Any]) -> None:
    import numpy as np

    with whole_file(output) as stream:
        np.savez(stream, **results)
