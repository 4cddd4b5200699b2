"""Renders one chat template, in a process of its own: a request from stdin, the answer to stdout.

Run by `templates.render` and by nobody else; it imports nothing of einfold. A template is anybody's program:
Jinja's sandbox keeps it from the interpreter's insides, and the limits of this process from the machine's
time and memory, wherever it spends them (loops, filters in C, powers, recursion, the compiler itself).
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

#: Bounds: characters of what is rendered, bytes of memory, seconds of the processor.
CHARACTERS, MEMORY, SECONDS = 1 << 22, 1 << 30, 4


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    sys.path[:] = request["path"]
    answer = _answer(request["template"], request["values"])
    sys.stdout.buffer.write(json.dumps(answer).encode())


def _answer(template: str, values: dict[str, Any]) -> dict[str, str]:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    _limit()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    try:
        pieces, length = [], 0
        for piece in environment.from_string(template).generate(values):
            pieces.append(piece)
            length += len(piece)
            if length > CHARACTERS:
                return {"error": f"it writes more than {CHARACTERS:,} characters"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": str(error)[:1000] or type(error).__name__}
    return {"text": "".join(pieces)}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: list[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: Jinja's own filter escapes it for HTML."""
    pair = (separators[0], separators[1]) if separators else None
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys
    )


def _limit() -> None:
    """What is left of the process's memory and time, from here on; on systems that can say so."""
    try:
        import resource
    except ImportError:
        return
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        hard = resource.getrlimit(kind)[1]
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
