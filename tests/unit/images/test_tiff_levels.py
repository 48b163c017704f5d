"""The smaller levels of a TIFF are kept in files beside it while the largest is written, and always deleted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.core.errors import SpaceError
from pipeline.core.image_formats import PixelKind
from pipeline.plan.image_memory import export_bytes
from pipeline.rundir.space import check_space
from tests.support.e2e import Outcome, make_call, write_run
from tests.support.pictures import measured_mb, picture, write
from tests.support.plans import config_of, planned

# An export of noise in bands of 64 rows, which executes `what` from row 1024 on.
CHILD = """
    import ctypes, os, signal, sys, tempfile
    from pathlib import Path
    import numpy as np
    from pipeline.images import vips_streams as streams, writer
    from pipeline.core.errors import PipelineError

    def files():
        for link in Path("/proc/self/fd").iterdir():
            try:
                yield Path(os.readlink(link))
            except OSError:  # that of the listing itself
                pass

    def tmpdir():  # as the C library sees it
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        return (getenv(b"TMPDIR") or b"None").decode()

    def read_rows(y0, y1):
        if y0 >= 1024:
            {what}
        return noise[y0:y1]

    {first}
    noise = np.random.default_rng(0).integers(0, 256, (2000, 1500, 3)).astype(np.uint8)
    streams.BAND_ROWS_PX = 64
    path = Path(sys.argv[1])
    try:
        writer.write_image(writer.ImageSpec(path, 1500, 2000, compression="none"), read_rows)
    except PipelineError as error:
        print(error)
        sys.exit(error.exit_code)
    print(tmpdir(), tempfile.gettempdir())
"""


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    return make_call(capfd, monkeypatch)


def export(path: Path, what: str = "pass", first: str = "pass", **environment: str) -> tuple[int, list[str]]:
    """Export to `path` in a child process; returns its exit code and the lines that it printed."""
    code = textwrap.dedent(CHILD).format(what=what, first=first)
    # libvips reads the size limit for levels in memory once; with a small one, small images have level files too
    values = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    values |= {"VIPS_DISC_THRESHOLD": "16k", **environment}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=values, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_export_with_levels_takes_little_memory_at_any_size(tmp_path: Path) -> None:
    """Levels in memory would take a third of the image's size, which ended a 30,000 px run at its last step."""
    planned = export_bytes((18000, 8000), PixelKind(), tiff=True, pyramid=True) / 1e6
    measured = measured_mb("export", tmp_path / "a.tif", "none", 8000, 18000)
    assert measured <= planned
    assert measured < 144  # a third of the image: the levels alone


def test_levels_in_files_are_those_in_memory(tmp_path: Path) -> None:
    """The bytes must not depend on whether the levels exceed the memory limit."""
    assert export(tmp_path / "files.tif")[0] == 0
    assert export(tmp_path / "memory.tif", VIPS_DISC_THRESHOLD="1g")[0] == 0
    assert (tmp_path / "files.tif").read_bytes() == (tmp_path / "memory.tif").read_bytes()
    sizes = [pyvips.Image.new_from_file(str(tmp_path / "files.tif"), page=page) for page in range(4)]
    assert [(image.height, image.width) for image in sizes] == [(2000 >> page, 1500 >> page) for page in range(4)]
    halves = [image.shrink(2, 2).numpy().astype(int) for image in sizes[:3]]
    for half, level in zip(halves, sizes[1:], strict=True):
        inside = level.numpy()[:-1, :-1]  # the last column of an odd width has one neighbour
        assert np.abs(half[: len(inside), : inside.shape[1]] - inside).max() <= 1


@pytest.mark.parametrize("elsewhere", [True, False])
def test_levels_lie_beside_the_picture(tmp_path: Path, elsewhere: bool) -> None:
    """/tmp may be small or in memory, and other programs use it too."""
    folder = tmp_path / "a folder, 100%d [x]" / "größer"
    other = tmp_path / "other"
    other.mkdir()
    environment = {"TMPDIR": str(other)} if elsewhere else {}
    what = 'print(*{file.parent.name for file in files() if "#" in file.name or "vips-" in file.name})'
    what += '; print(tmpdir()); assert not list(path.parent.glob(".*/*"))'
    code, lines = export(folder / "a.tif", what, **environment)
    outside = str(other) if elsewhere else None
    assert (code, lines[-1]) == (0, f"{outside} {outside or '/tmp'}")
    assert set(lines[1:-1:2]) == {str(outside)}  # TMPDIR is restored early
    places = set(lines[0:-1:2])
    assert len(places) == 1 and places.pop().startswith(".a.partial-")
    assert [entry.name for entry in folder.iterdir()] == ["a.tif"] and not list(other.iterdir())


def test_levels_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    """Otherwise every kill leaves gigabytes under a hidden name."""
    path = tmp_path / "a.tif"
    # as on a file system without unnamed temporary files
    folders = "[entry for entry in path.parent.iterdir() if entry.is_dir()]"
    kill = f"{folders}[0].joinpath('vips-0-1.target').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    assert export(path, kill) == (-signal.SIGKILL, [])
    assert {entry.is_dir() for entry in tmp_path.iterdir()} == {True, False}
    write(path, picture(50, 60))
    assert list(tmp_path.iterdir()) == [path]


def test_levels_of_a_failed_export_are_removed(tmp_path: Path) -> None:
    """The level files must be deleted if reading the canvas fails or the export is stopped."""
    failing = "raise writer.StorageError('broken')"
    assert export(tmp_path / "a.tif", failing) == (5, ["broken"])
    assert list(tmp_path.iterdir()) == []


def test_room_for_levels_is_asked_for_before_the_export(small_disk: Path) -> None:
    """A large export would fill the disk an hour after a check that ignored the levels."""
    values = {"size": 30_000, "output": str(small_disk / "a.tif"), "styles": [{"image": "/s0.png"}]}
    plan = planned(**values)
    pixels_bytes = 3 * plan.stages[-1].pixels
    with pytest.raises(SpaceError, match=f"the output image still needs {pixels_bytes * 5 / 3 / 2**30:.2f} GiB here"):
        check_space(config_of(**values), plan, len(plan.stages))


@pytest.mark.parametrize("levels_alone", [True, False])
def test_full_disk_while_levels_are_written(tmp_path: Path, small_disk: Path, levels_alone: bool) -> None:
    """A full disk must be reported as such, with the path of the output."""
    path = (tmp_path if levels_alone else small_disk) / "a.tif"
    first = "pass"
    if levels_alone:
        first = "make = writer._libvips_files_in; "
        first += f"writer._libvips_files_in = lambda folder: make(Path({str(small_disk)!r}) / folder.name)"
    code, lines = export(path, first=first)
    assert code == 5 and len(lines) == 1
    assert lines[0].startswith(f"{path}: No space left on device.")
    assert list(small_disk.iterdir()) == []
    assert [entry for entry in tmp_path.iterdir() if entry != small_disk] == []


def test_levels_can_be_left_out(tmp_path: Path, call: Callable[..., Outcome]) -> None:
    """Software that reads the last page of a TIFF would print a thumbnail."""
    keys = {"initial_size": 300, "compute": {"tile_px": 320}, "optimizer": {"max_iterations": 1}}
    config = write_run(tmp_path, (300, 300), **keys, export={"pyramid": False}, output="out.tif")
    assert call("run", "-c", config).code == 0
    with_levels, without = tmp_path / "with.tif", tmp_path / "without.tif"
    assert call("export", "-c", config, "-o", with_levels, "--pyramid").code == 0
    assert call("export", "-c", config, "-o", without).code == 0  # as the run, without the option
    pages = [
        pyvips.Image.new_from_file(str(path)).get_n_pages() for path in (tmp_path / "out.tif", without, with_levels)
    ]
    assert pages == [1, 1, 2]
