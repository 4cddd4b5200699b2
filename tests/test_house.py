"""Rules of the house: imports run one way, and the names of the four folders stay out of the way."""

from __future__ import annotations

import ast
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Who may import whom, by the first folder or file of a module's name inside `einfold`.
ALLOWED = {
    "errors": set(),
    "compiler.ir": {"errors"},
    "compiler.analysis": {"errors", "compiler.ir"},
    "compiler.frontend": {"errors", "compiler.ir"},
    "compiler.calibrate": {"errors", "compiler.ir"},
    "compiler.solve": {"errors", "compiler.ir"},
    "compiler.passes": {
        "errors",
        "compiler.ir",
        "compiler.analysis",
        "compiler.calibrate",
        "compiler.solve",
    },
    "compiler.codegen": {"errors", "compiler.ir"},
    "compiler.codegen.triton.attention": {
        "errors",
        "compiler.ir",
        "compiler.analysis",
        "compiler.codegen",
    },
    "compiler.codegen.*.runner": {"errors", "compiler.ir", "compiler.codegen", "runtime"},
    "compiler": {"errors", "compiler"},
    "runtime": {"errors", "compiler.ir"},
    "": {"", "errors", "compiler", "runtime"},
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
    """The longest prefix that the table names."""
    prefixes = [
        key for key in ALLOWED if key and (fnmatch(module, key) or fnmatch(module, key + ".*"))
    ]
    return max(prefixes, key=len, default="")


def imports(path: Path, module: str) -> list[str]:
    """Modules of einfold that a file imports, by their names inside it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "einfold"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = node.level - 1
                assert above <= len(package), f"{path}: relative import leaves einfold"
                base = package[: len(package) - above]
                found.append(".".join([*base, *(node.module or "").split(".")]).strip("."))
            elif (node.module or "").split(".")[0] == "einfold":
                found.append(str(node.module))
    return found


def test_imports_run_one_way() -> None:
    for module, path in modules():
        for target in imports(path, module):
            name = target.removeprefix("einfold").lstrip(".")
            allowed = ALLOWED[home(module)]
            ok = home(name) == home(module) or any(
                name == a or (a and name.startswith(a + ".")) or (a == "" and home(name) == "")
                for a in allowed
            )
            assert ok, f"{path.relative_to(ROOT)} imports {target}"


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
    for path in (*sizes, *(kv / "store").glob("*/storage.py"), ir / "manifest.py"):
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
