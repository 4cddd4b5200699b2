"""The arena in what people read: the report's picture and `einfold inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import einfold
from einfold.compiler.memory.drawing import HEIGHT, WIDTH, picture
from tests.cli.test_cli import einfold as command

PLAN = {
    "step": "a token",
    "arena": 8,
    "bound": 8,
    "calls": 4,
    "buffers": [["a<b", 0, 2, 0, 6], ["c", 1, 4, 6, 2]],
}


def test_a_picture_has_a_box_a_buffer() -> None:
    drawn = picture(PLAN)
    boxes = re.findall(r'x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    assert [[float(number) for number in box] for box in boxes] == [
        [0, HEIGHT / 4, WIDTH / 2, HEIGHT * 3 / 4],
        [WIDTH / 4, 0, WIDTH * 3 / 4, HEIGHT / 4],
    ]
    assert "a&lt;b: 6 bytes at 0, calls 0 to 1" in drawn


def test_report_and_inspect_tell_of_the_arena(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    einfold.compile(model_folder("llama"), out, target="reference")
    found = json.loads(command("inspect", out, "--json"))["memory"]
    assert [plan["step"] for plan in found] == ["256 tokens at once", "a token at a time"]
    assert all(plan["arena"] == plan["bound"] > 0 for plan in found)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert page.count("<title>") - 1 == sum(len(plan["buffers"]) for plan in found)
    told = command("inspect", out)
    assert "for 256 tokens at once, as much as is live at once" in " ".join(told.split())


def test_an_engine_that_plans_itself_has_no_arena_of_ours(
    artifact: Callable[..., Path],
) -> None:
    folder = artifact("llama")
    assert json.loads(command("inspect", folder, "--json"))["memory"] == []
    assert "<svg" not in (folder / "report.html").read_text(encoding="utf-8")
