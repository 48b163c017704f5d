"""Text for messages: shortening, escaping, sizes, counts and durations."""

from __future__ import annotations

import unicodedata


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


def count(number: int, noun: str) -> str:
    """`number` with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def stage_name(index: int, stages: int | None = None) -> str:
    """A stage for a person, who counts from 1: stage 1 of 4."""
    return f"stage {index + 1}" + (f" of {stages}" if stages else "")


# Why a stage ended, for a person; the keys are those of the journal.
_REASONS = {
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
