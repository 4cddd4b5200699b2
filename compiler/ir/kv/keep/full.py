"""Every token stays."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import POLICIES, Policy


@POLICIES.register
@dataclass(frozen=True)
class Full(Policy):
    """Every token of the context is kept."""

    name = "full"

    @property
    def whole(self) -> bool:
        return True
