"""A terminal emulator, and a command that runs in a pseudo-terminal."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Callable

from tests.support.e2e import TIMEOUT_S

_ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Screen:
    """A terminal of fixed width and unlimited height that understands the escape sequences of rich's live display."""

    def __init__(self, columns: int):
        self.columns = columns
        self.lines = [""]
        self.cursor_shown = True
        self._row = self._column = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""

    def feed(self, data: bytes) -> None:
        text, self._rest = self._rest + self._decoder.decode(data), ""
        while text:
            if text[0] == "\x1b":
                if (match := _ESCAPE.match(text)) is None:
                    self._rest = text  # the sequence continues in the next read
                    return
                self._obey(match[1], match[2])
                text = text[match.end() :]
            else:
                self._put(text[0])
                text = text[1:]

    def _obey(self, argument: str, letter: str) -> None:
        match argument, letter:
            case _, "m":
                pass
            case (("" | "1"), "A"):
                self._row = max(0, self._row - 1)
            case "2", "K":
                self.lines[self._row] = ""
            case "?25", ("l" | "h"):
                self.cursor_shown = letter == "h"
            case _:
                raise AssertionError(f"unknown escape sequence: {argument}{letter}")

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._down()
        else:
            if self._column == self.columns:  # a terminal wraps when the next character comes, not before
                self._column = 0
                self._down()
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + char + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    @property
    def shown(self) -> list[str]:
        """The non-empty lines."""
        return [line.rstrip() for line in self.lines if line.strip()]

    @property
    def bars(self) -> list[str]:
        """The lines with a progress bar."""
        return [line for line in self.shown if "━" in line]


class Terminal:
    """A command in a pseudo-terminal, which echoes what is typed."""

    def __init__(self, columns: int, *argv: object):
        self.screen = Screen(columns)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        command = ["env", "--default-signal=INT", "setsid", "--ctty", "--wait", *map(str, argv)]
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
        )
        os.close(theirs)

    def wait_until(self, reached: Callable[[Screen], bool]) -> None:
        """Read what the command prints until the screen fulfils `reached`."""
        deadline = time.monotonic() + TIMEOUT_S
        while not reached(self.screen):
            assert self._read(), f"the command has ended: {self.screen.shown}"
            assert time.monotonic() < deadline, self.screen.shown

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait(self) -> int:
        """Read to the end of the output; returns the exit code."""
        while self._read():
            pass
        os.close(self._ours)
        return self._process.wait(TIMEOUT_S)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 4096)
        except OSError:  # Linux reports EIO when the last process has closed the terminal
            return False
        self.screen.feed(data)
        return bool(data)
