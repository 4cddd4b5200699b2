"""Names in generated source: ASCII identifiers, one for each thing, none that the source uses itself."""

from __future__ import annotations

import keyword
import re

#: What generated source uses on its own account.
_RESERVED = {
    *("tl", "triton", "range", "float", "first", "tile", "split", "part", "parts", "start", "end"),
    *(
        "live_row",
        "live_t",
        "real_t",
        "rows",
        "programs",
        "program",
        "row",
        "ROWS",
        "STREAM",
        "int",
        "near",
    ),
    *("off_t", "virtual", "self", "at", "seen", "tiles", "stop", "skip"),
}


class Names:
    """Gives each key one identifier, as close to what is wanted as its letters allow."""

    def __init__(self) -> None:
        self._found: dict[object, str] = {}
        self._taken = set(_RESERVED)

    def of(self, key: object, wanted: str) -> str:
        """The identifier of `key`, made on first use."""
        if key not in self._found:
            self._found[key] = self.fresh(wanted)
        return self._found[key]

    def fresh(self, wanted: str) -> str:
        """An identifier that nothing has yet."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", wanted)
        if not plain or plain[0].isdigit() or keyword.iskeyword(plain) or plain.startswith("__"):
            plain = f"x{plain}"
        name, number = plain, 1
        while name in self._taken:
            name, number = f"{plain}_{number}", number + 1
        self._taken.add(name)
        return name
