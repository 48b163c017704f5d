"""Writes the result of a run directory as its output images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.commands.commits import Commits
from pipeline.commands.start import export_options, missing_sheets, refuse_foreign_outputs
from pipeline.config import AnyConfig
from pipeline.core.allocator import trim_heap
from pipeline.core.events import Note, Sink, reporter
from pipeline.executors import Executor
from pipeline.plan import Plan
from pipeline.render import export
from pipeline.rundir import (
    check_space,
    content_alpha,
    manifest_path,
    newest_canvas,
    output_colors,
    output_metadata,
    read_manifest,
    records,
    sheet_notes,
    written_picture,
)
from pipeline.store import integrity


@dataclass(frozen=True)
class Outputs:
    """The output images of a run."""

    config: AnyConfig
    plan: Plan
    executor: Executor
    sink: Sink
    force: bool
    commits: Commits

    def write(self) -> None:
        """Write the last stage's canvas as the output images, except for those that are there already."""
        config, plan, cancel, at = self.config, self.plan, self.executor.cancel, self.commits.position
        options, sheets = export_options(config, plan), missing_sheets(config, plan, at, cancel)
        for note in sheet_notes(config.output, [Path(name) for name in plan.outputs]):
            self.sink(Note(note))
        missing = {str(sheet.path) for sheet in sheets}
        for name in plan.outputs:
            if name not in missing:
                self.sink(Note(f"{name} is already there"))
        if not sheets:
            return
        check_space(config, plan, len(plan.stages))
        trim_heap()
        last = plan.stages[-1].index
        canvas = newest_canvas(config.work_dir, at, last)
        alpha = content_alpha(config.work_dir, at, last) if plan.picture.alpha else None
        planes = [canvas] if alpha is None else [canvas, alpha]
        integrity.require_intact(planes, self.executor, reporter(self.sink, last, "check"))
        settings = config.export.model_copy(update={"bits": plan.picture.bits, "dpi": plan.dpi})
        colors = output_colors(settings, config.canvas_space, config.content)
        manifest = read_manifest(manifest_path(config.work_dir))
        metadata = output_metadata(manifest, config.content, settings.metadata, cancel, self.sink)
        progress = reporter(self.sink, last, "export")
        for sheet in sheets:
            name = str(sheet.path)
            record = partial(self._record_picture, name)
            export.export_canvas(planes, sheet, settings, colors, cancel, progress, record, metadata)
            written = self.commits.position.pictures[name][-1]
            self.commits.commit(records.Exported(output=name, options=options, picture=written))

    def _record_picture(self, output: str, whole: Path) -> None:
        """Record the image before it is renamed: after a crash between the two, the run would not recognise it."""
        written = written_picture(whole, self.executor.cancel)
        if not self.force:  # again, because a run may take days
            refuse_foreign_outputs(self.plan, self.commits.position.pictures, self.executor.cancel)
        self.commits.commit(records.Exporting(output=output, picture=written))
