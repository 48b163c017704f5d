"""Train a small VGG-19-shaped network to have a large one's features; `pipeline/assets/vgg19-lite` was made with this.

    python -m tools.distill.distill_network --teacher vgg19-dcbb9e9d.pth --teacher-padding zeros --images photos/ \
        --output vgg19-small.safetensors

It shows how much of the teacher's features the student explains on held-out images, per layer and padding. A second
teacher, --deep-teacher, can replace the first at some layers. distillation.py describes the method, docs/networks.md
the packaged network, with the times that it took. The checkpoint beside the output holds student, maps and optimiser,
and a step's batch depends on the seed and the step alone, so the same command resumes a killed training. Then only
--steps may differ: it sets the step at which the learning rate reaches its end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core.errors import PipelineError
from pipeline.core.vgg_layers import ALIGN_PX, CONV_NAMES, min_side_px
from pipeline.network.padding import PADDINGS
from pipeline.network.weights import sha256_of
from pipeline.network.weights_file import load_state
from tools.distill.distillation import INPUT_KEYS, Distillation, Settings, Training
from tools.distill.training_images import list_images

WEIGHTS = click.Path(exists=True, dir_okay=False, path_type=Path)
CHECKPOINT_EVERY_S = 60
EXIT_STOPPED = 75
INPUT_CONVENTIONS = {
    True: "RGB in [0, 1] through input.weight and input.bias, a 1x1 convolution",
    False: "RGB in [0, 1], minus ImageNet's mean, divided by its standard deviation, as torchvision's networks",
}


def checkpoint_path(output: Path) -> Path:
    return output.with_name(output.name + ".checkpoint")


def save_checkpoint(path: Path, settings: Settings, training: Training) -> None:
    """Write a temporary file, sync, rename: a kill leaves the old checkpoint or the new one."""
    content = {
        "settings": json.dumps(asdict(settings)),
        "step": training.step,
        "student": {key: value.detach() for key, value in training.student.items()},
        "maps": {key: value.detach() for key, value in training.maps.items()},
        "optimizer": training.optimizer.state_dict(),
    }
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, task: Distillation) -> Training:
    """The training of a checkpoint. Raises UsageError if its settings differ in more than `steps`."""
    content = torch.load(path, map_location=task.device, weights_only=True)
    old, new = json.loads(content["settings"]), json.loads(json.dumps(asdict(task.settings)))
    changed = ", ".join(
        f"{key} {old.get(key)} → {new[key]}" for key in new if key != "steps" and old.get(key) != new[key]
    )
    if changed:
        raise click.UsageError(
            f"{path} was written with other settings ({changed}). Use those settings to resume, or delete it."
        )
    training = task.training(content["step"], content["student"], content["maps"])
    training.optimizer.load_state_dict(content["optimizer"])
    return training


def train(
    task: Distillation, output: Path, console: Console, evaluate_every: int, stop_at: int | None = None
) -> Training:
    """Train from the checkpoint, or from a warm start, up to the last step (or `stop_at`)."""
    checkpoint = checkpoint_path(output)
    if checkpoint.exists():
        training = load_checkpoint(checkpoint, task)
        console.print(f"resuming at step {training.step} from {checkpoint}")
    else:
        with console.status("warm start"):
            training = task.start()
        if evaluate_every:
            console.print("warm start:", summary(task, training))
    try:
        for step, loss in steps(task, training, stop_at or task.settings.steps, checkpoint, console):
            if evaluate_every and step % evaluate_every == 0:
                console.print(f"step {step}: loss {loss:.4f}, {summary(task, training)}")
    finally:
        save_checkpoint(checkpoint, task.settings, training)
    return training


def steps(
    task: Distillation, training: Training, end: int, checkpoint: Path, console: Console
) -> Iterator[tuple[int, float]]:
    """Train under a progress bar, yielding each step's number and the loss, a running mean."""
    columns = (
        TextColumn("distill"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    saved_s = time.monotonic()
    mean_loss: float | None = None
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=end, completed=training.step, loss=float("nan"))
        while training.step < end:
            loss = task.train_step(training)
            mean_loss = loss if mean_loss is None else 0.98 * mean_loss + 0.02 * loss
            progress.update(bar, completed=training.step, loss=mean_loss)
            if time.monotonic() - saved_s > CHECKPOINT_EVERY_S:
                save_checkpoint(checkpoint, task.settings, training)
                saved_s = time.monotonic()
            yield training.step, mean_loss


def summary(task: Distillation, training: Training) -> str:
    """Explained variance of every tap on held-out images in one line, with the first of the paddings."""
    (scores,) = task.scores(training.student, training.maps, task.settings.paddings[:1]).values()
    return "explained variance " + " ".join(f"{tap[4:]} {score:.3f}" for tap, score in scores.items())


def write_network(task: Distillation, training: Training, output: Path, source: str) -> dict[str, dict[str, float]]:
    """Write the student in float16 with its provenance; returns the scores of the written weights per padding."""
    halves = {key: value.detach().half().contiguous().cpu() for key, value in training.student.items()}
    rounded: dict[str, Tensor] = {key: value.float().to(task.device) for key, value in halves.items()}
    paddings = tuple(dict.fromkeys((*task.settings.paddings, *PADDINGS)))
    scores = task.scores(rounded, training.maps, paddings)
    metadata = {
        "source": source,
        "made_by": f"tools/distill/distill_network.py, {training.step} steps",
        "settings": json.dumps(asdict(task.settings)),
        "teacher_sha256": task.settings.teacher_sha256,
        "deep_teacher_sha256": task.settings.deep_teacher_sha256,
        "input": INPUT_CONVENTIONS[INPUT_KEYS[0] in halves],
        "padding": ", ".join(task.settings.paddings),
        "pooling": task.settings.pooling,
        "held_out_explained_variance": json.dumps(
            {padding: {tap: round(score, 4) for tap, score in taps.items()} for padding, taps in scores.items()}
        ),
    }
    temporary = output.with_name(output.name + ".partial")
    save_file(halves, temporary, metadata)
    temporary.replace(output)
    return scores


def print_scores(console: Console, scores: dict[str, dict[str, float]]) -> None:
    table = Table("layer", *scores, title="explained variance on held-out images, by padding of the student")
    for tap in next(iter(scores.values())):
        table.add_row(tap, *(f"{of_padding[tap]:.4f}" for of_padding in scores.values()))
    console.print(table)


def parse_widths(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in value.split(","))
    except ValueError:
        widths = ()
    if len(widths) != 5 or min(widths) < 1:
        raise click.BadParameter("expected five positive integers separated by commas, one per block")
    return widths


def parse_layers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, ...]:
    layers = tuple(value.split(","))
    if unknown := [layer for layer in layers if layer not in CONV_NAMES]:
        raise click.BadParameter(f"{', '.join(unknown)}: unknown; the layers are {', '.join(CONV_NAMES)}.")
    return layers


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.option("--teacher", type=WEIGHTS, required=True)
@click.option("--images", type=click.Path(exists=True, file_okay=False), required=True, multiple=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="A .safetensors file.")
@click.option("--widths", default="16,32,48,80,96", callback=parse_widths, show_default=True, help="Per block.")
@click.option("--steps", default=4000, type=click.IntRange(1), show_default=True)
@click.option("--batch", default=4, type=click.IntRange(1), show_default=True, help="Images per step.")
@click.option(
    "--distinct-batches",
    default=0,
    type=click.IntRange(0),
    show_default=True,
    help="Repeat this many batches, with the teachers' features in memory; 0: none is repeated.",
)
@click.option("--crop-px", default=256, type=click.IntRange(32), show_default=True, help="Side of a training image.")
@click.option(
    "--generated", default=0.3, type=click.FloatRange(0, 1), show_default=True, help="Share of generated images."
)
@click.option(
    "--learning-rate", default=0.0005, show_default=True, help="Per step, relative to a tensor's root mean square."
)
@click.option(
    "--gram-weight", default=0.5, show_default=True, help="Weight of the Gram matrices relative to the features."
)
@click.option("--teacher-padding", default="zeros", type=click.Choice(list(PADDINGS)), show_default=True)
@click.option("--deep-teacher", type=WEIGHTS, help="A second teacher, for the layers of --deep-layers.")
@click.option("--deep-layers", default="conv5_1", callback=parse_layers, show_default=True, help="Of --deep-teacher.")
@click.option("--deep-padding", default="zeros", type=click.Choice(list(PADDINGS)), show_default=True)
@click.option("--padding", "paddings", default=("replicate", "zeros"), type=click.Choice(list(PADDINGS)),
              multiple=True, show_default=True, help="Of the student; with several, each batch draws one.")  # fmt: skip
@click.option("--pooling", default="max", type=click.Choice(["max", "average"]), show_default=True)
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--evaluate-every", default=500, type=click.IntRange(0), show_default=True,
              help="Steps between scores; 0: scores at the end alone.")  # fmt: skip
@click.option("--source", default="", help="Where the teacher comes from and its licence, for the file's metadata.")
def main(
    *,
    teacher: Path,
    deep_teacher: Path | None,
    deep_layers: tuple[str, ...],
    images: tuple[str, ...],
    output: Path,
    device: str,
    evaluate_every: int,
    source: str,
    **options: Any,
) -> None:
    console = Console()
    paths = list_images(images)
    if len(paths) < 2:
        raise click.UsageError(f"{', '.join(images)}: {len(paths)} images found, at least two are needed.")
    settings = Settings(
        teacher_sha256=sha256_of(teacher),
        deep_teacher_sha256=sha256_of(deep_teacher) if deep_teacher else "",
        deep_layers=deep_layers if deep_teacher else (),
        images=len(paths),
        **options,
    )
    if settings.crop_px % ALIGN_PX or settings.crop_px < min_side_px(CONV_NAMES, "reflect"):
        raise click.UsageError(f"--crop-px must be a multiple of {ALIGN_PX}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        deep_state = load_state(deep_teacher) if deep_teacher else None
        task = Distillation(settings, load_state(teacher), paths, device, deep_state)
        training = train(task, output, console, evaluate_every=evaluate_every)
    except PipelineError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        console.print("Stopped. Run the same command again to resume.")
        sys.exit(EXIT_STOPPED)
    print_scores(console, write_network(task, training, output, source))
    checkpoint_path(output).unlink()
    console.print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
