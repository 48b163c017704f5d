"""Crops that the page orders: `pipeline preview --crop` in a process of its own, one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.text import shown

_MAX_SIDE_PX = 2048
_KEPT = 20  # crops of one viewer
_MAX_IMAGE_BYTES = 64 * 2**20


class CropRefusedError(PipelineError):
    """A crop that is not rendered, and why."""


class Crops:
    """Renders crops of a config. `allowed`: whether the page may order any."""

    def __init__(self, config_options: Sequence[str], allowed: bool, on_change: Callable[[], None]) -> None:
        self._config_options, self._on_change = tuple(config_options), on_change
        self.allowed = allowed and bool(config_options)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.entries: list[dict[str, Any]] = []

    def start(self, x: int, y: int, width: int, height: int) -> None:
        """Render a part of the finished image, in px of it. Raises CropRefusedError."""
        if not self.allowed:
            raise CropRefusedError("Start the viewer with --config and --allow-crops to render crops from here.")
        if not (0 < width <= _MAX_SIDE_PX and 0 < height <= _MAX_SIDE_PX):
            raise CropRefusedError(f"A crop from here has at most {_MAX_SIDE_PX}×{_MAX_SIDE_PX} px.")
        with self._lock:
            if self._closed or any(entry["state"] == "rendering" for entry in self.entries):
                raise CropRefusedError("Another crop is being rendered; wait for it.")
            if len(self.entries) >= _KEPT:
                raise CropRefusedError(f"A viewer keeps {_KEPT} crops; start it again for more.")
            number = len(self.entries)
            entry: dict[str, Any] = {"number": number, "rect": [x, y, width, height], "state": "rendering", "text": ""}
            self.entries.append(entry)
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="pipeline-view-crops-")
            thread = threading.Thread(target=self._render, args=(entry, self._path(number)), daemon=True)
        thread.start()

    def image(self, number: int) -> bytes | None:
        """The file of a crop, or None."""
        if not any(entry["number"] == number and entry["state"] == "done" for entry in self.entries):
            return None
        path = self._path(number)
        return path.read_bytes() if path.stat().st_size <= _MAX_IMAGE_BYTES else None

    def close(self) -> None:
        """Stop the crop that is being rendered, and delete all."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.terminate()
            process.wait()
        if self._folder is not None:
            self._folder.cleanup()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"crop_{number}.png"

    def _render(self, entry: dict[str, Any], output: Path) -> None:
        rect = ",".join(map(str, entry["rect"]))
        command = [
            sys.executable,
            "-m",
            "pipeline",
            "preview",
            *self._config_options,
            "--crop",
            rect,
            "-o",
            str(output),
        ]
        with self._lock:
            if self._closed:
                return
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        _, text = process.communicate()
        done = process.returncode == 0
        entry["text"] = "" if done else shown((text.strip().splitlines() or ["it failed"])[-1], 400)
        entry["state"] = "done" if done else "failed"
        self._on_change()
