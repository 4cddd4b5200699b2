"""Source of the kernels of a kind: one text for all schemes, in which a scheme's decoding stands.

    y[b, n] = sum over groups g of scale[n, g] * (sum over k in g of x[b, k] * value[n, k])  + bias[n]

matvec   one row of activations: products and sums in float32, no matrix instruction
matmul   tiles of rows: weights are the left operand, decoded in registers, and activations the right one
merge    the sum of parts that programs made of ranges of columns, in their order: never atomic

Numbers. Sums are float32. The inner sum is over values as they are decoded, and the scale multiplies it: so
operands of matrix instructions are small integers, or levels, which halves hold exactly (nf4 is rounded
there). Float32 activations are cut in two parts of tf32, which lose what is beyond their 22nd bit; where
values are not exact in tf32, Triton's product in three parts is taken.
"""

from __future__ import annotations

from .decoder import TRITON
from .kinds import LinearKind
from .layout import WORDS
from .text import added, filled_in, indented

_TEXT = '''
@triton.jit(do_not_specialize=["rows", "segments", "run"])
def matvec(
    x, codes, scales, {given}y, rows, outs, segments, run,
    OUTS: tl.constexpr, WHOLE: tl.constexpr,
):
    """x [{columns} segments], codes [segments, outs, {words}], scales [groups, outs] -> y [outs], or a part's
    [parts, outs]; `run` segments a part, OUTS rows of the weight a program."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    live = n < outs
    first = tl.program_id(2) * run
    word = tl.arange(0, {words})
    total = tl.zeros([OUTS, {words}], tl.float32)
    for segment in tl.range(first, tl.minimum(first + run, segments), num_stages=3):
        at = (segment * outs + n).to(tl.int64) * {words}
        words = tl.load(codes + at[:, None] + word[None, :], mask=live[:, None], other=0)
        for span in tl.static_range({spans}):
            group = {group}
            scale = tl.load(scales + group * outs + n, mask=live, other=0)
            scale = {scale}
            {zero}
            part = tl.zeros([OUTS, {words}], tl.float32)
            for plane in tl.static_range({planes}):
                k = segment * {columns} + (span * {planes} + plane) * {words}
                a = tl.load(x + k + word).to(tl.float32)
{single}
                part += values * a[None, :]
            total += part * scale[:, None]
    found = tl.sum(total, 1)
    if WHOLE:
        {added}
        tl.store(y + n, found.to(y.dtype.element_ty), mask=live)
    else:
        tl.store(y + tl.program_id(2) * outs + n, found, mask=live)


@triton.jit(do_not_specialize=["rows", "segments", "run"])
def matmul(
    x, codes, scales, {given}y, rows, outs, segments, run,
    OUTS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):
    """As `matvec`, for x [rows, {columns} segments] -> y [rows, outs] or [parts, rows, outs]."""
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = n < outs
    first = tl.program_id(2) * run
    word = tl.arange(0, {words})
    start = x + b.to(tl.int64)[None, :] * (segments * {columns}) + word[:, None]
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for segment in tl.range(first, tl.minimum(first + run, segments)):
        at = (segment * outs + n).to(tl.int64) * {words}
        words = tl.load(codes + at[:, None] + word[None, :], mask=live[:, None], other=0)
        for span in tl.static_range({spans}):
            group = {group}
            scale = tl.load(scales + group * outs + n, mask=live, other=0)
            scale = {scale}
            {zero}
            part = tl.zeros([OUTS, ROWS], tl.float32)
            for plane in tl.static_range({planes}):
                k = segment * {columns} + (span * {planes} + plane) * {words}
                a = tl.load(start + k, mask=(b < rows)[None, :], other=0.0){cast}
{values}
{product}
            total += part * scale[:, None]
    to = b.to(tl.int64)[None, :] * outs + n[:, None]
    kept = (b < rows)[None, :] & live[:, None]
    if WHOLE:
        found = total
        {added_rows}
        tl.store(y + to, found.to(y.dtype.element_ty), mask=kept)
    else:
        tl.store(y + tl.program_id(2).to(tl.int64) * rows * outs + to, total, mask=kept)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge(sums, {bias}y, rows, outs, parts, SIZE: tl.constexpr):
    """sums [parts, rows, outs] -> y [rows, outs]; SIZE numbers a program."""
    n = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    size = rows.to(tl.int64) * outs
    live = n < size
    found = tl.zeros([SIZE], tl.float32)
    for part in range(parts):
        found += tl.load(sums + part * size + n, mask=live, other=0.0)
    {merged}
    tl.store(y + n, found.to(y.dtype.element_ty), mask=live)
'''


def float_source(kind: LinearKind) -> str:
    """The source of the kernels of a kind whose products are of floats."""
    layout = kind.layout(1)
    span = min(layout.block or layout.columns, layout.columns)
    place = f"({layout.bits} * (span * {span // WORDS} + plane))"
    group = (
        f"(segment * {layout.columns} + span * {span}) // {layout.block}" if layout.block else "0"
    )
    return filled_in(
        _TEXT,
        given="".join(f"{name}, " for name in arguments_beside(kind)),
        bias="bias, " if kind.bias else "",
        columns=layout.columns,
        words=WORDS,
        spans=layout.columns // span,
        group=group,
        planes=span // WORDS,
        scale=kind.decoder.scale(),
        zero=indented(_zero(kind), 12).lstrip(),
        single=indented(kind.decoder.values(kind.scheme, "fp32", place), 16),
        values=indented(_values(kind, place), 16),
        product=indented(_product(kind), 16),
        added=added(kind, "n"),
        added_rows=added(kind, "n", "[:, None]"),
        merged=added(kind, "n % outs"),
        cast="" if kind.multiplied == kind.type else f".to({TRITON[kind.multiplied]})",
    )


def arguments_beside(kind: LinearKind) -> list[str]:
    """What kernels are given of a weight beside codes and scales."""
    return [*(["zeros"] if kind.zeros else []), *(["bias"] if kind.bias else [])]


def _zero(kind: LinearKind) -> list[str]:
    bits = kind.decoder.bits(kind.scheme)
    if not kind.zeros:
        return [f"zero = tl.full([OUTS, 1], {1 << (bits - 1)}, tl.float32)"]
    return [
        f"zero = tl.load(zeros + group * {bits} // 8 * outs + n, mask=live, other=0).to(tl.int32)",
        f"zero = ((zero >> (group * {bits} % 8)) & {(1 << bits) - 1}).to(tl.float32)[:, None]",
    ]


def _values(kind: LinearKind, place: str) -> list[str]:
    """The lines that make operands of matrix instructions."""
    halves = kind.multiplied == "fp16"
    found = kind.decoder.values(kind.scheme, "fp16" if halves else "fp32", place)
    return [*found, f"values = values.to({TRITON['bf16']})"] if kind.multiplied == "bf16" else found


def _product(kind: LinearKind) -> list[str]:
    """The lines that add a plane to the tile's sums, by how exact its operands are."""
    if kind.multiplied != "fp32":
        return ["part = tl.dot(values, a, part)"]
    if not kind.decoder.exact:
        return ['part = tl.dot(values, a, part, input_precision="tf32x3")']
    return [
        "high = (a.to(tl.int32, bitcast=True) >> 13 << 13).to(tl.float32, bitcast=True)",
        'part = tl.dot(values, high, part, input_precision="tf32")',
        'part = tl.dot(values, a - high, part, input_precision="tf32")',
    ]
