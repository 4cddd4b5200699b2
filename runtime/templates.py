"""Chat templates, rendered in a process of their own that has a bound on time, memory and output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import PromptError, first_line

#: Characters of a template; the longest that models come with have some thirty thousand.
LONGEST = 1 << 18

#: Seconds that rendering may take by the clock, the start of the process included.
SECONDS = 15


def render(template: str, values: dict[str, Any]) -> str:
    """The text that a template makes of `values`. Raises PromptError where it makes none."""
    if len(template) > LONGEST:
        raise _refusal(
            f"it has {len(template):,} characters, more than the {LONGEST:,} that are read"
        )
    try:
        request = json.dumps({"template": template, "values": values, "path": sys.path})
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"the messages are no JSON: {first_line(error)}") from error
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("render.py"))],
            input=request.encode(),
            capture_output=True,
            timeout=SECONDS,
            start_new_session=True,  # Ctrl-C is this process's to answer
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal("it takes too long") from None
    if done.returncode < 0:
        raise _refusal("it takes too much time or memory")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise _refusal(last[0] if last else "its process ended") from None
    if "error" in answer:
        raise _refusal(answer["error"])
    text: str = answer["text"]
    return text


def _refusal(reason: str) -> PromptError:
    return PromptError(f"the model's chat template refuses the conversation: {reason}")
