"""Opening an artifact: every listed file is checked before anything is loaded from it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..compiler.ir.file_hash import file_hash
from ..compiler.ir.manifest import WEIGHTS, Manifest
from ..compiler.ir.regular import LARGEST, read_regular
from ..errors import ArtifactError
from .hashed import hashed_once
from .memory.direct import direct_hash


@dataclass(frozen=True)
class Artifact:
    """An artifact's folder and its manifest."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: str | Path, verify: bool = True, weights: bool = True) -> Artifact:
        """Reads the manifest and checks size and BLAKE3 hash of every file that it lists.

        Without `weights` the hash of the weights is left to `check_weights`.

        Hashes find damage; they don't make an artifact from a stranger trusted. Nothing that an
        artifact brings is run: no pickle, no code. Raises ArtifactError with the file's name.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ArtifactError(f"there is no artifact folder {path}")
        artifact = Artifact(path, Manifest.read(path))
        for name in artifact.manifest.files:
            artifact._check(name, verify and (weights or name != WEIGHTS))
        return artifact

    def check_weights(self, resident: bool = True) -> None:
        """Checks the hash of the weights; raises ArtifactError where they are damaged.

        Where they need not be `resident` they are read past the page cache, and nothing of them stays.
        """
        self.file(WEIGHTS)
        self._check(WEIGHTS, True, file_hash if resident else direct_hash)

    def check(self, name: str) -> None:
        """Checks size and hash of a listed file; raises ArtifactError where it is damaged."""
        self.file(name)
        self._check(name, True)

    def file(self, name: str) -> Path:
        """The path of a listed file; raises ArtifactError where the artifact has none of that name."""
        if name not in self.manifest.files:
            raise ArtifactError(f"the artifact {self.folder} has no {name}")
        return self.folder / name

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def read(self, name: str, limit: int = LARGEST) -> bytes:
        """The bytes of a listed file; raises ArtifactError where it is none, or longer than `limit`."""
        return read_regular(self.file(name), limit)

    def weight_bytes(self) -> int:
        """Bytes of the tensors in the weights file, as its own header says."""
        path = self.file(WEIGHTS)
        with path.open("rb") as stream:
            header = struct.unpack("<Q", stream.read(8))[0]
        return path.stat().st_size - 8 - int(header)

    def _check(
        self,
        name: str,
        verify: bool,
        hash_of: Callable[[Path], str] = file_hash,
    ) -> None:
        hashed = partial(hashed_once, hash_of=hash_of) if verify else None
        self.manifest.check_file(self.folder, name, hashed)
