"""Text for messages: shortening, escaping, sizes, counts and durations."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping


def shown(text: str, max_chars: int = 80) -> str:
    """`text` shortened and escaped, so that a message stays on one line whatever text a user or a file puts into it."""
    short = text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
    return short if short.isprintable() else repr(short)[1:-1]


def printable(text: str) -> str:
    """`text` with control characters escaped: file names in a message may contain terminal control sequences."""
    return "".join(
        char if char == "\n" or unicodedata.category(char) not in ("Cc", "Cs") else repr(char)[1:-1] for char in text
    )


BYTE_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base ** (power + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def bytes_text(size_bytes: int) -> str | int:
    """The shortest exact notation of a size that the config accepts."""
    unit, factor = max(BYTE_UNITS.items(), key=lambda item: (size_bytes % item[1] == 0, item[1]))
    return f"{size_bytes // factor}{unit}"


# Longest first: the shortest notation of a number of seconds has the largest unit that divides it.
TIME_UNITS = {"h": 3600, "min": 60, "s": 1}


def seconds_text(seconds: float) -> str:
    """The shortest exact notation of a time that the config accepts."""
    unit, factor = next((unit, factor) for unit, factor in TIME_UNITS.items() if factor == 1 or seconds % factor == 0)
    return f"{seconds / factor:g}{unit}" if seconds else "0s"


def size_text(size_bytes: float) -> str:
    """A size in the largest unit of which there is one: "needs 0.00 GiB, 0.00 are free" explains nothing."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes >= BYTE_UNITS[unit]:
            return f"{size_bytes / BYTE_UNITS[unit]:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def work_text(flop: float) -> str:
    """Floating-point operations in the largest unit of which there is one: 640 MFLOP, 3.2 TFLOP."""
    return _in_units(flop, {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}, "FLOP")


def energy_text(joule: float) -> str:
    """Energy: 3.2 kWh, 12 Wh; below 1 Wh in joule."""
    return _in_units(joule, {"MWh": 3.6e9, "kWh": 3.6e6, "Wh": 3.6e3}, "J")


def _in_units(number: float, units: Mapping[str, float], smallest: str) -> str:
    """`number` in the first of `units` that it reaches, with two significant digits at least."""
    unit, factor = next(((unit, factor) for unit, factor in units.items() if number >= factor), (smallest, 1.0))
    value = number / factor
    return f"{value:,.0f} {unit}" if value >= 10 or factor == 1 else f"{value:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """`number` with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def stage_name(index: int, stages: int | None = None) -> str:
    """A stage for a person, who counts from 1: stage 1 of 4."""
    return f"stage {index + 1}" + (f" of {stages}" if stages else "")


# Why a stage ended, for a person; the keys are those of the journal.
_REASONS = {
    "applied": "all passes done",
    "max_iterations": "all iterations done",
    "stop_condition": "change below stop_condition",
    "converged": "nothing left to change",
}


def end_text(reason: str) -> str:
    """Why a stage ended, in words."""
    return _REASONS.get(reason, reason)


def duration(seconds: float) -> str:
    """A duration: 42s, 3m 10s, 5h 02m, 2d 03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
