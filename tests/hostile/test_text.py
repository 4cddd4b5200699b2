"""Tokenizers and chat templates from anybody: one sentence, within bounds of time, memory and output."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

import einfold
from einfold.errors import ArtifactError, PromptError
from einfold.runtime.tokenizer import Tokenizer
from einfold.runtime.tokenizer_check import check_pattern

from . import forge


def chat(folder: Path) -> str:
    tokenizer = einfold.load(folder, threads=1).tokenizer
    return tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}]))


#: template -> what the sentence says of it.
TEMPLATES = {
    "{{ 1/0 }}": "division by zero",
    "{% break %}": "break",
    "{{ 'inf'|float|int }}": "",
    "{{ range(10**9)|list }}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nested too deeply",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{% if 1 %}" * 3000: "",
    "{{ " + "-" * 60000 + "1 }}": "",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too (long|much)",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "writes more than",
    "{{ 'x' * 10**7 }}": "writes more than",
    "{{ ('x' * 10**10)|length }}": "memory",
    "{{ '%1000000000d' % 5 }}": "",
    "{{ (10**10**8)|length }}": "",
    "{{ 'a'|center(10**10)|length }}": "memory",
    "{{ 1|tojson(cls=namespace) }}": "cls",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe|undefined",
    "{{ cycler.__init__.__globals__ }}": "unsafe|undefined",
    "{{ raise_exception.__globals__['os'] }}": "unsafe|undefined",
    "{% include 'a' %}": "loader",
    "{% import '/etc/passwd' as p %}": "loader",
    "{{ messages.append(1) }}": "unsafe|immutable|modif",
    "{{ strftime_now('\ud800') }}": "",
    "x" * 300_000: "characters, more than",
}


@pytest.mark.parametrize(
    "template", TEMPLATES, ids=lambda template: template[:40].encode("ascii", "replace").decode()
)
def test_templates_that_do_harm_are_refused(
    template: str, text_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").symlink_to(text_artifact / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer(tmp_path)
    started = time.perf_counter()
    with pytest.raises(PromptError, match=f"refuses the conversation: .*({TEMPLATES[template]})"):
        tokenizer.chat([{"role": "user", "content": "hi"}])
    assert time.perf_counter() - started < 20
    assert capfd.readouterr() == ("", "")


PLACED: dict[str, Callable[[Path, Path], None]] = {
    "a file": lambda path, outside: path.write_bytes(b"planted"),
    "a link that leaves": lambda path, outside: path.symlink_to(outside),
    "a link to itself": lambda path, outside: path.symlink_to(path.name),
    "a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a folder": lambda path, outside: path.mkdir(),
    "a socket": lambda path, outside: _socket(path),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("what", PLACED)
def test_files_that_are_not_listed_are_not_read(
    what: str, name: str, text_artifact: Path, tmp_path: Path
) -> None:
    """And listed ones are regular files, in the folder."""
    outside = tmp_path / "outside"
    outside.write_bytes(b'{"chat_template": "from outside"}')
    folder = forge.copy(text_artifact, tmp_path / "copy")
    listed = forge.manifest(folder)["files"].get(name)
    expected = None if name == "tokenizer_config.json" else chat(folder)
    forge.edit(folder, lambda data: data["files"].pop(name, None))
    (folder / name).unlink(missing_ok=True)
    PLACED[what](folder / name, outside)
    if (
        expected is None
    ):  # the template in it is not seen, so there is one only in a file of its own
        tokenizer = einfold.load(folder, threads=1).tokenizer
        assert tokenizer._config == {}
    elif listed is None:
        assert chat(folder) == expected
    if what == "a file":
        return
    forge.edit(folder, lambda data: data["files"].update({name: {"bytes": 33, "blake3": "00"}}))
    with pytest.raises(ArtifactError, match=name):
        einfold.load(folder, verify=False)


@pytest.mark.parametrize("what", PLACED)
def test_a_manifest_is_a_regular_file(what: str, text_artifact: Path, tmp_path: Path) -> None:
    folder = forge.copy(text_artifact, tmp_path / "copy")
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").unlink()
    PLACED[what](folder / "manifest.json", outside)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        einfold.load(folder)


def split(pattern: str) -> dict[str, Any]:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": part}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "a pattern that tries forever": split("(a+)+$"),
    "alternatives that overlap": split("(a|a?)*b"),
    "counted repetitions": split("(a{2,9999}){2,}b"),
    "many in a row": split("a*a*a*a*a*a*b"),
    "a repetition twice": split("a**"),
    "a reference": split(r"(a+)\1+"),
    "recursion": split(r"(?<x>a\g<x>*)b"),
    "a long pattern": split("a" * 10_000),
    "replacing nothing": {"normalizer": _replace("", "x")},
    "growth": {"normalizer": {"type": "Sequence", "normalizers": [_replace("a", "a" * 10)] * 8}},
    "growth in one": {"normalizer": _replace("a", "a" * 100_000)},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 100_000}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an unknown part": {"normalizer": {"type": "Shell", "command": "true"}},
    "a part that is none": {"decoder": 3},
    "nesting": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 50 + "]}" * 50)},
    "a post-processor without its token": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a map of characters that is junk": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "words without their unknown": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}
    },
    "scores that are none": {"model": {"type": "Unigram", "vocab": [["a", 1e400]], "unk_id": 0}},
    "an unknown id": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}},
    "ids past the end": {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
    "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}},
    "no vocabulary": {"model": {"type": "BPE"}},
    "no model": {"model": None},
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizers_that_do_harm_are_refused(
    what: str, text_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((text_artifact / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | TOKENIZERS[what]))
    started = time.process_time()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    assert time.process_time() - started < 5
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "content", [b"", b"[", b"null", b"[" * 100_000, b'{"model": 1}', b"9" * 5000, b"\xff"]
)
def test_tokenizer_files_that_are_none(content: bytes, text_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    forge.write(tmp_path / "tokenizer.json", (text_artifact / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    if content not in (b"null", b'{"model": 1}'):  # JSON that says nothing of a template
        with pytest.raises(ArtifactError, match=r"tokenizer_config\.json"):
            Tokenizer(tmp_path)


#: The patterns of GPT-2, Llama 3, GPT-4o, Qwen2, DeepSeek, BLOOM, CLIP and Gemma, which must go through.
PATTERNS = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    " {2,}",
    r"\s+$",
    "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_models_go_through(pattern: str) -> None:
    check_pattern(pattern)
    pre_tokenizers.Split(Regex(pattern), "isolated")
