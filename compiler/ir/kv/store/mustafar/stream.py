"""Mustafar, which no kernel reads."""

from __future__ import annotations

from typing import NoReturn

from ......errors import UnsupportedError
from ..storage import GroupShape
from .storage import Mustafar


def streams(storage: Mustafar, shape: GroupShape) -> NoReturn:
    raise UnsupportedError(storage.without_kernels())
