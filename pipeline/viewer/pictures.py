"""The pictures that the page can show, and their tiles by address.

    tiles/stage_3/17-89abcdef/12/5_3.jpg      id / version / level / column_row

A version is one state of a picture: the iteration and a checksum of all its chunks. A tile's address so never means two
contents, and browsers may keep it for ever.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.text import shown, stage_name
from pipeline.images import srgb_output
from pipeline.images.tile_codec import encode_tile
from pipeline.render.export import without_white
from pipeline.rundir import Position, canvas_space, content_alpha, newest_canvas
from pipeline.store import ALPHA, ChunkError, StageArray, checksum, result_name
from pipeline.viewer.canvas import TILE_PX, Canvas, Pixels, Recent
from pipeline.viewer.inputs import Inputs
from pipeline.viewer.snapshot import RunReader, Snapshot

_BLOCK_BYTES = 64 * 2**20  # recently read chunks: those under one screen at 100 %
_OVERVIEW_BYTES = 64 * 2**20
_TILE_BYTES = 32 * 2**20
_WITH_ALPHA = ("webp",)
_WORDS = "this stage does not have"
Layers = tuple[Canvas, Canvas | None]  # the colours and the alpha of a picture


class SupersededError(PipelineError):
    """The version of a picture is no longer on the disk: the run has gone on."""


class NoPictureError(PipelineError):
    """There is no such picture, level or tile."""


@dataclass(frozen=True)
class TileAddress:
    """The parts of a tile's address."""

    picture: str
    version: str
    level: int
    column: int
    row: int
    suffix: str


class Pictures:
    """Pictures and tiles of a run. Safe to use from any thread."""

    def __init__(self, reader: RunReader, inputs: Inputs) -> None:
        self._reader, self._inputs = reader, inputs
        self.busy_s = 0.0  # processor time of all tiles so far, nearly: two threads may add at once
        self._blocks: Recent[Pixels] = Recent(_BLOCK_BYTES, lambda pixels: pixels.nbytes)
        self._canvases: Recent[Layers] = Recent(_OVERVIEW_BYTES, lambda layers: layers[0].overview_bytes + 2**16)
        self._alphas: Recent[Canvas] = Recent(_OVERVIEW_BYTES // 3, lambda canvas: canvas.overview_bytes + 2**16)
        self._tiles: Recent[bytes] = Recent(_TILE_BYTES, len)

    def listing(self, snapshot: Snapshot) -> list[dict[str, Any]]:
        """Every picture as the page's state has it, stages first."""
        manifest, position = snapshot.manifest, snapshot.position
        pictures = []
        for stage in sorted(position.slots) if manifest and not position.cleaned else ():
            height, width = manifest.stages[stage].size  # type: ignore[union-attr]
            running = stage == position.stage and not position.stage_done
            has_alpha = ALPHA in position.checksums[stage]
            pictures.append(
                {
                    **_picture(f"stage_{stage}", version_of(position, stage), height, width, has_alpha),
                    "title": f"{stage_name(stage)}{', being painted' if running else ''}",
                    "kind": "stage",
                }
            )
        for prepared in self._inputs.all():
            entry = {"id": prepared.file.id, "title": prepared.file.title, "kind": "input", "problem": prepared.problem}
            if prepared.pixels is not None:
                version, (height, width, _) = _input_version(prepared.pixels), prepared.pixels.shape
                entry |= _picture(prepared.file.id, version, height, width, prepared.alpha is not None)
            pictures.append(entry)
        return pictures

    def tile(self, at: TileAddress) -> bytes:
        """The file of one tile. Raises NoPictureError, SupersededError, ChunkError for damage, StorageError."""
        if (found := self._tiles.get(at)) is not None:
            return found
        started = time.thread_time()
        canvas, alpha = self._canvas(at.picture, at.version)
        try:
            pixels = canvas.tile(at.level, at.column, at.row)
            if alpha is not None and at.suffix in _WITH_ALPHA:
                pixels = _transparent(pixels, alpha.tile(at.level, at.column, at.row))
        except LookupError as error:
            raise NoPictureError(str(error.args[0])) from error
        except ChunkError:
            # overwritten by the next iteration, or damaged: the journal says which
            if at.version != self._newest_version(self._reader.read_again(), at.picture):
                raise SupersededError(f"{at.picture}: {at.version} is gone, the run has gone on") from None
            raise
        data = self._tiles.put(at, encode_tile(pixels, at.suffix))
        self.busy_s += time.thread_time() - started
        return data

    def _canvas(self, picture: str, version: str) -> Layers:
        found = self._canvases.get((picture, version))
        if found is not None:
            return found
        snapshot = self._reader.latest()
        newest = self._newest_version(snapshot, picture)
        if newest is None:
            raise NoPictureError(f"there is no picture {shown(picture, 40)}")
        if newest != version:
            raise SupersededError(f"{picture}: {shown(version, 40)} is gone; {newest} is the newest")
        return self._canvases.put((picture, version), self._opened(snapshot, picture))

    def _opened(self, snapshot: Snapshot, picture: str) -> Layers:
        for prepared in self._inputs.all():
            if prepared.file.id == picture and prepared.pixels is not None:
                return Canvas(prepared.pixels, self._blocks), self._alpha(prepared.alpha)
        stage = int(picture.removeprefix("stage_"))
        array = canvas_of(self._reader, snapshot, stage)
        assert snapshot.manifest is not None
        alpha = content_alpha(self._reader.work_dir, snapshot.position, stage)
        if alpha is not None:
            alpha.refuse_other_size([(*array.shape[:2], 1)], _WORDS)
        colors = srgb_output(canvas_space(snapshot.manifest))
        return Canvas(array, self._blocks, colors), self._alpha(alpha)

    def _alpha(self, array: StageArray | None) -> Canvas | None:
        """The alpha, which all iterations of a stage share: its overview is made once."""
        if array is None:
            return None
        key = array.path, checksum(np.ascontiguousarray(array.checksums))
        if (found := self._alphas.get(key)) is not None:
            return found
        return self._alphas.put(key, Canvas(array, self._blocks))

    def _newest_version(self, snapshot: Snapshot, picture: str) -> str | None:
        return next(
            (one["version"] for one in self.listing(snapshot) if one["id"] == picture and "version" in one), None
        )


def canvas_of(reader: RunReader, snapshot: Snapshot, stage: int) -> StageArray:
    """The committed canvas of a stage. Raises ChunkError, also for a size that the manifest does not have."""
    assert snapshot.manifest is not None
    array = newest_canvas(reader.work_dir, snapshot.position, stage)
    array.refuse_other_size([(*snapshot.manifest.stages[stage].size, 3)], _WORDS)
    return array


def _transparent(pixels_HW3: Pixels, alpha_HW1: Pixels) -> Pixels:
    """Pixels that lie over white, as (H, W, 4): the same over white, and transparent."""
    colors = without_white(pixels_HW3.astype(np.float32), alpha_HW1)
    return np.dstack([np.rint(colors).astype(np.uint8), alpha_HW1])


def version_of(position: Position, stage: int) -> str:
    """The version of a stage's canvas: its iterations and a checksum of its checksums."""
    sums = position.checksums[stage]
    done = f"{position.iteration}" if stage == position.stage else "done"
    return f"{done}-{checksum(sums[result_name(position.slots[stage], sums)].encode()):08x}"


def _input_version(pixels: StageArray) -> str:
    return f"file-{checksum(np.ascontiguousarray(pixels.checksums)):08x}"


def _picture(identity: str, version: str, height: int, width: int, has_alpha: bool) -> dict[str, Any]:
    return {
        "id": identity,
        "version": version,
        "tiles": f"tiles/{identity}/{version}/",
        "height": height,
        "width": width,
        "tile_px": TILE_PX,
        "overlap": 0,
        "format": "webp" if has_alpha else "jpg",
        "problem": "",
    }
