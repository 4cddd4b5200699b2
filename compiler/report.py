"""The report page of an artifact: what each pass did, saved, skipped and why. Plain HTML, no scripts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from .ir.kv.layout import CacheLayout
from .memory.drawing import picture, timeline_picture
from .memory.timeline import Timeline

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #d8dee4}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #eaeef2}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.skipped{color:#9a6700}
summary{cursor:pointer}.bar{background:#0969da;height:.6rem;border-radius:.3rem;min-width:1px}
"""


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that keeps the number above one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def context_text(context: int) -> str:
    """How long a text may be."""
    return f"{context:,} tokens" if context else "none: it reads no text"


def cache_bytes(layout: CacheLayout, context: int) -> str:
    """What a cache takes for one row of the whole context, after its prompt and while it is read; and what
    a step reads of it, where that is less."""
    steady, peak = layout.bytes(1, context), layout.peak_bytes(1, context, context)
    assert isinstance(steady, int) and isinstance(peak, int)
    held = f"{human_bytes(steady)} for a row of {context:,} tokens"
    more = "" if peak == steady else f", {human_bytes(peak)} while such a prompt is read"
    if layout.chooses:
        more += f", of which a step reads {human_bytes(layout.read_bytes(1, context))}"
    return f"{held}{more}"


def report_page(data: dict[str, Any]) -> str:
    """A compile report (`CompileReport.data()`) as one HTML page."""
    manifest = data["manifest"]
    model = manifest["model"]
    sections = [
        f"<h1>{escape(model['source'])}: compiled by einfold {escape(manifest['einfold'])}</h1>",
        _facts(manifest, data["tokenizer"]),
        *(f"<p>{escape(note)}</p>" for note in data.get("notes", [])),
        "<h2>Where the time went</h2>",
        _bars(data["seconds"]),
        "<h2>Passes</h2>",
        *map(_pass, data["passes"]),
        "<h2>Check against the original and the reference</h2>",
        _pairs(data["check"] or {"check": "not run"}),
        *(_call(manifest) if manifest["inputs"] else ()),
        *(_cache(manifest) if manifest["cache"] else ()),
        *(_arena(data["memory"]) if data.get("memory") else ()),
    ]
    return _page("einfold report", "\n".join(sections))


def plan_page(title: str, facts: dict[str, str], timeline: Timeline, side: str = "disk") -> str:
    """A plan for weights that do not all stay in memory, as one HTML page: `facts`, and a step of a token.
    `side` is what they come by."""
    disk = "is not asked"
    if timeline.disk:
        room = _seconds(timeline.disk_waits)
        disk = f"reads {_seconds(timeline.spent('read'))} and waits {room} for room"
    packs = f"packs {_seconds(timeline.spent('pack'))}, " if timeline.spent("pack") else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        _pairs(facts),
        f"<h2>A token among many: time across, the {side} above, the engine below</h2>",
        f"<p>{_seconds(timeline.seconds)}, by the device's bandwidths and without a run. The {side} {disk}; "
        f"the engine {packs}computes {_seconds(timeline.spent('compute'))}, and waits for the {side} "
        f"{_seconds(timeline.spent('wait'))}. A super-op has one colour in both lanes; grey is waiting.</p>",
        timeline_picture(timeline),
    ]
    return _page("einfold plan", "\n".join(body))


def _page(title: str, body: str) -> str:
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{body}</html>\n"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"


def _cache(manifest: dict[str, Any]) -> list[str]:
    return [
        "<h2>KV cache</h2>",
        f"<p>Bytes for B rows of C tokens{_read(manifest)}: "
        f"<code>{escape(manifest['cache_bytes'])}</code></p>",
        f"<p>{escape(_cache_bytes(manifest))}</p>",
        "<details><summary>Layout, a line a head group</summary><pre>"
        + escape("\n".join(manifest["cache"]))
        + "</pre></details>",
    ]


def arena_bytes(plan: dict[str, Any]) -> str:
    """What an arena takes in a step, beside the least that it could."""
    least = "as much as is live at once"
    if plan["arena"] != plan["bound"]:
        least = f"{human_bytes(plan['bound'])} are live at once"
    return f"{human_bytes(plan['arena'])} for {plan['step']}, {least}"


def _arena(plans: list[dict[str, Any]]) -> list[str]:
    found = ["<h2>Arena of intermediate values: time across, address up</h2>"]
    for plan in plans:
        found += [f"<p>{escape(arena_bytes(plan))}</p>", picture(plan)]
    return found


def _read(manifest: dict[str, Any]) -> str:
    return " behind T tokens that were read" if "T" in manifest["cache_bytes"] else ""


def _call(manifest: dict[str, Any]) -> list[str]:
    """What an encoder takes and gives."""
    kinds = {
        part: {
            entry["name"]: f"{entry['dtype']}[{', '.join(entry['shape'])}]"
            for entry in manifest[part]
        }
        for part in ("inputs", "outputs")
    }
    return [
        "<h2>Inputs: B rows of S tokens</h2>",
        _pairs(kinds["inputs"]),
        "<h2>Results</h2>",
        _pairs(kinds["outputs"]),
    ]


def _cache_bytes(manifest: dict[str, Any]) -> str:
    layout = CacheLayout.parse(list(manifest["cache"]))
    return "" if layout is None else cache_bytes(layout, manifest["model"]["context"])


def _facts(manifest: dict[str, Any], tokenizer: str) -> str:
    model = manifest["model"]
    return _pairs(
        {
            "architecture": model["architecture"],
            "parameters": f"{model['parameters']:,}",
            "target": f"{manifest['target']} ({manifest['flavour']})",
            "context": context_text(model["context"]),
            "weights": f"{manifest['recipe']['weights']['format']}, {human_bytes(manifest['weight_bytes'])}",
            "float32 would take": human_bytes(4 * model["parameters"]),
            "tokenizer": tokenizer,
        }
    )


def _pairs(pairs: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in pairs.items()
    )
    return f"<table>{rows}</table>"


def _bars(seconds: dict[str, float]) -> str:
    longest = max(seconds.values(), default=1.0) or 1.0
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td class=n>{value:.2f} s</td>"
        f"<td style='width:60%'><div class=bar style='width:{100 * value / longest:.0f}%'></div></td></tr>"
        for name, value in seconds.items()
    )
    return f"<table>{rows}</table>"


def _pass(record: dict[str, Any]) -> str:
    notes = record["notes"]
    applied = [note for note in notes if note["action"] == "applied"]
    skipped = [note for note in notes if note["action"] == "skipped"]
    saved = sum(note["bytes_saved"] for note in notes)
    title = f"<b>{escape(record['name'])}</b>: {len(applied)} applied, {len(skipped)} skipped"
    if saved:
        title += f", {human_bytes(saved)} saved"
    title += f" ({record['seconds'] * 1000:.0f} ms)"
    rows = "".join(_note(note, record["measured"]) for note in notes)
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"


def _note(note: dict[str, Any], measured: dict[str, float]) -> str:
    kind = "skipped" if note["action"] == "skipped" else ""
    error = measured.get(note["where"])
    detail = f" (relative error {error:.4f})" if error is not None else ""
    saved = human_bytes(note["bytes_saved"]) if note["bytes_saved"] else ""
    return (
        f"<tr class='{kind}'><td>{escape(note['action'])}</td><td>{escape(note['where'])}</td>"
        f"<td>{escape(note['what'])}{detail}</td><td class=n>{saved}</td></tr>"
    )


def summary_lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """A line a pass: what it did, saved and skipped."""
    lines = []
    for record in records:
        applied = sum(note["action"] == "applied" for note in record["notes"])
        skipped = sum(note["action"] == "skipped" for note in record["notes"])
        saved = sum(note["bytes_saved"] for note in record["notes"])
        text = f"{record['name']}: {applied} applied, {skipped} skipped"
        lines.append(text + (f", {human_bytes(saved)} saved" if saved else ""))
    return lines
