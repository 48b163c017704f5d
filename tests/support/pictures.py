"""Images written by the package, and the memory that reading or writing one takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.image_formats import PixelKind
from pipeline.images.writer import ImageSpec, write_image


def picture(height_px: int, width_px: int, seed: int = 0, bits: int = 8) -> np.ndarray:
    """Noise over a ramp with a hard edge: a shift, a wrong edge or a wrong kernel shows."""
    y, x = np.mgrid[0:height_px, 0:width_px]
    ramp = 40 + 120 * (x / max(width_px, 2) + y / max(height_px, 2)) / 2 + 60 * (x > width_px // 2)
    noise = np.random.default_rng(seed).normal(0, 25, (height_px, width_px, 3))
    pixels = np.clip(ramp[..., None] + noise, 0, 255)
    return pixels.astype(np.uint8) if bits == 8 else np.round(pixels * 257).astype(np.uint16)


def rows_of(pixels: np.ndarray) -> Callable[[int, int], np.ndarray]:
    return lambda y0, y1: pixels[y0:y1]


def write(path: Path, pixels: np.ndarray, **options: Any) -> None:
    kind = PixelKind(pixels.itemsize * 8, pixels.shape[2] == 4)
    write_image(ImageSpec(path, pixels.shape[1], pixels.shape[0], kind, **options), rows_of(pixels))


MEMORY = """
    import sys, threading, time
    from pathlib import Path
    import numpy as np, psutil
    from pipeline.images.writer import ImageSpec, write_image
    from pipeline.images.reader import stream_rgb
    from pipeline.config import ExportConfig
    from pipeline.plan import sheets_of
    from pipeline.render.edges import sheet_rows

    process = psutil.Process()
    peak, base, done = 0, process.memory_info().rss, threading.Event()
    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    what, path = sys.argv[1], Path(sys.argv[2])
    if what == "export":
        width, height = map(int, sys.argv[4:])
        band = np.random.default_rng(0).integers(0, 256, (16, width, 3)).astype(np.uint8)
        read_rows = lambda y0, y1: np.resize(band, (y1 - y0, width, 3))
        write_image(ImageSpec(path, width, height, compression=sys.argv[3], quality=50), read_rows)
    elif what == "bleed":
        width, height = map(int, sys.argv[4:])
        options = ExportConfig.model_validate({"dpi": 300, "bleed": sys.argv[3], "wrap": "5cm"})
        (sheet,) = sheets_of(path, (height, width), options)
        band = np.random.default_rng(0).integers(0, 256, (16, width, 3)).astype(np.uint8)
        read_rows = sheet_rows(lambda rect: np.resize(band, (rect.height, rect.width, 3)), sheet)
        write_image(ImageSpec(path, sheet.size[1], sheet.size[0], compression="none", quality=50), read_rows)
    else:
        for _ in stream_rgb(path, *map(int, sys.argv[3:])):
            pass
    done.set()
    watcher.join()
    print((peak - base) / 1e6)
"""


def measured_mb(*arguments: object) -> float:
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
