"""A `model.onnx` computes and nothing else; manifests and reports of any form end in one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import einfold
from einfold.errors import ArtifactError

from ..cli.test_cli import einfold as cli
from . import forge

Change = Callable[[Any], None]


def _node(domain: str, kind: str, **attributes: Any) -> Change:
    made = helper.make_node(kind, ["input_ids"], ["evil"], domain=domain, **attributes)
    return lambda model: model.graph.node.insert(0, made)


def _external(**entries: str) -> Change:
    def change(model: Any) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)

    return change


def _every(graph: Any) -> Iterator[Any]:
    """All nodes, those of branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _every(attribute.g)


def _constant(index: int, value: Any) -> Change:
    """An input of every attention is a constant."""

    def change(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), "evil"))
        for node in _every(model.graph):
            if node.op_type == "GroupQueryAttention":
                node.input[index] = "evil"

    return change


def _graph(nodes: int = 1, inside: Any = None) -> Any:
    made = [helper.make_node("Identity", ["input_ids"], [f"o{i}"]) for i in range(nodes)]
    if inside is not None:
        made.append(helper.make_node("If", ["c"], ["x"], then_branch=inside, else_branch=inside))
    out = helper.make_tensor_value_info("o0", TensorProto.INT64, None)
    return helper.make_graph(made, "g", [], [out])


def _deep() -> Any:
    graph = _graph()
    for _ in range(5):
        graph = _graph(inside=graph)
    return graph


def _function(model: Any) -> None:
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [], []))


def _sparse(model: Any) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def _dims(model: Any) -> None:
    model.graph.initializer.append(TensorProto(name="evil", dims=[2**40, 2**20], data_type=1))


def _empty(model: Any) -> None:
    model.graph.initializer.append(
        TensorProto(name="evil", dims=[0], data_type=7, raw_data=b"12345678")
    )


def _opset(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("evil.domain", 1))


def _renamed(old: str, new: str) -> Change:
    def change(model: Any) -> None:
        for node in _every(model.graph):
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name

    return change


def _attribute_file(model: Any) -> None:
    tensor = TensorProto(name="t", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    _node("", "Constant")(model)
    del model.graph.node[0].input[:]
    model.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


MODELS: dict[str, tuple[Change, str]] = {
    "an operator of another domain": (_node("evil", "Custom"), "evil.Custom"),
    "a compiled context from a file": (_node("com.microsoft", "EPContext"), "EPContext"),
    "random numbers": (_node("", "RandomNormalLike"), "RandomNormalLike"),
    "strings": (_node("", "StringConcat"), "StringConcat"),
    "a loop": (_node("", "Loop", body=_graph()), "Loop"),
    "a scan": (_node("", "Scan", body=_graph()), "Scan"),
    "graphs in graphs": (
        _node("", "If", then_branch=_deep(), else_branch=_deep()),
        "graphs in graphs",
    ),
    "many nodes in a graph": (
        _node("", "If", then_branch=_graph(200_001)),
        "more than 200,000 nodes",
    ),
    "an operator in a graph": (
        _node(
            "", "If", then_branch=helper.make_graph([helper.make_node("Evil", [], [])], "g", [], [])
        ),
        "Evil",
    ),
    "a graph where none belongs": (_node("", "Identity", body=_graph()), "of a kind"),
    "a remainder by zero": (_node("", "Mod"), "Mod of whole numbers by what is no constant"),
    "a quotient too large": (_node("", "Div"), "Div of whole numbers by what is no constant"),
    "functions": (_function, "functions"),
    "an unknown set of operators": (_opset, "evil.domain"),
    "sparse tensors": (_sparse, "sparse"),
    "an attribute in a file": (_attribute_file, "outside of the model"),
    "weights elsewhere": (_external(location="../secret"), "not in weights.safetensors"),
    "weights in another file": (_external(location="tokenizer.json"), "not in weights.safetensors"),
    "weights at an absolute path": (
        _external(location="/etc/passwd"),
        "not in weights.safetensors",
    ),
    "an offset past the end": (_external(offset="99999999999"), "not all in a file"),
    "a negative offset": (_external(offset="-1"), "lies at '-1'"),
    "an offset of 5,000 digits": (_external(offset="9" * 5000), "lies at '9999"),
    "a length of nothing": (_external(length="0"), "not all in a file"),
    "sizes without numbers": (_dims, "has not the numbers"),
    "numbers without sizes": (_empty, "has not the numbers"),
    "another input": (_renamed("lengths", "evil"), "which nobody gives"),
    "another result": (_renamed("present.cache.0.0.key", "evil"), "which nobody takes"),
    "no logits": (_renamed("logits", "query.x"), "gives no logits"),
    "lengths past every buffer": (_constant(5, np.array([10**6], np.int32)), "cannot be run"),
    "negative lengths": (_constant(5, np.array([-(10**6)], np.int32)), "cannot be run"),
    "a total past every buffer": (_constant(6, np.int32(2**31 - 1)), "cannot be run"),
    "positions past the tables": (_constant(9, np.array([[10**9] * 3])), "cannot be run"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_do_more_than_compute(
    what: str, text_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = forge.copy(text_artifact, tmp_path / "copy")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change, said = MODELS[what]
    change(model)
    forge.change(folder, "model.onnx", model.SerializeToString())
    with pytest.raises(ArtifactError, match=said):
        einfold.load(folder, threads=1).generate([1, 2, 3], max_new_tokens=2)
    assert capfd.readouterr().err == ""  # nothing but the sentence


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 1000])
def test_a_model_that_is_none(content: bytes, text_artifact: Path, tmp_path: Path) -> None:
    folder = forge.copy(text_artifact, tmp_path / "copy")
    forge.change(folder, "model.onnx", content)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        einfold.load(folder)


def _member(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({name: value})


def _model(**members: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["model"].update(members)


def _file(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["files"].update({name: {"bytes": 1, "blake3": ""}})


def _line(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(cache=[line.replace(old, new) for line in data["cache"]])


MANIFESTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a vocabulary past 64 bits": _model(vocabulary=2**63),
    "half the vocabulary": _model(vocabulary=150),
    "no vocabulary": _model(vocabulary=0),
    "a negative context": _model(context=-1),
    "a context past 64 bits": _model(context=10**400),
    "negative parameters": _model(parameters=-5),
    "a name with a null": _file("x\0y"),
    "a name with codes of the terminal": _file("\x1b[2Jx"),
    "a name of many letters": _file("x" * 5000),
    "a negative size": lambda data: data["files"]["graph.eir"].update(bytes=-1),
    "a size past 64 bits": lambda data: data["files"]["graph.eir"].update(bytes=2**70),
    "files that are a list": _member("files", []),
    "a cache of null": _member("cache", None),
    "a cache of numbers": _member("cache", [1, 2]),
    "no cache": _member("cache", []),
    "a layer that the model has not": _line("cache 1.0", "cache 9.0"),
    "keys of another size": _line("key=16", "key=8"),
    "another storage": _line("storage=f32", "storage=i8/channel"),
    "a number of 5,000 digits": _line("of=2", "of=" + "9" * 5000),
    "heads without end": _line("of=2", "of=999999999"),
    "a negative size of a key": _line("key=16", "key=-16"),
    "an odd digit": _line("key=16", "key=1٦"),
    "a policy with a number of 5,000 digits": _line("full", f"window(sinks={'9' * 5000},recent=2)"),
    "a policy that is none": _line("full", "window(sinks=1,recent=0)"),
    "a policy not of the graph": _line("full", "window(sinks=1,recent=8,slack=4)"),
    "a storage of no granule": _line("storage=f32", "storage=kivi(bits=0,residual=0)"),
    "many groups": lambda data: data.update(cache=data["cache"] * 50_000),
    "a target that is none": _member("target", "shell"),
    "the target of another": _member("target", "reference"),
    "a format that is true": _member("format", True),
    "a format of text": _member("format", "1"),
    "a recipe of null": _member("recipe", None),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_do_not_fit(what: str, text_artifact: Path, tmp_path: Path) -> None:
    folder = forge.edit(forge.copy(text_artifact, tmp_path / "copy"), MANIFESTS[what])
    started = time.process_time()
    if what == "the target of another":  # the reference runs what any target was compiled from
        assert einfold.load(folder).generate([1, 2], max_new_tokens=1).tokens
        return
    with pytest.raises(ArtifactError) as caught:
        einfold.load(folder, threads=1).generate([1, 2], max_new_tokens=1)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1500 + 2 * len(str(tmp_path))


RAW = {
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a lone surrogate": b'{"format":1,"x":"\\ud800"}',
    "a number of 5,000 digits": b'{"format":' + b"9" * 5000 + b"}",
    "not a number": b'{"format":NaN}',
    "null": b"null",
    "no UTF-8": b"\xff\xfe",
    "cut": b'{"format": 1',
    "twenty megabytes": b" " * 20_000_000,
}


@pytest.mark.parametrize("what", RAW)
def test_manifests_that_are_none(what: str, text_artifact: Path, tmp_path: Path) -> None:
    folder = forge.copy(text_artifact, tmp_path / "copy")
    forge.write(folder / "manifest.json", RAW[what])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        einfold.load(folder)


@pytest.mark.parametrize(
    "report",
    [b"null", b"[]", b"{", b"[" * 100_000, b'{"passes": 3}', b'{"passes": [1], "check": {}}', b"\xff",
     b'{"passes": [{"name": "x", "notes": [{"action": 1}]}], "check": 0}', b"9" * 5000],
)  # fmt: skip
def test_reports_of_any_form(report: bytes, text_artifact: Path, tmp_path: Path) -> None:
    folder = forge.copy(text_artifact, tmp_path / "copy")
    forge.change(folder, "report.json", report)
    shown = cli("inspect", folder, code=5)
    assert "report.json" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "code"),
    [({}, 5), ({"weights": 3, "cache": 4}, 5), ({"weights": {}, "cache": {"quant": {}}}, 0)],
)
def test_recipes_of_any_form_are_shown_or_refused(
    recipe: dict[str, Any], code: int, text_artifact: Path, tmp_path: Path
) -> None:
    folder = forge.edit(forge.copy(text_artifact, tmp_path / "copy"), _member("recipe", recipe))
    assert cli("inspect", folder, code=code)


def test_names_do_not_reach_the_terminal_as_codes(text_artifact: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J\x1b[31mred\x9b\u202e"
    folder = forge.edit(
        forge.copy(text_artifact, tmp_path / "copy"), _model(source=evil, architecture=evil)
    )
    shown = cli("inspect", folder)
    assert "\\x1b]0;pwned" in shown
    refused = cli("inspect", tmp_path / evil, code=5)
    assert not {*"\x1b\x07\x9b\u202e"} & {*shown, *refused}
    assert json.loads(cli("inspect", folder, "--json"))["manifest"]["model"]["source"] == evil
