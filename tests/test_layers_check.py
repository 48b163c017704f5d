"""Who may import whom. Read from the source, so that an import inside a function counts like any other."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_config, write_image

PACKAGE = Path(__file__).parents[1] / "pipeline"

# The one place that says how high each file stands (architecture.md, decision 7). An import goes strictly downward.
# Between the layers of the table stand the parts that were cut from one file of it: _explain and _fields from config,
# cost from plan, transfer and stage from run and passes, sinks and report from cli.
HEIGHT = {
    "errors": -1,
    "layers": 0,
    "places": 1,
    "pictures": 1,
    "allocator": 1,
    "arrays": 2,
    "checksums": 1,
    "durable": 1,
    "formats": 1,
    "loopback": 1,
    "progress": 1,
    "download": 2,
    "tiling": 1,
    "timeline": 1,
    "disk_turns": 2,
    "_yaml": 0,
    "_explain": 1,
    "_fields": 2,
    "_tiff": 3,
    "records": 3,
    "sections": 3,
    "regions": 4,
    "config": 5,
    "weights_file": 3,
    "weights": 4,
    "device": 3,
    "model": 6,
    "cost": 7,
    "image_header": 4,
    "plan": 8,
    "journal": 5,
    "manifest": 5,
    "losses": 4,
    "adam": 4,
    "store": 5,
    "ome_zarr": 5,
    "chunk_stream": 7,
    "zarr_files": 7,
    "images": 5,
    "image_export": 5,
    "streams": 3,
    "padding": 1,
    "network": 5,
    "engine": 5,
    "worker": 9,
    "worker_pool": 10,
    "engine_processes": 11,
    "survey": 9,
    "run_to_size": 9,
    "integrity": 7,
    "transfer": 8,
    "colors": 7,
    "staging": 7,
    "passes": 8,
    "update": 8,
    "variation": 2,
    "guidance": 7,
    "stage": 9,
    "opening": 10,
    "preparation": 10,
    "written": 2,
    "iteration": 10,
    "run": 12,
    "vary": 7,
    "parts": 8,
    "contact_sheet": 9,
    "known": 11,
    "crop": 13,
    "preview_folder": 11,
    "preview": 13,
    "status": 12,
    "damage": 12,
    "inspection": 13,
    "repair": 14,
    "verify": 15,
    "__init__": 16,
    "sinks": 13,
    "interrupts": 12,
    "report": 17,
    "arguments": 17,
    "cli": 18,
    "computing": 11,
    "lock": 4,
    "position": 4,
    "process": 8,
    "run_folder": 6,
    "written_picture": 4,
    "__main__": 19,
    "callers": 0,
}
# Lazy imports that go upward: opening a .pth takes torch, and only network may have it.
LAZY_UPWARD = {("weights", "network")}
# Third-party modules that only these files may import, wherever in the file.
ONLY = {
    "zarr": {"store", "ome_zarr", "zarr_files"},
    "crc32c": {"checksums"},
    "dask": {"engine", "worker", "worker_pool"},
    "distributed": {"engine_processes", "loopback", "worker", "worker_pool"},
    # report: doctor's line with libvips' version
    "pyvips": {"image_header", "images", "image_export", "contact_sheet", "streams", "report"},
    "safetensors": {"network"},
    "torch": {"network", "padding", "losses", "passes", "staging", "guidance", "variation", "device", "weights"},
    "click": {"arguments", "cli"},
    "rich": {"sinks", "report"},
    "yaml": {"_yaml", "config"},
}
TORCH_AT_THE_TOP = {
    "network",
    "padding",
    "losses",
    "passes",
    "staging",
    "guidance",
    "variation",
}  # all others start without it
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(stem: str) -> set[tuple[str, bool]]:
    """(module, at the top of the file), for every import in a file of the package, absolute or relative."""
    tree = ast.parse((PACKAGE / f"{stem}.py").read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found: set[tuple[str, bool]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node not in inside) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("pipeline" if node.level else "", node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "pipeline" else [module]
            found |= {(name, node not in inside) for name in names}
    return found


def own_imports(stem: str) -> set[tuple[str, bool]]:
    """Files of the package that a file imports; a name taken from the package itself is its __init__."""
    found = set()
    for module, at_top in imports(stem):
        package, _, name = module.partition(".")
        if package == "pipeline":
            inner = name.partition(".")[0]
            found.add((inner if inner in FILES else "__init__", at_top))
    return found


def test_every_file_has_its_height():
    """A new file without a place in the order could import anything."""
    assert set(FILES) == set(HEIGHT)


@pytest.mark.parametrize("stem", FILES)
def test_imports_go_strictly_downward(stem):
    """Circles make a change here break something there; `plan` without torch would be over with the first."""
    for name, _at_top in own_imports(stem):
        if (stem, name) not in LAZY_UPWARD:
            assert HEIGHT[name] < HEIGHT[stem], f"{stem} ({HEIGHT[stem]}) imports {name} ({HEIGHT[name]})"


def test_lazy_upward_imports_are_lazy_and_still_there():
    """An exception that nobody needs is a hole."""
    for stem, name in LAZY_UPWARD:
        assert (name, False) in own_imports(stem) and (name, True) not in own_imports(stem)


@pytest.mark.parametrize("stem", FILES)
def test_third_party_modules_have_one_door(stem):
    """Replacing zarr, dask or pyvips must stay a change of one file."""
    for module, _at_top in imports(stem):
        package = module.partition(".")[0]
        assert stem in ONLY.get(package, {stem}), f"{stem} imports {module}; only {sorted(ONLY[package])} may"


@pytest.mark.parametrize("stem", FILES)
def test_only_the_maths_imports_torch_at_the_top(stem):
    """Torch takes seconds and hundreds of MB: `plan`, `status` and `export` do without."""
    at_top = {module.partition(".")[0] for module, top in imports(stem) if top}
    if stem not in TORCH_AT_THE_TOP:
        assert not at_top & {"torch", "safetensors"}


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
    """Every command would start later, and Ctrl-C meanwhile would end it in a traceback."""
    modules = loaded_after("import pipeline, pipeline.__main__")
    assert {name for name in modules if name.startswith("pipeline.")} == {"pipeline.__main__"}
    assert not {*SLOW, "click"} & modules
    assert not SLOW & loaded_after("import pipeline.cli.app")


def test_a_name_of_the_package_loads_its_own_module():
    """A script that reads a config would wait for torch."""
    assert not {"torch", "distributed", "zarr", "dask"} & loaded_after("import pipeline; pipeline.load_config")
    modules = loaded_after("from pipeline import run; assert callable(run)")
    assert "pipeline.commands.run" in modules
    assert not {"torch", "distributed"} & modules


@pytest.mark.parametrize(
    "first",
    ["", "import pipeline.commands.run, pipeline.plan.plan, pipeline.commands.preview.crop, pipeline.commands.status"],
)
def test_names_of_the_package_are_what_they_are_in_any_order_of_imports(first):
    """`pipeline.run(config)` would fail, because a module of that name had been imported before."""
    loaded_after(
        f"""
{first}
import sys, pipeline
from pipeline import *
import pipeline.commands.verify.verify, pipeline.commands.preview.preview
names = "Config crop export load_config plan preview run set_up_process status verify"
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


def test_a_run_in_one_process_does_not_load_distributed(tmp_path, narrow_weights):
    """It would add its start and its memory to every run, for a scheduler that is not used."""
    write_image(tmp_path / "content.png", 32, 32)
    write_image(tmp_path / "style.png", 32, 32)
    path = write_config(
        tmp_path, network={"weights": str(narrow_weights)}, compute={"device": "cpu"}, optimizer={"max_iterations": 1}
    )
    modules = loaded_after(COMMAND, "run", "--config", str(path))
    assert "pipeline.render.tile_tasks" in modules
    assert not {"distributed", "pipeline.executors.processes"} & modules


@pytest.mark.parametrize("command", ["plan", "plan --json", "status", "export -o {}/again.tif", "verify", "run"])
def test_commands_that_compute_nothing_do_not_load_torch(finished_run, command):
    """They answer at once, and on a machine that has not torch's memory to spare."""
    name, *options = command.format(finished_run.parent).split()
    modules = loaded_after(COMMAND, name, *options, "--config", str(finished_run))
    assert "pipeline.plan.plan" in modules
    assert not {"torch", "pipeline.network.vgg", "pipeline.render.tile_tasks", "distributed"} & modules


@pytest.mark.parametrize("command", ["--help", "run --help", "init -", "doctor"])
def test_commands_without_a_run_do_not_load_torch(command):
    """The first that a newcomer types would take seconds."""
    if command == "doctor" and any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        pytest.skip("torch is what knows the GPU")
    modules = loaded_after(COMMAND, *command.split())
    assert not {"torch", "pipeline.network.vgg", "pipeline.render.tile_tasks", "distributed"} & modules
    assert "help" not in command or not SLOW & modules
