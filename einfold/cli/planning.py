"""`plan` and `device`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .common import err, out, parse_bytes, print_json, progress, whole_file
from .options import Artifact, Chunk, Debug, DeviceFile, Json, Room, Threads

if TYPE_CHECKING:
    from ..planning import Plan

device = typer.Typer(help="Measure this machine, for `plan`.", no_args_is_help=True)


def plan(
    artifact: Artifact,
    memory: Annotated[
        str,
        typer.Option(
            help="Memory that the process may hold, such as 2GiB or 800M; of a GPU where the artifact is for "
            "one.",
            show_default=False,
        ),
    ],
    context: Room = None,
    chunk: Chunk = 512,
    device: DeviceFile = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write a page there (HTML) that draws what is read and computed when.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell, before anything is loaded, which weights and layers of the cache stay in memory and which are
    read from the disk in every step, or copied to a GPU, the peak of memory, and the tokens a second."""
    from ..planning import plan as make

    found = make(artifact, memory=parse_bytes(memory), context=context, chunk=chunk, device=device)
    if page is not None:
        with whole_file(page) as stream:
            stream.write(found.page().encode())
    if json:
        print_json(found.data())
        return
    show_plan(found)


def show_plan(found: Plan) -> None:
    from ..compiler.report import human_bytes

    tiers, step = found.tiers, found.step
    table, gpu = Table(box=None), tiers.home == "host"
    for title in ("super-op", "in the file", "on the GPU" if gpu else "in memory"):
        table.add_column(title, justify="left" if title == "super-op" else "right")
    table.add_column("tier")
    for piece in tiers.pieces:
        held = human_bytes(piece.held) if piece.held else ""
        table.add_row(
            piece.name, human_bytes(piece.in_artifact) if held else "", held, tiers.tier_of(piece)
        )
    out.print(table)
    totals = Table(show_header=False, box=None)
    totals.add_row("the process itself", human_bytes(tiers.fixed.process))
    kept = f"KV cache, {found.tokens:,} tokens" + (", in memory" if tiers.spill else "")
    totals.add_row(kept, human_bytes(tiers.fixed.cache))
    totals.add_row(
        f"activations, {found.chunk} tokens a step", human_bytes(tiers.fixed.activations)
    )
    if tiers.fixed.shared:
        totals.add_row("weights of no super-op alone", human_bytes(tiers.fixed.shared))
    totals.add_row("pinned weights", human_bytes(sum(piece.held for piece in tiers.kept)))
    totals.add_row(
        "pages that are read ahead" if tiers.paged else "buffers that are read ahead",
        human_bytes(tiers.buffers),
    )
    if found.held():
        totals.add_row("held between tokens", found.held())
    totals.add_row("peak", f"{human_bytes(tiers.peak)} of {human_bytes(tiers.budget)}")
    brought = "copied" if gpu else "read"
    token = f"{brought} for a token" if tiers.routed else f"{brought} in every step"
    totals.add_row(token, human_bytes(tiers.fetched))
    if tiers.routed:
        totals.add_row("for a step of a prompt", f"up to {human_bytes(tiers.prompt)}")
    if found.spilled():
        totals.add_row("spilled to the disk", found.spilled())
    if found.way():
        totals.add_row("which are", found.way())
    packing = f"packing {step.packing:.3f} s, " if not gpu else ""
    parts = f"{found.words.name} {step.disk:.3f} s, {packing}compute {step.compute:.3f} s"
    totals.add_row("a token", f"{found.seconds:.3f} s ({1 / found.seconds:.2f} a second): {parts}")
    totals.add_row("bound by", found.bound())
    out.print(totals)
    if found.warning():
        err.print(found.warning(), style="yellow")
    if gpu and found.seen.source == "defaults":
        err.print(
            "no GPU was measured here: the seconds are those of one that is assumed (24 GiB that are read at "
            "1,000 GB/s, over a link of 24 GB/s); `einfold device probe` measures one"
        )
    elif found.device.source == "defaults":
        err.print(
            "this machine was not measured: the seconds are those of assumed bandwidths (disk 0.5 GB/s, "
            "packing 0.5 GB/s, memory 20 GB/s); `einfold device probe` measures them"
        )


@device.command()
def probe(
    at: Annotated[
        Path | None,
        typer.Option(
            help="A folder on the disk that artifacts lie on. [default: einfold's cache folder]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Write the description here instead of where `plan` looks.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the bandwidths of memory and disk, the rate of packing weights, and the GPU where there is one,
    its memory and the link to it, and keep them for `plan`."""
    from dataclasses import asdict, replace
    from datetime import UTC, datetime

    from ..compiler.codegen.onnx.packing_rate import packing_rate
    from ..compiler.codegen.onnx.runner import available_cores
    from ..compiler.ir.device import Device, device_file, write_device
    from ..compiler.ir.kept import cache_home
    from ..errors import EinfoldError, first_line
    from ..runtime.memory.gpu_probe import measured_gpu
    from ..runtime.memory.probe import disk_bandwidth, ram_bandwidth, ram_size

    cores = threads or available_cores()
    with progress(json) as tell:
        tell("reading memory", 0.0)
        ram = ram_bandwidth(cores)
        tell("reading the disk", 0.3)
        disk, direct = disk_bandwidth(at or cache_home())
        tell("packing weights", 0.7)
        packing = packing_rate()
    measured = f"measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC" + (
        "" if direct else ", without direct reads"
    )
    found = Device(cores, ram_size(), round(ram), round(disk), round(packing), measured)
    try:
        gpu, why = measured_gpu(), ""
    except (EinfoldError, RuntimeError) as error:  # RuntimeError: of a driver
        gpu, why = None, f"the GPU was not measured: {first_line(error)}"
    if gpu is not None:
        memory, reading, link = (round(number) for number in gpu)
        found = replace(
            found,
            gpu_memory=memory,
            gpu_bandwidth=reading,
            link_bandwidth=link,
            gpu_source=measured,
        )
    path = output or device_file()
    write_device(found, path)
    if json:
        print_json({"file": str(path), **asdict(found)})
        return
    out.print(
        f"{path}: {cores} cores, memory {ram / 1e9:.1f} GB/s, disk {disk / 1e9:.2f} GB/s"
        + ("" if direct else " (no direct reads)")
        + f", packing {packing / 1e9:.2f} GB/s"
        + (f", GPU {reading / 1e9:.0f} GB/s, link {link / 1e9:.1f} GB/s" if gpu is not None else "")
        + (f"; {why}" if why else "")
    )
