"""The text output of plan, preview, status, verify and doctor, on stdout."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.commands.preview.preview import Preview
from pipeline.commands.queue import QueuedRun
from pipeline.commands.verify.verify import Report
from pipeline.config import AnyConfig, ApplyConfig, StoreConfig
from pipeline.core.errors import PipelineError, Stopped
from pipeline.core.lengths import cm_text, sharp_from_m
from pipeline.core.text import (
    count,
    duration,
    end_text,
    energy_text,
    printable,
    seconds_text,
    size_text,
    stage_name,
    work_text,
)
from pipeline.plan import Plan, resolve_device

if TYPE_CHECKING:
    from pipeline.commands.measure import Forecast

_PACKAGES = ("pipeline", "torch", "zarr", "numcodecs", "dask", "numpy", "pyvips", "pydantic")
# Of a print that is held in hands, of a poster, and of a wall.
_PRINT_DPI = (300, 150, 100)
# Lines of damage in the text output; --json lists all.
_MAX_LINES = 20


def _console(width: int | None = None) -> Console:
    """A console without markup, because a path may look like markup. It wraps lines on a terminal only."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty(), width=width)


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table with every cell in full: in a narrow terminal a wrapped line is better than a truncated number."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console(width=1000).print(table)


def print_plan(config: AnyConfig, planned: Plan, expected: Forecast | None, run: str) -> None:
    """Print the stages, tiles, memory, disk space and work of a run, its time if measured, and what `run` would do."""
    rows = [
        (
            str(stage.index + 1),
            f"{stage.size[1]}×{stage.size[0]}",
            f"{stage.tiles:,}",
            f"×{stage.halo_overhead:.2f}",
            size_text(stage.store_bytes),
            work_text(stage.flop_per_iteration),
        )
        for stage in planned.stages
    ]
    is_apply = isinstance(config, ApplyConfig)
    step, steps = ("pass", "passes") if is_apply else ("iteration", "iterations per stage")
    _print_table(("stage", "size px", "tiles", "halo", "store", f"work/{step}"), rows)
    limit = size_text(planned.memory_limit_bytes)
    phases = ", ".join(f"{phase} {size_text(size)}" for phase, size in planned.host_bytes.items())
    tile = f"tiles of {planned.tile_px} px, chunks of {planned.chunk_px} px, halo {planned.halo_px} px"
    levels = f", plus {size_text(planned.levels_bytes)} while it is written" if planned.levels_bytes else ""
    numbers = [stage.max_iterations for stage in planned.stages]
    iterations = "–".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))  # one number if they are equal
    lines = [
        f"device   {planned.devices or planned.device}; {tile}",
        *([f"cluster  {planned.cluster}; memory is that of the largest process"] if planned.cluster else []),
        f"memory   {size_text(planned.projected_mem_bytes)} of {limit} (memory.limit); {phases}",
        *([] if planned.device == "cpu" else [f"on {planned.device}  {size_text(planned.device_bytes)}"]),
        *([] if is_apply else [f"commits  {_commits(config.store, planned)}"]),
        f"disk     {size_text(planned.disk_bytes)} in {config.work_dir}",
        f"output   up to {size_text(planned.output_bytes)} for {_named(planned.outputs)}, {planned.picture}{levels}",
        f"work     {work_text(planned.flop)} for {iterations} {steps}",
        *(f"note     {note}" for note in planned.notes),
    ]
    _print_lines(lines)
    _print_sizes(planned)
    if expected is not None:
        _print_forecast(expected)
    _print_lines([f"run      {run}"])


def _commits(store: StoreConfig, planned: Plan) -> str:
    """Which stages stay in memory, and when they go to the disk."""
    held = [stage for stage in planned.stages if stage.resident_bytes]
    if not held:
        return "after every iteration; no stage stays in memory"
    where = "memory" if planned.device == "cpu" else f"the memory of {planned.device}"
    largest = size_text(max(stage.resident_bytes for stage in held))
    every = f"every {seconds_text(store.commit_interval)} (store.commit_interval)"
    if len(held) == len(planned.stages):
        return f"{every}; all stages stay in {where}, at most {largest}"
    numbers = ", ".join(str(stage.index + 1) for stage in held)
    return f"{every} of stages {numbers}, which stay in {where}, at most {largest}; of others after every iteration"


def _named(outputs: Collection[str]) -> str:
    first, *others = outputs
    return f"{first} to {Path(others[-1]).name}" if others else first


def _print_forecast(expected: Forecast) -> None:
    """Print the time and energy of each stage and of the run."""
    rows = [(f"stage {number}", seconds) for number, seconds in enumerate(expected.stages_s, start=1)]
    rows += [("image", expected.export_s), ("in all", expected.seconds)]
    _print_table(
        ("", "time", "energy"),
        [(what, duration(seconds), energy_text(seconds * expected.power.watts)) for what, seconds in rows],
    )
    _print_lines([f"power    {expected.power.watts:.0f} W: {expected.power.source}"])


def _print_sizes(planned: Plan) -> None:
    """Print how large the picture is on paper, and from which distance it is sharp."""
    height, width = planned.stages[-1].size
    own = f"{planned.dpi:g} (export)"
    resolutions = {own: planned.dpi} | {str(dpi): dpi for dpi in _PRINT_DPI if dpi != planned.dpi}
    rows = [
        (name, f"{cm_text(width, dpi)} × {cm_text(height, dpi)}", f"{sharp_from_m(dpi):.2g} m")
        for name, dpi in resolutions.items()
    ]
    _print_table(("dpi", "size cm", "sharp from"), rows)
    if list(planned.outputs.values()) != [(height, width)]:  # edges or panels
        _print_lines(
            f"{name}: {columns}×{rows} px, {cm_text(columns, planned.dpi)} × {cm_text(rows, planned.dpi)} cm"
            for name, (rows, columns) in planned.outputs.items()
        )


def _print_lines(lines: Iterable[str]) -> None:
    console = _console()
    for line in lines:
        console.print(line)


def print_status(status: dict[str, Any]) -> None:
    """Print the progress of a run."""
    process = f" (process {status['pid']})" if status["pid"] else ""
    _print_lines([f"{status['work_dir']}: {status['state']}{process}, computed for {duration(status['seconds'])}"])
    rows = [
        (
            str(stage["stage"] + 1),
            f"{stage['width_px']}×{stage['height_px']}",
            {"prepared": "rendering" if status["state"] == "running" else "begun"}.get(stage["state"], stage["state"]),
            f"{stage['iterations']}/{stage['max_iterations']}",
            end_text(stage["reason"] or ""),
            duration(stage["seconds"]),
        )
        for stage in status["stages"]
    ]
    steps = "passes" if status["command"] == "apply" else "iterations"
    _print_table(("stage", "size px", "state", steps, "ended by", "time"), rows)
    lines = [_progress_line(status)]
    if (last := status["last"]) and "content_loss" in last:
        losses = f"content {last['content_loss']:.4g}, style {last['style_loss']:.4g}"
        lines.append(f"last iteration: {losses}, mean|u| {last['mean_abs_u']:.3f}")
    _print_lines([*lines, *(f"output: {output}" for output in status["exported"])])


def _progress_line(status: dict[str, Any]) -> str:
    state = "the state was deleted" if status["cleaned"] else f"{size_text(status['state_bytes'])} on disk"
    if status["state"] == "done":
        return f"finished; {state}"
    if status["run_left_s"] is None:
        return state
    when = "" if status["state"] == "running" else " once it is resumed"
    return (
        f"{status['percent']:.0f} % of the run, about {duration(status['run_left_s'])} left to its end{when}; {state}"
    )


def print_queue(runs: Sequence[QueuedRun]) -> None:
    """Print how each run of a queue ended, and how many are done."""
    lines = []
    for one in runs:
        if one.exit_code is None:
            ended = "not started"
        elif one.exit_code == 0:
            ended = f"done in {duration(one.seconds)}: {one.output}"
        elif one.exit_code == Stopped.exit_code:
            ended = "stopped; the same command resumes it"
        else:
            lines_of_error = one.message.strip().splitlines()
            told = lines_of_error[-1] if one.exit_code == PipelineError.exit_code else lines_of_error[0]
            ended = f"failed (exit code {one.exit_code}): {printable(told)}"  # of a bug the last line, below its frames
        lines.append(f"{one.config}: {ended}")
    done = sum(one.exit_code == 0 for one in runs)
    _print_lines([*lines, f"{done} of {count(len(runs), 'run')} done"])


def print_preview(preview: Preview) -> None:
    """Print the path of the sheet and, for each image, its path and the options that reproduce its settings."""
    lines = [str(preview.sheet), *([] if preview.page is None else [str(preview.page)])]
    for index, rendered in enumerate(preview.pictures):
        if len(preview.pictures) > 1:
            lines.append(f"row {index // preview.across + 1}, image {index % preview.across + 1}:")
        settings = " ".join(f"--set {shlex.quote(setting)}" for setting in rendered.settings)
        lines += [f"  {settings or 'the config unchanged'}", f"  {rendered.picture}"]
    _console().print("\n".join(lines), soft_wrap=True)  # a path must not be split into two lines


def print_verify(report: Report) -> None:
    """Print what was checked, the damage, and the steps of a repair."""
    extent = f"{report.checked:,} of {report.total:,}" if report.sample else f"all {report.total:,}"
    lines = [f"{report.work_dir}: checked {extent} chunks, array metadata, journal, inputs and file names"]
    if report.sample is not None:
        share = f"{report.sample.share:.4g} of each array, --seed {report.sample.seed}"
        lines.append(f"this was a sample ({share}): damage in other chunks is not detected")
    lines += [f"note: {note}" for note in report.notes]
    lines += _limited([str(problem) for problem in report.found])
    lines += _limited([f"{'done' if report.repaired else '--repair would'}: {step}" for step in report.steps])
    if report.steps:
        lost = count(report.iterations_lost, "iteration")
        lines.append(f"{'to compute again' if report.repaired else 'to compute again after a repair'}: {lost}")
    if report.repaired and report.found:
        lines.append(f"the run resumes at {stage_name(report.stage)}, iteration {report.iteration + 1}")
        lines += _limited([f"still {problem}" for problem in report.remaining])
    if report.leftovers:
        paths = ", ".join(map(str, report.leftovers[:3]))
        more = f" and {len(report.leftovers) - 3:,} more" if len(report.leftovers) > 3 else ""
        lines.append(f"unused files: {paths}{more}")
    if report.clean:
        lines.append("no damage in the sample" if report.sample else "no damage")
    _print_lines(lines)


def _limited(lines: list[str]) -> list[str]:
    if (more := len(lines) - _MAX_LINES) > 0:
        return [*lines[:_MAX_LINES], f"and {more:,} more (--json lists them)"]
    return lines


def verdict(report: Report) -> str:
    """Why a run directory is not clean, and the remedy, in one sentence."""
    problems = count(len(report.remaining), "damaged or foreign file")
    if not report.repaired and report.steps:
        remedy = "`pipeline verify --repair` takes the steps listed above."
    elif any("restore" in problem.what for problem in report.remaining):
        remedy = "Restore the inputs named above, then repair again."
    else:
        remedy = "This cannot be repaired: restore the files from a backup, or delete the run directory to start again."
    return f"{report.work_dir}: {problems}. {remedy}"


def print_doctor() -> None:
    """Print the versions, devices, memory and disk space of this machine."""
    from pipeline import images  # noqa: PLC0415 - slow, and not needed by the other reports

    python = f"python     {platform.python_version()} on {platform.system()} {platform.machine()}"
    packages = [f"{package:<10} {version(package)}" for package in _PACKAGES]
    # Before the device is looked for: that may fail, and the versions are needed to report it.
    compressions = ", ".join(images.tiff_compressions())
    _print_lines([python, *packages, f"libvips    {images.vips_version()}; compressions of a TIFF: {compressions}"])
    device = resolve_device("auto")
    memory = psutil.virtual_memory()
    _print_lines(
        [
            f"device     {device.name}: {device.label}, {size_text(device.memory_bytes)}",
            f"memory     {size_text(memory.total)}, {size_text(memory.available)} available",
            f"disk       {size_text(shutil.disk_usage(Path.cwd()).free)} free in {os.getcwd()}",  # noqa: PTH109
        ]
    )
