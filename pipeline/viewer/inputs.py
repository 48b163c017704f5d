"""The input files of a run as pictures: decoded once into a temporary folder, so that any size fits in memory.

A file that the manifest names is shown only if its hash is the run's: a run directory may come from a stranger, and its
manifest could name any picture of this machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AnyConfig, LimitsConfig, dotted, input_files
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import PipelineError, Stopped
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import shown
from pipeline.core.tiling import Rect
from pipeline.images import read_header, stream_rgb
from pipeline.network import sha256_of
from pipeline.rundir import Manifest, manifest_inputs
from pipeline.store import ChunkSums, StageArray, create_array, create_stage, open_array

_CHUNK_PX = 512
_MAX_INPUTS = 24
_NAMES = re.compile(r"(content|styles\.(\d+)\.(image|mask)|loss\.content_mask)")


@dataclass(frozen=True)
class InputFile:
    """An input picture: its id in addresses, a title, the file, and the hash that it must have, if one is known."""

    id: str
    title: str
    path: Path
    sha256: str | None = None


@dataclass(frozen=True)
class PreparedInput:
    """What became of a file: its pixels, or why there are none; neither while it is being read.

    Like a canvas, the pixels lie over white. `alpha`: (H, W, 1), of a file that has alpha.
    """

    file: InputFile
    pixels: StageArray | None = None
    alpha: StageArray | None = None
    problem: str = ""


def inputs_of_config(config: AnyConfig) -> list[InputFile]:
    """The pictures that a config names, before the run has begun."""
    return _named({dotted(key): path for key, path in input_files(config)}, {})


def inputs_of_run(manifest: Manifest) -> list[InputFile]:
    """The pictures that a run was begun with."""
    return _named(dict(manifest_inputs(manifest)), manifest.inputs)


def _named(paths: Mapping[str, Path], hashes: Mapping[str, str]) -> list[InputFile]:
    found: list[InputFile] = []
    for key, path in sorted(paths.items()):
        if (match := _NAMES.fullmatch(key)) is None:
            continue
        kind, number = match[3], match[2]
        if number is None:
            identity, title = ("content", "content") if key == "content" else ("content_mask", "content mask")
        else:
            name = "style" if kind == "image" else "mask"
            identity, title = f"{name}_{number}", f"{name} {int(number) + 1}"
        found.append(InputFile(identity, f"{title}: {path.name}", path, hashes.get(key)))
    return found[:_MAX_INPUTS]


class Inputs:
    """Reads input files one after another, on a thread of its own, into a temporary folder that `close` deletes."""

    def __init__(self, limits: LimitsConfig, on_change: Callable[[], None]) -> None:
        self._limits, self._on_change = limits, on_change
        self._folder = Path(tempfile.mkdtemp(prefix="pipeline-view-"))
        self._stop = threading.Event()
        self._wanted = threading.Condition()
        self._files: dict[str, PreparedInput] = {}
        self._thread = threading.Thread(target=self._work, name="inputs", daemon=True)
        self._thread.start()

    def want(self, files: Sequence[InputFile]) -> None:
        """Show these files, and no others."""
        with self._wanted:
            if [prepared.file for prepared in self._files.values()] != list(files):
                old = self._files
                self._files = {
                    file.id: old[file.id] if file.id in old and old[file.id].file == file else PreparedInput(file)
                    for file in files
                }
                self._wanted.notify()

    def all(self) -> list[PreparedInput]:
        """The files in the order of `want`."""
        with self._wanted:
            return list(self._files.values())

    def close(self) -> None:
        """End the thread and delete the folder."""
        self._stop.set()
        with self._wanted:
            self._wanted.notify()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self) -> None:
        number = 0
        while not self._stop.is_set():
            with self._wanted:
                waiting = [one for one in self._files.values() if one.pixels is None and not one.problem]
                if not waiting:
                    self._wanted.wait()
                    continue
            number += 1
            result = self._prepared(waiting[0], f"input_{number}")
            with self._wanted:
                if self._files.get(result.file.id) == waiting[0]:
                    self._files[result.file.id] = result
            self._on_change()

    def _prepared(self, one: PreparedInput, name: str) -> PreparedInput:
        try:
            pixels, alpha = self._read(one.file, self._folder / name)
            return replace(one, pixels=pixels, alpha=alpha)
        except Stopped:
            return replace(one, problem="stopped")
        except (PipelineError, OSError) as error:
            return replace(one, problem=shown(str(error), 300))

    def _read(self, file: InputFile, stage_dir: Path) -> tuple[StageArray, StageArray | None]:
        cancel = CancelToken(self._stop)
        header = read_header(file.path, self._limits)
        if file.sha256 is not None and sha256_of(file.path, cancel) != file.sha256:
            raise PipelineError(f"{file.path}: has changed since the run began, so it is not shown.")
        height, width, kind = header.height_px, header.width_px, PixelKind(8, header.kind.alpha)
        need_bytes = kind.channels * (height + _CHUNK_PX) * (width + _CHUNK_PX)
        if shutil.disk_usage(self._folder).free < 2 * need_bytes:
            raise PipelineError(f"{self._folder}: has no room for {file.path.name} ({need_bytes:,} bytes). Set TMPDIR.")
        create_stage(stage_dir)
        planes = {"pixels": slice(3), **({"alpha": slice(3, 4)} if kind.alpha else {})}
        for name, channels in planes.items():
            shape = height, width, channels.stop - (channels.start or 0)
            create_array(stage_dir, name, shape, _CHUNK_PX, "uint8", "none")
        arrays = {name: open_array(stage_dir, name) for name in planes}
        sums: dict[str, ChunkSums] = {name: {} for name in planes}
        for y0, rows in stream_rgb(file.path, width, height, _CHUNK_PX, cancel, kind):
            rect, over_white = Rect(y0, y0 + len(rows), 0, width), _over_white(rows)
            for name, channels in planes.items():
                sums[name].update(arrays[name].write_window(rect, over_white[..., channels]))
            cancel.raise_if_set()
        opened = {name: open_array(stage_dir, name, arrays[name].packed(sums[name])) for name in planes}
        return opened["pixels"], opened.get("alpha")


def _over_white(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """The colours over white, with the alpha, if there is one, as it was."""
    rows = rows.astype(np.uint8, copy=False)
    if rows.shape[2] == 4:
        share = rows[..., 3:].astype(np.float32) / 255
        rows = np.dstack([np.rint(255 - (255 - rows[..., :3]) * share).astype(np.uint8), rows[..., 3]])
    return rows
