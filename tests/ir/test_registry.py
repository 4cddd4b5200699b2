"""A room's modules are its things: what is there is found, and a test may bring one more."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from einfold.compiler.ir.registry import Registry
from einfold.errors import IRError


@dataclass(frozen=True)
class Toy:
    name: ClassVar[str] = "toy"


#: A module of a room: it finds the registry by its name, as those of the product import it.
MODULE = """
import sys
import time

class Thing:
    name = "{name}"

time.sleep(0.05)
sys.modules["{room}"].THINGS.register(Thing)
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[type]:
    name = f"room_{tmp_path.name}".replace("-", "_")
    folder = tmp_path / name
    for path, thing in (("b.py", "b"), ("a.py", "a"), ("c/thing.py", "c")):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MODULE.format(name=thing, room=name))
    (folder / "c" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("THINGS = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[type] = Registry("thing", name, module="thing", order=("b",))
    __import__(name)
    monkeypatch.setattr(sys.modules[name], "THINGS", registry)
    return registry


def test_a_room_is_read_when_it_is_asked_for(room: Registry[type]) -> None:
    assert not [name for name in sys.modules if name.startswith(room._room + ".")]
    assert list(room) == ["b", "a", "c"]
    assert room.find("c") is room["c"]


def test_what_is_unknown_is_said_with_what_is_known(room: Registry[type]) -> None:
    with pytest.raises(IRError, match="unknown thing 'd'; known: b, a, c"):
        room.find("d")


def test_one_more_for_a_while(room: Registry[type]) -> None:
    with room.with_one_more(Toy):
        assert room["toy"] is Toy
    assert "toy" not in room


def test_a_name_is_taken_once(room: Registry[type]) -> None:
    room.register(Toy)
    room.register(Toy)
    with pytest.raises(ValueError, match="two of the thing toy"):
        room.register(type("Other", (), {"name": "toy"}))


def test_another_thread_waits_for_the_whole_room(room: Registry[type]) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(len(room))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [3] * 4
