"""GEAR as kernels read it."""

from __future__ import annotations

from ...streams import AT, Source, Stream
from ..kivi.stream import stream
from ..storage import GroupShape
from .storage import Gear


def streams(storage: Gear, shape: GroupShape) -> dict[str, Stream]:
    made = stream(storage)
    terms = {part: _correction(made, storage, part, shape.size(part)) for part in ("key", "value")}
    made.key = " + ".join([made.key, *terms["key"]])
    made.value = " + ".join([made.value, *terms["value"]])
    return {"": made}


def _correction(stream: Stream, form: Gear, part: str, size: int) -> list[str]:
    """The low-rank part and outliers, to be added to the codes column by column."""
    terms, at, each = [], AT[part], (("t", form.tokens),)
    for i in range(form.rank):
        left = Source(f"{part}_left{i}", f"{part}_left", at[:3], (), "token", i)
        right = Source(f"{part}_right{i}", f"{part}_right", at, each, "column", i)
        terms.append(f"{stream.add(left)} * {stream.add(right)}")
    vector = form.tokens if part == "key" else size
    for i in range(2 * form.outliers(vector)):
        place, outlier = (
            Source(f"{part}_{name}{i}", f"{part}_{name}", at, each, "row", i)
            if part == "key"
            else Source(f"{part}_{name}{i}", f"{part}_{name}", at[:3], (), "token", i)
            for name in ("place", "outlier")
        )
        here = f"pos(t) % {form.tokens}" if part == "key" else "pos(f)"
        terms.append(f"where({stream.add(place)} == {here}, {stream.add(outlier)}, 0)")
    return terms
