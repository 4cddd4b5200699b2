"""A second copy of an artifact's weights, as onnxruntime packs them, from which a model runs by paging.

onnxruntime saves what it packed (`session.save_external_prepacked_constant_initializers`), maps that file
when the saved model is loaded and reads the weights where they are mapped. Each super-op is saved so, and
what was saved is laid out anew in one file: all that a super-op may read in a step is one stretch of whole
units, and what is read only while a session is made lies outside of it.

    | packed .. others .. | originals | packed .. others .. | originals | .. | models |
      super-op 0            at loading   super-op 1

What was packed of an expert lies together, so that a token reads as few units as its experts take.

Each of these stretches has a hash of its own, so that it can be checked when it is read anyway, or beside.

Copies lie in the user's cache folder under a hash of the artifact's model and weights, of how it is cut, of
onnxruntime's version and the processor's features. One takes 2.3 times the bytes of the weights; the last two
used are kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import IO, Any

import onnxruntime as ort
from blake3 import blake3

from ....errors import ArtifactError, DiskError, pass_on
from ....runtime.artifact import Artifact
from ....runtime.hashed import state_of
from ....runtime.memory.direct import PAGE, DirectFile, direct_hashes
from ....runtime.memory.filesystem import held_in_memory
from ....runtime.memory.pages import UNIT
from ...ir.heap import give_back
from ...ir.kept import cache_home, drop_oldest, read_json, write_json
from ...ir.locks import lock
from ...ir.manifest import WEIGHTS, WHOLE
from .cut import PADDING, SMALL, SuperOp
from .runner import session_of

#: Changes with the layout of the file.
_LAYOUT = 6

#: Copies that are kept.
_KEPT = 2

#: The files of a copy.
_FILE, _TABLE = "packed.bin", "packed.json"

#: Beside a copy: how experts were chosen.
_EXPERTS = "experts.json"

#: Beside the copies: who makes one is alone.
_LOCK = ".lock"

#: What onnxruntime saves of one super-op, until it is laid out.
_SAVED = "op.bin"

#: Bytes that are left free on the disk.
_LEFT_FREE = 1 << 30

#: Times the bytes of weights that a copy takes at most: as they are, packed with scales and sums, and gaps.
_SIZE = 2.5

#: Seconds after which a copy that is half written is nobody's any more.
_STALE = 3600

_PIECE = 4 << 20

#: Part of an expert's bytes that may be lost for it to begin at a unit.
_LOST = 1 / 8


class NoCopyError(Exception):
    """There is no copy and none can be made, for the reason that it says; weights are read in another way."""


class DamagedCopyError(NoCopyError):
    """A copy is not as it was written, or cannot be read."""


@dataclass(frozen=True)
class PackedOp:
    """Where in the file a super-op lies."""

    start: int
    end: int
    """Of what a step may read, in whole units."""
    last: int
    """Where what is read at loading ends too."""
    packed: tuple[tuple[int, int], ...]
    """Place and length of what onnxruntime must have mapped, else it has packed it again."""
    model: tuple[int, int]
    """Place and length of the saved model."""
    hashes: tuple[str, str]
    """BLAKE3 of what was packed, and of what lies behind it, which is read at loading."""
    experts: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Places and lengths of what is read of each expert, where tokens choose them."""

    @property
    def loaded(self) -> int:
        """Where what is read at loading begins: others, of which a step may read too, and originals."""
        return max((at + length for at, length in self.packed), default=self.start)


@dataclass(frozen=True)
class PackedCopy:
    """A copy whose size and saved models were checked; whoever loads it checks the rest."""

    folder: Path
    ops: Mapping[str, PackedOp]
    written: bool = field(default=False, compare=False)
    """Whether this process wrote it just now, and hashed what it wrote."""

    @property
    def file(self) -> Path:
        return self.folder / _FILE

    def model(self, name: str) -> bytes:
        place, length = self.ops[name].model
        with self.file.open("rb") as stream:
            stream.seek(place)
            return stream.read(length)

    def check_packed(self, names: Sequence[str], stop: Event) -> None:
        """Reads what was packed of super-ops, past the page cache; raises DamagedCopyError where it is not as
        it was written, or where it was told to `stop`."""
        places = [self.ops[name] for name in names]
        try:
            with closing(DirectFile(self.file)) as file:
                found = direct_hashes(file, [(place.start, place.loaded) for place in places], stop)
        except (ArtifactError, DiskError) as error:
            raise DamagedCopyError(str(error)) from error
        if found != [place.hashes[0] for place in places]:
            raise self.damaged()

    def damaged(self) -> DamagedCopyError:
        return DamagedCopyError(f"the packed copy in {self.folder} is not as it was written")

    def tell_of_experts(self, part: float, hits: float) -> None:
        """Keeps for later plans what a run found: a part of the experts was held, and so much of what tokens
        asked for."""
        write_json(self.folder / _EXPERTS, {"part": part, "hits": hits})

    def discard(self) -> None:
        """Has it not be found again."""
        with suppress(OSError):
            (self.folder / _TABLE).unlink()


@dataclass(frozen=True)
class Layout:
    """Where what was packed of a super-op lies, from the start of its stretch."""

    places: tuple[tuple[int, ...], ...]
    """Of each piece of each group."""
    units: tuple[tuple[int, ...], ...]
    """Units that pieces of each group lie in."""
    nbytes: int
    """Of whole units, but for one that would hold padding alone: that is never read."""

    def most(self, choices: int) -> int:
        """Bytes of the units that a token may read which chooses so many groups beside the first."""
        most = choices * max((len(units) for units in self.units[1:]), default=0)
        return min((len(self.units[0]) + most) * UNIT, self.nbytes)


def laid_out(groups: Sequence[Sequence[int]]) -> Layout:
    """Places of packed weights by their sizes: those of every token, then those of each expert.

    Each begins at the next page: at a unit it would cost one more for the few bytes of padding behind codes
    and scales. What is of one expert lies together, and begins at a unit where that loses little.
    """
    places, units, end = [], [], 0
    for number, sizes in enumerate(groups):
        total = sum(-(-size // PAGE) * PAGE for size in sizes)
        if number and -total % UNIT <= _LOST * total:
            end = -(-end // UNIT) * UNIT
        found = []
        for size in sizes:
            found.append(-(-end // PAGE) * PAGE)
            end = found[-1] + size
        spans = [(place, place + size) for place, size in zip(found, sizes, strict=True) if size]
        places.append(tuple(found))
        units.append(units_of(spans))
    return Layout(tuple(places), tuple(units), -(-max(end - PADDING, 0) // UNIT) * UNIT)


def units_of(spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The units that stretches lie in, from a place to another."""
    found = {unit for start, end in spans for unit in range(start // UNIT, -(-end // UNIT))}
    return tuple(sorted(found))


def home() -> Path:
    return cache_home().resolve() / "packed"


def key_of(artifact: Artifact, ops: Sequence[SuperOp]) -> str:
    """What a copy is right for, as a name; super-ops may be cut otherwise by another version of einfold."""
    files = artifact.manifest.files
    words = (
        *(f"{op.name} {op.inputs} {op.outputs} {[n.op_type for n in op.nodes]}" for op in ops),
        *(files[name].blake3 for name in (WHOLE.model, WEIGHTS)),
        ort.__version__,
        _processor(),
        str(_LAYOUT),
    )
    return blake3("\n".join(words).encode()).hexdigest()[:32]


def no_copy(artifact: Artifact, ops: Sequence[SuperOp]) -> str:
    """Why there can be no copy; "" where one is there or there is room for it on a disk."""
    memory = held_in_memory(home())
    if memory:
        return (
            f"a packed copy would lie in memory, since {home()} is on {memory}; set EINFOLD_CACHE to a "
            "folder on a disk"
        )
    if os.path.isfile(home() / key_of(artifact, ops) / _TABLE):  # False where nobody may look
        return ""
    need = int(_SIZE * sum(op.nbytes for op in ops))
    free = _free(home())
    if free < need + _LEFT_FREE:
        return f"a packed copy takes {need / 2**20:,.0f} MiB on the disk of {home()}, which has not as much"
    return ""


def told_of_experts(artifact: Artifact, ops: Sequence[SuperOp]) -> tuple[float, float]:
    """What the last run from an artifact's copy told of experts: which part of them was held, and how much
    that was of what tokens asked for; zeros where none did."""
    try:
        found = read_json(home() / key_of(artifact, ops) / _EXPERTS) or {}
        return float(found["part"]), float(found["hits"])
    except (LookupError, TypeError, ValueError):  # of a file that is none
        return 0.0, 0.0


def find(artifact: Artifact, ops: Sequence[SuperOp]) -> PackedCopy | None:
    """The copy that was made of an artifact, if its table, size and models are as they were written."""
    folder = home() / key_of(artifact, ops)
    table = read_json(folder / _TABLE)
    if table is None:
        return None
    try:
        found = _read_table(table)
        with (folder / _FILE).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(table["models"])
            models = blake3(stream.read()).hexdigest()
        whole = size == table["bytes"] and all(_within(place, size) for place in found.values())
        whole = whole and models == table["blake3"]
    except OSError:  # it is made again, or done without
        return None
    except Exception as error:  # of a table that is none
        pass_on(error)
        return None
    if not whole or found.keys() != {op.name for op in ops if op.weights}:
        return None
    with suppress(OSError):
        os.utime(folder)
    return PackedCopy(folder, found)


def _read_table(table: Mapping[str, Any]) -> dict[str, PackedOp]:
    return {
        name: PackedOp(
            int(entry["start"]),
            int(entry["end"]),
            int(entry["last"]),
            tuple((int(place), int(length)) for place, length in entry["packed"]),
            (int(entry["model"][0]), int(entry["model"][1])),
            (str(entry["hashes"][0]), str(entry["hashes"][1])),
            tuple(tuple((int(at), int(size)) for at, size in each) for each in entry["experts"]),
        )
        for name, entry in table["ops"].items()
    }


def _within(place: PackedOp, size: int) -> bool:
    """Whether all of a super-op lies where it may in a file of so many bytes: memory is let go by places."""
    whole = place.start % UNIT == place.end % UNIT == 0
    ordered = 0 <= place.start <= place.end <= place.last <= place.model[0] <= size
    packed = all(place.start <= at <= at + length <= place.end for at, length in place.packed)
    experts = all(
        place.start <= at <= at + length <= place.end
        for each in place.experts
        for at, length in each
    )
    model = 0 <= place.model[1] <= size - place.model[0]
    return whole and ordered and packed and experts and model


def make(
    artifact: Artifact, ops: Sequence[SuperOp], models: Mapping[str, bytes], options: Any
) -> PackedCopy:
    """Writes a copy; `models` are the super-ops' own, `options()` gives those of a session over them.

    Raises NoCopyError where it cannot be written, ArtifactError where the artifact is damaged: a copy is
    found by the hashes in its manifest.
    """
    folder = home() / key_of(artifact, ops)
    files = [artifact.file(name) for name in (WEIGHTS, WHOLE.model)]
    before = [state_of(file) for file in files]
    artifact.check_weights(resident=False)
    artifact.check(WHOLE.model)
    try:
        home().mkdir(parents=True, exist_ok=True)
        with lock(home() / _LOCK, wait=True):
            made = find(artifact, ops)  # another process may have made it meanwhile
            if made is not None:
                return made
            _clear(home(), key_of(artifact, ops))
            with _scratch(home()) as scratch:
                with (scratch / _FILE).open("wb") as stream:
                    table = _write_all(stream, scratch, ops, models, options)
                if [state_of(file) for file in files] != before:
                    raise ArtifactError(
                        f"{artifact.folder} was changed while its weights were packed: load it again"
                    )
                if not write_json(scratch / _TABLE, table):
                    raise NoCopyError(f"the packed copy could not be written to {home()}")
                shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
                try:
                    scratch.rename(folder)
                    made = PackedCopy(folder, _read_table(table), written=True)
                except OSError:  # another process was faster, where none can be kept out
                    made = find(artifact, ops)
    except OSError as error:
        raise NoCopyError(
            f"the packed copy could not be written to {home()}: {error.strerror or error}"
        ) from error
    if made is None:
        raise NoCopyError(f"the packed copy in {home()} is not as it was written")
    return made


def _write_all(
    stream: IO[bytes],
    scratch: Path,
    ops: Sequence[SuperOp],
    models: Mapping[str, bytes],
    options: Any,
) -> dict[str, Any]:
    """Saves one super-op after the other and copies what it needs behind the others; gives the table."""
    out, protos, found = _Out(stream), {}, {}
    tables: dict[str, int] = {}
    for op in ops:
        if op.weights:
            proto = _saved(op, models[op.name], options(), scratch)
            found[op.name] = _lay_out(proto, op, scratch / _SAVED, out, tables)
            protos[op.name] = proto.SerializeToString()
            out.flush()
            give_back()
            (scratch / _SAVED).unlink(missing_ok=True)
    behind = out.place
    out.hashed()
    for name, raw in protos.items():
        found[name]["model"] = (out.place, len(raw))
        out.write(raw)
    out.flush()
    return {"bytes": out.place, "models": behind, "blake3": out.hashed(), "ops": found}


def _saved(op: SuperOp, model: bytes, options: Any, scratch: Path) -> Any:
    """The model of a super-op as onnxruntime saves it, with what it packed in a file beside."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    path = scratch / "op.onnx"
    options.optimized_model_filepath = str(path)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", _SAVED),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    try:
        session_of(model, options, op.name)
        saved = ModelProto.FromString(path.read_bytes())
    except (ArtifactError, DecodeError) as error:  # the model itself was loaded before
        raise NoCopyError(
            f"onnxruntime could not save {op.name} as it packs it: {error}"
        ) from error
    (scratch / _SAVED).touch()  # it leaves none where all lies in the model
    path.unlink()
    return saved


def _lay_out(
    proto: Any, op: SuperOp, source: Path, out: _Out, tables: dict[str, int]
) -> dict[str, Any]:
    """Copies the tensors of a saved model and has it say where they lie now.

    `tables` are places of what several super-ops look rows up in: it is there once.
    """
    try:
        found = [_Tensor(tensor) for tensor in proto.graph.initializer if tensor.external_data]
    except (LookupError, ValueError) as error:
        raise NoCopyError(
            f"onnxruntime {ort.__version__} says in a way that is not known here where it saved what it "
            f"packed of {op.name}"
        ) from error
    shared = {extent.name for extent in op.tables}
    with source.open("rb") as stream:
        for tensor in [t for t in found if t.length < SMALL and not t.blobs]:
            stream.seek(tensor.place)
            tensor.embed(stream.read(tensor.length))
            found.remove(tensor)
        out.align(UNIT)
        start = out.place
        out.hashed()
        groups = [
            [blob for tensor in group for blob in tensor.blobs] for group in _grouped(found, op)
        ]
        layout = laid_out([[blob.length for blob in blobs] for blobs in groups])
        packed = []
        placed = zip(chain(*layout.places), chain(*groups), strict=True)
        for place, blob in sorted(placed, key=lambda pair: pair[0]):
            out.fill(start + place - out.place)
            packed.append((out.place, blob.length))
            blob.place = out.copy(stream, blob.place, blob.length)
        hashes = [out.hashed()]
        for tensor in [t for t in found if not t.blobs and t.name not in shared]:
            tensor.place = out.copy(stream, tensor.place, tensor.length)
        out.align(UNIT)
        end = out.place
        for tensor in [t for t in found if t.blobs or t.name in shared]:
            if tensor.name in shared and tensor.name in tables:
                tensor.place = tables[tensor.name]
                continue
            tensor.place = tables[tensor.name] = out.copy(stream, tensor.place, tensor.length)
    for tensor in found:
        tensor.tell()
    hashes.append(out.hashed())
    return {
        "start": start,
        "end": end,
        "last": out.place,
        "packed": packed,
        "hashes": hashes,
        "experts": [_read(group, end) for group in _grouped(found, op)[1:]],
    }


def _read(tensors: Sequence[_Tensor], end: int) -> list[tuple[int, int]]:
    """Places and lengths of what a step reads of an expert, before the `end`: what was packed of it, and the
    tensors themselves where nothing was."""
    packed = [(blob.place, blob.length) for tensor in tensors for blob in tensor.blobs]
    return packed or [(t.place, t.length) for t in tensors if t.place < end]


def _grouped(tensors: Sequence[_Tensor], op: SuperOp) -> list[list[_Tensor]]:
    """Those that every token reads, then those of each expert."""
    experts = op.routing.experts.values() if op.routing is not None else ()
    number = {name: place for place, names in enumerate(experts, 1) for name in names}
    groups: list[list[_Tensor]] = [[] for _ in range(1 + len(experts))]
    for tensor in tensors:
        groups[number.get(tensor.name, 0)].append(tensor)
    return groups


@dataclass
class _Blob:
    """A piece of what was packed of a tensor."""

    place: int
    length: int
    rest: str


class _Tensor:
    """A tensor of a saved model: where it lies, and where what was packed of it.

    The latter stand under `prepacked_N` as `key|place;length;checksum[;..]`.
    """

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self._entries = {entry.key: entry for entry in proto.external_data}
        self.name = proto.name
        self.place, self.length = (int(self._entries[key].value) for key in ("offset", "length"))
        self._packed = {}
        for key, entry in self._entries.items():
            if key.startswith("prepacked_"):
                kernel, _, rest = entry.value.rpartition("|")
                words = rest.split(";")
                self._packed[key] = (
                    kernel,
                    [
                        _Blob(int(words[n]), int(words[n + 1]), words[n + 2])
                        for n in range(0, len(words) - 2, 3)
                    ],
                )

    @property
    def blobs(self) -> list[_Blob]:
        return [blob for _, blobs in self._packed.values() for blob in blobs]

    def embed(self, data: bytes) -> None:
        """Has the model hold it."""
        self._proto.raw_data = data
        self._proto.ClearField("external_data")
        self._proto.ClearField("data_location")

    def tell(self) -> None:
        """Writes down where it lies now."""
        self._entries["location"].value = _FILE
        self._entries["offset"].value = str(self.place)
        for key, (kernel, blobs) in self._packed.items():
            places = ";".join(f"{blob.place};{blob.length};{blob.rest}" for blob in blobs)
            self._entries[key].value = f"{kernel}|{places}"


class _Out:
    """A file that is written from its beginning to its end, and hashed; nothing of it stays in memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = blake3()
        self.place = 0

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.place += len(data)

    def hashed(self) -> str:
        """The hash of what was written since this was last asked, in hex."""
        found = self._digest.hexdigest()
        self._digest.reset()
        return str(found)

    def fill(self, size: int) -> None:
        self.write(bytes(size))

    def align(self, size: int) -> None:
        self.fill(-self.place % size)

    def copy(self, source: IO[bytes], place: int, length: int) -> int:
        """Copies from a place in another file to the next page, whose place it gives."""
        self.align(PAGE)
        start = self.place
        source.seek(place)
        while length:
            piece = source.read(min(length, _PIECE))
            if not piece:
                raise OSError(0, "what onnxruntime saved ends too early")
            self.write(piece)
            length -= len(piece)
        return start

    def flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside the copies, which is gone behind the `with` where it was not renamed."""
    path = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _clear(folder: Path, key: str) -> None:
    """Removes what a killed process left, and copies beyond those that were used last."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
    others = [p for p in folder.iterdir() if p.name != key and not p.name.startswith(".")]
    drop_oldest(others, _KEPT - 1)


def _free(folder: Path) -> int:
    """Bytes free on the disk that a folder will lie on; 0 where it cannot be."""
    for path in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(path).free
    return 0


def sums_are_read() -> bool:
    """Whether a product with one token reads the sums of blocks that were packed with the codes, as all
    products with several do. On processors that multiply bytes in one instruction (VNNI) it was measured to,
    and on one without not to."""
    found = _processor()
    return not found.startswith("flags") or bool({"avx512_vnni", "avx_vnni"} & {*found.split()})


def _processor() -> str:
    """What decides how onnxruntime packs, as far as the system says it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
        for line in stream:
            if line.startswith(("flags", "Features")):
                return line
    return ""
