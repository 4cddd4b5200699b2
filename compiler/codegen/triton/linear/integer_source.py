"""Source of the kernels of a product of integers: rows of activations in 8 bits times rows of integers.

    y[b, n] = (sum over k of input[b, k] * value[n, k]) * size[b] * unit[n]  + bias[n]

quantize  a row of activations as int8, and its size, max |x| / 127: what `round_to_int8` means, to the bit
matmul    tiles of rows: weights are the left operand, made int8 in registers, activations the right one
merge     the sum of parts that programs made of ranges of columns

Numbers. Values and sums are integers, so that nothing is rounded until both scales multiply the whole sum,
and parts may be added in any order. A row of up to 131,072 weights fits the 32 bits of a sum. One row of
activations takes matrix instructions too: they are the only ones that multiply bytes.
"""

from __future__ import annotations

from ....ir.ops.rounding import LARGEST, LEAST
from .kinds import LinearKind
from .layout import BYTES
from .text import added, filled_in, indented

_TEXT = '''
@triton.jit
def quantize(x, inputs, sizes, width, columns, SIZE: tl.constexpr):
    """x [rows, width] -> inputs i8 [rows, columns], 0 where x ends, and sizes [rows]; a row a program, SIZE
    numbers at a time."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    largest = tl.zeros([SIZE], tl.float32)
    for start in range(0, width, SIZE):
        k = start + place
        a = tl.load(x + row * width + k, mask=k < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(a))
    size = tl.maximum(tl.div_rn(tl.max(largest, 0), {largest}), {least})
    tl.store(sizes + row, size)
    for start in range(0, columns, SIZE):
        k = start + place
        a = tl.load(x + row * width + k, mask=k < width, other=0.0).to(tl.float32)
        # What is beyond the last bit of a mantissa is rounded to even.
        found = (tl.div_rn(a, size) + 12582912.0) - 12582912.0
        tl.store(inputs + row * columns + k, found.to(tl.int8), mask=k < columns)


@triton.jit(do_not_specialize=["rows", "segments", "run"])
def matmul(
    inputs, sizes, codes, {given}y, rows, outs, segments, run,
    OUTS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):
    """inputs [rows, {columns} segments], codes [segments, outs, {words}] -> y [rows, outs], or a part's i32
    [parts, rows, outs]; `run` segments a part, OUTS rows of the weight and ROWS of activations a program."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = n < outs
    first = tl.program_id(2) * run
    word = tl.arange(0, {words})
    start = inputs + b.to(tl.int64)[None, :] * (segments * {columns}) + word[:, None]
    total = tl.zeros([OUTS, ROWS], tl.int32)
    for segment in tl.range(first, tl.minimum(first + run, segments)):
        at = (segment * outs + n).to(tl.int64) * {words}
        words = tl.load(codes + at[:, None] + word[None, :], mask=live[:, None], other=0)
        for span in tl.static_range({spans}):
            {group}
            for plane in tl.static_range({planes}):
                k = segment * {columns} + (span * {planes} + plane) * {words}
                a = tl.load(start + k, mask=(b < rows)[None, :], other=0)
{values}
                total = tl.dot(values, a, total)
    to = b.to(tl.int64)[None, :] * outs + n[:, None]
    kept = (b < rows)[None, :] & live[:, None]
    if WHOLE:
        unit = tl.load(units + n, mask=live, other=0.0).to(tl.float32)
        size = tl.load(sizes + b, mask=b < rows, other=0.0)
        found = total.to(tl.float32) * size[None, :] * unit[:, None]
        {added_rows}
        tl.store(y + to, found.to(y.dtype.element_ty), mask=kept)
    else:
        tl.store(y + tl.program_id(2).to(tl.int64) * rows * outs + to, total, mask=kept)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge(sums, sizes, units, {bias}y, rows, outs, parts, SIZE: tl.constexpr):
    """sums i32 [parts, rows, outs] -> y [rows, outs]; SIZE numbers a program."""
    n = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    size = rows.to(tl.int64) * outs
    live = n < size
    total = tl.zeros([SIZE], tl.int32)
    for part in range(parts):
        total += tl.load(sums + part * size + n, mask=live, other=0)
    unit = tl.load(units + n % outs, mask=live, other=0.0).to(tl.float32)
    found = total.to(tl.float32) * tl.load(sizes + n // outs, mask=live, other=0.0) * unit
    {merged}
    tl.store(y + n, found.to(y.dtype.element_ty), mask=live)
'''


def integer_source(kind: LinearKind) -> str:
    """The source of the kernels of a kind whose products are of integers."""
    layout = kind.layout(1)
    span = min(layout.block or layout.columns, layout.columns)
    planes = span // BYTES
    place = f"({layout.bits} * (span * {planes} + plane))"
    return filled_in(
        _TEXT,
        given="".join(f"{name}, " for name in integer_arguments(kind)),
        bias="bias, " if kind.bias else "",
        largest=float(LARGEST),
        least=LEAST,
        columns=layout.columns,
        words=BYTES,
        spans=layout.columns // span,
        planes=planes,
        group=indented(_group(kind, layout.columns, span), 12).lstrip(),
        values=indented(kind.decoder.integers(kind.scheme, place), 16),
        added_rows=added(kind, "n", "[:, None]"),
        merged=added(kind, "n % outs"),
    )


def integer_arguments(kind: LinearKind) -> list[str]:
    """What kernels are given of a weight beside its codes."""
    groups = ["scales", "zeros"] if "units" in kind.stored else []
    return [*groups, "units", *(["bias"] if kind.bias else [])]


def _group(kind: LinearKind, columns: int, span: int) -> list[str]:
    """The lines that load what a group of integers has of its own."""
    if "units" not in kind.stored:
        return []
    return [
        f"group = (segment * {columns} + span * {span}) // {kind.decoder.block(kind.scheme)}",
        "scale = tl.load(scales + group * outs + n, mask=live, other=0).to(tl.int8)[:, None]",
        "zero = tl.load(zeros + group // 2 * outs + n, mask=live, other=0)",
        "zero = ((zero >> (group % 2 * 4).to(tl.uint8)) & 15).to(tl.int8)[:, None]",
    ]
