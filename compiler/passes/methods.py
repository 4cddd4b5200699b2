"""Methods for the KV cache that are passes of their own; the others are policies and storages."""

from __future__ import annotations

from ..ir.registry import Registry
from .base import Pass

PRUNE: Registry[type[Pass]] = Registry("method of cache.prune", f"{__package__}.kv_prune")
SHARE: Registry[type[Pass]] = Registry("method of cache.share", f"{__package__}.kv_share")
