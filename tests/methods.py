"""Methods for the KV cache as recipes make them, for tests that run their passes."""

from __future__ import annotations

from typing import Any

from einfold.compiler.passes.base import Pass
from einfold.compiler.passes.cache_methods import FAMILIES, method_pass


def chosen(name: str, **options: Any) -> Pass:
    """The pass of a method, with options."""
    (family,) = (family for family, known in FAMILIES.items() if name in known)
    return method_pass(family, {"method": name, **options})
