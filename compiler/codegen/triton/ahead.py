"""Kernels compiled with no GPU, and what the compiler says of them: registers, shared memory, spills.

The arguments are taken as a launch usually has them: tensors contiguous over their ranks, pointers
aligned to 16 bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import UnsupportedError, pass_on
from .dtypes import TYPES, output_type
from .emit import Argument, Generated
from .kernel import Kernel
from .options import Tiles, merge_tiles

#: Matrix instructions as PTX writes them.
INSTRUCTIONS = ("mma.sync", "tcgen05.mma", "wgmma.mma_async")


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A function compiled for a capability.

    `registers` a thread, `shared` bytes a block, `spills` bytes that did not fit the registers
    (`stack` bytes of local memory all told); `matrix` counts matrix instructions by name in the PTX;
    `metadata` is what Triton's loader wants to know, as plain data.
    """

    capability: int
    registers: int
    shared: int
    stack: int
    spills: int
    matrix: Mapping[str, int]
    seconds: float
    ptx: str
    cubin: bytes
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Compiled(Assembled):
    """One function of a kernel made of a plan: "whole", "part" or "merge", at tiles."""

    kind: str
    tiles: Tiles


#: The types of a function's arguments by name, those that are constants, and what is known of the others.
Signature = tuple[dict[str, str], dict[str, Any], dict[Any, Any]]


def compile_ahead(
    kernel: Kernel,
    capability: int,
    kind: str = "whole",
    tiles: Tiles | None = None,
    parts: int = 8,
) -> Compiled:
    """One function of a kernel compiled for a GPU of a compute capability (80, 90, 100), with no GPU.

    `tiles` are the kernel's own where none are given. Raises UnsupportedError where Triton refuses.
    """
    generated = kernel.functions[kind]
    tiles = tiles or (merge_tiles(kernel.tiles) if kind == "merge" else kernel.tiles)
    known = {"ROWS": tiles.rows, "STREAM": tiles.stream, "PARTS": parts}
    signature = signature_of(kernel, generated, known)
    made = assemble(
        kernel.function(kind), generated.name, signature, capability, tiles.warps, tiles.stages
    )
    return Compiled(**vars(made), kind=kind, tiles=tiles)


def assemble(
    function: Any, name: str, signature: Signature, capability: int, warps: int, stages: int
) -> Assembled:
    """A Triton function, called `name` in what is said of it, compiled for a capability with no GPU.

    Raises UnsupportedError where Triton refuses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(function, *signature)
    options = {"num_warps": warps, "num_stages": max(1, stages), "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    log = io.StringIO()
    start = time.perf_counter()
    # What is found in a cache comes without the assembler's log, which Triton prints where it is asked to.
    with (
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        try:
            made = triton.compile(source, target=target, options=options)
        except Exception as error:
            pass_on(error)
            reason = str(error).strip().splitlines()
            raise UnsupportedError(
                f"Triton does not compile {name} for sm_{capability}: {reason[-1:]}"
            ) from error
    seconds = time.perf_counter() - start
    ptx, said = made.asm["ptx"], log.getvalue()
    return Assembled(
        capability=capability,
        registers=_said(said, r"Used (\d+) registers"),
        shared=int(made.metadata.shared),
        stack=_said(said, r"(\d+) bytes stack frame"),
        spills=_said(said, r"(\d+) bytes spill stores"),
        matrix={name: ptx.count(f"{name}.") for name in INSTRUCTIONS if f"{name}." in ptx},
        seconds=seconds,
        ptx=ptx,
        cubin=made.asm["cubin"],
        metadata=_plain(made.metadata),
    )


def _said(log: str, what: str) -> int:
    """A number from the assembler's log. Raises UnsupportedError where it is said in other words."""
    found = re.search(what, log)
    if found is None:
        raise UnsupportedError(f"the assembler's log does not have {what!r}: {log.strip()[-200:]}")
    return int(found.group(1))


def _plain(metadata: Any) -> dict[str, Any]:
    """Triton's metadata as plain data, without the paths of the machine that compiled."""
    found: dict[str, Any] = json.loads(json.dumps(metadata._asdict(), default=vars))
    return {**found, "extern_libs": []} if "extern_libs" in found else found


def signature_of(kernel: Kernel, generated: Generated, known: Mapping[str, int]) -> Signature:
    """As `describe`, with the constants of tiles and parts, in the order of the function."""
    signature, constants, attributes = describe(kernel, generated)
    for name in re.findall(r"(\w+): tl\.constexpr", generated.text):
        signature[name] = "constexpr"
        constants[name] = known[name]
    return signature, constants, attributes


def describe(kernel: Kernel, generated: Generated) -> Signature:
    """The signature of a function, its constants, and what is known of its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for at, argument in enumerate(generated.arguments):
        signature[argument.name] = _type(kernel, argument)
        if signature[argument.name] == "constexpr":
            constants[argument.name] = 1
        elif _aligned(kernel, argument):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(kernel: Kernel, argument: Argument) -> str:
    if argument.kind == "part":
        return "*fp32"
    if argument.kind == "input":
        return f"*{kernel.types[argument.of]}"
    if argument.kind == "output":
        return f"*{TYPES[output_type(kernel, argument.of)]}"
    if (
        argument.kind == "stride"
        and kernel.division.plan.ranks_of(argument.of)[-1] == argument.rank
    ):
        return "constexpr"
    return "i32"


def _aligned(kernel: Kernel, argument: Argument) -> bool:
    """Pointers are aligned; so are strides whose last rank is a lane of a multiple of 16."""
    if argument.kind != "stride":
        return argument.kind in ("input", "output", "part")
    last = kernel.division.plan.ranks_of(argument.of)[-1]
    each = kernel.shared.get((argument.of, last), 1)
    return last in kernel.division.roles.lanes and kernel.sizes[last] // each % 16 == 0
