"""Text in, text out: streaming, stop strings, chat."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import einfold
from einfold.completion import Listener
from einfold.errors import PromptError
from einfold.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_artifact: Path) -> Tokenizer:
    return Tokenizer(text_artifact)


def test_encoding_is_that_of_transformers(tokenizer: Tokenizer, text_model: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(text_model)
    for text in ("the pass key", "naïve  spaces\n\ttabs", "日本語 🎈", ""):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == want


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)[1:]]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_stop_strings_end_and_are_not_shown(tokenizer: Tokenizer) -> None:
    listener = Listener(tokenizer.stream(), ["key", "\n\n"])
    shown = ""
    for token in tokenizer.encode("the pass k is not the key here")[1:]:
        shown += listener.push(token)
        if listener.stopped:
            break
    assert listener.stopped
    assert shown + listener.finish() == "the pass k is not the "
    assert listener.text == "the pass k is not the "


def test_generation_streams_what_it_returns(text_artifact: Path) -> None:
    model = einfold.load(text_artifact, threads=1)
    pieces: list[str] = []
    result = model.generate("the pass", max_new_tokens=30, on_text=pieces.append, ignore_eos=True)
    assert "".join(pieces) == result.text
    assert result.prompt_tokens == len(model.encode("the pass"))
    stop = result.text[5:8]
    again = model.generate("the pass", max_new_tokens=30, stop=stop, ignore_eos=True)
    assert again.finish_reason == "stop"
    assert again.text == result.text[: result.text.index(stop)]
    # A stop text that the last token completes is why the row ends, not the limit.
    exact = model.generate(
        "the pass", max_new_tokens=len(again.tokens), stop=[stop], ignore_eos=True
    )
    assert (exact.text, exact.finish_reason) == (again.text, "stop")
    with pytest.raises(PromptError, match="a list of prompts"):
        model.generate_batch("the pass")


def test_chat_template_errors_are_sentences(text_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((text_artifact / name).read_bytes())
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(PromptError, match="no system role"):
        Tokenizer(folder).chat([{"role": "user", "content": "hi"}])
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(PromptError, match="refuses"):
        Tokenizer(folder).chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none %}TOOLS{% endif %}{{ messages[0].content }}",
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ documents is none }}",
        "{{ bos_token }}{{ strftime_now('%Y') | length }}\n\n  {{ eos_token }}",
        [
            {"name": "default", "template": "{{ messages[0]['content'] }}"},
            {"name": "x", "template": "no"},
        ],
    ],
)
def test_templates_see_what_transformers_gives_them(
    template: Any, text_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "m"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": "a <b> & 'é'"}]
    want = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer(folder).chat(messages) == want


def test_a_template_that_fails_is_a_sentence(text_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((text_artifact / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(PromptError, match="refuses the conversation"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])
