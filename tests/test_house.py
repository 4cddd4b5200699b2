"""Rules of the house: imports run one way, and the names of the four folders stay out of the way."""

from __future__ import annotations

import ast
import os
from collections import deque
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: What stands in graphs as text: it is in a registry, its fields are options, its sizes have bytes.
RECORDS = {f"compiler.ir.{name}" for name in ("item_bytes", "options", "record_text", "registry")}

#: Who may import whom, by names inside `einfold`: the deepest row that fits a module counts, and an entry
#: stands for what is beneath it too. What is beneath a module's own folder may always be imported.
ALLOWED = {
    "errors": set(),
    "compiler.ir": {"errors", "compiler.ir"},
    "compiler.ir.cascade": {"errors"},
    "compiler.ir.kv": {"errors", "compiler.ir.kv", "compiler.ir.types", *RECORDS},
    "compiler.ir.quant": {"errors", "compiler.ir.quant", *RECORDS},
    "compiler.ir.ops": {
        "errors",
        "compiler.ir.kv",
        "compiler.ir.quant",
        "compiler.ir.registry",
        "compiler.ir.types",
    },
    "compiler.analysis": {"errors", "compiler.ir", "compiler.analysis"},
    "compiler.frontend": {"errors", "compiler.ir", "compiler.frontend"},
    "compiler.fuse": {
        "errors",
        "compiler.ir",
        "compiler.analysis",
        "compiler.frontend",
        "compiler.codegen.cpu",
        "compiler.codegen.triton.device",
        "compiler.codegen.triton.through",
    },
    "compiler.memory": {"errors", "compiler.ir"},
    "compiler.calibrate": {"errors", "compiler.ir", "compiler.calibrate"},
    "compiler.solve": {"errors", "compiler.ir", "compiler.calibrate", "compiler.solve"},
    "compiler.budget": {
        "errors",
        "compiler.ir",
        "compiler.budget",
        "compiler.calibrate",
        "compiler.solve",
    },
    "compiler.passes": {
        "errors",
        "compiler.ir",
        "compiler.analysis",
        "compiler.budget",
        "compiler.calibrate",
        "compiler.memory",
        "compiler.passes",
        "compiler.solve",
    },
    "compiler.passes.fusion.fuse_attention": {
        "errors",
        "compiler.ir",
        "compiler.passes",
        "compiler.fuse",
    },
    "compiler.codegen.target": {
        "errors",
        "compiler.ir",
        "compiler.memory",
        "compiler.passes",
        "runtime",
    },
    "compiler.codegen.*.target": {
        "errors",
        "compiler.ir",
        "compiler.memory",
        "compiler.passes",
        "compiler.codegen.target",
        "runtime",
    },
    "compiler.codegen.onnx.streaming": {
        "errors",
        "compiler.ir",
        "compiler.memory.leveling",
        "compiler.memory.spill",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.onnx.cut_model": {
        "errors",
        "compiler.ir",
        "compiler.memory.spill",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.onnx.in_parts": {
        "errors",
        "compiler.ir",
        "compiler.memory.placing",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.onnx.paging": {
        "errors",
        "compiler.ir",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.onnx.packed_copy": {"errors", "compiler.ir", "runtime"},
    "compiler.codegen.*.runner": {"errors", "compiler.ir", "compiler.memory.arena", "runtime"},
    "compiler.codegen.reference": {
        "errors",
        "compiler.ir",
        "compiler.memory",
        "compiler.codegen.cpu",
    },
    "compiler.codegen.cpu": {"errors", "compiler.ir"},
    "compiler.codegen.onnx": {
        "errors",
        "compiler.ir",
        "compiler.codegen.target",
        "compiler.codegen.cpu",
    },
    "compiler.codegen.triton": {
        "errors",
        "compiler.ir",
        "compiler.codegen.cpu.frame",
        "compiler.codegen.reference",
    },
    "compiler.codegen.triton.starting": {"errors", "compiler.memory.recording"},
    "compiler.codegen.triton.cut": {"errors", "compiler.ir", "runtime.memory.device_ahead"},
    "compiler.codegen.triton.in_parts": {
        "errors",
        "compiler.ir",
        "compiler.analysis.liveness",
        "compiler.memory.survey",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.triton.offload": {
        "errors",
        "compiler.ir",
        "compiler.memory.leveling",
        "compiler.memory.tiers",
        "runtime",
    },
    "compiler.codegen.triton.linear": {"errors", "compiler.ir", "compiler.codegen.triton"},
    "compiler.codegen.triton.attention": {
        "compiler.frontend.cascade",
        "errors",
        "compiler.ir",
        "compiler.analysis",
        "compiler.codegen.triton",
    },
    "compiler": {"errors", "compiler"},
    "runtime": {"errors", "compiler.ir", "runtime"},
    "evaluate": {"", "errors", "compiler", "runtime", "model"},
    "cli": {
        "errors",
        "compiler",
        "runtime",
        "evaluate",
        "api",
        "cli",
        "encoder",
        "encoder_decoder",
        "explaining",
        "model",
        "planning",
        "recipe_text",
    },
    "__main__": {"cli"},
    "": {"", "errors", "compiler", "runtime", "evaluate"},
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("compiler", "runtime", "einfold"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if top == "einfold" and relative.parts[1] in ("compiler", "runtime"):
                continue  # the links
            parts = relative.with_suffix("").parts
            name = ".".join(parts if top != "einfold" else parts[1:])
            found.append((name.removesuffix(".__init__"), path))
    return found


def home(module: str) -> str:
    """The deepest row of the table that fits."""
    prefixes = [
        key for key in ALLOWED if key and (fnmatch(module, key) or fnmatch(module, key + ".*"))
    ]
    return max(prefixes, key=lambda key: (key.count("."), len(key)), default="")


def imports(path: Path, module: str) -> Iterator[tuple[str, list[str]]]:
    """What a file imports of einfold, wherever it does: modules by their names inside, and what of each."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "einfold":
                    yield alias.name.removeprefix("einfold").lstrip("."), []
        elif isinstance(node, ast.ImportFrom):
            base = str(node.module or "")
            if node.level:
                above = node.level - 1
                assert above <= len(package), f"{path}: relative import leaves einfold"
                base = ".".join([*package[: len(package) - above], base]).strip(".")
            elif base.split(".")[0] == "einfold":
                base = base.removeprefix("einfold").lstrip(".")
            else:
                continue
            yield base, [alias.name for alias in node.names]


def test_imports_run_one_way() -> None:
    known = dict(modules())
    for module, path in modules():
        folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for base, names in imports(path, module):
            inside = [f"{base}.{n}".strip(".") for n in names if f"{base}.{n}".strip(".") in known]
            for name in inside or [base]:
                ok = (bool(folder) and f"{name}.".startswith(f"{folder}.")) or any(
                    name == entry or (entry and name.startswith(entry + "."))
                    for entry in ALLOWED[home(module)]
                )
                face = home(module) == home(name) == ""
                assert ok or face, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_has_its_row() -> None:
    rooms = [
        folder
        for pattern in ("compiler/*", "compiler/ir/*", "compiler/codegen/*")
        for folder in ROOT.glob(pattern)
        if (folder / "__init__.py").is_file()
    ]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in rooms} - {"compiler.codegen"}
    assert len(names) > 12
    assert names <= ALLOWED.keys(), "a room without a row in the table of directions"


def graph_of_modules() -> dict[str, set[str]]:
    """What each module imports, lazily and for types too. A package is what its `__init__` holds.

    Whoever imports a.b.c reads a and a.b as well, unless it is in them itself: then they are being read.
    """
    known = {"" if name == "__init__" else name: path for name, path in modules()}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        above = {".".join(module.split(".")[:at]) for at in range(module.count(".") + 1)}
        read: set[str] = set()
        for base, names in imports(path, module if module else "__init__"):
            of_base = [f"{base}.{name}".strip(".") for name in names]
            read |= {name for name in of_base if name in known}
            if not names or any(name not in known for name in of_base):
                read.add(base)
        around = {".".join(m.split(".")[:at]) for m in read for at in range(1, m.count(".") + 1)}
        graph[module] = (read | (around - above)) & known.keys() - {module}
    return graph


def circle(graph: dict[str, set[str]], start: str) -> list[str]:
    """The shortest way from a module back to itself, or []."""
    came: dict[str, str] = {}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for after in sorted(graph[at]):
            if after == start:
                way = [at]
                while way[-1] != start:
                    way.append(came[way[-1]])
                return [*reversed(way), start]
            if after not in came:
                came[after] = at
                queue.append(after)
    return []


def test_no_module_imports_itself_through_others() -> None:
    """Not at the top, not within a function, not for a type."""
    graph = graph_of_modules()
    assert len(graph) > 300
    found = [circle(graph, module) for module in graph]
    assert not [" -> ".join(way) for way in found if way]


def test_circles_are_found() -> None:
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()}
    assert circle(graph, "b") == ["b", "c", "a", "b"]
    assert circle(graph, "d") == []


@pytest.mark.parametrize(
    "top", ["compiler", "runtime", "einfold", "tests", "benchmarks", "examples"]
)
def test_nothing_imports_the_bare_names(top: str) -> None:
    """`import compiler` would claim names that users' own folders have."""
    for path in sorted((ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert not [n for n in names if n.split(".")[0] in ("compiler", "runtime")], path


def test_nothing_evaluates_text() -> None:
    """Text from artifacts and caches is read by parsers; generated kernels are the one thing that is run."""
    runs = set()
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("eval", "exec", "sympify", "lambdify", "__import__"):
                    runs.add((path.relative_to(ROOT).as_posix(), node.func.id))
            elif isinstance(node, ast.Attribute):
                assert node.attr not in ("sympify", "lambdify", "literal_eval"), path
            elif isinstance(node, ast.ImportFrom):
                assert "sympy.parsing" not in (node.module or ""), path
                assert "pickle" not in (node.module or ""), path
    assert runs == {("compiler/codegen/triton/kernel.py", "exec")}


def test_the_links_are_relative() -> None:
    for name in ("compiler", "runtime"):
        assert os.readlink(ROOT / "einfold" / name) == f"../{name}"


def test_the_ir_that_the_runtime_needs_is_light() -> None:
    """Layout and manifest load neither torch nor sympy, so that running an artifact starts at once."""
    ir = ROOT / "compiler" / "ir"
    kv = ir / "kv"
    sizes = [*kv.glob("*.py"), *(kv / "keep").glob("*.py"), *(kv / "store").glob("*.py")]
    records = [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in RECORDS]
    storages = (kv / "store").glob("*/storage.py")
    for path in (*sizes, *storages, *records, ir / "manifest.py"):
        text = path.read_text()
        top = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in top if "torch" in line or "sympy" in line]


def test_no_text_is_read_or_written_as_the_locale_says() -> None:
    """What is opened as text, and by no name of an encoding, would be read otherwise elsewhere."""
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            if name not in ("read_text", "write_text", "fdopen", "open"):
                continue
            words = [ast.literal_eval(a) for a in node.args if isinstance(a, ast.Constant)]
            named = any(keyword.arg == "encoding" for keyword in node.keywords) or "utf-8" in words
            mode = [word for word in words if isinstance(word, str) and set(word) <= set("rwxab+t")]
            plain = name.endswith("text") or (mode and "b" not in mode[0])
            assert named or not plain, f"{path.relative_to(ROOT)}:{node.lineno} names no encoding"


def broad_handlers() -> list[tuple[Path, ast.ExceptHandler]]:
    found = []
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or {"Exception", "BaseException"}
                & {getattr(n, "id", "") for n in ast.walk(node.type)}
            ):
                found.append((path, node))
    return found


#: Handlers that end in the same error, or in the exit code that `recognise` gives.
NOTHING_RENAMED = {
    "einfold/cli/__init__.py",
    "compiler/ir/interrupts.py",
    "compiler/ir/locks.py",
    "runtime/render.py",  # a process of its own, without einfold
}


def test_whoever_catches_everything_asks_first_what_it_is() -> None:
    """An interrupt, want of memory and a full disk are none of the faults that a wrapper names."""
    handlers = broad_handlers()
    assert len(handlers) > 20
    for path, handler in handlers:
        name = str(path.relative_to(ROOT))
        called = {getattr(n.func, "id", "") for n in ast.walk(handler) if isinstance(n, ast.Call)}
        assert name in NOTHING_RENAMED or called & {"pass_on", "stop_on", "recognise"}, (
            f"{name}:{handler.lineno} catches every error and calls neither pass_on nor stop_on"
        )
