"""`pipeline apply` as a command: its memory is what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.e2e import peak_of_command, run_pipeline, write_picture
from tests.support.networks import write_network


@pytest.mark.parametrize("activations", ["recompute", "store"])
def test_measured_memory_is_what_was_planned(tmp_path: Path, activations: str) -> None:
    write_network(tmp_path / "net.safetensors", width=0.5)
    write_picture(tmp_path / "content.png", 300, 250)
    keys = {"networks": "net.safetensors", "content": "content.png", "output": "out.tif", "size": 1100}
    path = tmp_path / "apply.yaml"
    keys |= {"activations": activations, "compute": {"tile_px": 512, "device": "cpu"}, "store": {"chunk_px": 256}}
    path.write_text(yaml.safe_dump(keys))
    planned = json.loads(run_pipeline("plan", "-c", path, "--json").out)
    assert planned["run"] == "starts from the beginning"
    peak = peak_of_command("apply", "-c", path)
    assert planned["projected_mem_bytes"] / 3 < peak < planned["projected_mem_bytes"]
    again = json.loads(run_pipeline("plan", "-c", path, "--json").out)
    assert "already there" in again["run"]
