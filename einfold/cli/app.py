"""The verbs, in the order in which the help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from .compiling import compile_, estimate
from .explain import explain
from .exporting import export_checkpoint
from .measuring import bench, eval_
from .planning import device, plan
from .recipes import recipe
from .running import run
from .showing import diff, inspect, methods, passes

app = typer.Typer(
    name="einfold",
    help="Compile transformer models so that they fit and fly. Every verb takes --help.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib import metadata

        typer.echo(f"einfold {metadata.version('einfold')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("compile")(compile_)
app.command()(run)
app.command("eval")(eval_)
app.command()(bench)
app.command()(estimate)
app.command()(plan)
app.add_typer(device, name="device")
app.command()(inspect)
app.command()(diff)
app.command()(passes)
app.command()(methods)
app.command()(recipe)
app.command()(explain)
app.command("export-checkpoint")(export_checkpoint)
