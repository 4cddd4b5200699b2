"""The command line. Verbs load what they need when they run, so that help and `run` start at once."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """The entry point `einfold`: runs a verb and turns errors into one sentence and an exit code."""
    from .app import app
    from .common import explain_error

    debug = "--debug" in sys.argv
    try:
        app(prog_name="einfold", standalone_mode=True)
    except BrokenPipeError:  # the reader, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        sys.exit(explain_error(error, as_json="--json" in sys.argv))
