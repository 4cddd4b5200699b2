"""The Python API where it is not the command line's."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

import einfold


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 4)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.drop(self.inner(x)))


def test_a_module_is_exported_as_it_infers_and_left_as_it_was(tmp_path: Path) -> None:
    net, x = _Net().train(), torch.randn(2, 8)
    path = einfold.export_onnx(net, tmp_path / "net", (x,))
    assert all(part.training for part in net.modules())
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), net.eval()(x))


def test_an_exported_module_is_replaced_by_force_alone(tmp_path: Path) -> None:
    net, x = _Net(), torch.randn(2, 8)
    einfold.export_onnx(net, tmp_path / "net", (x,))
    with pytest.raises(einfold.errors.OutputError, match="exists already"):
        einfold.export_onnx(net, tmp_path / "net", (x,))
    einfold.export_onnx(net, tmp_path / "net", (x,), force=True)
    (tmp_path / "net" / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_text("of another tool")
    for folder in ("net", "other"):
        with pytest.raises(einfold.errors.OutputError, match="no einfold artifact"):
            einfold.export_onnx(net, tmp_path / folder, (x,), force=True)
