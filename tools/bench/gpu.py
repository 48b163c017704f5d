"""Speed and memory on a GPU: the paper's two renders, the last stage at 16K and 30K, one tile against many, growth.

    python -m tools.bench.gpu --json gpu.json                       all cases
    python -m tools.bench.gpu --case paper-4k --dtype tf32          one case
    python -m tools.bench.gpu --device cpu --shrink 16 --case …     a rehearsal without a GPU: sides divided by 16

`compute` is the share of the time in which the device computes a tile, from its launch to its end. TFLOP/s are compared
with a large matrix product of the same dtype in the same process. Cases run in the given order until `--budget` seconds
have passed; the tool names the cases it skips. The paper's times are for a Titan V (5,258.7 s and 23,504.1 s).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from pipeline.core.allocator import set_up_process
from tools.bench.runs import Taken, machine, make_image, make_weights, render, synchronised

PAPER_S = {"paper-4k": 5258.7, "paper-8k": 23504.1}
SIZES = {"paper-4k": (2160, 4096), "paper-8k": (4320, 7680)}
PAPER = {"schedule": "constant", "stop_condition": 0.0}


class Bench:
    """Images, weights and settings that all cases share."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options, self.shrink = folder, options, options["shrink"]
        self.weights = options["weights"] or make_weights(folder / "random.safetensors", options["divide"])
        make_image(folder / "style.png", *[1024 // self.shrink] * 2, seed=1)
        make_image(folder / "square.png", *[1024 // self.shrink] * 2, seed=2)

    def render(self, name: str, dtype: str, content: str, size: int, **sections: Any) -> Taken:
        config: dict[str, Any] = {
            "content": content,
            "styles": [{"image": "style.png"}],
            "size": size // self.shrink,
            "initial_size": size // self.shrink,
            "network": {"name": "vgg19", "weights": str(self.weights)},
            "optimizer": {"max_iterations": 4},
            "compute": {"device": self.options["device"], "dtype": dtype},
            "memory": {"limit": self.options["limit"]},
            "store": {"chunk_px": 512 // self.shrink},
        }
        for section, values in sections.items():
            config[section] = {**config[section], **values} if isinstance(values, dict) else values
        return render(self.folder, name, config)


def paper(bench: Bench, which: str, dtype: str, iterations: int) -> list[Taken]:
    """The paper's whole render from 512 px, without and with early stop."""
    height, width = (side // bench.shrink for side in SIZES[which])
    make_image(bench.folder / f"{which}.png", height, width, seed=0)
    taken = []
    for stop in (0.0, 0.1):
        optimizer = {**PAPER, "max_iterations": iterations, "stop_condition": stop}
        name = f"{which} {dtype} {iterations} iterations, early stop {'on' if stop else 'off'}"
        sections: dict[str, Any] = {"optimizer": optimizer, "initial_size": 512 // bench.shrink}
        taken.append(bench.render(name, dtype, f"{which}.png", SIZES[which][1], **sections))
        if bench.options["skip_early_stop"]:
            break
    return taken


def last_stage(bench: Bench, size: int, dtype: str) -> list[Taken]:
    """A few iterations of a square last stage with an enlarged content and a compact state."""
    compact = {"state_dtype": "compact"}
    optimizer = {"max_iterations": bench.options["last_iterations"]}
    return [bench.render(f"last stage {size} {dtype}", dtype, "square.png", size, store=compact, optimizer=optimizer)]


def tiling(bench: Bench, dtype: str) -> list[Taken]:
    """The same canvas as one, four and sixteen tiles."""
    return [
        bench.render(f"tiles of {tile} {dtype}", dtype, "square.png", 4096, compute={"tile_px": tile // bench.shrink})
        for tile in (4096, 2048, 1024)
    ]


def growth(bench: Bench, dtype: str) -> list[Taken]:
    """Time per pixel from 1K up, with tiles of one size."""
    return [
        bench.render(f"growth {size} {dtype}", dtype, "square.png", size, compute={"tile_px": 1024 // bench.shrink})
        for size in (1024, 2048, 4096, 8192)
        if size <= bench.options["largest"]
    ]


CASES: dict[str, Callable[[Bench, str, int], list[Taken]]] = {
    "paper-4k": lambda bench, dtype, iterations: paper(bench, "paper-4k", dtype, iterations),
    "paper-8k": lambda bench, dtype, iterations: paper(bench, "paper-8k", dtype, iterations),
    "tiling": lambda bench, dtype, _iterations: tiling(bench, dtype),
    "growth": lambda bench, dtype, _iterations: growth(bench, dtype),
    "last-16k": lambda bench, dtype, _iterations: last_stage(bench, 16_384, dtype),
    "last-30k": lambda bench, dtype, _iterations: last_stage(bench, 30_000, dtype),
}


def rates(device: str) -> dict[str, float]:
    """FLOP/s of a large matrix product per dtype, and bytes/s of a copy on the device."""
    side = 8192 if device != "cpu" else 512
    measured = {}
    for dtype, numbers in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        a, b = (torch.randn(side, side, device=device, dtype=numbers) for _ in range(2))
        measured[dtype] = 2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.ones(side * side * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured["copy"] = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    return measured


def _seconds(call: Callable[[], object], device: str) -> float:
    """Median of six calls after two warm-up calls."""
    turns = []
    for _ in range(8):
        start = synchronised(device)
        call()
        turns.append(synchronised(device) - start)
    return sorted(turns[2:])[len(turns[2:]) // 2]


def full_run_s(taken: Taken, iterations: int) -> float:
    """Projected seconds of a run from 512 px with `iterations` per stage, at the last stage's time per pixel."""
    height, width = taken.last["size"]
    pixels, long_side = 0.0, max(height, width)
    side = 512
    while side < long_side:
        pixels += height * width * (side / long_side) ** 2
        side *= 2
    per_iteration = taken.per_iteration("wall") * (1 + pixels / (height * width))
    return per_iteration * iterations + taken.seconds - sum(busy["wall"] for busy in taken.last["busy"])


def show(rows: list[dict[str, Any]], speeds: dict[str, float]) -> None:
    """Print one line per run: time, device share and speed of an iteration of its last stage."""
    table = Table(title="last stage of every run; seconds per iteration are medians")
    for column in ("run", "px", "tiles", "all s", "s/it", "ns/px", "compute", "read", "write", "update", "GiB", "plan"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    table.add_column("TFLOP/s (of matmul)", justify="right")
    for row in rows:
        taken, dtype = Taken(**row["taken"]), row["dtype"]
        wall, compute = taken.per_iteration("wall"), taken.per_iteration("compute")
        height, width = taken.last["size"]
        speed = taken.last["flop"] / compute if compute else 0.0
        table.add_row(
            taken.name,
            f"{width}×{height}",
            str(taken.last["tiles"]),
            f"{taken.seconds:.1f}",
            f"{wall:.3f}",
            f"{wall / height / width * 1e9:.2f}",
            f"{compute / wall:.0%}",
            *(f"{taken.per_iteration(kind) / wall:.0%}" for kind in ("read", "write", "update")),
            f"{taken.device_bytes / 2**30:.1f}",
            f"{taken.planned['device'] / 2**30:.1f}",
            f"{speed / 1e12:.1f} ({speed / speeds[dtype]:.0%})",
        )
    Console(width=180).print(table)
    for row in rows:
        taken = Taken(**row["taken"])
        if row["case"] in PAPER_S:
            its = [len(stage["busy"]) for stage in taken.stages]
            factor = PAPER_S[row["case"]] / taken.seconds
            print(f"{taken.name}: {taken.seconds:.1f} s, {factor:.0f} times as fast as the paper; iterations {its}")
        elif row["case"].startswith("last"):
            print(f"{taken.name}: projected (not run) from 512 px, 100 iterations: {full_run_s(taken, 100):.0f} s")


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--dtype", "dtypes", multiple=True, default=["tf32", "float32", "bfloat16"], show_default=True)
@click.option("--iterations", default=100, show_default=True, help="Iterations per stage of the paper's renders.")
@click.option("--last-iterations", default=3, show_default=True, help="Iterations of the last stage at 16K and 30K.")
@click.option("--largest", default=8192, show_default=True, help="Largest canvas of the growth case, px.")
@click.option("--skip-early-stop", is_flag=True, help="Render the paper's images without early stop only.")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--limit", default="64GiB", show_default=True, help="memory.limit")
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: random weights.")
@click.option("--divide", default=1, show_default=True, help="Divide the widths of the random weights by this.")
@click.option("--shrink", default=1, show_default=True, help="Divide all sides by this, for a rehearsal.")
@click.option("--budget", default=3600.0, show_default=True, help="Seconds after which no further case starts.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Working folder; default: temporary.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here after every case.")
def main(
    cases: tuple[str, ...],
    dtypes: tuple[str, ...],
    iterations: int,
    budget: float,
    folder: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Print time and memory of renders on a GPU."""
    set_up_process()
    started = time.monotonic()
    device = options["device"]
    about, speeds = machine(device), rates(device)
    print(about, {name: f"{value / 1e12:.2f} T" for name, value in speeds.items()}, flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        bench = Bench(Path(name), options)
        for case in cases:
            for dtype in dtypes:
                if time.monotonic() - started > budget:
                    print(f"skipped (out of budget): {case} {dtype}")
                    continue
                try:
                    taken = CASES[case](bench, dtype, iterations)
                except Exception as error:  # the results of the other cases are still reported
                    print(f"failed: {case} {dtype}: {error!r}", flush=True)
                    continue
                rows += [{"case": case, "dtype": dtype, "taken": asdict(run)} for run in taken]
                for run in taken:
                    print(f"{time.monotonic() - started:.0f} s: {run.name} took {run.seconds:.1f} s", flush=True)
                if json_path:
                    json_path.write_text(json.dumps({"machine": about, "rates": speeds, "rows": rows}), "utf-8")
    show(rows, speeds)


if __name__ == "__main__":
    main()
