"""Proof sheets: parts of the image at the scale of the print, to be judged on paper before the whole is printed.

The parts come from the canvas of a finished run, from the output image if the run's state was deleted, or are rendered
at full resolution as crops are (crop.py), before the run has come that far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pipeline.commands.preview.crop import Crops
from pipeline.commands.preview.cut import cut_canvas
from pipeline.commands.preview.folder import Claim, claimed, folder_of
from pipeline.config import Config
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.image_formats import format_of
from pipeline.core.lengths import MAX_PARTS, MAX_PROOF_DPI, MIN_PROOF_DPI, PROOF_SUFFIXES, cm_text
from pipeline.core.tiling import Rect, Size
from pipeline.images import ProofSheet, read_header, stream_rgb, write_proof
from pipeline.plan import BASE_BYTES
from pipeline.rundir import refuse_missing_folder, resolved, store_path
from pipeline.rundir.process_settings import process_settings

_BAND_PX = 256
_FILES = ("TIFF", "PNG", "JPEG")  # what can be read back
_UNPRINTED = {"output", "work_dir", "compute", "memory", "limits", "store"}  # keys that do not change the image


@dataclass(frozen=True)
class ProofSpec:
    """A sheet of paper with parts of the image, and the file to write.

    `points`: (x, y) in px of the finished image, the centre of each part; default the centre of the image. `paper`: a
    key of PAPERS_MM. `dpi`: of the print. `output`: default beside the config's output. `force`: overwrite a file that
    no preview of this config wrote.
    """

    points: Sequence[tuple[int, int]] = ()
    paper: str = "a4"
    dpi: float = 150
    output: Path | None = None
    force: bool = False


@process_settings()
def proof(
    config: Config, spec: ProofSpec = ProofSpec(), *, sink: Sink = ignore, stop: threading.Event | None = None
) -> Path:
    """Write a sheet of paper with parts of the image at the scale of the print, as PDF or TIFF.

    Raises ConfigError if no stage of the run is finished, and the errors of errors.py.
    """
    dpi, output = spec.dpi, spec.output
    target_file = output or folder_of(config).with_name(f"{config.output.stem}.proof.pdf")
    if output is not None:
        refuse_missing_folder(output)
    config = resolved(config)
    crops = Crops.of(config, sink, stop)
    size = crops.plan.stages[-1].size
    _refuse_points(spec.points, size)
    _refuse_dpi(dpi)
    centres = spec.points or [(size[1] // 2, size[0] // 2)]
    sheet = ProofSheet(spec.paper, dpi, len(centres), _title(config, size, dpi), ", ".join(_given(config)))
    _refuse_memory(sheet, config.memory.limit_bytes)
    rects = [_around(*point, sheet.cells[0], size) for point in centres]
    cancel = CancelToken(stop)
    with _parts(crops, rects, partial(claimed, config, target_file, spec.force, PROOF_SUFFIXES)) as (parts, claim):
        drawn = sheet.draw([(part, _caption(rect, dpi)) for part, rect in zip(parts, rects, strict=True)])
        write_proof(drawn, target_file, sheet, cancel, claim.record)
        claim.done()
    return target_file


@contextmanager
def _parts(
    crops: Crops, rects: Sequence[Rect], claim_of: Callable[[], AbstractContextManager[Claim]]
) -> Iterator[tuple[list[NDArray[np.uint8]], Claim]]:
    """The pixels of the finished image in each of `rects`, and the claim of the sheet."""
    config, last, cancel = crops.config, len(crops.plan.stages) - 1, CancelToken(crops.stop)
    if not store_path(config.work_dir).exists() and config.output.is_file():
        written = crops.plan.outputs.get(str(config.output), crops.plan.stages[last].size)
        _refuse_picture(config, written)
        crops.sink(Note(f"the state of the run is gone: the parts are cut from {config.output}"))
        # what lies around the canvas is equally wide on opposite sides
        y, x = ((whole - own) // 2 for whole, own in zip(written, crops.plan.stages[last].size, strict=True))
        moved = [Rect(rect.y0 + y, rect.y1 + y, rect.x0 + x, rect.x1 + x) for rect in rects]
        with claim_of() as claim:
            yield _cut(config.output, written, moved, cancel), claim
        return
    with crops.rendered(rects, last, claim_of) as (canvases, claim, folder):
        parts = []
        for canvas, rect in zip(canvases, rects, strict=True):
            # Through a file, which has the canvas's colour profile: decoding converts it to sRGB, as the sheet has it.
            cut_canvas(canvas, rect, folder / "part.png", cancel, lambda _file: None, config.canvas_space)
            own = Rect(0, rect.height, 0, rect.width)
            parts += _cut(folder / "part.png", (rect.height, rect.width), [own], cancel)
        yield parts, claim


def _cut(path: Path, size: Size, rects: Sequence[Rect], cancel: CancelToken) -> list[NDArray[np.uint8]]:
    """The rectangles of an image file, which is decoded once."""
    parts = [np.empty((rect.height, rect.width, 3), np.uint8) for rect in rects]
    # Closed explicitly, as in cut.py: an error's traceback would keep the decoder's thread and the open file.
    with closing(stream_rgb(path, size[1], size[0], min(_BAND_PX, size[0]), cancel)) as bands:
        for y0, rows_HWC in bands:
            for rect, part in zip(rects, parts, strict=True):
                start, end = max(rect.y0, y0), min(rect.y1, y0 + len(rows_HWC))
                if start < end:
                    part[start - rect.y0 : end - rect.y0] = rows_HWC[start - y0 : end - y0, rect.x0 : rect.x1]
    return parts


def _caption(rect: Rect, dpi: float) -> str:
    return f"x {rect.x0:,} to {rect.x1:,}, y {rect.y0:,} to {rect.y1:,} px; {_cm((rect.height, rect.width), dpi)}"


def _around(x: int, y: int, cell: Rect, size: Size) -> Rect:
    """The rectangle of the cell's size, or the image's if that is smaller, around a point and inside the image."""
    height, width = min(cell.height, size[0]), min(cell.width, size[1])
    y0 = min(max(y - height // 2, 0), size[0] - height)
    x0 = min(max(x - width // 2, 0), size[1] - width)
    return Rect(y0, y0 + height, x0, x0 + width)


def _title(config: Config, size: Size, dpi: float) -> str:
    print_size = f"{size[1]:,} × {size[0]:,} px print at {_cm(size, dpi)}"
    return f"{config.output.name}: proof at 1:1 for {dpi:g} dpi. All {print_size}"


def _cm(size: Size, dpi: float) -> str:
    """(height, width) in px as width × height on paper."""
    return " × ".join(cm_text(side_px, dpi) for side_px in (size[1], size[0])) + " cm"


def _given(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """`key value` of every key that the config gives and that may change the image."""
    for name, model_field in type(section).model_fields.items():
        key, value = f"{prefix}{model_field.alias or name}", getattr(section, name)
        if name not in section.model_fields_set or (not prefix and name in _UNPRINTED):
            continue
        if isinstance(value, BaseModel):
            yield from _given(value, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, entry in enumerate(value):
                yield from _given(entry, f"{key}.{index}.")
        elif value is not None:
            yield f"{key} {value.name if isinstance(value, Path) else value}"


def _refuse_points(points: Sequence[tuple[int, int]], size: Size) -> None:
    if len(points) > MAX_PARTS:
        raise ConfigError(f"--at: {len(points)} parts, but a sheet has room for {MAX_PARTS}. Make several sheets.")
    for x, y in points:
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise ConfigError(f"--at {x},{y}: is not inside the image, which has {size[1]}×{size[0]} px.")


def _refuse_dpi(dpi: float) -> None:
    if not MIN_PROOF_DPI <= dpi <= MAX_PROOF_DPI:
        raise ConfigError(f"--dpi {dpi:g}: a proof sheet has {MIN_PROOF_DPI:g} to {MAX_PROOF_DPI:g} dpi.")


def _refuse_memory(sheet: ProofSheet, limit_bytes: int) -> None:
    needed = BASE_BYTES["cpu"] + sheet.memory_bytes
    if needed > limit_bytes:
        raise ConfigError(
            f"--proof {sheet.paper}: at {sheet.dpi:g} dpi the sheet takes {needed / 2**30:.2f} GiB of memory, but "
            f"{limit_bytes / 2**30:.2f} GiB is the limit. Choose a lower --dpi, or raise memory.limit."
        )


def _refuse_picture(config: Config, size: Size) -> None:
    """Raise ConfigError for an output image from which no part can be cut."""
    remedy = "Run the config again for a proof."
    form = format_of(config.output)
    if form is None or form.name not in _FILES:
        raise ConfigError(
            f"{config.output}: is no {', '.join(_FILES)} file, and the state of its run is gone. {remedy}"
        )
    header = read_header(config.output, config.limits)
    if (header.height_px, header.width_px) != size:
        raise ConfigError(
            f"{config.output}: has {header.width_px}×{header.height_px} px, not the {size[1]}×{size[0]} px of this "
            f"config's image, and the state of its run is gone. {remedy}"
        )
