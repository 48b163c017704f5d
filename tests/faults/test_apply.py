"""`pipeline apply` killed for real, in worker processes, and resumed in none."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.rundir import Journal, journal_path
from pipeline.rundir.records import Pass
from tests.support.e2e import PIPELINE, TIMEOUT_S, run_pipeline
from tests.support.inputs import write_image
from tests.support.networks import write_network

pytestmark = pytest.mark.fault


def passes(run_dir: Path) -> list[Pass]:
    journal = Journal(journal_path(run_dir))
    return [record for record in journal.read() if isinstance(record, Pass)] if journal.path.exists() else []


@pytest.mark.parametrize("activations", ["recompute", "store"])
def test_a_kill_costs_the_pass_in_progress_and_workers_give_the_same_bytes(tmp_path: Path, activations: str) -> None:
    net, content = tmp_path / "net.safetensors", tmp_path / "content.png"
    write_network(net, blocks=3)
    write_image(content, 210, 330)
    settings = ("store.chunk_px=32", "compute.tile_px=96", f"activations={activations}")
    line = ["apply", net, content, *(f"--set={one}" for one in settings)]
    out, once, killed_run = tmp_path / "out.png", tmp_path / "once.png", tmp_path / "out.run"
    with subprocess.Popen([PIPELINE, *map(str, line), "-o", out, "--set=compute.workers=1"]) as child:
        limit = time.monotonic() + TIMEOUT_S
        while len(passes(killed_run)) < 3:
            assert child.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    before = passes(killed_run)
    assert len(before) < 12
    assert run_pipeline(*line, "-o", out).code == 0
    assert passes(killed_run)[: len(before)] == before  # none was repeated
    assert run_pipeline(*line, "-o", once).code == 0
    assert out.read_bytes() == once.read_bytes()
    assert np.std(pyvips.Image.new_from_file(str(out)).numpy()) > 1
    assert "12/12" in run_pipeline("status", "--run", killed_run).out
    refused = run_pipeline("apply", content, content, "-o", tmp_path / "no.png")
    assert (refused.code, refused.out) == (3, "")
    assert "cannot be read as weights" in refused.err
    assert not (tmp_path / "no.run").exists()
