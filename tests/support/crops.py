"""A run that is stopped between two stages, for tests of crops."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import load_config, run
from pipeline.commands.preview.whole_image import WholeImageEstimate
from pipeline.core.errors import Stopped
from pipeline.core.events import StageStarted

CONTENT_PX = (150, 110)
# Deep layers have a halo larger than such an image; with these layers the region is a part of it.
SHALLOW = {"name": "random", "content_layers": {"conv2_1": 1.0}, "style_layers": {"conv1_1": 0.5, "conv2_1": 0.5}}


def stopped_before(config: Path, stage: int, *settings: str) -> None:
    """The run of a config, stopped when all stages before this one are finished."""
    stop = threading.Event()

    def sink(event):
        if isinstance(event, StageStarted) and event.stage == stage:
            stop.set()

    with pytest.raises(Stopped):
        run(load_config(config, settings), sink=sink, stop=stop)


def no_estimate(_whole: Any, stage: Any, _region: Any) -> WholeImageEstimate:
    """A replacement of WholeImage.estimate that estimates nothing."""
    return WholeImageEstimate({}, dict.fromkeys(stage.layer_use.content_layers, 1.0))
