"""What a `tokenizer.json` may ask for: the parts that models are made of, within bounds of time and memory.

The library that runs it takes what it reads at its word. A pattern can take years of a word of thirty
letters, a replacement can make a gigabyte of a line, and some numbers end it in a panic. So each part is
looked at first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ArtifactError

#: How many times longer a text may become before it is cut into tokens.
GROWTH = 64

#: Parts of one kind in sequence, nesting of sequences, characters of a pattern.
PARTS, DEPTH, PATTERN = 32, 4, 4096

_NORMALIZERS = (
    "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Strip "
    "StripAccents"
)
_PRE_TOKENIZERS = (
    "BertPreTokenizer ByteLevel CharDelimiterSplit Digits Metaspace Punctuation Split UnicodeScripts "
    "Whitespace WhitespaceSplit"
)
_POST_PROCESSORS = "BertProcessing ByteLevel RobertaProcessing TemplateProcessing"
_DECODERS = "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Strip WordPiece"

_KNOWN: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset(_NORMALIZERS.split()),
    "pre_tokenizer": frozenset(_PRE_TOKENIZERS.split()),
    "post_processor": frozenset(_POST_PROCESSORS.split()),
    "decoder": frozenset(_DECODERS.split()),
    "model": frozenset(("BPE", "Unigram", "WordLevel", "WordPiece")),
}
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")


def check_tokenizer(raw: bytes) -> None:
    """Raises ArtifactError, saying which part, for one that could do more than cut text into tokens."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"it is no JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ArtifactError("it has no model")
    for kind, known in _KNOWN.items():
        parts = list(_parts(data.get(kind), 0))
        if len(parts) > PARTS:
            raise ArtifactError(f"its {kind} has {len(parts)} parts, more than {PARTS}")
        growth = 1.0
        for part in parts:
            name = part.get("type", "BPE" if kind == "model" else None)
            if not isinstance(name, str) or name not in known:
                raise ArtifactError(f"its {kind} is a {name!r}, which einfold does not run")
            growth *= _check_part(name, part)
        if growth > GROWTH:
            raise ArtifactError(f"its {kind} makes a text up to {growth:,.0f} times longer")
    _check_model(data["model"])


def _parts(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    """The parts of a sequence in sequences."""
    if value is None:
        return
    if not isinstance(value, dict) or depth > DEPTH:
        raise ArtifactError("one of its parts is no object, or nested too deeply")
    if value.get("type") != "Sequence":
        yield value
        return
    for name in _LISTS:
        items = value.get(name, [])
        if not isinstance(items, list) or len(items) > PARTS:
            raise ArtifactError(f"its {name} are no list, or too many")
        for item in items:
            yield from _parts(item, depth + 1)


def _check_part(name: str, part: dict[str, Any]) -> float:
    """How many times longer the part may make a text."""
    if name == "Precompiled" and not _charsmap_fits(part.get("precompiled_charsmap")):
        raise ArtifactError("its precompiled map of characters is damaged")
    if name == "TemplateProcessing":
        _check_post_template(part)
    for key in ("start", "stop"):
        if not isinstance(part.get(key, 0), int) or not 0 <= part.get(key, 0) <= 64:
            raise ArtifactError(f"its {name} strips {part[key]!r} characters")
    pattern = part.get("pattern")
    if name not in ("Replace", "Split"):
        return 1.0 + len(str(part.get("prepend", "")))
    if not isinstance(pattern, dict) or len(pattern) != 1:
        raise ArtifactError(f"its {name} has no pattern")
    ((kind, text),) = pattern.items()
    if kind not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise ArtifactError(f"its {name} has no pattern, or an empty one")
    if kind == "Regex":
        check_pattern(text)
    content = len(str(part.get("content", ""))) if name == "Replace" else 0
    return max(1.0, content / (len(text) if kind == "String" else 1))


def _charsmap_fits(text: Any) -> bool:
    """Whether a map is as SentencePiece writes it: the length of its trie in bytes, the trie, the strings."""
    import base64
    import binascii

    if text is None:
        return True
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        return False
    size = int.from_bytes(data[:4], "little")
    return len(data) > 4 and size % 4 == 0 and 1024 <= size <= len(data) - 4


def _check_post_template(part: dict[str, Any]) -> None:
    special = part.get("special_tokens")
    named = special if isinstance(special, dict) else {}
    for which in ("single", "pair"):
        pieces = part.get(which)
        if not isinstance(pieces, list) or len(pieces) > PARTS:
            raise ArtifactError(f"its template for a {which} text is no list, or too long")
        for piece in pieces:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(token, dict) and token.get("id") not in named:
                raise ArtifactError(
                    f"its template names {token.get('id')!r}, which it does not define"
                )
    for token in named.values():
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or len(ids) > PARTS:
            raise ArtifactError("a special token of its template is no list of ids, or too long")


def _check_model(model: dict[str, Any]) -> None:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        raise ArtifactError("its model has no vocabulary")
    unknown = model.get("unk_token")
    words = model.get("type") in ("WordLevel", "WordPiece")
    if words and isinstance(vocabulary, dict) and unknown not in vocabulary:
        raise ArtifactError(f"its unknown token {unknown!r} is not in its vocabulary")
    index = model.get("unk_id")
    if index is not None and not (isinstance(index, int) and 0 <= index < len(vocabulary)):
        raise ArtifactError(f"its unknown token {index!r} is not in its vocabulary")
    if isinstance(vocabulary, list):  # [token, logarithm of its probability]
        pairs = all(
            isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and item[0]
            and isinstance(item[1], (int, float)) and abs(item[1]) < 1e9
            for item in vocabulary
        )  # fmt: skip
        if not pairs:
            raise ArtifactError(
                "its vocabulary holds an entry that is no token with a finite score"
            )
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if not all(type(index) is int and 0 <= index < 1 << 26 for index in ids):
        raise ArtifactError("its vocabulary holds an id that is none")


_CLASS = re.compile(
    r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|&&|\[\^?(?:\\.|[^\]\\])*\]|[^\]\\])*\]", re.DOTALL
)
_ATOM = re.compile(r"\\[pP]\{\^?\w+\}|\\[xu]\{?[0-9a-fA-F]+\}?|\\[^0-9kgKXNO]|[^\\]", re.DOTALL)
_OPEN = re.compile(r"\((?:\?(?:[imx-]*:|[=!>]|<[=!]|[imx-]+\)))?")
_TIMES = re.compile(r"[*+?]|\{([0-9]{0,4})(,?)([0-9]{0,4})\}")

#: Repetitions without an end that may follow each other in one alternative.
_REPEATS = 3


def check_pattern(text: str) -> None:
    """Raises ArtifactError for a pattern that could try more ways than a small power of a text's length.

    A repetition of what holds a repetition is refused, as are many in a row, references to groups, and
    what the patterns of tokenizers do not use.
    """
    if len(text) > PATTERN:
        raise ArtifactError(f"a pattern has {len(text):,} characters, more than {PATTERN:,}")
    #: Of each open group: repetitions in this alternative, the most in one before it, and 1 where it has
    #: alternatives or parts that may be left out. `last` is not 0 behind what matches in more ways than one.
    open_groups, place, last = [[0, 0, 0]], 0, 0
    while place < len(text):
        start = place
        if text.startswith("(?", place) and _OPEN.match(text, place).end() == place + 1:  # type: ignore[union-attr]
            raise _pattern(text, "a group of a kind that no tokenizer needs")
        if text[place] == "(":
            match = _OPEN.match(text, place)
            assert match is not None
            place = match.end()
            if not match[0].endswith(")") or match[0] == "(":
                open_groups.append([0, 0, 0])
            last = 0
            continue
        if text[place] == ")":
            if len(open_groups) == 1:
                raise _pattern(text, "a group that is closed and never opened")
            repeats, most, ways = open_groups.pop()
            last, place = max(repeats, most) + ways, place + 1
            open_groups[-1][0] += max(repeats, most)
        elif text[place] == "|":
            open_groups[-1] = [0, max(open_groups[-1][:2]), 1]
            last, place = 0, place + 1
            continue
        else:
            match = _CLASS.match(text, place) if text[place] == "[" else _ATOM.match(text, place)
            if match is None:
                raise _pattern(text, f"{text[place : place + 8]!r}, which is not read")
            last, place = 0, match.end()
        times = _TIMES.match(text, place)
        if times is None:
            continue
        place = times.end()
        if place < len(text) and text[place] in "?+":
            place += 1
        many = _unbounded(times)
        if many and last:
            raise _pattern(
                text, f"a repetition of what repeats itself at {text[start : start + 20]!r}"
            )
        if _TIMES.match(text, place):
            raise _pattern(text, "a repetition of a repetition")
        open_groups[-1][0] += bool(many)
        open_groups[-1][2] |= times[0] == "?"
        if open_groups[-1][0] > _REPEATS:
            raise _pattern(text, "many repetitions in a row")


def _unbounded(times: re.Match[str]) -> bool:
    """Whether a repetition has no end, or so late a one that it makes no difference."""
    if times[0] == "?":
        return False
    if times[0] in "*+":
        return True
    return (bool(times[2]) and not times[3]) or int(times[3] or times[1] or 0) > 16


def _pattern(text: str, what: str) -> ArtifactError:
    return ArtifactError(f"the pattern {text[:60]!r} has {what}")
