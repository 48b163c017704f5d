"""A JPEG file with the segment that states its resolution, JFIF, which libvips does not write."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.core.errors import storage_error

_START = b"\xff\xd8"
_PER_INCH = 1
_VERSION = 0x0102


class JfifFile:
    """A file for libvips' custom target. It keeps the OSError that it met, which libvips passes on as text, if at all.

    The segment must be the first: it is inserted behind the marker that every JPEG starts with.
    """

    def __init__(self, path: Path, dpi: float, output: Path | None = None) -> None:
        """`output`: the name that the file gets when it is whole, which errors name."""
        self._path, self._output = path, output or path
        density = min(max(1, round(dpi)), 2**16 - 1)  # the format has whole numbers
        fields = (b"\xff\xe0", 16, b"JFIF", _VERSION, _PER_INCH, density, density, 0, 0)
        self._segment = struct.pack(">2sH5sHBHHBB", *fields)
        self._started = False
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if self._failure is not None:
            raise storage_error(self._output, self._failure)

    def write(self, data: Any) -> int:
        """Write bytes of the JPEG; returning -1 makes libvips stop."""
        rest = memoryview(data)
        try:
            if not self._started:
                assert rest[:2] == _START, "libvips writes the start of a JPEG in one piece"
                self._write_all(memoryview(_START + self._segment))
                self._started, rest = True, rest[2:]
            self._write_all(rest)
        except OSError as error:
            self._failure = error
            return -1
        return len(data)

    def _write_all(self, rest: memoryview) -> None:
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
