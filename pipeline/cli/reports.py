"""Text for people: the plan, the status and the doctor's findings, on stdout."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.commands.preview.preview import Preview
from pipeline.commands.verify.verify import Report
from pipeline.config.config import Config
from pipeline.core.text import count, duration
from pipeline.plan.device import resolve_device
from pipeline.plan.plan import Plan

_PACKAGES = ("pipeline", "torch", "zarr", "numcodecs", "dask", "numpy", "pyvips", "pydantic")


def gib(size_bytes: float) -> str:
    """Bytes for people."""
    return f"{size_bytes / 2**30:.2f} GiB"


def _console(width: int | None = None) -> Console:
    """Text as it is: a path may hold what rich takes for markup, and only a terminal needs lines to be broken."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty(), width=width)


def _print_table(table: Table) -> None:
    """Every cell whole: in a narrow window a line that the terminal breaks says more than a number cut short."""
    _console(width=1000).print(table)


def print_plan(config: Config, planned: Plan) -> None:
    """Stages, tiles, memory, disk and work of a run."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "size px", "tiles", "halo", "store", "TFLOP/it"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in planned.stages:
        table.add_row(
            str(stage.index),
            f"{stage.size[1]}×{stage.size[0]}",
            f"{stage.tiles:,}",
            f"×{stage.halo_overhead:.2f}",
            gib(stage.store_bytes),
            f"{stage.flop_per_iteration / 1e12:.2f}",
        )
    _print_table(table)
    limit = gib(planned.memory_limit_bytes)
    phases = ", ".join(f"{phase} {gib(size)}" for phase, size in planned.host_bytes.items())
    tile = f"tiles of {planned.tile_px} px, chunks of {planned.chunk_px} px, halo {planned.halo_px} px"
    lines = [
        f"device   {planned.device}; {tile}",
        f"memory   {gib(planned.projected_mem_bytes)} of {limit} (memory.limit); {phases}",
        *([] if planned.device == "cpu" else [f"on {planned.device}  {gib(planned.device_bytes)}"]),
        f"disk     {gib(planned.disk_bytes)} in {config.work_dir}",
        f"picture  up to {gib(planned.output_bytes)} for {config.output}, {planned.picture}{_beside(planned)}",
        f"work     {planned.flop / 1e12:,.0f} TFLOP for {_iterations(planned)} iterations of every stage",
    ]
    for line in lines:
        console.print(line)


def _beside(planned: Plan) -> str:
    """What a TIFF's smaller levels take besides."""
    return f", and {gib(planned.levels_bytes)} beside it while it is written" if planned.levels_bytes else ""


def _iterations(planned: Plan) -> str:
    """Of every stage: one number, or the least and the most."""
    numbers = sorted(stage.max_iterations for stage in planned.stages)
    return "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))


def print_status(found: dict[str, Any]) -> None:
    """Where a run stands."""
    console = _console()
    process = f" (process {found['pid']})" if found["pid"] else ""
    console.print(f"{found['work_dir']}: {found['state']}{process}, {duration(found['seconds'])} of computing")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "size px", "state", "iterations", "ended by", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in found["stages"]:
        table.add_row(
            str(stage["stage"]),
            f"{stage['width_px']}×{stage['height_px']}",
            stage["state"],
            f"{stage['iterations']}/{stage['max_iterations']}",
            stage["reason"] or "",
            duration(stage["seconds"]),
        )
    _print_table(table)
    if found["last"]:
        last = found["last"]
        losses = f"content {last['content_loss']:.4g}, style {last['style_loss']:.4g}"
        console.print(f"last: {losses}, mean|u| {last['mean_abs_u']:.3f}")
    for output in found["exported"]:
        console.print(f"picture: {output}")


def print_preview(found: Preview) -> None:
    """Where the sheet is, and which keys make each of its pictures, as lines that can be copied."""
    lines = [str(found.sheet)]
    for index, one in enumerate(found.pictures):
        if len(found.pictures) > 1:
            lines.append(f"row {index // found.across + 1}, picture {index % found.across + 1}:")
        settings = " ".join(f"--set {shlex.quote(setting)}" for setting in one.settings)
        lines += [f"  {settings or 'the config as it is'}", f"  {one.picture}"]
    _console().print("\n".join(lines), soft_wrap=True)  # a path that is broken into two lines is none


# Lines of damage that a person reads; --json has them all.
_MOST_LINES = 20


def print_verify(found: Report) -> None:
    """What a run directory holds, what is wrong with it, and what is or can be done about that."""
    console = _console()
    extent = f"all {found.total:,} chunks" if found.sample is None else f"{found.checked:,} of {found.total:,} chunks"
    console.print(f"{found.work_dir}: {extent}, all descriptions, records, inputs and names")
    if found.sample is not None:
        share = f"{found.sample.share:.4g} of each array, --seed {found.sample.seed}"
        console.print(f"this was a sample ({share}): damage elsewhere was not looked for")
    for text in found.notes:
        console.print(f"note: {text}")
    _print_some(console, [str(problem) for problem in found.found])
    _print_some(console, [f"{'done' if found.repaired else '--repair would'}: {text}" for text in found.steps])
    if found.steps:
        lost = count(found.iterations_lost, "iteration")
        console.print(f"{'lost' if found.repaired else 'lost by that'}: {lost}, to be computed again")
    if found.repaired and found.found:
        console.print(f"the run goes on at stage {found.stage}, iteration {found.iteration}")
        _print_some(console, [f"still {problem}" for problem in found.remaining])
    if found.leftovers:
        paths = ", ".join(map(str, found.leftovers[:3]))
        more = "" if len(found.leftovers) <= 3 else f" and {len(found.leftovers) - 3:,} more"
        console.print(f"left over, read by nothing: {paths}{more}")
    if found.clean:
        console.print("no damage" if found.sample is None else "no damage in the sample")


def _print_some(console: Console, lines: list[str]) -> None:
    for line in lines[:_MOST_LINES]:
        console.print(line)
    if len(lines) > _MOST_LINES:
        console.print(f"and {len(lines) - _MOST_LINES:,} more (--json lists them)")


def verdict(found: Report) -> str:
    """Why a run directory is not clean, and what to do, in one sentence."""
    problems = count(len(found.remaining), "damaged or foreign file")
    if not found.repaired and found.steps:
        remedy = "`pipeline verify --repair` does what is listed above."
    elif any("restore" in problem.what for problem in found.remaining):
        remedy = "Restore the inputs named above, then repair again."
    else:
        remedy = (
            "Nothing here can mend that: restore the files from a copy, or delete the run directory to begin again."
        )
    return f"{found.work_dir}: {problems}. {remedy}"


def print_doctor() -> None:
    """Versions, devices, memory and disk of this machine."""
    console = _console()
    console.print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        console.print(f"{package:<10} {version(package)}")
    from pipeline import images  # noqa: PLC0415

    console.print(f"libvips    {images.vips_version()}")
    device = resolve_device("auto")
    console.print(f"device     {device.name}: {device.label}, {gib(device.memory_bytes)}")
    memory = psutil.virtual_memory()
    console.print(f"memory     {gib(memory.total)}, {gib(memory.available)} available")
    console.print(f"disk       {gib(shutil.disk_usage(Path.cwd()).free)} free in {os.getcwd()}")  # noqa: PTH109
