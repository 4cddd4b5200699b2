"""Whether the Hugging Face hub can be asked: its client tries for half a minute before it says no."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

#: Seconds to wait for the hub's answer to a connection.
_PATIENCE = 3.0


@functools.cache
def unreachable() -> str:
    """Why the hub cannot be reached, empty where it can; asked once a process.

    With a proxy nothing is known before it is asked, so that it counts as reachable.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if "https" in getproxies():
        return ""
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_PATIENCE):
            return ""
    except OSError as error:
        return f"{parts.hostname} does not answer: {error.strerror or error}"
