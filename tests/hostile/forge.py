"""Makes hostile artifacts: files changed by somebody who can compute their hashes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from einfold.compiler.ir.manifest import _encode, _hash


def copy(base: Path, out: Path) -> Path:
    """The artifact once more; what is not written to shares its bytes with the first (hard links)."""
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(base, out, copy_function=os.link))


def write(path: Path, data: bytes) -> None:
    """Writes a file anew: behind a hard link lies the base's own."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def manifest(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    del data["blake3"]
    return data


def seal(folder: Path, data: dict[str, Any] | None = None, *changed: str) -> None:
    """Lists these files with their sizes and hashes, and writes the manifest with its own."""
    data = manifest(folder) if data is None else data
    for name in changed:
        content = (folder / name).read_bytes()
        data["files"][name] = {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    write(folder / "manifest.json", _encode(data | {"blake3": _hash(data)}))


def change(folder: Path, name: str, content: bytes) -> Path:
    """One file with other contents, and listed so."""
    write(folder / name, content)
    seal(folder, None, name)
    return folder


def edit(folder: Path, how: Callable[[dict[str, Any]], None]) -> Path:
    """The manifest with other members."""
    data = manifest(folder)
    how(data)
    seal(folder, data)
    return folder
