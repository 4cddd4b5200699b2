"""A graph's text can compute and nothing else, and reading it takes time that grows with its length alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import einfold
from einfold.compiler.driver import compile_to, open_model
from einfold.compiler.ir.allowed import ALLOWED, check_allowed
from einfold.compiler.ir.ops import OPERATORS
from einfold.compiler.ir.parser import parse
from einfold.compiler.ir.program import find_op
from einfold.compiler.recipe import Recipe
from einfold.errors import ArtifactError, IRError, UnsupportedError

from . import forge

BEFORE = """einfold.ir 1
model architecture="x" vocabulary=8 context=8
input %x "x" : f32[4]
input %s "s" : f32[S, S]
call %n = aten.sym_size.int(%s, 0) : sym(S)
"""


def read(*lines: str) -> None:
    parse(BEFORE + "\n".join(lines) + '\noutput "y" = %x\n')


#: What torch has in its namespace and no graph may call, by what it would do.
CALLS = {
    "reads a file": 'aten.from_file.default("/etc/passwd", false, 4)',
    "reads a file into another": 'aten.from_file.out("/etc/passwd", false, 4, out=%x)',
    "reads outside of a buffer": 'aten.segment_reduce.default(%x, "sum", lengths=%x, axis=0, unsafe=true)',
    "writes outside of a buffer": 'aten._segment_reduce_backward.default(%x, %x, %x, "sum", lengths=%x)',
    "writes in place": "aten.add_.Tensor(%x, %x)",
    "writes into another": "aten.add.out(%x, %x, out=%x)",
    "unchecked indices": "aten._unsafe_index.Tensor(%x, [%x])",
    "another's memory": "aten.as_strided.default(%x, [4], [1], 9)",
    "memory as it was": "aten.empty.memory_format([4])",
    "memory as it was, like": "aten.empty_like.default(%x)",
    "other storage": "aten.set_.source_Tensor(%x, %x)",
    "another size": "aten.resize_.default(%x, [9])",
    "random numbers": "aten.rand.default([4])",
    "dropout": "aten.native_dropout.default(%x, 0.5, true)",
    "strings": 'aten.zfill.default("A", 100000000000)',
    "Python objects": 'aten.format.default("{}", 3)',
    "prints": 'aten._print.default("hello")',
    "asserts": "aten._assert_async.default(%x)",
    "to Python": "aten.item.default(%x)",
    "sizes from data": "aten.nonzero.default(%x)",
    "the smallest integer by -1": "aten.fmod.Scalar(%x, -1)",
    "linear algebra": "aten.linalg_inv.default(%x)",
    "an operator of the caller's cache": 'einfold.through_cache("a", %x, %x, %x)',
    "another namespace": "prims.fft_r2c(%x)",
    "Python": 'os.system("true")',
    "a class": "aten.__class__.__init__()",
    "a device": 'aten._to_copy.default(%x, device="meta")',
    "pinned memory": "aten.full.default([4], 0, pin_memory=true)",
}


@pytest.mark.parametrize("what", CALLS)
def test_what_does_more_than_compute_is_refused(what: str) -> None:
    with pytest.raises(IRError, match=r"^line 7: .*(operator|is told of its)"):
        read("", f"call %y = {CALLS[what]} : f32[4]")


def test_the_list_holds_nothing_that_changes_its_arguments() -> None:
    for name in [*ALLOWED, *(f"einfold.{name}" for name in OPERATORS)]:
        schema = find_op(name)._schema  # type: ignore[attr-defined]
        assert not schema.is_mutable, name
        kinds = {str(argument.type) for argument in schema.arguments}
        assert not kinds & {"Generator", "Optional[Generator]", "Storage", "Stream"}, name


def _squares(count: int) -> list[str]:
    lines, before = [], "n"
    for place in range(count):
        lines.append(
            f"call %n{place}_ = builtin.mul(%{before}, %{before}) : sym(S**{2 ** (place + 1)})"
        )
        before = f"n{place}_"
    return lines


def _grown(count: int) -> list[str]:
    lines, before, power = [], "s", 2
    for place in range(count):
        flat, size = f"a{place}_", f"S**{power}"
        lines.append(f"call %{flat} = aten.flatten.using_ints(%{before}) : f32[{size}]")
        before, power = f"b{place}_", power * 2
        lines.append(f"call %{before} = aten.outer.default(%{flat}, %{flat}) : f32[{size}, {size}]")
    return lines


BOMBS: dict[str, Callable[[], list[str]]] = {
    "a long list": lambda: ["call %y = aten.full.default([" + "1," * 2_000_000 + "1], 0) : f32[1]"],
    "a long line of junk": lambda: ["x" * 50_000_000],
    "many lines": lambda: ["call %y = aten.neg.default(%x) : f32[4]"] * 200_000,
    "squares of a size": lambda: _squares(40),
    "squares of a shape": lambda: _grown(40),
    "lists in lists": lambda: [
        f"call %y = aten.full.default({'[' * 30_000}{']' * 30_000}, 0) : f32[1]"
    ],
    "a number of 5,000 digits": lambda: [f"call %y = aten.add.Scalar(%x, {'9' * 5000}) : f32[4]"],
    "a number of 25 digits": lambda: [f"call %y = aten.add.Scalar(%x, {'9' * 25}) : f32[4]"],
    "a power of numbers": lambda: [
        "call %y = builtin.mul(9223372036854775807, 9223372036854775807) : const(1)"
    ],
    "a giant tensor": lambda: [
        "call %y = aten.full.default([1000000000000], 0) : f32[1000000000000]"
    ],
    "a giant by views": lambda: [
        "call %y = aten.full.default([9000000, 9000000], 0) : f32[9000000, 9000000]"
    ],
    "a giant input": lambda: ['input %z "z" : f32[999999999999, 9999]'],
    "a size of 5,000 digits": lambda: [f'input %z "z" : f32[{"9" * 5000}]'],
    "a thousand dims": lambda: ['input %z "z" : f32[' + "1, " * 999 + "1]"],
    "a giant weight": lambda: [
        "weight @w : f32[999999999999999, 99]",
        'read %w "w" : f32[999999999999999, 99]',
    ],
    "a nested name": lambda: ["output " + "[" * 30_000 + " = %x"],
    "no arguments": lambda: ["call %y = aten.add.Tensor() : f32[4]"],
    "arguments that end": lambda: ["call %y = aten.full.default([4, 5 : f32[4]"],
    "an argument twice": lambda: [
        "call %y = aten.full.default([4], 0, dtype=f32, dtype=f32) : f32[4]"
    ],
    "an odd digit": lambda: ["call %y = aten.add.Scalar(%x, ٣) : f32[4]"],
    "division by zero": lambda: ["call %y = builtin.floordiv(%n, 0) : sym(S)"],
    "an item of a tensor that is none": lambda: ["call %y = builtin.getitem(%n, 0) : sym(S)"],
    "a second model": lambda: ['model architecture="y" vocabulary=9 context=9'],
    "an unknown member of the model": lambda: ["model nothing=1"],
    "a method of the parser": lambda: ["model_ x", "run x"],
}


@pytest.mark.parametrize("what", BOMBS)
def test_texts_that_cost_more_than_they_say(what: str) -> None:
    lines = BOMBS[what]()
    started = time.process_time()
    with pytest.raises(IRError, match=r"^line \d+: |lines, more than") as caught:
        read(*lines)
    assert time.process_time() - started < 10
    assert len(str(caught.value)) < 1000


@pytest.fixture(scope="module")
def base(text_model: Path) -> Path:
    out = text_model.parent / "reference"
    einfold.compile(text_model, out, target="reference", check=False)
    return out


def _graph(text: str, before: str, *lines: str) -> bytes:
    return text.replace(before, "\n".join([*lines, before]), 1).encode()


GRAPHS: dict[str, Callable[[str], bytes]] = {
    "an operator that reads files": lambda text: _graph(
        text, "output", 'call %f = aten.from_file.default("/etc/passwd", false, 4) : f32[4]'
    ),
    "another vocabulary": lambda text: text.replace("vocabulary=300", "vocabulary=299").encode(),
    "no logits": lambda text: text.replace('output "logits"', 'output "other"').encode(),
    "logits of another kind": lambda text: _graph(
        text.replace('output "logits" = ', 'output "first" = ', 1),
        'output "first"',
        'output "logits" = %input_ids',
    ),
    "another cache": lambda text: text.replace(
        "policy=full", "policy=window(sinks=1,recent=8,slack=4)", 1
    ).encode(),
    "no UTF-8": lambda text: text.encode()[:700] + b"\xff" + text.encode()[700:],
    "nothing": lambda text: b"",
    "an input that nobody gives": lambda text: _graph(
        text, "input %position_ids", 'input %more "more" : f32[B]'
    ),
    "indices out of range": lambda text: _graph(
        text.replace("einfold.embedding(%input_ids", "einfold.embedding(%far"),
        "call",
        "call %far = aten.add.Scalar(%input_ids, 1000000) : i64[B, S]",
    ),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_graphs_that_do_not_fit_their_artifact(what: str, base: Path, tmp_path: Path) -> None:
    folder = forge.copy(base, tmp_path / "copy")
    text = (folder / "graph.eir").read_text("utf-8")
    changed = GRAPHS[what](text)
    assert changed != text.encode()
    forge.change(folder, "graph.eir", changed)
    with pytest.raises(ArtifactError, match=str(folder)):
        einfold.load(folder).generate([1, 2], max_new_tokens=2)


def test_weights_that_the_graph_reads_otherwise(base: Path, tmp_path: Path) -> None:
    """Damage in the header is told of as damage, with hashes and without."""
    folder = forge.copy(base, tmp_path / "copy")
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[10] = 0
    forge.write(folder / "weights.safetensors", bytes(data))
    for verify in (True, False):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged"):
            einfold.load(folder, verify=verify)
    forge.change(folder, "weights.safetensors", bytes(data[:-1]))
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is damaged"):
        einfold.load(folder)


def test_what_could_not_be_loaded_is_not_compiled(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler refuses, with the operator's name, what the loader would refuse."""
    kept = ALLOWED - {"aten.reshape.default"}
    monkeypatch.setattr("einfold.compiler.ir.allowed.ALLOWED", kept)
    with pytest.raises(UnsupportedError, match=r"aten\.reshape\.default at %\w+"):
        compile_to(open_model(text_model), tmp_path / "out", Recipe())
    assert not list(tmp_path.iterdir())


def test_builtins_are_functions_of_sizes() -> None:
    """No name leads from a builtin to another function of Python's."""
    program = parse(BEFORE + 'call %m = builtin.mul(%n, 2) : sym(2*S)\noutput "y" = %x\n')
    check_allowed(program)
    assert isinstance(next(program.nodes(torch.ops.aten.sym_size.int)).meta["val"], torch.SymInt)
