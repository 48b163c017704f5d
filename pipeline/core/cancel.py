"""Cancellation: one token per call of the library, which all its threads check between two tasks."""

from __future__ import annotations

import threading

from pipeline.core.errors import Stopped


class CancelToken:
    """Wraps the event that asks a call to stop. Safe to use from any thread."""

    def __init__(self, event: threading.Event | None = None):
        self._event = event or threading.Event()

    def set(self) -> None:
        """Ask the call to stop."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the call was asked to stop."""
        return self._event.is_set()

    def raise_if_set(self) -> None:
        """Raise Stopped if the call was asked to stop."""
        if self._event.is_set():
            raise Stopped


class _NeverToken(CancelToken):
    def set(self) -> None:
        raise AssertionError("NEVER is shared: setting it would cancel every call of the process")


# For calls that cannot be cancelled.
NEVER = _NeverToken()
