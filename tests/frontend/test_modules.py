"""Any module through `export_onnx`: its arguments, state, types and names; and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import einfold
from einfold.compiler.codegen.onnx import lowerings
from einfold.errors import ArtifactWarning, EinfoldError, ModelError, UnsupportedError

from .. import models


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(100, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.out(self.table(input_ids).mean(1))
        return out


class Optional(nn.Module):
    """Buffers of every kind, optional arguments, a flag, a table as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("not_kept", torch.full((1,), 2.0), persistent=False)
        self.constant = torch.full((3,), 3.0)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, flag: bool = True, z: Tensor | None = None
    ) -> dict[str, Any]:
        out = x + self.kept + self.not_kept + self.constant
        out = out if y is None else out * y
        return {"x": out if flag else -out, "rest": (None if z is None else z * 2, None, 3)}


X, Y = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(3, -2, 6).reshape(2, 3)
Z = torch.linspace(0.5, 2, 4)


@pytest.mark.parametrize(
    ("inputs", "keywords", "names"),
    [
        ((X,), None, {"x": "x_out"}),
        (X, None, {"x": "x_out"}),
        ({"x": X}, None, {"x": "x_out"}),
        ((X, None), {"z": Z}, {"x": "x_out", "z": "rest_0"}),
        ((X,), {"z": Z, "flag": False, "y": Y}, {"x": "x_out", "y": "", "z": "rest_0"}),
        (None, {"x": X, "y": Y}, {"x": "x_out", "y": ""}),
        ({"y": Y}, {"x": X}, {"x": "x_out", "y": ""}),
    ],
)
def test_arguments_of_every_kind(
    inputs: Any, keywords: Any, names: dict[str, str], tmp_path: Path
) -> None:
    path = einfold.export_onnx(Optional(), tmp_path / "a", inputs, example_kwargs=keywords)
    graph = ir.load(path).graph
    assert {value.name for value in graph.inputs} == set(names)
    assert [value.name for value in graph.outputs] == [n for n in names.values() if n]


def test_an_argument_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'x' is given in example_inputs and"):
        einfold.export_onnx(Optional(), tmp_path / "a", {"x": X}, example_kwargs={"x": X})
    with pytest.raises(UnsupportedError, match="missing a required argument: 'x'"):
        einfold.export_onnx(Optional(), tmp_path / "a", {"y": X}, dynamic_shapes={"y": None})


def test_names_of_axes_and_outputs(tmp_path: Path) -> None:
    batch, length = Dim("batch"), Dim("length")
    path = einfold.export_onnx(
        Bag(),
        tmp_path / "a",
        (torch.randint(0, 100, (2, 5)),),
        dynamic_shapes=({0: batch, 1: length},),
        output_names=["scores"],
    )
    graph = ir.load(path).graph
    assert [str(value.shape) for value in graph.inputs] == ["[batch,length]"]
    assert [(v.name, str(v.shape)) for v in graph.outputs] == [("scores", "[batch,3]")]
    for names in ([], ["a", "b"], ["input_ids"]):
        with pytest.raises(UnsupportedError, match="gives 1 tensors, which need as many names"):
            einfold.export_onnx(
                Bag(), tmp_path / "b", (torch.zeros(1, 2).long(),), output_names=names
            )


def test_an_encoder_of_transformers(tmp_path: Path) -> None:
    """With its token ids alone, and with a mask beside them, at any length."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    ).eval()
    ids = torch.randint(0, 50, (2, 5))
    path = einfold.export_onnx(model, tmp_path / "ids", (ids,))
    names = [value.name for value in ir.load(path).graph.outputs]
    assert names == ["last_hidden_state", "pooler_output"]
    axes = {0: Dim("B"), 1: Dim("S", max=32)}
    path = einfold.export_onnx(
        model,
        tmp_path / "mask",
        {"input_ids": ids, "attention_mask": (ids > 10).long()},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([7, 8]), 0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = onnxruntime.InferenceSession(str(path)).run(["last_hidden_state"], feeds)[0]
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("portable", [False, True])
def test_types_other_than_float32(dtype: torch.dtype, portable: bool, tmp_path: Path) -> None:
    """An encoder whose inputs and outputs keep their type; the check compares the numbers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).to(dtype).eval()
    path = einfold.export_onnx(
        encoder, tmp_path / "a", (torch.randn(2, 3, 16, dtype=dtype),), portable=portable
    )
    graph = ir.load(path).graph
    kinds = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    assert [str(v.dtype) for v in (*graph.inputs, *graph.outputs)] == [kinds[dtype]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_that_a_module_asks_for_rounds(dtype: torch.dtype, tmp_path: Path) -> None:
    def rounded(x: Tensor) -> Tensor:
        return (x * 1.1).to(dtype).float() * 3

    x = torch.linspace(0.1, 5, 40)
    path = einfold.export_onnx(Call(rounded), tmp_path / "a", (x,))
    found = onnxruntime.InferenceSession(str(path)).run(None, {"args_0": x.numpy()})[0]
    np.testing.assert_array_equal(found, rounded(x).numpy())


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


@pytest.mark.parametrize(
    ("module", "dynamic", "reason"),
    [
        (Counter(), None, "writes to 'calls' while it runs"),
        (Call(lambda x: x.add_(1)), None, "writes into its input 'args_0'"),
        (Call(lambda x: x + torch.rand_like(x)), None, "draws random numbers"),
        (Call(lambda x: (x * 2, x.shape[0])), (({0: Dim("B")},),), "output 1 is a size"),
        (Table(), ({1: Dim("S")},), r"<= 64. Suggested fixes: S = Dim\('S', max=64\)"),
        (Call(torch.linalg.inv), None, "aten.linalg_inv"),
        (Call(lambda x: torch.cdist(x, x)), None, r"aten.cdist.default at %\w+ cannot be lowered"),
        (Call(lambda x: torch.view_as_real(torch.fft.rfft(x))), None, "gives complex64"),
        (Call(lambda x: x * x.sum().item()), None, "gives a number that is computed from data"),
        (Call(lambda x: x[x > 0]), None, "which einfold does not know"),
    ],
)
def test_what_cannot_be_exported(module: Any, dynamic: Any, reason: str, tmp_path: Path) -> None:
    x = torch.eye(4) + torch.rand(2, 4, 4)
    with pytest.raises(UnsupportedError, match=reason):
        einfold.export_onnx(module, tmp_path / "a", (x,), dynamic_shapes=dynamic)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", [torch.relu, "some/model", None])
def test_what_is_no_module(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"example inputs are for a torch\.nn\.Module"):
        einfold.export_onnx(model, tmp_path / "a", (X,))


def test_a_language_model_as_a_plain_module(tmp_path: Path) -> None:
    """With example inputs it is exported as it stands, without a cache of einfold's."""
    ids = torch.randint(3, 100, (2, 7))
    model = models.build("llama")
    with pytest.raises(UnsupportedError, match=r"gives its cache back.*use_cache=False"):
        einfold.export_onnx(model, tmp_path / "a", (ids,))
    path = einfold.export_onnx(model, tmp_path / "a", {"input_ids": ids, "use_cache": False})
    graph = ir.load(path).graph
    assert [value.name for value in graph.inputs] == ["input_ids"]
    assert [value.name for value in graph.outputs] == ["logits"]


class Calls(nn.Module):
    """Counts its calls in a number that is no tensor, which a trace takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_state_that_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="or keeps a state"):
        einfold.export_onnx(Calls(), tmp_path / "a", (X,))


def _wrongly(context: Any, node: Any) -> Any:
    return context.builder.op("Add", context.value(node.args[0]), context.builder.floats(0.001))


def _not_at_all(context: Any, node: Any) -> Any:
    return context.builder.op("And", *[context.value(node.args[0])] * 2)


def _at_one_size(context: Any, node: Any) -> Any:
    return context.builder.op(
        "Sub", context.value(node.args[0]), context.builder.constant([[1.0]] * 2, "float32")
    )


@pytest.mark.parametrize(
    ("lowering", "reason"),
    [
        (_wrongly, "the exported model differs from what is right in 'output_0'"),
        (_not_at_all, "onnxruntime cannot load the exported model"),
        (_at_one_size, "onnxruntime cannot run the exported model"),
    ],
)
def test_a_fault_is_found_before_anything_is_kept(
    lowering: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is right for the example's own size alone."""
    module, x = Call(lambda x: x - 1), torch.randn(2, 3)
    einfold.export_onnx(module, tmp_path / "right", (x,))
    monkeypatch.setitem(lowerings._TABLE, (torch.ops.aten.sub.Tensor, "ort"), lowering)
    dynamic = (({0: Dim("B")},),)
    with pytest.raises(EinfoldError, match=reason):
        einfold.export_onnx(module, tmp_path / "a", (x,), dynamic_shapes=dynamic)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]
    einfold.export_onnx(module, tmp_path / "a", (x,), dynamic_shapes=dynamic, check=False)


def test_a_graph_that_is_not_the_module_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from einfold.compiler.ir.weights import Weight

    of = Weight.of
    monkeypatch.setattr(Weight, "of", lambda tensor, dtype=None: of(tensor * 1.01, dtype))
    with pytest.raises(EinfoldError, match="the graph of the module differs"):
        einfold.export_onnx(nn.Linear(4, 4), tmp_path / "a", (torch.randn(2, 4),), weights="int8")


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("portable", [False, True])
def test_forms_of_weights_over_any_axes(weights: str, portable: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for shape in ((64,), (2, 64), (2, 3, 64), (2, 3, 4, 64)):
        path = tmp_path / str(len(shape))
        x = torch.randn(shape)
        einfold.export_onnx(net, path, (x,), weights=weights, portable=portable)


def test_other_sizes_that_the_module_refuses_are_said(tmp_path: Path) -> None:
    def choosy(x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] != 2:
            raise ValueError("two rows, please")
        return x * 2

    with pytest.warns(ArtifactWarning, match="on the example inputs alone.*two rows, please"):
        einfold.export_onnx(
            Call(choosy), tmp_path / "a", (X,), dynamic_shapes=(({0: Dim.DYNAMIC},),)
        )
