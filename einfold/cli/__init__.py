"""The command line. Verbs load what they need when they run, so that help and `run` start at once."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["main"]


def main() -> None:
    """The entry point `einfold`: runs a verb and turns errors into one sentence and an exit code."""
    from .app import app
    from .common import explain_error, show_warnings

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale cannot write is no error
            stream.reconfigure(errors="backslashreplace")
    show_warnings()
    debug = "--debug" in sys.argv
    try:
        try:
            app(prog_name="einfold", standalone_mode=True)
        finally:
            sys.stdout.flush()  # a full disk is met here, not when Python has ended
    except SystemExit as stop:
        if stop.code == 130:  # typer's for Ctrl-C, of which it says nothing
            print("interrupted", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        code = explain_error(error, as_json="--json" in sys.argv)
        _let_go_of_stdout()
        sys.exit(code)


def _let_go_of_stdout() -> None:
    """What stdout cannot take is given up, or Python would try once more and end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
