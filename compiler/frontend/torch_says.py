"""What torch says while it traces: kept quiet, and the reason of a failure in a sentence."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

from ...errors import first_line


@contextmanager
def quietly(category: type[Warning] = Warning) -> Iterator[None]:
    """Without what torch logs or prints on the way, and its warnings of a category: an error says it, or a
    report.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.disable(before)


#: Where torch says that the code is which it could not trace.
_CODE = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.+)')


def reason_of(error: Exception) -> str:
    """The first line of torch's message; with what violates a constraint and the fix that it suggests."""
    first = first_line(error)
    if "data-dependent" in first:
        code = _CODE.search(str(error))
        where = f" (line {code[2]} of {code[1]}: `{code[3].strip()}`)" if code else ""
        return (
            f"what it does depends on the numbers in a tensor{where}, and a graph does the same whatever "
            "these are; compute both and choose with torch.where"
        )
    lines = [line.strip() for line in str(error).split("\n\n")[0].splitlines()[1:]]
    if "transformers.cache_utils" in first:
        return "the model gives its cache back, which is no tensor; give use_cache=False among the inputs"
    if "Suggested fixes:" not in lines:
        return first
    at = lines.index("Suggested fixes:")
    reasons = [line.removeprefix("- ") for line in lines[:at] if line.startswith("- ")]
    fixes = [line for line in lines[at + 1 :] if line]
    first = first.split(" For more information")[0]
    return f"{first} {'; '.join(reasons)}. Suggested fixes: {'; '.join(fixes)}"
