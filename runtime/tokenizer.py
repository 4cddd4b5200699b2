"""Text to tokens and back, from the tokenizer files of the artifact, without transformers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from ..compiler.ir.regular import read_regular
from ..errors import ArtifactError, PromptError, first_line, pass_on
from .artifact import Artifact
from .templates import render
from .tokenizer_check import check_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

#: A text of many kinds, which a tokenizer that is whole takes and gives again.
_SAMPLE = "The 1st naïve line's\n\t 日本語 🎈 ()"


class Tokenizer:
    """The model's tokenizer. Special tokens are added on encoding as the model expects them."""

    def __init__(self, folder: Path, listed: Collection[str] | None = None) -> None:
        """Reads the tokenizer of a folder; of an artifact only the files that its manifest lists.

        Raises ArtifactError where it is damaged, or asks for more than to cut text into tokens.
        """
        files = {}
        for name in FILES:
            if name in listed if listed is not None else (folder / name).is_file():
                path = folder / name
                files[name] = read_regular(path if listed is not None else path.resolve())
        where = f"{folder}/{FILES[0]}"
        if FILES[0] not in files:
            raise ArtifactError(f"{folder} has no {FILES[0]}")
        self._where = where
        try:
            check_tokenizer(files[FILES[0]])
        except ArtifactError as error:
            raise ArtifactError(f"{where} cannot be used: {error}") from error
        with _silent(), self._library("cannot be read"):
            self._fast = FastTokenizer.from_buffer(files[FILES[0]])
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.decode(self._fast.encode(_SAMPLE).ids)
        self._config = _read_json(folder / FILES[1], files.get(FILES[1], b"{}"))
        self._template = _chat_template(folder / FILES[2], files.get(FILES[2]), self._config)

    @staticmethod
    def of(artifact: Artifact) -> Tokenizer:
        """The tokenizer of an artifact; raises PromptError where it has none."""
        if not artifact.has(FILES[0]):
            raise PromptError(
                f"{artifact.folder} holds no tokenizer; give token ids instead of text"
            )
        return Tokenizer(artifact.folder, artifact.manifest.files.keys())

    @contextmanager
    def _library(self, what: str) -> Iterator[None]:
        """Errors of the library, which raises a bare Exception, and panics, which are none, as sentences."""
        try:
            yield
        except BaseException as error:
            pass_on(error)
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ArtifactError(f"{self._where} {what}: {first_line(error)}") from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the `special` tokens that the model puts around it, or without."""
        return self._encode(text, special).ids  # type: ignore[no-any-return]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters (start, end) that each token stands for."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str, special: bool = True) -> Any:
        _check_text(text)
        with self._library("does not take this text"):
            return self._fast.encode(text, add_special_tokens=special)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        with self._library("does not give the text of these tokens"):
            text: str = self._fast.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template."""
        return self._template is not None

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the answer begins.

        Templates run in Jinja's sandbox, in a process with bounds. Raises PromptError where the model has no
        template, or it refuses the conversation.
        """
        if self._template is None:
            raise PromptError("this model has no chat template; give a plain prompt instead")
        for message in messages:
            _check_text(message["content"])
        special = {
            key: _token_text(self._config.get(key))
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        text = render(
            self._template,
            {
                "messages": messages,
                "tools": None,  # many templates ask `tools is not none`, which an absent name passes
                "documents": None,
                "add_generation_prompt": True,
                **special,
            },
        )
        return self._encode(text, special=False).ids  # type: ignore[no-any-return]

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


def _read_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {str(error)[:200]}") from error
    return data if isinstance(data, dict) else {}


def _chat_template(path: Path, raw: bytes | None, config: dict[str, Any]) -> str | None:
    if raw is not None:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is no text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is for plain conversations
        for entry in template:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
    return template if isinstance(template, str) else None


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr meanwhile: a panic of the library writes lines there before it is an error."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError, ValueError):  # closed, or absent
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
