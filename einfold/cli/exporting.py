"""The verb `export-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import err, out, print_json, progress
from .options import Debug, Json, ModelName, RecipeFile, WeightsOption


def export_checkpoint(
    model: ModelName,
    output: Annotated[
        Path, typer.Option("-o", "--out", help="The folder to write.", show_default=False)
    ],
    weights: WeightsOption = None,
    recipe: RecipeFile = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it is an empty folder.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model, its weights in groups of integers, as a folder that others read (compressed-tensors)."""
    from ..compiler.artifact import check_output

    check_output(output, force)
    from ..api import export_checkpoint
    from ..compiler.report import human_bytes

    with progress(json) as tell:
        report = export_checkpoint(
            model, output, weights=weights, recipe=recipe, force=force, progress=tell
        )
    if json:
        print_json({**vars(report), "folder": str(output)})
        return
    for note in report.notes:
        err.print(note)
    out.print(f"{output}: {human_bytes(report.nbytes)} of weights, {len(report.weights)} in codes")
