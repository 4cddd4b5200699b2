from __future__ import annotations

from benchmarks.rotation_quality import forms
from einfold.compiler.passes.cache_methods import method_pass
from einfold.compiler.passes.method_text import read_method


def test_forms_are_those_that_their_names_say() -> None:
    """But for the first tokens, which all of them pack."""
    made = list(forms([2, 3]))
    assert len(made) == 18
    for name, table in made:
        named = read_method("cache.quant", f"{name},sinks=0")
        assert method_pass("quant", table) == method_pass("quant", named)
