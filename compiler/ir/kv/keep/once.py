"""What policies share that choose once, when the prompt has been read."""

from __future__ import annotations

from .....errors import IRError
from ...options import missing, settle
from ..sizes import Size, least
from .policy import Ints, Policy, Row, best_slots, check_budget


class ChosenOnce(Policy):
    """Keeps `chosen` tokens of a prompt, by scores, and the newest; later ones pass in a window behind them.

    The prompt is held whole while it is read. A prompt that is shorter than the budget stays whole, and the
    first tokens generated fill it up.
    """

    chosen: int
    slack: int
    tokens: int

    def fit(self, named: str) -> None:
        """Settles how many tokens are chosen beside the newest, which are the option `named`.

        Raises IRError for a budget that cannot be.
        """
        if missing(self.chosen):
            check_budget(self.method, self.tokens, self.newest, named)
            settle(self, chosen=self.tokens - self.newest)
        if self.chosen < 1 or self.newest < 1 or self.slack < 1:
            raise IRError(
                f"{self.name} keeps 1 or more chosen tokens, of {named} and of slack, "
                f"not {self.chosen}, {self.newest} and {self.slack}"
            )
        settle(self, tokens=self.chosen + self.newest)

    @property
    def lead(self) -> int:
        return self.chosen

    @property
    def waiting(self) -> int:
        return self.slack

    @property
    def exact(self) -> bool:
        return True

    @property
    def once(self) -> bool:
        return True

    def slots(self, capacity: Size) -> Size:
        return least(capacity, self.tokens + self.slack)

    def staying(self, row: Row, used: int, leaving: int) -> Ints | None:
        score_KT = self.token_scores(row, used)
        if score_KT is None:
            return None  # the prompt was read: what was chosen stays in front
        older = used - self.newest
        return best_slots(score_KT[:, :older], older - leaving, used, self.newest)
