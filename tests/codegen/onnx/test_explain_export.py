"""One report for every road: what an export to ONNX makes of a module's attention, or of a folder's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import einfold
from einfold.cli.app import app

from ...encoders import common


class Windowed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[-2])
        near = (place[:, None] - place[None, :]).abs() < 4
        scores = torch.where(near, q @ k.mT / 4, -torch.inf)
        return torch.softmax(scores, -1) @ v


class Capped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(5 * torch.tanh(q @ k.mT / 5), -1) @ v


FILE = """
import torch
from tests.codegen.onnx.test_explain_export import Windowed
windowed = Windowed()
def function(q, k, v):
    return windowed(q, k, v)
def example_inputs():
    return tuple(torch.randn(1, 2, 9, 16) for _ in range(3))
"""


def inputs() -> tuple[Tensor, ...]:
    return tuple(torch.zeros(1, 2, 9, 16) for _ in range(3))


@pytest.mark.parametrize("portable", [False, True])
def test_it_says_what_the_export_does(portable: bool, tmp_path: Path) -> None:
    report = einfold.explain_export(Windowed(), inputs(), portable=portable)
    [item] = report.cascades
    assert item.status == "fused"
    assert (item.passes_before, item.passes_after) == (3, 1)
    assert "softmax_attention" in item.source
    assert str(report).startswith("1 of 1 cascades fused\n")
    exported = einfold.export_onnx(Windowed(), tmp_path / "m", inputs(), portable=portable)
    assert "einfold.softmax_attention" in (exported.parent / "graph.eir").read_text()


def test_what_stays_has_its_reason() -> None:
    [item] = einfold.explain_export(Capped(), inputs()).cascades
    assert (item.status, item.lowering) == ("refused", "as written")
    assert "tanh" in item.reason


@pytest.mark.slow
def test_a_folder_of_an_encoder_is_read_so_too(tmp_path: Path) -> None:
    folder = common.save("bert", tmp_path / "m")
    report = einfold.explain_export(folder)
    assert [item.status for item in report.cascades] == ["fused"] * len(report.cascades)
    assert len(report.cascades) >= 2  # one a layer
    done = CliRunner().invoke(app, ["explain", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cascades"][0]["status"] == "fused"


def test_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(FILE)
    for options in ([], ["--onnx"], ["--portable"]):
        done = CliRunner().invoke(app, ["explain", f"{file}::windowed", "--json", *options])
        assert done.exit_code == 0, done.output
        [item] = json.loads(done.stdout)["cascades"]
        assert (item["status"], item["passes_before"]) == ("fused", 3)
        assert ("target onnx" in item["lowering"]) == bool(options)
    done = CliRunner().invoke(app, ["explain", f"{file}::function", "--onnx"])
    assert "is no module, which is what is exported" in str(done.exception)
