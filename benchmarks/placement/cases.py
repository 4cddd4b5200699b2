"""What is placed: layouts of real shapes, computed without weights, cuts of real artifacts, random cases."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from einfold.compiler.codegen.onnx.cut import HALVED, LEAST_HALVED, PADDING, SMALL
from einfold.compiler.codegen.onnx.cut_model import CutModel
from einfold.compiler.codegen.onnx.packed_copy import laid_out
from einfold.compiler.codegen.onnx.process import PROCESS
from einfold.compiler.ir.device import Device
from einfold.compiler.memory.spill import Slots
from einfold.compiler.memory.tiers import Choice, Fixed, Load, Piece
from einfold.runtime.artifact import Artifact
from einfold.runtime.memory.pages import UNIT

#: Disks and memories: what is assumed where nothing was measured, and two whose disks are less far behind.
DEVICES = {
    "disk 0.5, memory 20 GB/s": Device(source="case"),
    "disk 3, memory 20 GB/s": Device(disk_bandwidth=3e9, source="case"),
    "disk 6, memory 10 GB/s": Device(disk_bandwidth=6e9, ram_bandwidth=10e9, source="case"),
}

#: Where a budget lies between the least that does and all that could be held.
BUDGETS = (0.02, 0.25, 0.5, 0.75, 0.95)

#: Tokens that a step may have, and the newest of a spilled layer that stay in memory.
_CHUNK, _TAIL = 128, 64


@dataclass(frozen=True)
class Shape:
    """A decoder by its sizes."""

    layers: int
    width: int
    inner: int
    queries: int
    pairs: int
    head: int
    vocabulary: int
    experts: int = 0
    choices: int = 0
    full: int = 1
    """Of so many layers one keeps every token; the others have a window of 1,024."""


#: By the configs of Qwen2.5-0.5B, Llama-3.2-1B, Mixtral-8x7B, Gemma-3-4B and Llama-3-70B.
SHAPES = {
    "0.5B": Shape(24, 896, 4864, 14, 2, 64, 151936),
    "1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "Gemma 4B": Shape(34, 2560, 10240, 8, 4, 256, 262208, full=6),
    "Mixtral 8x7B": Shape(32, 4096, 14336, 32, 8, 128, 32000, experts=8, choices=2),
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}

#: Bits of a weight, and of what comes with a block of 128 as it lies in the file: a scale, and a zero point.
FORMATS = {"int4": (4, 32, 4), "fp32": (32, 0, 0)}


@dataclass(frozen=True)
class Case:
    """Something to place."""

    name: str
    load: Load
    paged: bool
    """Streamed weights are pages; else they are packed in every step."""

    @property
    def routed(self) -> bool:
        """Whether tokens choose experts, of which pages are held."""
        return self.paged and any(piece.choice is not None for piece in self.load.paged)


def shaped(name: str, weights: str, context: int = 0, paged: bool = True) -> Case:
    """A shape in a format, with a cache of float32 for so many tokens that may be spilled, layer by layer."""
    shape = SHAPES[name]
    plain, paged_pieces = list[Piece](), list[Piece]()
    for op in _super_ops(shape, FORMATS[weights][0]):
        mine = Matrices(op.name, op.every, op.experts, shape.choices, weights)
        plain.append(mine.plain)
        paged_pieces.append(mine.paged)
    slots = tuple(_slots(shape, context))
    windows = shape.layers - len(slots)
    cache = sum(s.nbytes for s in slots) + windows * _cache_bytes(shape, min(context, 1024))
    widest = 2 * shape.inner * max(shape.choices, 1)
    activations = 4 * (int(2.5 * widest) * _CHUNK + 2 * shape.vocabulary)
    fixed = Fixed(PROCESS, cache, activations)
    found = Load(tuple(plain), fixed, tuple(paged_pieces), UNIT, slots=slots)
    told = f"{name} {weights}" + (f", cache of {context:,}" if context else "")
    return Case(told + ("" if paged else ", packed in steps"), found, paged)


@dataclass(frozen=True)
class _Op:
    name: str
    every: tuple[tuple[int, int], ...]
    """Rows and columns of what every token reads."""
    experts: tuple[tuple[tuple[int, int], ...], ...] = ()


def _super_ops(shape: Shape, bits: int) -> Iterator[_Op]:
    width = shape.width
    attention = (
        ((shape.queries + 2 * shape.pairs) * shape.head, width),
        (width, shape.queries * shape.head),
    )
    feeding = ((2 * shape.inner, width), (width, shape.inner))
    norms = ((1, width), (1, width))
    products = (*attention, *feeding)
    sizes = [rows * columns for rows, columns in products]
    head, layer_size, first = shape.vocabulary * width, sum(sizes), len(products)
    most = max((shape.layers * layer_size + head) // HALVED, LEAST_HALVED * 8 // bits)
    if layer_size > most and not shape.experts:  # as `cut` does, both norms before the second part
        first = min((2, 3), key=lambda n: max(sum(sizes[:n]), sum(sizes[n:])))
        layer_size = max(sum(sizes[:first]), sum(sizes[first:]))
    yield _Op("embedding", ())
    for layer in range(shape.layers):
        if not shape.experts:
            yield _Op(f"layer {layer}", (*products[:first], *norms))
            if products[first:]:
                yield _Op(f"layer {layer} rest", products[first:])
        else:
            yield _Op(f"layer {layer}", (*attention, *norms, (shape.experts, width)))
            yield _Op(f"layer {layer} experts", (), (feeding,) * shape.experts)
    parts = -(-head // layer_size)
    rows = -(-shape.vocabulary // parts // 64) * 64
    for part in range(parts):
        mine = min(rows, shape.vocabulary - part * rows)
        yield _Op(f"head part {part + 1}", ((mine, width),))


class Matrices:
    """The bytes of a super-op's matrices, in the file and as onnxruntime packs them."""

    def __init__(
        self,
        name: str,
        every: Sequence[tuple[int, int]],
        experts: Sequence[Sequence[tuple[int, int]]],
        choices: int,
        weights: str,
    ) -> None:
        groups = [
            [_sizes(rows, columns, weights) for rows, columns in g] for g in (every, *experts)
        ]
        nbytes = sum(sum(sizes) for group in groups for sizes in group)
        held = sum(codes + 3 * scales + zeros for g in groups for codes, scales, zeros in g)
        layout = laid_out([[n for s in g for n in _packed(*s, weights)] for g in (every, *experts)])
        choice = None
        if experts:
            of_each = sum(sum(sizes) for sizes in groups[1])
            chosen = nbytes - (len(experts) - choices) * of_each
            choice = Choice(chosen * layout.nbytes // nbytes, layout.most(choices))
        self.plain = Piece(name, nbytes, held)
        self.paged = Piece(name, layout.nbytes, layout.nbytes, choice, nbytes)


def _sizes(rows: int, columns: int, weights: str) -> tuple[int, int, int]:
    """Bytes of codes, scales and zero points; a norm, of one row, is in float32."""
    bits, scale, zero = FORMATS[weights] if rows > 1 else FORMATS["fp32"]
    blocks = -(-columns // 128)
    return rows * columns * bits // 8, rows * blocks * scale // 8, -(-blocks * zero // 8) * rows


def _packed(rows: int, columns: int, weights: str) -> list[int]:
    """As `codegen/onnx/cut.py` counts them: codes with scales and as many sums, and what is not so small that
    the saved model holds it."""
    codes, scales, zeros = _sizes(rows, columns, weights)
    found = [codes + 2 * scales + PADDING if scales else codes] if rows > 1 else []
    return found + [size for size in (codes * (rows == 1), zeros) if size >= SMALL]


def _cache_bytes(shape: Shape, tokens: int) -> int:
    return 2 * 4 * shape.pairs * shape.head * tokens


def _slots(shape: Shape, context: int) -> Iterator[Slots]:
    token = _cache_bytes(shape, 1)
    for layer in range(shape.layers if context else 0):
        if layer % shape.full == shape.full - 1:
            name = f"layer {layer}"
            nbytes = token * context
            yield Slots(
                layer,
                name,
                name,
                nbytes,
                token * _TAIL,
                nbytes + 2 * 4096,
                token,
                nbytes + 2 * 4096,
            )


def cut_of(folder: Path, paged: bool = True) -> Case:
    """A real artifact's."""
    model = CutModel.of(Artifact.open(folder))
    layout = model.artifact.manifest.layout()
    tokens = min(512, model.artifact.manifest.model.context)
    load = model.spilling(model.load(_CHUNK, int(layout.peak_bytes(1, tokens, tokens))), tokens)
    return Case(folder.name, load, paged and bool(load.paged))


#: What random cases are of, one after the other.
KINDS = ("pages", "packed in steps", "cache", "experts")


def random_case(seed: int) -> Case:
    """Five to ten super-ops of up to three sizes, which a token reads in part; with a cache that may be
    spilled, or with experts of which a token chooses a quarter, by the seed."""
    drawn, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    sizes = [drawn.randint(2, 40) for _ in range(drawn.randint(1, 3))]
    densities = [drawn.choice((0.7, 0.85, 1.0)) for _ in sizes]
    plain, pieces = list[Piece](), list[Piece]()
    for index in range(drawn.randint(5, 10)):
        size = drawn.randrange(len(sizes))
        held = sizes[size] * UNIT
        name, nbytes, choice = f"layer {index}", int(held * densities[size]), None
        if kind == "experts" and index % 2:
            held = nbytes = 4 * held
            name, choice = f"layer {index - 1} experts", Choice(held // 4, held // 4)
        plain.append(Piece(name, nbytes, int(1.2 * held)))
        pieces.append(Piece(name, nbytes, held, choice))
    each = drawn.randint(5, 60) * UNIT
    found = tuple(
        Slots(n, f"layer {n}", f"layer {n}", each, each // 64, each + 8192, each // 512, each)
        for n in range(len(pieces) if kind == "cache" else 0)
    )
    fixed = Fixed(PROCESS, each * len(found), 1 << 20)
    load = Load(tuple(plain), fixed, tuple(pieces), UNIT, slots=found)
    return Case(f"random {seed}, {kind}", load, kind != "packed in steps")
