"""Reads a sample through a model once, and shows observers what passes its sites.

A sample goes through in parts, side by side from one site to the next: what is kept of all of them is what is
needed behind a site, and of one part what is computed between two. Weights are loaded one at a time and let
go, and attention is computed in blocks of rows where its weights are looked at, so that memory is bounded by
the sample's activations at one place of the model. What was found at each site can be kept in a folder; a run
that was interrupted goes on behind the last site that is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import CalibrationError, IRError
from ..ir.heap import give_back, leaving_from
from ..ir.interpreter import Interpreter, Run
from ..ir.kept import read_tensors, write_tensors
from ..ir.locks import lock
from ..ir.ops.attention import distance_bias
from ..ir.program import Program, remove_dead_nodes
from .observer import Found, Observer
from .sites import Site
from .snapshot import all_inputs, snapshot

#: Numbers of attention weights in a block of rows: 64 MB.
_BLOCK = 1 << 24

#: Told of progress: what is being done, and the share of it that is done (0 to 1).
Tell = Callable[[str, float], None]

#: Bytes from which on what a part of the sample computes goes to the system when it is let go of: in the
#: heap it leaves holes between what is kept of all parts.
_LEAVES = 1 << 20

#: How many times as much as at the least may be needed to go on, for it to be written.
_NARROW = 1.5

#: Seconds of work after which the time that is left can be told.
_TOLD = 5.0

_PROGRESS = "progress.pt"
_LOCK = "lock"


def stream(
    program: Program,
    tokens_BS: Tensor,
    observers: Sequence[Observer],
    folder: Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Found]:
    """What the observers find at each of their sites on the sample, by the names of the sites.

    `program` has no cache yet and is left as it is. With `folder`, finished sites are kept there, and those
    that are there already are not read again. Raises CalibrationError where values are not finite.
    """
    return Stream(program, observers).over([tokens_BS], folder, tell)


class Later:
    """What observers find once the calibration text is read: of the model as it is when this is made.

    Later passes may round the weights. It is for what is decided before, and computed when weights are
    written; a pass adds it to `program.calibrations`.
    """

    def __init__(self, program: Program, observers: Sequence[Observer]) -> None:
        self._stream: Stream | None = Stream(program, observers)
        self._found: dict[str, Found] = {}

    def run(self, tokens_BS: Tensor, tell: Tell | None = None) -> None:
        """Reads the text once. Raises CalibrationError where it gives no usable numbers."""
        assert self._stream is not None
        self._found = self._stream.over([tokens_BS], tell=tell)
        self._stream = None  # lets go of the weights

    def at(self, site: str) -> Found:
        """What was found at a site, nothing where nobody looked. Raises IRError before the text was read."""
        if self._stream is not None:
            raise IRError(f"what {site} shows was asked for before calibration")
        return self._found.get(site, {})


def cut_behind(program: Program, places: Sequence[Site]) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """(a copy that ends behind the sites, each node's copy); it shares the weights, and holds none."""
    if not places:
        raise IRError("the program has nothing to observe")
    cut, copies = snapshot(program)
    attention = {site.attention for site in places}
    last = [node for node in program.graph.nodes if node in attention][-1:]
    products = [site.product for site in places if site.product is not None]
    shown = [node for site in places if site.call is None for node in _sources(site)]
    ends = dict.fromkeys((*last, *products, *shown))
    names = ["last"] if [*ends] == last else [node.name for node in ends]
    cut.graph.output(tuple(copies[node] for node in ends)).meta["names"] = names
    remove_dead_nodes(cut)
    return cut, copies


def _sources(site: Site) -> list[fx.Node]:
    """The nodes that a site shows."""
    shown = (*(node for _, node in site.values), *site.more)
    return [each for each in shown if isinstance(each, fx.Node)]


class Stream:
    """The sites of a program at which observers look, and one reading of a sample."""

    def __init__(
        self,
        program: Program,
        observers: Sequence[Observer],
        every: float = 0.0,
        doing: str = "measuring the model",
    ) -> None:
        """`every`: seconds at least between two states of the run that are kept, to go on behind. `doing`:
        what progress is told of."""
        self._sites: dict[str, Site] = {}
        self._observers: dict[str, list[Observer]] = {}
        for observer in observers:
            for site in observer.sites(program):
                if self._sites.setdefault(site.name, site) != site:
                    raise IRError(f"there are two sites {site.name}")
                self._observers.setdefault(site.name, []).append(observer)
        self._program, copies = cut_behind(program, list(self._sites.values()))
        self._ends = self._shown(copies)
        self._unread = {name for node, name in self._ends.items() if _only_result(node)}
        self._folder: Path | None = None
        self._tell: Tell = lambda text, share: None
        self._every, self._kept, self._narrow = every, 0.0, math.inf
        self._doing = doing
        self._found: dict[str, Found] = {}

    def _shown(self, copies: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, str]:
        """The nodes behind which sites were seen, in their order: attention, products, and for other sites a
        call that is put right behind their values."""
        graph, ends, calls = self._program.graph, {}, []
        place = {node: index for index, node in enumerate(graph.nodes)}
        output = self._program.output
        for site in self._sites.values():
            if site.call is not None:
                ends[copies[site.call]] = site.name
                continue
            values = [copies[node] for _, node in site.values]
            more = [copies[each] if isinstance(each, fx.Node) else each for each in site.more]
            last = max((copies[node] for node in _sources(site)), key=place.__getitem__)
            with graph.inserting_after(last):
                calls.append(graph.call_function(_nothing, (*values, *more)))
            ends[calls[-1]] = site.name
        # The calls stand for what they saw, which then goes; so does a product once it was read.
        seen = [node for node in output.all_input_nodes if node in ends and _only_result(node)]
        results = [*calls, *seen]
        graph.erase_node(output)
        graph.output(tuple(results)).meta["names"] = [node.name for node in results]
        return {node: ends[node] for node in graph.nodes if node in ends}

    def over(
        self, parts: Sequence[Tensor], folder: Path | None = None, tell: Tell | None = None
    ) -> dict[str, Found]:
        """Reads a sample, given in parts [rows, tokens]; only sites that are products may be seen in several.
        `stream` says what it gives and raises."""
        if len(parts) > 1 and any(site.product is None for site in self._sites.values()):
            raise IRError(
                "attention and shown values are of one part; the sample was given in several"
            )
        self._folder, self._tell, self._found = None, tell or self._tell, {}
        with ExitStack() as stack:
            if folder is not None:
                with suppress(OSError):  # no room, or no right to write: measuring goes on without
                    folder.mkdir(parents=True, exist_ok=True)
                    # Keeps the folder to one reader; another one, at the same time, keeps nothing.
                    if stack.enter_context(lock(folder / _LOCK)):
                        self._folder = folder
            at, known = (None, []) if folder is None else self._resumed(folder, len(parts))
            self._started, self._before = time.monotonic(), len(self._found)
            if len(self._found) < len(self._ends):
                with leaving_from(_LEAVES):
                    self._read(parts, at, known)
                if self._folder is not None:
                    with suppress(OSError):
                        (self._folder / _PROGRESS).unlink(missing_ok=True)
        return self._found

    def _read(
        self, parts: Sequence[Tensor], at: fx.Node | None, known: list[Mapping[str, Any]]
    ) -> None:
        """Goes from site to site, from where a run stood that was interrupted."""
        instead = {
            node: partial(self._attention if site.product is None else self._product, name)
            for node, name in self._ends.items()
            if (site := self._sites[name]).call is not None
        }
        weights: dict[str, Tensor] = {}  # what several parts read between two sites is loaded once
        interpreter = Interpreter(self._program, len(parts) > 1, instead, kept=weights)
        runs = [
            Run(interpreter, self._inputs(part), at, known[place] if at is not None else None)
            for place, part in enumerate(parts)
        ]
        known.clear()  # runs let go of it as they go on
        name, places = None, [*self._ends, self._program.output]
        for node in places[0 if at is None else places.index(at) :]:
            whole = True
            for run in runs:
                run.until(node)
                whole &= not self._narrowed(node, run)
            weights.clear()
            give_back()  # parts leave holes, which add up from site to site
            if name is not None:
                self._end(name)
                self._keep(name, node, runs if whole else [])
            name = self._ends.get(node)
            if name is not None:
                self._begin(name, [run.arguments(node) for run in runs])

    def _inputs(self, tokens_BS: Tensor) -> dict[str, Tensor]:
        return all_inputs(self._program, tokens_BS)  # the head sees all, where it is a site

    def _begin(self, name: str, calls: Sequence[tuple[Any, ...]]) -> None:
        """Shows a site, in each of the parts: the values that are named, or all that a product is given."""
        found, ends = len(self._found), len(self._ends)
        done = found - self._before if found - self._before >= 5 else 0  # the first are no measure
        self._tell(self._doing + time_left(self._started, done, ends - found), found / ends)
        site = self._sites[name]
        for arguments in calls:
            _check_finite(site, arguments)
            shown = arguments if site.attention is None else arguments[: len(site.values)]
            for observer in self._observers[name]:
                observer.begin(site, *shown)

    def _narrowed(self, node: fx.Node, run: Run) -> bool:
        """Has a run hold less until a product is asked for, as soon as it is at it: what all parts hold
        there may be the most that is held at all. Gives whether it does."""
        site = self._sites.get(self._ends.get(node, ""))
        if site is None or site.product is None:
            return False
        (observer,), source = self._observers[site.name], node.args[0]
        if not isinstance(source, fx.Node) or [*source.users] != [node]:
            return False
        if not observer.narrows(site):  # before its weight is loaded, which may be the largest
            return False
        arguments = run.arguments(node)
        _check_finite(site, arguments)
        run.values[source] = observer.narrow(site, *arguments)
        return True

    def _end(self, name: str) -> None:
        observers = self._observers[name]
        self._found[name] = {n: t for observer in observers for n, t in observer.end().items()}

    def _product(self, name: str, *arguments: Any) -> Tensor:
        (observer,) = self._observers[name]
        return observer.product(name not in self._unread, *arguments)

    def _attention(
        self,
        name: str,
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        sinks_H: Tensor | None,
        layer: int,
        scale: float,
        window: int,
        softcap: float,
        by_distance_HR: Tensor | None = None,
    ) -> Tensor:
        parts = []
        for start, weights_BHST in attention_weights(
            q_BSHD, k_BSKD, sinks_H, scale, window, softcap, by_distance_HR
        ):
            for observer in self._observers[name]:
                observer.block(start, weights_BHST)
            parts.append(_weighted(weights_BHST, v_BSKD))
        return torch.cat(parts, dim=1)

    def _keep(self, name: str, behind: fx.Node, runs: Sequence[Run]) -> None:
        """Keeps what was found at a site, and what is needed to go on behind it, at the next node; without
        runs the first alone."""
        folder = self._folder
        if folder is None:
            return
        known = [run.known for run in runs]
        values = [value for each in known for value in each.values()]
        size = sum(value.nbytes for value in values if isinstance(value, Tensor))
        # Where much is needed, what was done since is done again sooner than it is written.
        due = time.monotonic() - self._kept > self._every
        self._narrow = min(self._narrow, size) if runs else self._narrow
        due = due and size <= _NARROW * self._narrow
        # Without room, or the right to write, measuring goes on and keeps nothing.
        if not keep_found(self._found[name], folder / f"{name}.pt"):
            self._folder = None
        elif runs and due and behind.op != "output":
            self._kept = time.monotonic()
            if not keep_found({"at": behind.name, "values": known}, folder / _PROGRESS):
                self._folder = None

    def _resumed(self, folder: Path, parts: int) -> tuple[fx.Node | None, list[Mapping[str, Any]]]:
        """The node at which an earlier run stood, and the values of its parts; None where all is to be read,
        or all was found."""
        for name in self._ends.values():
            found = kept_found(folder / f"{name}.pt")
            if found is not None:
                self._found[name] = found
        if len(self._found) == len(self._ends):
            return None, []
        state = kept_found(folder / _PROGRESS) or {}
        nodes = [node.name for node in self._ends]
        done = nodes.index(state["at"]) if state.get("at") in nodes else 0
        before = list(self._ends.values())[:done]
        if not (
            done and all(name in self._found for name in before) and len(state["values"]) == parts
        ):
            self._found.clear()  # what is behind a gap cannot be measured without it
            return None, []
        self._found = {name: self._found[name] for name in before}
        return [*self._ends][done], state["values"]


def time_left(started: float, done: int, left: int) -> str:
    """How long `left` more will take, once that can be said, where `done` took since then."""
    used = time.monotonic() - started
    if not done or used < _TOLD:
        return ""
    seconds = used / done * left
    return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"


def _check_finite(site: Site, arguments: Sequence[Any]) -> None:
    """Raises CalibrationError where a site is given what is not finite."""
    for (what, _), x in zip(site.values, arguments, strict=False):
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(
                f"the {what} are not finite on the calibration text: "
                "the model's weights are damaged, or overflow in float32"
            )


def _nothing(*values: Any) -> None:
    """What stands in a graph where its values are shown."""


def _only_result(node: fx.Node) -> bool:
    """Whether nothing but the program's results has a use for a node."""
    return all(user.op == "output" for user in node.users)


def attention_weights(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    sinks_H: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    by_distance_HR: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(first row, weights [B, H, rows, T]) of causal attention in blocks of rows; `einfold::attention`
    says what each argument means."""
    batch, total, heads, _ = q_BSHD.shape
    keys_BHDT = k_BSKD.repeat_interleave(heads // k_BSKD.shape[2], dim=2).permute(0, 2, 3, 1)
    rows = max(1, _BLOCK // (batch * heads * total))
    column = torch.arange(total)
    for start in range(0, total, rows):
        q_BHSD = q_BSHD[:, start : start + rows].transpose(1, 2)
        logits = q_BHSD @ keys_BHDT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        row = torch.arange(start, start + q_BHSD.shape[2])
        distance = row[:, None] - column
        bias_BHST = distance_bias(by_distance_HR, row[None], total)
        logits = logits if bias_BHST is None else logits + bias_BHST
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        logits = logits.masked_fill(hidden, float("-inf"))
        if sinks_H is not None:
            sink = sinks_H[None, :, None, None].expand(batch, -1, logits.shape[2], 1)
            logits = torch.cat((logits, sink), dim=-1)
        yield start, torch.softmax(logits, dim=-1)[..., :total]


def _weighted(weights_BHST: Tensor, v_BSKD: Tensor) -> Tensor:
    """The values by their weights, [B, rows, H, D]."""
    each = weights_BHST.shape[1] // v_BSKD.shape[2]
    values_BHTD = v_BSKD.repeat_interleave(each, dim=2).transpose(1, 2)
    return (weights_BHST @ values_BHTD).transpose(1, 2).contiguous()


def keep_found(value: Any, path: Path) -> bool:
    """Whether a value could be kept. A file says what it is of by the name of its folder, which tells model,
    graph and sample apart."""
    return write_tensors(path, {"of": path.parent.name, "value": value})


def kept_found(path: Path) -> dict[str, Any] | None:
    """The table that was kept; None where there is none, or it is damaged, or of something else."""
    data = read_tensors(path)
    known = isinstance(data, dict) and data.get("of") == path.parent.name
    value = data.get("value") if known else None
    return value if isinstance(value, dict) else None
