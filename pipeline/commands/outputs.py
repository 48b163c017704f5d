"""Writes the result of a run directory as its output images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.commands.start import export_options, missing_sheets, refuse_foreign_outputs
from pipeline.config import AnyConfig
from pipeline.core.allocator import trim_heap
from pipeline.core.events import Note, Sink, WorkDone
from pipeline.executors import Executor
from pipeline.plan import Plan
from pipeline.render import export
from pipeline.rundir import (
    Position,
    check_space,
    content_alpha,
    manifest_path,
    newest_canvas,
    output_colors,
    output_metadata,
    read_manifest,
    records,
    written_picture,
)
from pipeline.store import integrity


@dataclass(frozen=True)
class Outputs:
    """The output images of a run. `commit`: appends a record to its journal; `position`: after the newest record."""

    config: AnyConfig
    plan: Plan
    executor: Executor
    sink: Sink
    force: bool
    commit: Callable[[records.Record], None]
    position: Callable[[], Position]

    def write(self) -> None:
        """Write the last stage's canvas as the output images, except for those that are there already."""
        options = export_options(self.config, self.plan)
        settings = self.config.export.model_copy(update={"bits": self.plan.picture.bits})
        with_dpi = settings.model_copy(update={"dpi": self.plan.dpi})
        sheets = missing_sheets(self.config, self.plan, self.position(), self.executor.cancel)
        missing = {str(sheet.path) for sheet in sheets}
        for name in self.plan.outputs:
            if name not in missing:
                self.sink(Note(f"{name} is already there"))
        if not sheets:
            return
        check_space(self.config, self.plan, len(self.plan.stages))
        trim_heap()
        last = self.plan.stages[-1].index
        canvas = newest_canvas(self.config.work_dir, self.position(), last)
        alpha = content_alpha(self.config.work_dir, self.position(), last) if self.plan.picture.alpha else None
        planes = [canvas] if alpha is None else [canvas, alpha]
        integrity.require_intact(
            planes, self.executor, lambda done, total: self.sink(WorkDone(last, "check", done, total))
        )
        colors = output_colors(settings, self.config.canvas_space, self.config.content)
        manifest = read_manifest(manifest_path(self.config.work_dir))
        cancel = self.executor.cancel
        metadata = output_metadata(manifest, self.config.content, settings.metadata, cancel, self.sink)
        for sheet in sheets:
            export.export_canvas(
                planes,
                sheet,
                with_dpi,
                colors,
                self.executor.cancel,
                lambda done, total: self.sink(WorkDone(last, "export", done, total)),
                partial(self._record_picture, str(sheet.path)),
                metadata,
            )
            written = self.position().pictures[str(sheet.path)][-1]
            self.commit(records.Exported(output=str(sheet.path), options=options, picture=written))

    def _record_picture(self, output: str, whole: Path) -> None:
        """Record the image before it is renamed: after a crash between the two, the run would not recognise it."""
        written = written_picture(whole, self.executor.cancel)
        if not self.force:  # again, because a run may take days
            refuse_foreign_outputs(self.plan, self.position().pictures, self.executor.cancel)
        self.commit(records.Exporting(output=output, picture=written))
