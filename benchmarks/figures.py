"""From the journal to figures: medians over rounds, ratios within rounds, targets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .entries import BANDWIDTH

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One entry of one shape."""

    entry: str
    rates: dict[str, float]
    """Tokens a second by measure, the median over rounds."""

    spread: dict[str, float]
    """Largest less smallest rate, as a share of the median."""

    roofline: dict[str, float]
    """Share of the bandwidth that a decode step uses, by measure."""

    load: float | None
    """Seconds from the files to the first token, without imports."""

    start: float | None
    """Seconds from starting the process to the first token."""

    memory: int | None
    skipped: str | None


class Figures:
    """The figures of one shape."""

    def __init__(self, records: Records, shape: str) -> None:
        self._records = [r for r in records if r.get("shape") == shape]

    def entries(self) -> list[str]:
        """Names in the order in which they were begun."""
        return list(dict.fromkeys(str(r["entry"]) for r in self._records if "entry" in r))

    def measures(self) -> list[str]:
        """Names of the timed measures, prefill first."""
        found = dict.fromkeys(str(r["measure"]) for r in self._records if "seconds" in r)
        return list(found)

    def rounds(self, entry: str, measure: str) -> dict[int, float]:
        """Tokens a second by round."""
        return {
            r["round"]: r["tokens"] / r["seconds"]
            for r in self._of(entry, measure)
            if "seconds" in r
        }

    def rate(self, entry: str, measure: str) -> float | None:
        rates = self.rounds(entry, measure)
        return statistics.median(rates.values()) if rates else None

    def ratio(self, entry: str, peer: str, measure: str) -> float | None:
        """How many times faster than a peer: the median of the ratios within rounds."""
        ours, theirs = self.rounds(entry, measure), self.rounds(peer, measure)
        both = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
        return statistics.median(both) if both else None

    def bandwidth(self) -> float | None:
        """Bytes a second: the median of what was read beside the engines."""
        loads = self._of(BANDWIDTH, "load")
        times = [
            r["seconds"]
            for measure in self.measures()
            for r in self._of(BANDWIDTH, measure)
            if "seconds" in r
        ]
        return loads[0]["weight_bytes"] / statistics.median(times) if loads and times else None

    def roofline(self, entry: str, measure: str) -> float | None:
        """Bytes that a decode step must read, over its time, over the bandwidth."""
        loads, rate, bandwidth = (
            self._of(entry, "load"),
            self.rate(entry, measure),
            self.bandwidth(),
        )
        if not loads or rate is None or bandwidth is None or not measure.startswith("d"):
            return None
        context = int(measure[1:])
        needed = loads[0]["weight_bytes"] + context * loads[0]["cache_bytes"]
        return float(needed * rate / bandwidth)

    def load(self, entry: str, whole: bool = False) -> float | None:
        """Seconds to the first token, the median; `whole` counts from the start of the process."""
        times = [
            r["load"] + r["first"] + (r["start"] if whole else 0.0) for r in self._of(entry, "load")
        ]
        return statistics.median(times) if times else None

    def memory(self, entry: str) -> int | None:
        found = self._of(entry, "memory")
        return int(found[-1]["bytes"]) if found else None

    def row(self, entry: str) -> Row:
        rates, spread, roofline = {}, {}, {}
        for measure in self.measures():
            found = list(self.rounds(entry, measure).values())
            if found:
                rates[measure] = statistics.median(found)
                spread[measure] = (max(found) - min(found)) / rates[measure]
            share = self.roofline(entry, measure)
            if share is not None:
                roofline[measure] = share
        skipped = self._of(entry, "skipped")
        return Row(
            entry,
            rates,
            spread,
            roofline,
            self.load(entry),
            self.load(entry, whole=True),
            self.memory(entry),
            str(skipped[-1]["reason"]) if skipped else None,
        )

    def versions(self) -> dict[str, str]:
        """Versions of all packages, over all workers."""
        found: dict[str, str] = {}
        for record in self._records:
            found |= record.get("versions", {})
        return dict(sorted(found.items()))

    def apart(self) -> list[float]:
        """Nanoseconds that a cache line took from core to core as each round began, where measured."""
        rounds = [r for r in self._records if r["measure"] == "round"]
        return [r["apart"] for r in rounds if r.get("apart") is not None]

    def busy(self) -> list[float]:
        """The machine's load at the beginning of each round."""
        return [r["busy"] for r in self._records if r["measure"] == "round"]

    def _of(self, entry: str, measure: str) -> list[dict[str, Any]]:
        return [r for r in self._records if r.get("entry") == entry and r["measure"] == measure]
