"""What a forked child may not use: its parent's pools of threads, which are not there and are waited for."""

from __future__ import annotations

import os

_forked = False
_settled = False


def forked() -> bool:
    """Whether this process came out of another by fork, since einfold was imported there."""
    return _forked


def settle_torch() -> None:
    """Has torch compute with one thread in a forked child, where OpenMP's pool would hang. Once; then the
    child may choose another number."""
    global _settled
    if _forked and not _settled:
        import torch

        torch.set_num_threads(1)
        _settled = True


def _note() -> None:
    global _forked, _settled
    _forked, _settled = True, False


os.register_at_fork(after_in_child=_note)
