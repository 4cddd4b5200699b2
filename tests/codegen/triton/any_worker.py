"""Answers as any of the workers here, by its module's name; started as `tests.codegen.triton.worker` is."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .worker import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = import_module(request.pop("worker")).answer(request)
    return found


if __name__ == "__main__":
    serve(answer)
