"""A gallery of a run: the canvas of a stage, and the content for before and after, as a folder for any web host."""

from __future__ import annotations

import threading
from pathlib import Path

from pipeline.commands.status import choose_stage, manifest_of
from pipeline.config import LimitsConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, ignore, reporter
from pipeline.core.text import stage_name
from pipeline.rundir import (
    Journal,
    Manifest,
    canvas_space,
    content_alpha,
    journal_path,
    newest_canvas,
    refuse_links,
    refuse_missing_folder,
    refuse_own_state,
    standing,
)
from pipeline.rundir.process_settings import process_settings
from pipeline.viewer.gallery import GalleryPicture, Work, read_works, write_gallery
from pipeline.viewer.inputs import Inputs, PreparedInput, inputs_of_run
from pipeline.viewer.state import print_dpi

_POLL_S = 0.2


@process_settings()
def gallery(
    work_dir: Path,
    output: Path,
    *,
    stage: int | None = None,
    title: str | None = None,
    credit: str = "",
    add: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Write the folder `output` with the canvas of a finished stage (default: the newest), and return its path.

    `title`: default the name of the run's image. `add`: to the gallery that is there. The content is beside the picture
    if its file is still the run's. Raises ConfigError if the stage is being painted, or `output` exists, or with `add`
    is no gallery; StorageError, Stopped.
    """
    refuse_own_state(output, work_dir)
    refuse_missing_folder(output)
    if add:
        read_works(output)  # before the content is decoded
    manifest = manifest_of(work_dir)
    _, position = standing(Journal(journal_path(work_dir)))
    chosen = choose_stage(work_dir, position, stage)
    if chosen == position.stage and not position.stage_done:
        raise ConfigError(f"{work_dir}: {stage_name(chosen)} is being painted. Give a finished one with --stage.")
    refuse_links(work_dir)
    cancel, read = CancelToken(stop), threading.Event()
    name = Path(manifest.config.output).stem
    inputs = Inputs(LimitsConfig(), read.set)
    try:
        canvas, alpha = newest_canvas(work_dir, position, chosen), content_alpha(work_dir, position, chosen)
        pictures = [GalleryPicture("picture", "after", canvas, alpha, canvas_space(manifest))]
        content = _content(inputs, manifest, read, cancel)
        if content is not None and content.pixels is not None:
            pictures.append(GalleryPicture("content", "before", content.pixels, content.alpha))
        elif content is not None:
            sink(Note(f"the gallery has no picture of the content: {content.problem}"))
        dpi = print_dpi(manifest) if chosen == len(manifest.stages) - 1 else None
        write_gallery(
            output, Work(title or name, credit, pictures, dpi), cancel, reporter(sink, chosen, "gallery"), add=add
        )
    finally:
        inputs.close()
    return output


def _content(inputs: Inputs, manifest: Manifest, read: threading.Event, cancel: CancelToken) -> PreparedInput | None:
    """The run's content once it has been read; None for a run without."""
    inputs.want([file for file in inputs_of_run(manifest) if file.id == "content"])
    if not inputs.all():
        return None
    while not read.wait(_POLL_S):
        cancel.raise_if_set()
    return inputs.all()[0]
