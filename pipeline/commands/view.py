"""The `view` command: a web page of a run, before, while and after it renders. Reads the run directory only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.config import AnyConfig
from pipeline.core.events import Sink, ignore
from pipeline.rundir.process_settings import process_settings
from pipeline.viewer import Viewer, ViewerOptions


@process_settings()
def view(
    work_dir: Path,
    *,
    config: AnyConfig | None = None,
    options: ViewerOptions | None = None,
    on_ready: Callable[[str], None] = lambda address: None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> None:
    """Serve the page of the run in `work_dir` until `stop` is set; `on_ready` gets its address.

    The run need not have begun: `config` then names the pictures to show. Raises ConfigError if the address is taken,
    or is one that other machines reach and `options` has no token.
    """
    Viewer(work_dir, config, options or ViewerOptions(), sink).serve(stop or threading.Event(), on_ready)
