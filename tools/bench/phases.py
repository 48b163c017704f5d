"""Measured and projected peak memory of every phase of a run, by size of the canvas.

A run has two stages (half the size, then the size) and an export to a TIFF pyramid; a separate process exports to
DeepZoom. `--deepzoom` exchanges the formats. The kernel's peak (VmHWM) is reset when a phase ends. `--cap` makes the
kernel enforce `memory.limit`: `data` limits private memory (RLIMIT_DATA), `cgroup` limits all memory, page cache
included (this needs root and cgroup v1).

    python -m tools.bench.phases --sizes 4096,8192,16384 --limit 2GiB --json phases.json
    python -m tools.bench.phases --sizes 30000 --ratio 15 --divide 64 --set export.bleed=5mm
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyvips
import yaml
from rich.console import Console
from rich.table import Table

import pipeline
from tools.bench.runs import make_weights

PIPELINE = Path(sys.executable).with_name("pipeline")
CGROUP = Path("/sys/fs/cgroup/memory/pipeline-bench")
# The names of work in the events, and the phase of the plan that each belongs to.
PHASES = {
    "content": "ingest",
    "style": "ingest",
    "style Gram": "style statistics",
    "canvas": "upsample",
    "average": "upsample",
    "content features": "Gram pass",
    "Gram pass": "Gram pass",
    "gradient pass": "gradient pass",
    "update pass": "update pass",
    "check": "update pass",
    "export": "export",
    "export alone": "export",
}


class PeakOf:
    """Peak resident memory and time of a process, by phase.

    A phase emits events only when a piece of it is done, so each peak belongs to the phase of the next event.
    """

    def __init__(self, pid: int, report: Callable[[str], None]):
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._proc, self._report = Path(f"/proc/{pid}"), report
        self._mark, self._since = 0, time.monotonic()
        self._lock = threading.Lock()

    def sample(self) -> None:
        """Read the current peak; it is unavailable once the process has ended."""
        with self._lock, contextlib.suppress(OSError):
            for line in (self._proc / "status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    self._mark = int(line.split()[1]) * 1024

    def done(self, phase: str, last: bool) -> None:
        """Record that a piece of `phase` is done; the last piece resets the peak for the next phase."""
        self.sample()
        now = time.monotonic()
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._mark)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
        if last:
            self._report(f"{phase}: {self.peaks[phase] / 2**20:.0f} MiB, {self.seconds[phase]:.1f} s")
            with self._lock, contextlib.suppress(OSError):
                (self._proc / "clear_refs").write_text("5")


def cap_command(cap: str, limit: int) -> list[str]:
    """The prefix of a command line that runs it in limited memory."""
    if cap == "data":
        return ["prlimit", f"--data={limit}"]
    return ["sh", "-c", f'echo $$ > {CGROUP}/cgroup.procs && exec "$@"', "sh"] if cap == "cgroup" else []


def watch(command: list[str], name: str) -> tuple[PeakOf, list[dict[str, Any]]]:
    """(peak bytes and seconds of every phase, all iterations) of a command that may write JSON events."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stderr is not None
        peak = PeakOf(process.pid, lambda line: print(f"{time.strftime('%H:%M:%S')} {name}: {line}", flush=True))
        threading.Thread(target=_sample, args=(process, peak), daemon=True).start()
        iterations = []
        for line in process.stderr:
            if not line.startswith("{"):
                log.write(line)
                continue
            event = json.loads(line)
            if event["event"] == "WorkDone":
                peak.done(event["what"], event["done"] == event["total"])
            if event["event"] == "IterationDone":
                iterations.append(event)
        if process.wait() != 0:
            log.seek(0)
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()}")
        return peak, iterations


def _sample(process: subprocess.Popen[str], peak: PeakOf) -> None:
    """Read the peak every 20 ms, because it disappears with the process."""
    while process.poll() is None:
        peak.sample()
        time.sleep(0.02)


def measure(folder: Path, size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured bytes of every phase at one size, and the iterations."""
    config = folder / f"{size}.yaml"
    in_run, separate = ("dz", "tif") if options["deepzoom"] else ("tif", "dz")
    config.write_text(
        yaml.safe_dump(
            {
                "content": str(options["content"] or folder / "content.jpg"),
                "styles": [{"image": str(options["style"] or folder / "style.jpg")}],
                "output": f"{size}.{in_run}",
                "work_dir": f"{size}.run",
                "size": size,
                "initial_size": -(-size // 2),
                "network": options["network"],
                "optimizer": {"max_iterations": options["iterations"]},
                "compute": {"device": "cpu"},
                "memory": {"limit": options["limit"]},
                "store": {"state_dtype": options["state_dtype"]},
            }
        ),
        encoding="utf-8",
    )
    planned = pipeline.plan(pipeline.load_config(config, options["settings"]))
    cap = cap_command(options["cap"], planned.memory_limit_bytes)
    given = ["-c", str(config), *(part for setting in options["settings"] for part in ("--set", setting))]
    run, iterations = watch([*cap, str(PIPELINE), "run", *given, "--log-format", "json"], f"{size:,} px")
    export_command = [*cap, str(PIPELINE), "export", *given, "-o", str(folder / f"{size}.{separate}"), "--force"]
    export, _ = watch(export_command, f"{size:,} px")
    export.done("export alone", True)  # it emits no events
    if not options["keep"]:
        subprocess.run(["rm", "-rf", *map(str, folder.glob(f"{size}[._]*"))], check=True)
    return {
        "size": size,
        "tile_px": planned.tile_px,
        "planned": planned.host_bytes,
        "peaks": run.peaks | export.peaks,
        "seconds": run.seconds | export.seconds,
        "iterations": [{key: event[key] for key in ("stage", "seconds", "busy")} for event in iterations],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print MiB of every phase by size, then the time per pixel."""
    table = Table(title="peak MiB (planned)")
    table.add_column("phase")
    for row in rows:
        table.add_column(f"{row['size']:,} px", justify="right")
    for what, phase in PHASES.items():
        cells = [(row["peaks"].get(what), row["planned"][phase]) for row in rows]
        table.add_row(what, *(f"{peak / 2**20:.0f} ({plan / 2**20:.0f})" if peak else "" for peak, plan in cells))
    peaks = [(max(row["peaks"].values()), max(row["planned"].values())) for row in rows]
    table.add_row("all", *(f"{peak / 2**20:.0f} ({plan / 2**20:.0f}, {plan / peak:.2f}×)" for peak, plan in peaks))
    times = Table(title="seconds per megapixel and iteration, last stage")
    for column in ("canvas", "tile", "Gram", "gradient", "update", "all"):
        times.add_column(column, justify="right")
    for row in (row for row in rows if row["iterations"]):  # a resumed run may have had no iterations left
        seconds, megapixels = row["iterations"][-1]["seconds"], row["size"] ** 2 / 1e6
        parts = [seconds.get(name, 0.0) / megapixels for name in ("gram", "gradient", "update")]
        times.add_row(f"{row['size']:,}", f"{row['tile_px']:,}", *(f"{part:.3f}" for part in (*parts, sum(parts))))
    Console().print(table, times)


@click.command()
@click.option("--sizes", default="2048,4096", show_default=True, help="Long sides in px.")
@click.option("--limit", default="2GiB", show_default=True, help="memory.limit")
@click.option("--state-dtype", type=click.Choice(["float", "compact"]), default="float", show_default=True)
@click.option("--iterations", default=1, show_default=True, help="Iterations of each stage.")
@click.option("--divide", type=int, help="Use random weights of VGG-19's widths divided by this, not vgg19-lite.")
@click.option("--cap", type=click.Choice(["none", "data", "cgroup"]), default="none", show_default=True)
@click.option("--deepzoom", is_flag=True, help="The run exports DeepZoom, the separate process TIFF.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of every config.")
@click.option("--ratio", default=1.0, show_default=True, help="Width / height of the content of noise.")
@click.option("--content", type=click.Path(path_type=Path), help="Image file; default: noise.")
@click.option("--style", type=click.Path(path_type=Path), help="Image file; default: noise.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Working folder; default: temporary.")
@click.option("--keep", is_flag=True, help="Work in --folder itself and keep its files; the same command resumes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    sizes: str, folder: Path | None, json_path: Path | None, divide: int | None, ratio: float, **options: Any
) -> None:
    """Print planned and measured memory of every phase."""
    if options["cap"] == "cgroup":
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(options["limit"].replace("iB", "").lower())
    rows = []
    if options["keep"] and folder is None:
        raise click.UsageError("--keep needs --folder.")
    with contextlib.nullcontext(str(folder)) if options["keep"] else tempfile.TemporaryDirectory(dir=folder) as name:
        Path(name).mkdir(parents=True, exist_ok=True)
        for image, height in (("content", round(1024 / ratio)), ("style", 1024)):
            noise = np.random.default_rng(0).integers(0, 256, (height, 1024, 3), dtype="uint8")
            pyvips.Image.new_from_array(noise).write_to_file(f"{name}/{image}.jpg")
        options["network"] = {"name": "vgg19-lite"}
        if divide:
            options["network"] = {
                "name": "vgg19",
                "weights": str(make_weights(Path(name) / "random.safetensors", divide)),
            }
        for size in map(int, sizes.split(",")):
            rows.append(measure(Path(name), size, options))
            show(rows)
            if json_path:
                machine = f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
                json_path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
