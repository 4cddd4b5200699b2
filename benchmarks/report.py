"""The results as Markdown and JSON."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from .entries import BANDWIDTH, EINFOLD, ENTRIES
from .figures import Figures, Records, Row
from .shapes import SHAPES
from .targets import TARGETS, Target

#: Peers that every einfold row is compared with.
PEERS = ("genai int4", "llama.cpp Q4_0", "Hugging Face fp32")


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    flags = set(fields.get("flags", "").split())
    memory = Path("/proc/meminfo").read_text().split()[1]
    cores = sum(
        line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines()
    )
    return {
        "cpu": fields.get("model name", platform.machine()),
        "family": f"{fields.get('cpu family', '?')}-{fields.get('model', '?')}",
        "cores": str(cores),
        "flags": " ".join(flag for flag in wanted if flag in flags),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "python": platform.python_version(),
    }


def slug(found: dict[str, str]) -> str:
    """The kind of machine as part of a file name."""
    name = re.sub(r"\(\w+\)|processor|cpu|@.*", " ", found["cpu"].lower())
    words = re.findall(r"[a-z0-9]+", name)
    return "-".join([*words, found["family"], f"{found['cores']}cores"])


def data(records: Records, found: dict[str, str]) -> dict[str, Any]:
    """Everything as plain data."""
    shapes = {}
    for shape in _shapes(records):
        figures = Figures(records, shape)
        rows = [figures.row(entry) for entry in figures.entries()]
        shapes[shape] = {
            "bandwidth": figures.bandwidth(),
            "busy": figures.busy(),
            "apart": figures.apart(),
            "versions": figures.versions(),
            "rows": {row.entry: vars(row) for row in rows},
            "ratios": {
                row.entry: {
                    peer: {m: figures.ratio(row.entry, peer, m) for m in row.rates}
                    for peer in PEERS
                }
                for row in rows
                if row.entry.startswith(EINFOLD)
            },
        }
    targets = [
        {**vars(target), "value": value, "met": None if value is None else target.met(value)}
        for target, value in judged(records)
    ]
    return {"machine": found, "shapes": shapes, "targets": targets}


def judged(records: Records) -> list[tuple[Target, float | None]]:
    """Each target whose shape was run, with the value measured."""
    found = set(_shapes(records))
    return [(t, t.value(Figures(records, t.shape))) for t in TARGETS if t.shape in found]


def markdown(records: Records, found: dict[str, str], title: str) -> str:
    """The page: what it ran on, a table a shape, the targets."""
    parts = [
        f"# {title}",
        f"{found['cpu']} (family-model {found['family']}), {found['cores']} cores, "
        f"{found['memory']}; {found['flags']}. Python {found['python']}.",
    ]
    for shape in _shapes(records):
        parts += _shape(Figures(records, shape), shape)
    rows = [
        [
            target.title,
            target.entry,
            target.measure or "load",
            f"{'<=' if target.kind == 'load' else '>='} {_value(target, target.wanted)}",
            "not measured" if value is None else _value(target, value),
            "" if value is None else ("met" if target.met(value) else "not met"),
        ]
        for target, value in judged(records)
    ]
    if rows:
        head = ["against", "entry", "measure", "target", "measured", ""]
        parts += ["## Targets", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _shape(figures: Figures, shape: str) -> list[str]:
    rows = [figures.row(entry) for entry in figures.entries() if entry != BANDWIDTH]
    measures = figures.measures()
    decodes = [m for m in measures if m.startswith("d")]
    head = ["engine", *measures, f"roofline % {'/'.join(m[1:] for m in decodes)}"]
    lines = [
        [row.entry, *(_rate(row, m) for m in measures), _rooflines(row, decodes)] for row in rows
    ]
    for line, row in zip(lines, rows, strict=True):
        line += [_seconds(row.load), _seconds(row.start), _megabytes(row.memory)]
    parts = [
        f"## {SHAPES[shape].title} shape, tokens a second",
        table([*head, "load s", "start s", "peak MB"], lines),
    ]
    ratios = [
        [row.entry, *(_ratios(figures, row.entry, peer, measures) for peer in PEERS)]
        for row in rows
        if row.entry.startswith(EINFOLD)
    ]
    parts += [
        f"How many times faster, {'/'.join(measures)}:",
        table(["entry", *(f"than {peer}" for peer in PEERS)], ratios),
    ]
    what = {entry.name: entry.what for entry in ENTRIES}
    parts.append("\n".join(f"- {row.entry}: {what.get(row.entry, '')}" for row in rows))
    skipped = [f"- {row.entry} left out: {row.skipped}" for row in rows if row.skipped]
    if skipped:
        parts.append("\n".join(skipped))
    bandwidth, busy = figures.bandwidth(), figures.busy()
    notes = [f"{len(busy)} rounds, load of the machine {', '.join(f'{b:.1f}' for b in busy)}"]
    if apart := figures.apart():
        between = ", ".join(f"{a:.0f}" for a in apart)
        notes.append(f"a cache line between two cores {between} ns as each began")
    if bandwidth is not None:
        notes.append(f"bandwidth {bandwidth / 1e9:.1f} GB/s")
    widest = max((s for row in rows for s in row.spread.values()), default=0.0)
    notes.append(f"widest spread over rounds {100 * widest:.0f}%")
    versions = ", ".join(f"{name} {version}" for name, version in figures.versions().items())
    parts.append(f"{'; '.join(notes)}. {versions}.")
    return parts


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _shapes(records: Records) -> list[str]:
    return list(dict.fromkeys(str(r["shape"]) for r in records))


def _rate(row: Row, measure: str) -> str:
    rate = row.rates.get(measure)
    return "-" if rate is None else f"{rate:.3g}"


def _rooflines(row: Row, measures: list[str]) -> str:
    shares = [row.roofline.get(m) for m in measures]
    return "/".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


def _ratios(figures: Figures, entry: str, peer: str, measures: list[str]) -> str:
    found = [figures.ratio(entry, peer, m) for m in measures]
    return "/".join("-" if ratio is None else f"{ratio:.2f}" for ratio in found)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def _value(target: Target, value: float) -> str:
    if target.kind == "roofline":
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" + (" s" if target.kind == "load" else "")
