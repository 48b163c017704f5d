"""The `export` command: writes the canvas of any stage as an image, also while the run is active."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.commands.status import choose_stage, manifest_of
from pipeline.config import AnyConfig, ExportConfig, LimitsConfig, changed_export
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, ignore, reporter
from pipeline.core.files import taken
from pipeline.core.image_formats import PixelKind, is_too_deep, picture_kind, unsupported_options
from pipeline.core.lengths import DEFAULT_DPI, sensible_dpi
from pipeline.core.tiling import Size
from pipeline.executors import ThreadExecutor
from pipeline.images import check_colors, check_output, refuse_unheeded
from pipeline.plan import WORKERS, Sheet, sheets_of
from pipeline.render.export import export_canvas
from pipeline.rundir import (
    Journal,
    Manifest,
    Position,
    canvas_space,
    content_alpha,
    content_kind,
    export_notes,
    journal_path,
    manifest_inputs,
    manifest_path,
    newest_canvas,
    output_colors,
    output_metadata,
    position_of,
    refuse_inputs,
    refuse_links,
    refuse_missing_folder,
    refuse_own_state,
    refuse_unknown_stage,
    sheet_notes,
    standing,
)
from pipeline.rundir.process_settings import process_settings
from pipeline.store import ChunkError, integrity


@process_settings()
def export(
    work_dir: Path,
    output: Path,
    *,
    stage: int | None = None,
    options: ExportConfig | None = None,
    given: frozenset[str] | None = None,
    force: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Write the canvas of a stage (default: the newest) as an image at any time, and return its path, or the first's.

    `options`: by default those that the run began with. `given`: the names of the options that are for this image; by
    default all that differ from their defaults, if there are `options`. The others are the run's: they are dropped with
    a note where the format cannot hold them, and their dpi is that of the run's result.
    Raises ConfigError if there is no such stage, the format cannot store it or ignores a given option, `output` exists
    without `force`, its folder does not exist, or an active run overwrites the canvas meanwhile; DamagedStateError.
    """
    refuse_own_state(output, work_dir)
    refuse_missing_folder(output)
    manifest = manifest_of(work_dir)
    if given is None:
        given = frozenset() if options is None else frozenset(options.changed)
    options = options or own_options(work_dir)[0]
    journal = Journal(journal_path(work_dir))
    read_bytes = journal.size_bytes()  # before reading: a record that follows makes the export check again
    _, position = standing(journal)
    refuse_unknown_stage(work_dir, manifest, position)
    chosen = choose_stage(work_dir, position, stage)
    refuse_links(work_dir)
    options = _heeded(output, options, given, content_kind(manifest), sink)
    kind = picture_kind(output, options.bits, options.compression, content_kind(manifest))
    content = manifest.config.model_dump().get("content")
    colors = output_colors(options, canvas_space(manifest), Path(content) if content else None)
    check_colors(output, colors, options.compression)
    kind = colors.picture_kind(kind)
    for note in export_notes(output, options, colors):
        sink(Note(note))
    canvas = newest_canvas(work_dir, position, chosen)
    alpha = content_alpha(work_dir, position, chosen) if kind.alpha else None
    canvas.refuse_other_size([(*stage_sizes.size, 3) for stage_sizes in manifest.stages], "no stage has")
    if alpha is not None:
        alpha.refuse_other_size([(*canvas.shape[:2], 1)], "no stage has")
    scaled = _dpi_of(manifest, canvas.shape[:2], options.dpi)
    dpi = options.dpi if options.dpi is not None and "dpi" in given else scaled
    options = options.model_copy(update={"bits": kind.bits, "dpi": dpi})
    sheets = sheets_of(output, canvas.shape[:2], options)
    _refuse_too_large(sheets, canvas.shape[:2], dpi)
    for sheet in sheets:
        refuse_inputs(sheet.path, manifest_inputs(manifest))
        if taken(sheet.path) and not force:
            raise ConfigError(f"output {sheet.path}: exists and would be lost. Choose another name, or give --force.")
        height, width = sheet.size
        check_output(sheet.path, width, height, kind.bits, options.compression)

    cancel = _OvertakenToken(journal, read_bytes, position, chosen, stop)
    progress = partial(reporter, sink, chosen)
    planes = [canvas] if alpha is None else [canvas, alpha]
    try:
        with ThreadExecutor(WORKERS, CancelToken(stop)) as executor:
            integrity.require_intact(planes, executor, progress("check"))
        source = dict(manifest_inputs(manifest)).get("content")
        metadata = output_metadata(manifest, source, options.metadata, cancel, sink)
        for sheet in sheets:
            export_canvas(planes, sheet, options, colors, cancel, progress("export"), metadata=metadata)
        for note in sheet_notes(output, [sheet.path for sheet in sheets]):
            sink(Note(note))
    except ChunkError:
        cancel.raise_if_set()  # chunks that an active run has overwritten are not damaged
        raise
    return sheets[0].path


def own_options(
    work_dir: Path,
    config: AnyConfig | None = None,
    settings: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> tuple[ExportConfig, frozenset[str]]:
    """(how a run writes its image, with changes for another image; the names of the options that are changed).

    `config`: of the run, by default that which it began with. `settings`: of `--set`, about `export`. `changes`: values
    by name. Raises ConfigError for settings that are invalid, or if there is no run; DamagedStateError.
    """
    if config is not None:
        section = config.export.model_dump(mode="json")
    else:
        section = manifest_of(work_dir).config.model_dump().get("export", {})
    return changed_export(str(manifest_path(work_dir)), section, settings, changes or {})


def _heeded(
    output: Path, options: ExportConfig, given: frozenset[str], content: PixelKind, sink: Sink = ignore
) -> ExportConfig:
    """The options without those of the run that the format of `output` would ignore; a note says each.

    Raises ConfigError for a `given` option that it would ignore.
    """
    if is_too_deep(output, options.bits, options.compression) and "bits" not in given:
        options = options.model_copy(update={"bits": "auto"})
        sink(Note(f"{output.name}: export.bits: 16 of the run is not used: the format has 8"))
    while True:
        values, alpha = options.model_dump(), picture_kind(output, options.bits, options.compression, content).alpha
        refuse_unheeded(output, {name: values[name] for name in given}, alpha)
        wanted = {name: value for name, value in values.items() if name in given or name in options.changed}
        ignored = list(unsupported_options(output, wanted, alpha))
        if not ignored:
            return options
        option, why = next((entry for entry in ignored if entry[0] not in given), ignored[0])
        if option in given:
            raise ConfigError(f"{output}: {option}: {why}.")
        sink(Note(f"{output.name}: export.{option} of the run is not used: {why.partition(';')[0]}"))
        defaults = ExportConfig()
        field = "purpose" if option == "for" else option
        options = options.model_copy(update={field: getattr(defaults, field)})


def _refuse_too_large(sheets: Sequence[Sheet], canvas: Size, dpi: float) -> None:
    """Raise ConfigError for edges that a person cannot have meant."""
    pixels = sum(height * width for height, width in (sheet.size for sheet in sheets))
    if pixels > (limit := max(LimitsConfig().max_result_pixels, 4 * canvas[0] * canvas[1])):
        raise ConfigError(
            f"export: with its edges at {dpi:g} dpi the result would have {pixels:,} px, beyond {limit:,}. Choose "
            "smaller edges, or another dpi."
        )


def _dpi_of(manifest: Manifest, canvas: Size, result_dpi: float | None) -> float:
    """The resolution at which a canvas of this (height, width) has the size on paper that the run's result has.

    `result_dpi`: that of the result, by default as when the run began.
    """
    if (dpi := result_dpi or manifest.dpi) is None:
        return DEFAULT_DPI
    return sensible_dpi(dpi * max(canvas) / max(manifest.stages[-1].size)) or DEFAULT_DPI


class _OvertakenToken(CancelToken):
    """Also raises ConfigError once an active run has overwritten the arrays that the export reads."""

    def __init__(self, journal: Journal, read_bytes: int, position: Position, stage: int, stop: threading.Event | None):
        """`read_bytes`: the size of the journal before `position` was read from it."""
        super().__init__(stop)
        self._journal, self._read_bytes = journal, read_bytes
        self._position, self._stage = position, stage

    def raise_if_set(self) -> None:
        super().raise_if_set()
        # called several times a second, so that a long journal is read only when it has grown
        if not finished_stage(self._position, self._stage) and self._read_bytes != self._journal.size_bytes():
            self._read_bytes = self._journal.size_bytes()
            _refuse_overtaken(self._journal.path.parent, self._position, position_of(self._journal.read()))


def finished_stage(position: Position, stage: int) -> bool:
    """Whether no further iteration overwrites the stage's canvas."""
    return stage < position.stage or position.stage_done


def _refuse_overtaken(work_dir: Path, before: Position, now: Position) -> None:
    """Raise ConfigError if the run has committed an iteration: the next one overwrites the slot that was read."""
    if (now.stage, now.iteration) != (before.stage, before.iteration):
        raise ConfigError(
            f"{work_dir}: the run finished an iteration while its canvas was being read, and the image would mix "
            "two of them. Export a finished stage with --stage, or stop the run first."
        )
