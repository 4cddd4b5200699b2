"""What a model wrote, and the text of it as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import PromptError
from .runtime.artifact import Artifact
from .runtime.engine import Generated
from .runtime.tokenizer import Tokenizer, TokenStream


@dataclass(frozen=True)
class Completion:
    """What the model wrote for one prompt."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    """"stop" (end token or stop string), "length" (max_new_tokens) or "context" (no room left)."""


@dataclass
class Listeners:
    """The rows of a generation: their texts, and the stop strings that end them. Without a tokenizer there
    is nothing to hear."""

    rows: list[Listener]
    tell: Callable[[int, str], None] | None

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        tokenizer: Callable[[], Tokenizer],
        rows: int,
        stop: str | Sequence[str],
        tell: Callable[[int, str], None] | None,
    ) -> Listeners:
        """Raises PromptError for stop strings where the artifact has no tokenizer."""
        stop = [stop] if isinstance(stop, str) else list(stop)
        has_text = artifact.has("tokenizer.json")
        if stop and not has_text:
            raise PromptError("stop strings need a tokenizer, and the artifact holds none")
        count = rows if has_text else 0
        return cls([Listener(tokenizer().stream(), stop) for _ in range(count)], tell)

    @property
    def on_token(self) -> Callable[[int, int], bool] | None:
        """What the engine tells of new tokens."""
        return self._push if self.rows else None

    def _push(self, row: int, token: int) -> bool:
        piece = self.rows[row].push(token)
        if piece and self.tell is not None:
            self.tell(row, piece)
        return self.rows[row].stopped

    def completions(self, results: list[Generated], prompts: list[int]) -> list[Completion]:
        """What was written, behind prompts of so many tokens."""
        for row, listener in enumerate(self.rows):
            piece = listener.finish()
            if piece and self.tell is not None:
                self.tell(row, piece)
        return [
            Completion(
                text=self.rows[row].text if self.rows else "",
                tokens=result.tokens,
                prompt_tokens=prompts[row],
                finish_reason=result.finish_reason,
            )
            for row, result in enumerate(results)
        ]


class Listener:
    """Text of one row as it grows; watches for stop strings and holds back what may begin one."""

    def __init__(self, stream: TokenStream, stop: list[str]) -> None:
        self.stream = stream
        self.stop = [text for text in stop if text]
        self.text = ""
        self.stopped = False
        self._held = ""

    def push(self, token: int) -> str:
        return self._show(self.stream.push(token), final=False)

    def finish(self) -> str:
        return "" if self.stopped else self._show(self.stream.finish(), final=True)

    def _show(self, piece: str, final: bool) -> str:
        pending = self._held + piece
        found = [at for at in (pending.find(text) for text in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            shown = pending[: min(found)]
        else:
            keep = 0 if final else _overlap(pending, self.stop)
            shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    for size in range(longest, 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
