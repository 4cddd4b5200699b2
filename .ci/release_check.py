"""What a release would be, built and looked at: `make release-check`. Uploads nothing.

Builds the sdist and the wheel of the last commit twice and asks that they agree byte for byte, that the
changelog gives the version a date, that the metadata is what an index takes, and that nothing is uncommitted.
Writes both to dist/ and prints their hashes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.metadata import Metadata
from packaging.version import Version

ROOT = Path(__file__).parent.parent

_BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools writes its own arguments there
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def build(out: Path) -> list[Path]:
    """The sdist and the wheel of the last commit, the same bytes whenever they are built."""
    moment = git("log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        packed = subprocess.run(
            ["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "x", "-C", source], input=packed.stdout, check=True)
        subprocess.run(
            [sys.executable, "-c", _BUILD, out],
            cwd=source,
            env=os.environ | {"SOURCE_DATE_EPOCH": moment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    sdist.write_bytes(without_times(sdist.read_bytes(), int(moment)))
    return [sdist, wheel]


def without_times(packed: bytes, moment: int) -> bytes:
    """A .tar.gz whose members are in order, nobody's, and of one moment; setuptools writes when it ran."""
    plain = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(packed)) as before,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = moment, 0, 0, "", ""
            member.pax_headers = {}
            after.addfile(member, before.extractfile(member) if member.isfile() else None)
    return gzip.compress(plain.getvalue(), mtime=moment)


def faults_of_changelog(text: str, version: str) -> list[str]:
    """What keeps a changelog from naming this release first, with its date."""
    first = re.search(r"^## (.+)$", text, re.MULTILINE)
    if first is None or first[1].split()[0] != version:
        named = first[1] if first else "nothing"
        return [f"CHANGELOG.md begins with {named}, and pyproject.toml says {version}"]
    if not re.fullmatch(r"\S+ \(\d{4}-\d\d-\d\d\)", first[1]):
        return [f"CHANGELOG.md says '{first[1]}': a release has its date there, as (2026-01-31)"]
    return []


def faults_of_metadata(raw: bytes, version: str) -> list[str]:
    """What an index would refuse of a package's metadata, or show wrongly."""
    try:
        found = Metadata.from_email(raw, validate=True)
    except Exception as error:  # a group, whose class is another one before Python 3.11
        return [f"metadata: {each}" for each in getattr(error, "exceptions", [error])]
    faults = []
    if found.version != Version(version):
        faults.append(f"metadata: version {found.version}, and pyproject.toml says {version}")
    if found.description_content_type != "text/markdown" or not found.description:
        faults.append("metadata: there is no description in Markdown")
    if not found.license_expression or not found.license_files:
        faults.append("metadata: the license or its file is missing")
    if not found.project_urls:
        faults.append(
            "metadata: no address says where the source and its issues are; give them in project.urls of "
            "pyproject.toml once the project has a public place"
        )
    return faults


def metadata_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as opened:
        [name] = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        return opened.read(name)


def main() -> None:
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    faults = ["there are changes that no commit has"] if git("status", "--porcelain") else []
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        built, again = build(Path(one)), build(Path(other))
        for path, second in zip(built, again, strict=True):
            if path.read_bytes() != second.read_bytes():
                faults.append(f"{path.name} is built differently each time")
            (out / path.name).write_bytes(path.read_bytes())
    raw = metadata_of(out / built[1].name)
    version = str(message_from_bytes(raw)["Version"])
    faults += faults_of_metadata(raw, version)
    faults += faults_of_changelog((ROOT / "CHANGELOG.md").read_text("utf-8"), version)
    tagged = git("tag", "--list", f"v{version}")
    if tagged and git("rev-list", "-n", "1", tagged) != git("rev-parse", "HEAD"):
        faults.append(f"{tagged} is another commit")
    for path in built:
        print(hashlib.sha256((out / path.name).read_bytes()).hexdigest(), f"dist/{path.name}")
    for fault in faults:
        print(f"no release: {fault}", file=sys.stderr)
    print("nothing was uploaded")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
