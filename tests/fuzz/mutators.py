"""Mutations of an artifact, each drawn from a seed: the same number gives the same artifact everywhere.

Half of them are sealed with right hashes, as somebody would who means harm; the rest are damage. A mutation
gives a sentence that says what it did, so that a failure can be read.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hostile import forge

Draw = random.Random
Mutator = Callable[[Path, Draw], str]

#: Numbers at which things break.
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    31,
    255,
    2**15,
    2**31 - 1,
    -(2**31),
    2**31,
    2**40,
    2**63 - 1,
    -(2**63),
    2**63,
    10**30,
)
VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "\x1b[2J", "../x", "\x00", [], {}, [[[]]], 1e308, float("inf"), float("nan"),
    0.5, "9" * 5000, *NUMBERS,
)  # fmt: skip
TEXTS = (
    "aten.from_file.default", "aten.empty.memory_format", "aten.add_.Tensor", "einfold.linear", "builtin.mul",
    "none", "true", "[1, 2]", "-1", "9223372036854775807", "1e400", "inf", "nan", '"x"', "f64", "i8", "B",
    "S", "%input_ids", "(", "]", "{{ 10**10**6 }}", "\\", "'", "\U0001f388",
)  # fmt: skip


def _bytes(data: bytes, draw: Draw) -> bytes:
    """Some bytes flipped, cut, doubled, moved or put in."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, length = draw.randrange(len(found) + 1), draw.choice((1, 1, 2, 4, 16, 200))
        kind = draw.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            found[at : at + length] = draw.randbytes(length)
        else:
            other = draw.randrange(len(found) + 1)
            found[at:at] = found[other : other + length]
    return bytes(found)


def _number(draw: Draw) -> str:
    return str(draw.choice((*NUMBERS, draw.randrange(2000))))


def _words(text: str, draw: Draw) -> str:
    """Some tokens of a text swapped, doubled, replaced or left out."""
    tokens = re.findall(r"[\w.%@]+|\s+|[^\w\s]", text)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(tokens))
        numbers = [i for i, token in enumerate(tokens) if token.isdecimal()]
        kind = draw.randrange(5)
        if kind == 0:
            other = draw.randrange(len(tokens))
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif kind == 1 and numbers:
            tokens[draw.choice(numbers)] = _number(draw)
        elif kind == 2:
            tokens[at] = draw.choice(TEXTS)
        elif kind == 3:
            tokens[at] *= draw.choice((0, 2, 3))
        else:  # another of the same kind: a node for a node, an operator for an operator
            alike = [
                t for t in tokens if t[:1] == tokens[at][:1] and ("." in t) == ("." in tokens[at])
            ]
            tokens[at] = draw.choice(alike)
    return "".join(tokens)


def _lines(text: str, draw: Draw) -> str:
    lines = text.splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(3)
    if kind == 0:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    else:
        del lines[at]
    return "".join(lines)


def _json(value: Any, draw: Draw) -> Any:
    """One member somewhere in a document replaced, left out or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        members = node.items() if isinstance(node, dict) else enumerate(node)
        for key, item in members:
            places.append((node, key))
            if isinstance(item, (dict, list)) and len(places) < 3000:
                walk(item)

    walk(value)
    node, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other = draw.choice(places)
        node[key] = other[0].get(other[1]) if isinstance(other[0], dict) else other[0][other[1]]
        json.dumps(value)  # a document that holds itself is refused here, and drawn again
    elif kind == 2 and isinstance(node, dict):
        node[str(draw.choice(VALUES))[:60]] = draw.choice(VALUES)
    else:
        node[key] = draw.choice(VALUES)
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def _of_file(name: str, how: Callable[[bytes, Draw], bytes]) -> Mutator:
    def mutate(folder: Path, draw: Draw) -> str:
        path = folder / name
        before = path.read_bytes() if path.is_file() else b"{{ messages[0].content }}"
        forge.write(path, how(before, draw))
        return f"{name} {getattr(how, '__name__', 'changed')}"

    return mutate


def _as_text(how: Callable[[str, Draw], str]) -> Callable[[bytes, Draw], bytes]:
    def changed(data: bytes, draw: Draw) -> bytes:
        return how(data.decode("utf-8", "replace"), draw).encode("utf-8", "replace")

    return changed


def _as_json(data: bytes, draw: Draw) -> bytes:
    for _ in range(5):
        try:
            return _dump(_json(json.loads(data), draw))
        except (ValueError, RecursionError):
            continue
    return data[:-1]


def manifest(folder: Path, draw: Draw) -> str:
    """A member of the manifest; its hash is right, or nobody would look further."""
    data = forge.manifest(folder)
    try:
        changed = _json(data, draw)
        forge.seal(folder, changed)
    except (ValueError, UnicodeEncodeError, TypeError, RecursionError):
        forge.write(folder / "manifest.json", _bytes((folder / "manifest.json").read_bytes(), draw))
    return "a member of the manifest"


def cache(folder: Path, draw: Draw) -> str:
    """The lines of the cache in the manifest, and sometimes those of the graph with them."""
    data = forge.manifest(folder)
    line = draw.randrange(len(data["cache"]))
    before = data["cache"][line]
    data["cache"][line] = _words(before, draw)
    if draw.random() < 0.5:
        graph = folder / "graph.eir"
        text = graph.read_text("utf-8").replace(before, data["cache"][line])
        forge.write(graph, text.encode("utf-8", "replace"))
    forge.seal(folder, data)
    return f"the cache line {data['cache'][line][:100]!r}"


def header(folder: Path, draw: Draw) -> str:
    """The header of the weights: shapes, offsets, dtypes, its own length."""
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    kind = draw.randrange(3)
    if kind == 0:
        size = draw.choice((0, 1, size + 1, size - 1, 2**31, 2**63, len(data)))
    else:
        text = _as_json(text, draw) if kind == 1 else _bytes(text, draw)
        size = len(text)
    forge.write(path, size.to_bytes(8, "little") + text + rest)
    return "the header of the weights"


def model_structure(folder: Path, draw: Draw) -> str:
    """The ONNX graph: operators, attributes, names, sizes and the places of tensors."""
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    said = []
    for _ in range(draw.choice((1, 1, 2))):
        node, tensor = draw.choice(graph.node), draw.choice(graph.initializer)
        kind = draw.randrange(9)
        if kind == 0:
            node.op_type = draw.choice(
                ("If", "Loop", "Custom", "EPContext", *(n.op_type for n in graph.node))
            )
        elif kind == 1 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(
                ["", *(name for n in graph.node for name in (*n.input, *n.output))]
            )
        elif kind == 2 and node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i = int(draw.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
        elif kind == 3 and tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice((0, 1, -1, 2**31, 2**62, 7))
        elif kind == 4 and tensor.external_data:
            entry = draw.choice(tensor.external_data)
            entry.value = draw.choice(
                ("/etc/passwd", "../x", "-1", "9" * 400, "", _number(draw), "graph.eir")
            )
        elif kind == 5:
            tensor.data_type = draw.randrange(30)
        elif kind == 6 and not tensor.external_data and tensor.raw_data:
            tensor.raw_data = _bytes(tensor.raw_data, draw)
        elif kind == 7:
            value = draw.choice([*graph.input, *graph.output])
            sizes = value.type.tensor_type.shape.dim
            if sizes:
                draw.choice(sizes).dim_value = draw.choice((0, 1, -1, 2**40, 5))
        else:
            del graph.node[draw.randrange(len(graph.node))]
        said.append(f"{kind} at {node.op_type} or {tensor.name}")
    forge.write(path, model.SerializeToString())
    return f"the ONNX graph: {', '.join(said)}"


def template(folder: Path, draw: Draw) -> str:
    """A chat template put in, listed or not."""
    pieces = (
        "{{ messages[0].content }}", f"{{% for i in range(10**{draw.randrange(12)}) %}}", "{% endfor %}",
        "{{ 'x' * 10**9 }}", "{{ 1/0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__ }}", "{{ cycler.__init__ }}", "{% include '/etc/passwd' %}",
        "{{ '%0*d' % (10**9, 1) }}", "{{ (" * 300, "{% if %}", "{{ x|tojson }}", "\x00",
        "{{ lipsum(n=10**9) }}", "{{ joiner|attr('__init__') }}",
        "{{ range(10**18)|list }}", "{# ", "}}",
    )  # fmt: skip
    text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 6)))
    forge.write(folder / "chat_template.jinja", text.encode())
    return f"the template {text[:80]!r}"


def placed(folder: Path, draw: Draw) -> str:
    """A file replaced by something that is none, or one more."""
    name = draw.choice(
        [*forge.manifest(folder)["files"], "chat_template.jinja", "manifest.json", "extra"]
    )
    path = folder / name
    kind = draw.choice(("link out", "device", "pipe", "folder", "loop", "nothing", "empty"))
    path.unlink(missing_ok=True)
    if kind == "link out":
        path.symlink_to("/etc/hostname")
    elif kind == "device":
        path.symlink_to(draw.choice(("/dev/zero", "/dev/stdin", "/dev/tty")))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "empty":
        path.write_bytes(b"")
    return f"{name}: {kind}"


def kernel(folder: Path, draw: Draw) -> str:
    """A kernel's source or plan, or one more."""
    present = sorted(path.relative_to(folder).as_posix() for path in (folder / "kernels").glob("*"))
    name = draw.choice([*present, "kernels/new.py", "kernels/new.plan", "kernels/x.sm_90.f.cubin"])
    before = (
        (folder / name).read_bytes() if name in present else b"import os\nos.mkdir('/tmp/pwned')\n"
    )
    change = _as_text(draw.choice((_words, _lines))) if name in present else _bytes
    forge.write(folder / name, change(before, draw))
    return f"{name} changed"


#: What is mutated, for every target and for one.
COMMON: tuple[Mutator, ...] = (
    manifest, cache, header, template, placed,
    _of_file("tokenizer.json", _as_json), _of_file("tokenizer.json", _bytes),
    _of_file("tokenizer_config.json", _as_json), _of_file("report.json", _as_json),
    _of_file("manifest.json", _bytes), _of_file("graph.eir", _bytes),
)  # fmt: skip
GRAPH: tuple[Mutator, ...] = (
    _of_file("graph.eir", _as_text(_words)), _of_file("graph.eir", _as_text(_words)),
    _of_file("graph.eir", _as_text(_words)), _of_file("graph.eir", _as_text(_lines)),
)  # fmt: skip
MUTATORS: dict[str, tuple[Mutator, ...]] = {
    "onnx": (
        *COMMON,
        model_structure,
        model_structure,
        model_structure,
        _of_file("model.onnx", _bytes),
    ),
    "reference": (*COMMON, *GRAPH),
    "triton": (*COMMON, *GRAPH, kernel, kernel),
}


def mutate(base: Path, out: Path, target: str, seed: int) -> str:
    """A mutated copy of an artifact; gives what was done to it."""
    draw = random.Random(f"{target} {seed}")
    folder = forge.copy(base, out)
    said = draw.choice(MUTATORS[target])(folder, draw)
    listing = folder / "manifest.json"
    if draw.random() < 0.6 and listing.is_file() and not listing.is_symlink():
        try:
            listed = forge.manifest(folder)
            names = {*listed["files"], *(["chat_template.jinja"] if draw.random() < 0.7 else [])}
            names |= {p.relative_to(folder).as_posix() for p in (folder / "kernels").glob("*")}
            found = [n for n in names if (folder / n).is_file() and not (folder / n).is_symlink()]
            forge.seal(folder, listed, *sorted(found))
            said += ", sealed"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
    return said
