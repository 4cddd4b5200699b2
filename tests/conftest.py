from __future__ import annotations

import gc
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import settings

from einfold.compiler import kept_trace

from . import models

torch.set_num_threads(1)
# Continuous integration sets these, and command lines colour what they say for it, in pipes too.
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)
# Shared machines are slow at times; a slow example is no failure. Examples are the same in every run, so that
# what a change breaks shows with that change; EINFOLD_EXPLORE=1 draws new ones.
explore = bool(os.environ.get("EINFOLD_EXPLORE"))
settings.register_profile("einfold", deadline=None, derandomize=not explore)
settings.load_profile("einfold")


def seed_by(name: str) -> None:
    """Seeds what draws without a generator of its own."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def pytest_collection_finish() -> None:
    """What was imported is not looked through for garbage over and over, which takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions say what they find left over when a process ends


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """A fixture draws the same numbers whichever test asks for it first."""
    seed_by(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """A test draws the same numbers alone, behind others and in any worker."""
    seed_by(item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of models in tests stays out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("EINFOLD_CACHE", raising=False)  # it would come before
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model is traced once for all tests and workers, wherever a test keeps the rest of its cache; tracing
    is a third of what tests take. What is found again is tested in `frontend/test_kept_trace.py`. One that
    breaks how models are traced keeps its own."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "traced"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_trace, "cache_home", lambda: shared)
        patch.setattr(kept_trace, "_KEPT", 1 << 20)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face folders of tiny models, each made once a session."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = models.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def artifact(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Compiled artifacts of tiny models, each made once a session and never written to."""
    import einfold

    made: dict[tuple[str, str, bool], Path] = {}

    def get(name: str, weights: str = "fp32", portable: bool = False) -> Path:
        key = (name, weights, portable)
        if key not in made:
            out = tmp_path_factory.mktemp("artifacts") / f"{name}-{weights}"
            few = {"calibration": {"tokens": 256}}  # of what int4 is solved on
            einfold.compile(model_folder(name), out, weights=weights, portable=portable, recipe=few)
            made[key] = out
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as a Hugging Face folder."""
    folder = models.save("llama", tmp_path_factory.mktemp("text") / "model", vocab_size=300)
    models.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_artifact(text_model: Path) -> Path:
    import einfold

    out = text_model.parent / "artifact"
    einfold.compile(text_model, out)
    return out


@pytest.fixture(scope="session")
def wide_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a tiny Llama whose head has more weights than its layers."""
    import einfold

    folder = tmp_path_factory.mktemp("wide")
    out = folder / "artifact"
    einfold.compile(
        models.save("llama", folder / "model", vocab_size=3000), out, recipe="int4", check=False
    )
    return out
