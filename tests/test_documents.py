"""What a newcomer reads and types: reference pages, completion, recipes, what the package shows of itself."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import einfold
from einfold.api import resolve_recipe
from einfold.cli.options import METHODS, recipe_names
from einfold.compiler.codegen.target import TARGETS
from einfold.compiler.frontend import hub
from einfold.compiler.frontend.huggingface import find_model, read_config
from einfold.compiler.passes.cache_methods import FAMILIES
from einfold.compiler.recipe import Recipe
from einfold.errors import ModelError
from einfold.recipe_text import field_docs, recipe_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "recipe.md", "api.md"])
def test_reference_pages_are_current(reference: ModuleType, page: str) -> None:
    """`make docs` writes them."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == reference.PAGES[page]()


def test_completion_knows_every_method_and_recipe() -> None:
    assert {family: tuple(known) for family, known in FAMILIES.items() if known} == METHODS
    for name in recipe_names():
        resolve_recipe(name)
    assert set(recipe_names()) >= {"int4", "streaming"}


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_a_printed_recipe_reads_as_itself(name: str | None, tmp_path: Path) -> None:
    recipe = resolve_recipe(name)
    (tmp_path / "r.toml").write_text(recipe_text(recipe), encoding="utf-8")
    assert Recipe.read(tmp_path / "r.toml") == recipe


def test_every_key_of_a_recipe_is_explained() -> None:
    """By a text under it; a section's first key may lean on the section's own."""
    sections: list[Any] = [section.annotation for section in Recipe.model_fields.values()]
    for kind in (*sections, *TARGETS.values()):
        if not hasattr(kind, "model_fields"):
            continue
        missing = set(kind.model_fields) - set(field_docs(kind))
        assert missing <= {"format", "portable", "tokens"}, kind


def test_what_the_package_shows() -> None:
    assert set(einfold.__all__) <= set(dir(einfold))
    assert einfold.__version__ == metadata.version("einfold")
    for name in einfold.__all__:
        assert getattr(einfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        _ = einfold.complie  # type: ignore[attr-defined]


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> Any:
        asked.append(address)
        raise OSError(113, "No route to host")

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    hub.unreachable.cache_clear()
    try:
        source = find_model("nobody/nothing")
        assert source.local_only and find_model("nobody/else").local_only
        assert asked == [("huggingface.co", 443)]
        with pytest.raises(ModelError, match=r"cannot be asked .*No route to host.*a model folder"):
            read_config(source)
        monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
        hub.unreachable.cache_clear()
        assert not find_model("nobody/nothing").local_only
    finally:
        hub.unreachable.cache_clear()


def test_a_folder_never_asks_the_network(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.socket, "create_connection", lambda *a, **k: pytest.fail("asked"))
    assert find_model(text_model).local_only


def test_methods_are_listed_as_json_with_their_options() -> None:
    from tests.cli.test_cli import as_json
    from tests.cli.test_cli import einfold as command

    assert json.loads(command("recipe", "--json"))["weights"]["format"] == "fp32"
    assert as_json("recipe", "int4")["weights"]["format"] == "int4"
    assert 'format = "int4"' in command("recipe", "int4")
