"""Where `pipeline` and `python -m pipeline` begin: they listen to signals, and only then import what is slow."""

from __future__ import annotations

import atexit
import os
import signal

TYPE_CHECKING = False  # as in __init__
if TYPE_CHECKING:
    from typing import NoReturn

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED = 75  # as errors.Stopped
_LINE = b"pipeline: stopped: run the same command again to resume.\n"


def main() -> NoReturn:
    """Run the command of sys.argv, and exit with its code (see errors.py).

    Until stop_on_signals listens, and once it has ended, a signal ends the process at once: nothing is under way then.
    """
    listened = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    for number in listened:
        signal.signal(number, _stop)
    # Registered first and so called last. After that the interpreter would restore the default: death by the signal.
    atexit.register(_set_all, listened, signal.SIG_IGN)
    from pipeline.cli import app  # noqa: PLC0415 - slow
    from pipeline.core import allocator  # noqa: PLC0415 - slow

    allocator.set_up_process()
    try:
        app.main()
    except SystemExit as end:
        code = int(end.code or 0)
        _set_all(listened, lambda *_: os._exit(code))  # done: a signal changes the outcome no more
        raise


def _set_all(numbers: list[signal.Signals], handler: signal._HANDLER) -> None:
    for number in numbers:
        signal.signal(number, handler)


def _stop(*_: object) -> None:
    """Not by an exception: libraries would catch it, or print it with a traceback where they cannot."""
    try:
        os.write(2, _LINE)
    finally:  # also where nobody reads stderr any more
        os._exit(_STOPPED)


if __name__ == "__main__":
    main()
