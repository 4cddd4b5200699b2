"""Triton artifacts: kernels from the graph, what is refused, what is trusted, and the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from einfold.compiler.artifact import file_entry
from einfold.compiler.codegen.triton import runner
from einfold.compiler.codegen.triton.ahead import compile_ahead
from einfold.compiler.codegen.triton.attention import (
    attention_kernels,
    bind,
    differences,
    kernel_files,
)
from einfold.compiler.codegen.triton.attention.cascade import cascade_of
from einfold.compiler.codegen.triton.attention.cubins import variants
from einfold.compiler.codegen.triton.attention.kernels import AttentionKernel, attention_kernel
from einfold.compiler.codegen.triton.attention.kinds import AttentionKind
from einfold.compiler.codegen.triton.attention.trusted import with_compiled
from einfold.compiler.codegen.triton.limits import exceeded, limits_of
from einfold.compiler.codegen.triton.options import DEVICES
from einfold.compiler.codegen.triton.shipped import triton_version
from einfold.compiler.ir.cascade.evaluate import evaluate
from einfold.compiler.ir.manifest import NAME, Manifest
from einfold.compiler.ir.ops import einfold_ops
from einfold.compiler.ir.ops.attention import CachedAttention
from einfold.errors import ArtifactError, ArtifactWarning, RecipeError, UnsupportedError
from einfold.runtime.artifact import Artifact
from einfold.runtime.program import read_program

from ... import models
from ...quick import quick, rarely
from .artifact_worker import arguments
from .conftest import Ask, needs_triton

PLAIN = AttentionKind(2, 2, 16, 16, 0.25, 0, 0.0, False, "fp32", "fp32", False)
KINDS = {
    "plain": PLAIN,
    "one head, values of another size": replace(PLAIN, kv_heads=1, group=1, value_size=24),
    "window": replace(PLAIN, window=5),
    "softcap": replace(PLAIN, softcap=2.0, scale=-0.5),
    "sinks in a window": replace(PLAIN, sinks=True, window=5),
    "int8": replace(PLAIN, cache="i8", scaled=True),
    "int4": replace(PLAIN, cache="u8", scaled=True),
    "int4, values of another size": replace(PLAIN, cache="u8", scaled=True, value_size=24),
    "float16": replace(PLAIN, cache="fp16"),
    "counted": replace(PLAIN, counted=True),
    "everything": AttentionKind(2, 3, 16, 8, 0.3, 7, 3.0, True, "fp32", "i8", True, True),
    "everything over int4": AttentionKind(2, 3, 16, 8, 0.3, 7, 3.0, True, "fp32", "u8", True, True),
}


WAITING = {"residual": 8, "slack": 4}
KIVI = {"method": "kivi", "group": 8} | WAITING
CSKV = {"method": "cskv", "keep": 0.6, "recent": 5, "slack": 3}
LOCRET = {"method": "locret", "tokens": 9, "recent": 4, "slack": 3, "read": 64, "steps": 2}
MATRYOSHKA = {"method": "matryoshka_kv", "value_keep": 0.75, "read": 64, "steps": 2}
CROSS = {"method": "cross_layer", "layers": 1, "threshold": -1}
#: Chooses behind 20 tokens, so that a prompt of so many means the same where prompts read everything.
QUEST = {"method": "quest", "page": 4, "share": 0.25, "tokens": 20, "skip_layers": 0}
LANDMARKS = QUEST | {"method": "shadowkv", "tokens": 16, "outliers": 1}


@pytest.fixture(scope="module")
def interpreter(interpreting: Callable[[str], Ask]) -> Ask:
    return interpreting("artifact_worker")


@pytest.fixture(scope="module", autouse=True)
def _own_plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EINFOLD_CACHE", str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.fixture(scope="module")
def compiled(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(name: str, **cache: Any) -> Path:
        key = f"{name} {cache}"
        if key not in made:
            out = tmp_path_factory.mktemp("triton") / name
            einfold.compile(model_folder(name), out, target="triton", recipe={"cache": cache})
            made[key] = out
        return made[key]

    return get


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_cascade_means_what_the_operator_means(kind: AttentionKind) -> None:
    """In float64, so that a term that is small is seen as well."""
    used = [1, 9, 20]
    given = arguments(kind, 4, 26, used)
    given = {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
        for name, x in given.items()
    }
    out = CachedAttention(**given).run()  # writes the caches
    q, k = given["q_BSHD"], given["key_cache_BKCD"]
    from einfold.compiler.ir.ops.rotary import rotary_reference

    tables = (given["positions_BS"], given["cos_PR"], given["sin_PR"], False)
    arrays: dict[str, Any] = {
        "query": rotary_reference(q, *tables).unflatten(2, (kind.kv_heads, kind.group)),
        "key": k.repeat_interleave(1 + kind.halved, -1),
        "value": given["value_cache_BKCD"].repeat_interleave(1 + kind.halved, -1),
        "used": given["used_B"],
    }
    if kind.counted:
        arrays["count"] = given["count_BK"]
    if kind.sinks:
        arrays["sink"] = given["sinks_H"].unflatten(0, (kind.kv_heads, kind.group))
    if kind.scaled:
        arrays |= {"key_scale": given["key_scale_KD"], "value_scale": given["value_scale_KD"]}
    sizes = {"b": 3, "s": 4, "k": kind.kv_heads, "g": kind.group, "c": 26}
    sizes |= {"d": kind.key_size, "f": kind.value_size}
    found = evaluate(cascade_of(kind), {n: x.numpy() for n, x in arrays.items()}, sizes)["out"]
    expected = out.unflatten(2, (kind.kv_heads, kind.group)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@needs_triton
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kernel_does_what_the_operator_does(
    interpreter: Ask, kind: AttentionKind, new: int
) -> None:
    """New tokens in every row at another place, whole and in parts, caches written where they lie."""
    for parts in (1, 3):
        found = interpreter(kind=asdict(kind), new=new, used=[1, 30, 12], parts=parts)
        assert found["error"] < 2e-5, parts
        assert found["same caches"]


@needs_triton
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_layer_that_reads_anothers_slots_has_the_same_kernel(interpreter: Ask, name: str) -> None:
    """After the owner has written this step's tokens, other queries over them; nothing more is written."""
    found = interpreter(kind=asdict(KINDS[name]), new=3, used=[1, 30, 12], parts=2, shared=True)
    assert found["reader"] < 2e-5 and found["same caches"]


@needs_triton
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", {}),
        rarely("gemma2", {}),
        ("gpt_oss", {}),
        rarely("mistral", {"storage": "int8"}),
        rarely("gemma2", {"storage": "f16"}),
        rarely(
            "llama",
            {"storage": "f16", "prune": {"method": "ems", "tokens": 8, "recent": 4, "slack": 3}},
        ),
        rarely("llama", {"storage": "f16", "share": CROSS}),
        rarely(
            "llama", {"prune": {"method": "streaming_llm", "sinks": 2, "recent": 7, "slack": 3}}
        ),
        ("llama", {"prune": {"method": "h2o", "tokens": 8, "slack": 3}}),
        rarely("llama", {"storage": "int8", "prune": LOCRET}),
        rarely(
            "llama",
            {
                "storage": "int8",
                "prune": {"method": "expected_attention", "tokens": 9, "recent": 4, "slack": 3},
            },
        ),
        (
            "llama",
            {
                "storage": "int8",
                "prune": {"method": "razor_attention", "recent": 5, "slack": 3, "induction": 0.5},
            },
        ),
        rarely("llama", {"storage": "int8", "share": CROSS}),
        ("llama", {"storage": "int4"}),
        rarely("gpt_oss", {"storage": "int4"}),
        rarely("llama", {"storage": "int4", "share": CROSS}),
        rarely(
            "llama",
            {
                "storage": "int4",
                "prune": {"method": "razor_attention", "recent": 5, "slack": 3, "induction": 0.5},
            },
        ),
        rarely("llama", {"quant": KIVI | {"rotate": "both"}, "share": CROSS}),
        rarely("llama", {"share": {"method": "minicache", "start": 0, "group": 4} | WAITING}),
        rarely("llama", {"share": CSKV}),
        rarely(
            "gpt_neox",
            {"share": CSKV | {"sinks": 1, "prefill": "streaming", "dtype": "f16"}},
        ),
        rarely("gpt2", {"share": CSKV}),
        ("gpt_oss", {"share": MATRYOSHKA}),
        rarely("llama", {"storage": "f16", "share": MATRYOSHKA}),
        rarely("llama", {"read": QUEST}),
        rarely("llama", {"storage": "int8", "read": LANDMARKS}),
        ("llama", {"storage": "int8", "read": QUEST | {"skip_layers": 1, "alike": 8}}),
        (  # 18 tokens stay, and of 21 a query reads 20
            "llama",
            {
                "prune": {"method": "snapkv", "tokens": 18, "observe": 4, "slack": 4},
                "read": QUEST | {"linear": 0.6},
            },
        ),
    ],
)
def test_tokens_are_those_of_the_reference(
    interpreter: Ask, compiled: Callable[..., Path], name: str, cache: dict[str, Any]
) -> None:
    """Prompts past the window, rows of unequal length, and one prompt in chunks."""
    artifact = str(compiled(name, **cache))
    prompts = [list(range(3, 23)), [7, 5, 90]]
    together = interpreter(artifact=artifact, prompts=prompts, new=5)
    chunked = interpreter(artifact=artifact, prompts=prompts[:1], new=3, chunk=7)
    for found in (together, chunked):
        assert found["found"] == found["expected"]
        assert found["tensors"] and not found["warnings"]


def test_what_an_artifact_holds(compiled: Callable[..., Path]) -> None:
    folder = compiled("gemma2")
    manifest = Manifest.read(folder)
    assert manifest.target == "triton" and not manifest.recipe["triton"]["cubins"]
    names = sorted(name for name in manifest.files if name.startswith("kernels/"))
    assert names == [
        f"kernels/attention_h4_kv2_d16{window}_softcap_fp32.{kind}"
        for window in ("", "_window16")
        for kind in ("plan", "py")
    ]
    assert "model.onnx" not in manifest.files
    source = (folder / names[-1]).read_text()
    assert source.startswith("# Cached attention of layer 0.\n")
    assert "# einfold.cascade 1\n" in source and "# einfold.plan 1 over c, passes 3 -> 1" in source
    assert "used[b] + pos(s)" in source and "- pos(c) < 16" in source
    report = json.loads((folder / "report.json").read_text())
    assert "needs a CUDA device" in report["check"]["check"]


def test_layers_of_one_kind_share_a_kernel(compiled: Callable[..., Path]) -> None:
    (made,) = kernels_of(compiled("llama"))
    assert made.layers == (0, 1)
    assert "layers 0, 1" in kernel_files([made])[f"kernels/{made.name}.py"]


@needs_triton
def test_a_reader_shares_its_owners_kernel(compiled: Callable[..., Path]) -> None:
    program = read_program(Artifact.open(compiled("llama", storage="int8", share=CROSS)))
    (made,) = attention_kernels(program)
    assert made.layers == (0, 1) and made.kind.scaled
    assert [node.target for node in bind(program, [made])] == [
        einfold_ops.cached_attention.default,
        einfold_ops.shared_attention.default,
    ]


def kernels_of(folder: Path) -> list[AttentionKernel]:
    program = read_program(Artifact.open(folder))
    return attention_kernels(program, DEVICES[90])


def changed(folder: Path, out: Path, name: str, text: str) -> Path:
    """A copy of an artifact with one file replaced, and a manifest that agrees with it."""
    shutil.copytree(folder, out)
    (out / name).write_text(text)
    manifest = Manifest.read(out)
    files = {**manifest.files, name: file_entry(out / name)}
    (out / NAME).write_bytes(manifest.model_copy(update={"files": files}).dump())
    return out


@pytest.fixture
def on_cpu(compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets artifacts load here; running them takes the interpreter."""
    compiled("llama")  # ahead of the change: compiling would try to run it
    monkeypatch.setattr(runner, "find_device", lambda: torch.device("cpu"))


NAME_OF = "kernels/attention_h4_kv2_d16_fp32"


def test_a_changed_byte_is_refused(compiled: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(compiled("llama"), out)
    path = out / f"{NAME_OF}.py"
    text = path.read_bytes()
    path.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"d16_fp32\.py is damaged"):
        einfold.load(out)


def test_layers_that_read_pages_have_kernels_of_their_own(compiled: Callable[..., Path]) -> None:
    """The first layer reads everything, and its kernel reads prompts for the second too."""
    folder = compiled("llama", read=QUEST | {"skip_layers": 1})
    manifest = Manifest.read(folder)
    assert [name for name in manifest.files if name.startswith("kernels/")] == [
        *(f"{NAME_OF}.{kind}" for kind in ("plan", "py")),
        *(f"kernels/attention_h4_kv2_d16_pages4_fp32.{kind}" for kind in ("plan", "py")),
        "kernels/choosing_h4_kv2_d16_pages4_fp32.py",
    ]
    source = (folder / "kernels/choosing_h4_kv2_d16_pages4_fp32.py").read_text()
    assert source.startswith("# The choice of pages of layer 1.\n")
    assert (
        "# Which pages a query reads: quest(page=4,share=0.25,tokens=20,spread=0.5,alike=0,linear=0.0),\n"
        in source
    )
    layout = manifest.layout()
    assert layout is not None
    # Keys, values and bounds in float32: 2 heads of 16 numbers, 25 pages and one more.
    assert layout.bytes(1, 100) == 4 * 2 * 16 * (2 * 2 * 100 + 2 * 26)
    assert [made.layers for made in kernels_of(folder)] == [(0, 1), (1,)]


@needs_triton
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "line",
    [
        "stream score[b, s, k, g, c] = __import__('os').system('true')",
        'stream score[b, s, k, g, c] = eval("1")',
        "state top[b] = lambda: 0 :: max(c)",
        "finish out[b] = open(1)",
    ],
)
def test_a_hostile_plan_is_refused_by_the_parser(
    compiled: Callable[..., Path], tmp_path: Path, line: str
) -> None:
    folder = compiled("llama")
    text = (folder / f"{NAME_OF}.plan").read_text()
    out = changed(folder, tmp_path / "copy", f"{NAME_OF}.plan", f"{text}{line}\n")
    with pytest.raises(ArtifactError, match=r"d16_fp32\.plan is no plan that einfold writes: line"):
        einfold.load(out)


@needs_triton
def test_sources_and_plans_of_an_artifact_are_never_used(
    interpreter: Ask, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    """A source that would stop the process, and a plan that reads and is wrong: told of, and passed over."""
    folder = compiled("llama")
    bad = changed(folder, tmp_path / "a", f"{NAME_OF}.py", "raise SystemExit(3)\n")
    plan = (folder / f"{NAME_OF}.plan").read_text().replace(":: max(c)", ":: min(c)")
    bad = changed(bad, tmp_path / "b", f"{NAME_OF}.plan", plan)
    found = interpreter(artifact=str(bad), prompts=[[5, 6, 7]], new=2)
    assert found["found"] == found["expected"]
    told = " ".join(found["warnings"])
    assert "d16_fp32.py is not what this einfold makes of graph.eir; it is not used" in told
    assert "d16_fp32.plan is not what" in told


@needs_triton
@pytest.mark.usefixtures("on_cpu")
def test_sympy_reads_no_text_of_an_artifact(
    compiled: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SymPy's parser evaluates what it reads. Plans are derived anew here, so SymPy is at work."""
    from sympy.parsing import sympy_parser

    monkeypatch.setattr(sympy_parser, "eval_expr", lambda *given: pytest.fail(f"read {given}"))
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path / "empty"))
    einfold.load(compiled("llama"))
    assert len(list((tmp_path / "empty" / "plans").iterdir())) == 1


def test_files_that_are_missing_or_too_many_are_told(compiled: Callable[..., Path]) -> None:
    kernels = kernels_of(compiled("llama"))
    files = kernel_files(kernels)
    expected = kernel_files(kernels)
    assert differences(expected, files) == []
    (source,) = [name for name in files if name.endswith(".py")]
    less = {name: text for name, text in files.items() if name != source}
    assert differences(expected, less) == [f"{source} is missing"]
    (told,) = differences(expected, files | {"kernels/other.py": "x"})
    assert told.startswith("kernels/other.py is none of what")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(compiled: Callable[..., Path]) -> None:
    folder = compiled("llama")
    with pytest.raises(UnsupportedError, match=r"needs a CUDA device, .* --engine reference"):
        einfold.load(folder)
    model = einfold.load(folder, engine="reference")
    assert len(model.generate([3, 4, 5], max_new_tokens=2).tokens) == 2
    with pytest.raises(RecipeError, match="compiled for triton, so engine 'onnx' cannot run it"):
        einfold.load(folder, engine="onnx")


def test_an_onnx_artifact_is_no_triton_one(artifact: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="compile with --target triton"):
        einfold.load(artifact("llama"), engine="triton")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "triton", "portable": True}, "portable is for the target onnx"),
        ({"cubins": ["sm_90"]}, "add --target triton"),
        ({"target": "triton", "cubins": ["sm_30"]}, "triton.cubins"),
    ],
)
def test_options_that_do_not_go_together(
    model_folder: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        einfold.compile(model_folder("llama"), tmp_path / "out", **options)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        (AttentionKind(8, 4, 128, 128, 0.09, 0, 0.0, False, "fp32", "i8", True), 90),
        (AttentionKind(8, 4, 128, 128, 0.09, 0, 0.0, False, "fp32", "u8", True), 90),
        (AttentionKind(8, 2, 256, 256, 0.06, 4096, 50.0, False, "fp32", "fp32", False), 80),
    ],
    ids=["head size 128 over int8", "head size 128 over int4", "head size 256"],
)
def test_kernels_fit_the_gpu_that_they_are_compiled_for(
    kind: AttentionKind, capability: int
) -> None:
    """A kernel that asks for more shared memory than there is cannot start; one that spills much is slow."""
    made = attention_kernel(kind, "tested", (0,), 8192, DEVICES[capability])
    assert not made.kernel.division.ahead and not made.kernel.division.after
    for variant in variants(made):
        if variant.name in ("prefill", "decode"):
            found = compile_ahead(made.kernel, capability, variant.kind, variant.tiles)
            limits = limits_of(triton_version(), capability)
            assert exceeded(made.kernel, found, limits) == []


class Recorder:
    """Stands for a function on a GPU, and keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *values, **constants: self.launches.append((grid, values, constants))


@pytest.fixture(scope="module")
def with_cubins(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact with kernels compiled for one GPU: half a minute on a slow machine."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("cubins") / "llama"
    options: dict[str, Any] = {"target": "triton", "cubins": ["sm_90"], "check": False}
    einfold.compile(model_folder("llama"), out, **options)
    return out


@needs_triton
def test_compiled_kernels_serve_the_launches_they_are_for(with_cubins: Path) -> None:
    artifact = Artifact.open(with_cubins)
    files = {name: artifact.file(name) for name in artifact.manifest.files}
    kernels = kernels_of(with_cubins)
    (made,), missing = with_compiled(kernels, "sm_90", files)
    assert not missing
    whole = made.kernel.function("whole")
    one = next(c for c in whole.compiled if c.constants["ROWS"] == made.decode.rows)
    assert one.handle.metadata.name == f"{made.name}_whole"
    assert one.handle.metadata.target.arch == 90
    compiled, otherwise = Recorder(), Recorder()
    constants = {
        "ROWS": made.decode.rows,
        "STREAM": made.decode.stream,
        "num_warps": made.decode.warps,
        "num_stages": made.decode.stages,
        "enable_fp_fusion": True,
    }
    whole = replace(whole, compiled=(replace(one, handle=compiled),), otherwise=otherwise)
    names = [argument.kind for argument in made.kernel.functions["whole"].arguments]
    values = [
        1 if at in one.unit else torch.zeros(4) if names[at] in ("input", "output") else 32
        for at in range(len(names))
    ]
    whole[(1, 2)](*values, **constants)
    ((grid, given, _),) = compiled.launches
    assert grid == (1, 2, 1) and len(given) == len(values) + 2
    for at in (min(one.unit), min(one.aligned)):
        other = list(values)
        other[at] = torch.zeros(4)[1:] if isinstance(values[at], torch.Tensor) else 24
        whole[(1, 2)](*other, **constants)
    whole[(1, 2)](*values, **{**constants, "ROWS": 128})
    assert len(compiled.launches) == 1 and len(otherwise.launches) == 3


@needs_triton
def test_kernels_of_another_triton_or_source_are_not_used(
    with_cubins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(with_cubins)
    files = {name: artifact.file(name) for name in artifact.manifest.files}
    kernels = kernels_of(with_cubins)
    expected = sum(name.endswith(".cubin") for name in files)
    assert expected == 6
    _, missing = with_compiled(kernels, "sm_100", files)
    assert len(missing) == expected
    other = [
        replace(made, kernel=replace(made.kernel, source=f"{made.kernel.source}\n"))
        for made in kernels
    ]
    (found,), missing = with_compiled(other, "sm_90", files)
    assert len(missing) == expected and not found.kernel.function("whole").compiled
    monkeypatch.setattr("einfold.compiler.codegen.triton.shipped.triton_version", lambda: "0")
    _, missing = with_compiled(kernels, "sm_90", files)
    assert len(missing) == expected


@needs_triton
@pytest.mark.usefixtures("on_cpu")
def test_compiled_kernels_are_read_with_trust_alone(
    with_cubins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code that is no such thing, with a hash that agrees: without trust nothing looks at it."""
    stem = "kernels/attention_h4_kv2_d16_fp32.sm_90.decode"
    out = changed(with_cubins, tmp_path / "copy", f"{stem}.json", "no JSON")
    einfold.load(out)
    monkeypatch.setattr(runner, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(runner, "described", lambda device: DEVICES[90])
    einfold.load(out)
    with pytest.raises(ArtifactError, match="does not describe a compiled kernel"):
        einfold.load(out, trust=True)
    monkeypatch.setattr(runner, "described", lambda device: DEVICES[80])
    with pytest.warns(ArtifactWarning, match="6 compiled kernels for sm_80"):
        einfold.load(with_cubins, trust=True)
    monkeypatch.setattr(runner, "find_device", lambda: torch.device("cpu"))
    with pytest.warns(ArtifactWarning, match="need a GPU"):
        einfold.load(with_cubins, trust=True)


@pytest.mark.parametrize("name", quick(["llama", "gemma2", "gpt2", "phi3", "mixtral"], "gemma2"))
def test_a_graph_stays_on_its_device(name: str, tmp_path: Path) -> None:
    """Every operator on tensors of the device that computes nothing: none may come from another one."""
    from einfold.compiler.codegen.triton.runner import KernelRunner
    from einfold.compiler.driver import open_model, trace
    from einfold.compiler.ir.weights import Weight
    from einfold.compiler.recipe import Recipe

    program, _ = trace(open_model(models.save(name, tmp_path / "model")), Recipe())
    meta = torch.device("meta")
    for key in list(program.weights):
        declared = program.weights[key]
        program.weights.discard(key)
        program.weights.add(
            key,
            Weight(
                declared.shape,
                declared.dtype,
                lambda d=declared: torch.empty(d.shape, dtype=d.dtype, device="meta"),
            ),
        )
    assert program.layout is not None
    runner = KernelRunner(program, {}, meta, 0)
    shapes = {"input_ids": (2, 3), "position_ids": (2, 3), "logit_rows": (2,), "lengths": (2,)}
    inputs = {n: torch.zeros(s, dtype=torch.int64, device="meta") for n, s in shapes.items()}
    inputs |= {spec.name: runner.make(spec) for spec in program.layout.buffers(2, 8)}
    assert runner.interpreter.run(inputs)["logits"].device == meta
