"""Text to tokens and back, from the tokenizer files of the artifact, without transformers."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from ..errors import ArtifactError, PromptError, pass_on

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Tokenizer:
    """The model's tokenizer. Special tokens are added on encoding as the model expects them."""

    def __init__(self, folder: Path) -> None:
        try:
            self._fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises a bare Exception
            pass_on(error)
            raise ArtifactError(f"{folder}/tokenizer.json cannot be read: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._config = _read_json(folder / "tokenizer_config.json")
        self._template = _chat_template(folder, self._config)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around it."""
        _check_text(text)
        ids: list[int] = self._fast.encode(text).ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters (start, end) that each token stands for."""
        encoding = self._fast.encode(text)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        text: str = self._fast.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template."""
        return self._template is not None

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the answer begins.

        Templates run in Jinja's sandbox. Raises PromptError where the model has no template.
        """
        if self._template is None:
            raise PromptError("this model has no chat template; give a plain prompt instead")
        for message in messages:
            _check_text(message["content"])
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        special = {
            key: _token_text(self._config.get(key))
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        try:
            template = environment.from_string(self._template)
            text = template.render(
                messages=messages,
                tools=None,  # many templates ask `tools is not none`, which an absent name passes
                documents=None,
                add_generation_prompt=True,
                **special,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise PromptError(
                f"the model's chat template refuses the conversation: {error}"
            ) from error
        _check_text(text)
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def stream(self) -> TokenStream:
        """A decoder that is fed tokens one at a time."""
        return TokenStream(self)


class TokenStream:
    """Turns tokens into text piece by piece; holds back what a later token may still change.

    Only a window of recent tokens is decoded again at each step, so the work a token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window = 0  # decoding starts here, far enough back for spaces to come out right
        self._shown = 0  # tokens up to here have been given out

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is only partly there."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._window : self._shown])
        text = self._tokenizer.decode(self._tokens[self._window :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def finish(self) -> str:
        """What was held back, as far as it can be shown."""
        before = self._tokenizer.decode(self._tokens[self._window : self._shown])
        text = self._tokenizer.decode(self._tokens[self._window :])
        self._window = self._shown = len(self._tokens)
        return text[len(before) :]


def _check_text(text: str) -> None:
    """Bytes that are no UTF-8 come from the command line as lone surrogates, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is not valid UTF-8 at character {error.start}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return data if isinstance(data, dict) else {}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is for plain conversations
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    """JSON as it stands: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _raise_template_error(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
