"""Which modules an import of a part of the package loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.inputs import write_config, write_image


def loaded_after(code: str, *arguments: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after running `code`."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return set(json.loads(out.stdout.splitlines()[-1]))


SLOW = {"torch", "distributed", "dask", "zarr", "numcodecs", "pyvips", "numpy", "pydantic", "yaml", "rich"}


def test_importing_the_package_loads_nothing_slow():
    """Slow imports delay every command, and Ctrl-C during them would print a traceback."""
    modules = loaded_after("import pipeline, pipeline.__main__")
    assert {name for name in modules if name.startswith("pipeline.")} == {"pipeline.__main__"}
    assert not {*SLOW, "click"} & modules
    assert not SLOW & loaded_after("import pipeline.cli.app")


def test_a_name_of_the_package_loads_its_own_module():
    """A script that loads a config must not wait for torch."""
    assert not {"torch", "distributed", "zarr", "dask"} & loaded_after("import pipeline; pipeline.load_config")
    modules = loaded_after("from pipeline import run; assert callable(run)")
    assert "pipeline.commands.run" in modules
    assert not {"torch", "distributed"} & modules


@pytest.mark.parametrize(
    "first",
    ["", "import pipeline.commands.run, pipeline.plan.plan, pipeline.commands.preview.crop, pipeline.commands.status"],
)
def test_names_of_the_package_are_what_they_are_in_any_order_of_imports(first):
    """`pipeline.run` must be the function even if the module of that name was imported first."""
    loaded_after(
        f"""
{first}
import sys, pipeline
from pipeline import *
import pipeline.commands.verify.verify, pipeline.commands.preview.preview
names = (
    "ApplyConfig Config CropSpec GridSpec ProofSpec SampleSpec TrainConfig apply clean crop export gallery "
    "load_apply_config load_config load_train_config measured_time outlook plan preview proof run set_up_process "
    "status train verify view"
)
assert pipeline.__all__ == names.split()
assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)
assert pipeline.plan is plan is sys.modules["pipeline.rundir.preflight"].plan
assert pipeline.run is run is sys.modules["pipeline.commands.run"].run
assert {{*pipeline.__all__, "__doc__"}} <= {{*dir(pipeline)}}
assert not hasattr(pipeline, "rnu")
assert issubclass(pipeline.errors.Stopped, pipeline.core.errors.PipelineError)
"""
    )


COMMAND = """
import sys
from pipeline.cli.app import cli
cli.main(sys.argv[1:], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, narrow_weights) -> Path:
    """The config of a run that has ended."""
    import pipeline

    folder = tmp_path_factory.mktemp("finished")
    write_image(folder / "content.png", 32, 32)
    write_image(folder / "style.png", 32, 32)
    path = write_config(
        folder, network={"weights": str(narrow_weights)}, compute={"device": "cpu"}, optimizer={"max_iterations": 1}
    )
    pipeline.run(pipeline.load_config(path))
    return path


@pytest.mark.e2e
def test_a_run_in_one_process_does_not_load_distributed(tmp_path, narrow_weights):
    """Its start-up time and memory are only needed with worker processes."""
    write_image(tmp_path / "content.png", 32, 32)
    write_image(tmp_path / "style.png", 32, 32)
    path = write_config(
        tmp_path, network={"weights": str(narrow_weights)}, compute={"device": "cpu"}, optimizer={"max_iterations": 1}
    )
    modules = loaded_after(COMMAND, "run", "--config", str(path))
    assert "pipeline.render.tile_tasks" in modules
    assert not {"distributed", "pipeline.executors.processes"} & modules


@pytest.mark.e2e
@pytest.mark.parametrize("command", ["plan", "plan --json", "status", "export -o {}/again.tif", "verify", "run"])
def test_commands_that_compute_nothing_do_not_load_torch(finished_run, command):
    """They answer quickly, and without the memory that torch needs."""
    name, *options = command.format(finished_run.parent).split()
    modules = loaded_after(COMMAND, name, *options, "--config", str(finished_run))
    assert "pipeline.plan.plan" in modules
    assert not {"torch", "pipeline.network.vgg", "pipeline.render.tile_tasks", "distributed"} & modules


@pytest.mark.parametrize("command", ["--help", "run --help", "init -", "doctor"])
def test_commands_without_a_run_do_not_load_torch(command):
    """The first commands of a new user must not take seconds."""
    if command == "doctor" and any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        pytest.skip("torch is what knows the GPU")
    modules = loaded_after(COMMAND, *command.split())
    assert not {"torch", "pipeline.network.vgg", "pipeline.render.tile_tasks", "distributed"} & modules
    assert "help" not in command or not SLOW & modules
