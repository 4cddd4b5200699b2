"""Prompts as the command line gives them."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import PromptError, pass_on


def read_prompt(prompt: str | None, file: Path | None, ids: str | None) -> str | None:
    """The one text that was given; None where it is `ids`. Raises PromptError for none, or several."""
    given = [value for value in (prompt, file, ids) if value is not None]
    if len(given) != 1:
        raise PromptError("give one prompt: -p TEXT, -f FILE (- is stdin), or --ids")
    if file is None:
        return prompt
    try:
        # Bytes, so that neither the locale's encoding nor its line ends change a prompt.
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        pass_on(error)
        raise PromptError(f"cannot read the prompt {file}: {error}") from error


def parse_ids(text: str) -> list[int]:
    """Token ids from a text of numbers; raises PromptError where it is none."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise PromptError(f"--ids takes numbers, such as '1 15 27'; found {text!r}") from None
