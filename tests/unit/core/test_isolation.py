"""Settings that a user has for other programs: files in ~/.config and variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from pipeline.core.isolation import own_environment
from pipeline.rundir.process_settings import process_settings
from pipeline.store import create_array, open_array
from pipeline.store.arrays import create_stage

# Imports what a run and its workers import, and prints the settings inside of a call, and after it.
_SETTINGS = """
import json
from pipeline.rundir.process_settings import process_settings
import dask.config, zarr
with process_settings():
    import distributed
    settings = dask.config.get("distributed.scheduler.preload"), dask.config.get("scheduler", None)
    inside = [*settings, zarr.config.get("default_zarr_format"), zarr.config.get("array.order")]
print(json.dumps([inside, dask.config.get("scheduler", None), zarr.config.get("array.order")]))
"""


@pytest.mark.parametrize(
    ("dask_file", "zarr_file", "after"),
    [
        ("a: [1\n:::", "{", '[[[], null, 3, "C"], null, "C"]'),
        (
            "scheduler: mine\ndistributed: {scheduler: {preload: [nosuch]}}\nlogging: {version: 2}",
            "array: {order: F}\ndefault_zarr_format: 2",
            '[[[], null, 3, "C"], "mine", "F"]',
        ),
    ],
    ids=["malformed", "for a cluster"],
)
def test_files_of_a_user_change_nothing(tmp_path: Path, dask_file: str, zarr_file: str, after: str) -> None:
    """A file for a cluster, or one with a slip in it, ended every command with a traceback."""
    for name, text in (("dask", dask_file), ("zarr", zarr_file)):
        (tmp_path / ".config" / name).mkdir(parents=True)
        (tmp_path / ".config" / name / "mine.yaml").write_text(text)
    environment = {**os.environ, "HOME": str(tmp_path), "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}
    command = [sys.executable, "-c", _SETTINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == after
    assert sorted(path.name for path in tmp_path.rglob("*.yaml")) == ["mine.yaml", "mine.yaml"]  # and none is added


def test_arrays_are_zarr_3_whatever_a_program_has_set(tmp_path: Path) -> None:
    """Zarr 2 has no zarr.json, and a resume would find nothing."""
    with zarr.config.set({"default_zarr_format": 2, "array.order": "F", "json_indent": 7}):
        with process_settings():
            create_stage(tmp_path / "stage")
            create_array(tmp_path / "stage", "canvas_0", (8, 8, 3), 16, "float32", "none")
            assert open_array(tmp_path / "stage", "canvas_0").shape == (8, 8, 3)
        assert zarr.config.get("default_zarr_format") == 2
    assert '\n  "shape"' in (tmp_path / "stage" / "canvas_0" / "zarr.json").read_text()


def test_variables_of_libraries_do_not_reach_our_processes() -> None:
    """A VIPS_ or BLOSC_ variable would change planned memory or written bytes; where files are is the user's choice."""
    ours = {"TORCH_HOME": "/x", "OMP_NUM_THREADS": "2", "HOME": "/h"}
    theirs = {"VIPS_CONCURRENCY": "64", "BLOSC_CLEVEL": "9", "ZARR_DEFAULT_ZARR_FORMAT": "2", "DASK_CONFIG": "/y"}
    assert own_environment(ours | theirs) == ours
