"""The command line. Verbs load what they need when they run, so that help and `run` start at once."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """The entry point `einfold`: runs a verb and turns errors into one sentence and an exit code."""
    _open_what_is_closed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    try:
        from ..compiler.ir.interrupts import Later

        with Later(hold=False):
            _run()
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        _let_go_of_stdout()
        sys.exit(130)


def _run() -> None:
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
            raise KeyboardInterrupt from stop
        raise
    except Exception as error:
        if debug:
            raise
        code = explain_error(error, as_json="--json" in sys.argv)
        _let_go_of_stdout()
        sys.exit(code)


def _end(number: int, frame: object) -> NoReturn:
    """Ends as a signal does, with what is half done cleared away."""
    sys.exit(128 + number)


def _open_what_is_closed() -> None:
    """Puts something in the place of closed streams, or the next file that is opened would get their number.

    Reading from stdin and writing to stdout then fail as they do on a closed file; messages are lost.
    """
    streams = (
        ("stdin", os.O_WRONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    )
    for number, (name, flags, mode) in enumerate(streams):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _let_go_of_stdout() -> None:
    """What stdout cannot take is given up, or Python would try once more and end with a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
