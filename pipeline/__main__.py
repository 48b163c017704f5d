"""Entry point of `pipeline` and `python -m pipeline`: installs signal handlers before the slow imports."""

from __future__ import annotations

import atexit
import os
import signal

TYPE_CHECKING = False  # as in __init__: importing typing is slow
if TYPE_CHECKING:
    from typing import NoReturn

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Copies of errors.Stopped, which is not imported yet when a signal arrives.
_EXIT_CODE = 75
_MESSAGE = b"pipeline: Stopped. Run the same command again to resume.\n"


def main() -> NoReturn:
    """Run the command of sys.argv and exit with its code (see errors.py).

    Before and after the scope of stop_on_signals a signal ends the process at once: no work is in progress then.
    """
    listened = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in listened:
        signal.signal(number, _stop)
    # Registered first and so called last. Then the interpreter restores the default handlers: death by the signal.
    atexit.register(_set_all, listened, signal.SIG_IGN)
    from pipeline.core import isolation  # noqa: PLC0415 - as below

    isolation.drop_settings()
    from pipeline.cli import app  # noqa: PLC0415 - slow
    from pipeline.core import allocator  # noqa: PLC0415 - slow

    allocator.set_up_process()
    try:
        app.main()
    except SystemExit as end:
        code = int(end.code or 0)
        _set_all(listened, lambda *_: os._exit(code))  # the command is done: a signal must not change its exit code
        raise


def _set_all(numbers: list[signal.Signals], handler: signal._HANDLER) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _stop(*_: object) -> None:
    """Exit at once. An exception would be caught by libraries, or printed with a traceback."""
    try:
        os.write(2, _MESSAGE)
    finally:  # even if stderr is closed
        os._exit(_EXIT_CODE)


if __name__ == "__main__":
    main()
