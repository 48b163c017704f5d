"""A run overwrites its own output images and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.core.events import Event, StageDone
from pipeline.rundir.results import is_as_written, written_picture
from tests.support.e2e import Nursery, journal, write_journal, write_picture, write_run

# By format, an option that changes the image.
OPTIONS = {
    ".png": "export.bits=16",
    ".tif": "export.compression=none",
    ".jpg": "export.quality=50",
    ".dz": "export.quality=50",
    ".zarr": "export.bits=16",
}


@pytest.fixture(params=[".png", *(pytest.param(name, marks=pytest.mark.e2e) for name in OPTIONS if name != ".png")])
def finished(request, tmp_path, call) -> tuple[Path, Path]:
    """The config of a run that has ended, and its picture."""
    config = write_run(tmp_path, output=f"out{request.param}", optimizer={"max_iterations": 1})
    assert call("run", "-c", config).code == 0
    return config, tmp_path / f"out{request.param}"


def a_file_of(picture: Path) -> Path:
    """The image, or the largest file of its folder."""
    files = [path for path in picture.rglob("*") if path.is_file()] if picture.is_dir() else [picture]
    return max(files, key=lambda path: path.stat().st_size)


def bytes_of(picture: Path) -> dict[str, bytes]:
    files = [path for path in picture.rglob("*") if path.is_file()] if picture.is_dir() else [picture]
    return {str(path.relative_to(picture)): path.read_bytes() for path in files}


def retouch(path: Path, *, keep_time: bool = False) -> None:
    """Change a pixel, and the time unless `keep_time`, but not the size."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if not keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_a_retouched_picture_is_not_overwritten(finished, call):
    """The user's retouching would be lost, because the run once wrote to this path."""
    config, picture = finished
    retouch(a_file_of(picture))
    before = bytes_of(picture)
    for options in ((), ("--set", OPTIONS[picture.suffix])):
        outcome = call("run", "-c", config, *options)
        assert outcome.code == 3 and outcome.err.count("\n") == 1, outcome
        assert "is not what was written there" in outcome.err and "--force" in outcome.err
        assert bytes_of(picture) == before
    assert call("run", "-c", config, "--force").code == 0
    assert bytes_of(picture) != before
    assert "already there" in call("run", "-c", config).err  # now it is the run's own image


def test_a_picture_that_is_saved_there_meanwhile_is_not_overwritten(tmp_path):
    """A run takes a day: an image that the user saves at the output path meanwhile would be lost."""
    config, foreign = write_run(tmp_path, optimizer={"max_iterations": 1}), b"somebody's"

    def sink(event: Event) -> None:
        if isinstance(event, StageDone) and event.stage == 0:
            (tmp_path / "out.png").write_bytes(foreign)

    with pytest.raises(ConfigError, match="this run did not make it"):
        pipeline.run(pipeline.load_config(config), sink=sink)
    assert (tmp_path / "out.png").read_bytes() == foreign
    (tmp_path / "out.png").rename(tmp_path / "mine.png")
    before = len([record for record in journal(tmp_path / "run") if record["type"] == "iteration"])
    pipeline.run(pipeline.load_config(config))  # nothing that was rendered is lost
    assert len([record for record in journal(tmp_path / "run") if record["type"] == "iteration"]) == before


def test_a_picture_of_another_size_or_a_foreign_one_is_not_overwritten(finished, call):
    """Another program has saved an image at the output path."""
    config, picture = finished
    with a_file_of(picture).open("ab") as file:
        file.write(b"more")
    before = bytes_of(picture)
    assert call("run", "-c", config).code == 3
    assert bytes_of(picture) == before


def test_a_picture_that_was_only_copied_or_touched_is_its_own(finished, call):
    """A restored backup has other times: the run would ask for --force."""
    config, picture = finished
    for path in [picture, *picture.rglob("*")] if picture.is_dir() else [picture]:
        os.utime(path, ns=(10**18, 10**18))
    before = len(journal(config.with_name("run")))
    outcome = call("run", "-c", config)
    assert outcome.code == 0 and "already there" in outcome.err
    assert len(journal(config.with_name("run"))) == before


def test_a_picture_that_was_emptied_is_written_again(finished, call):
    """A full disk or a crash left an empty file, and the run said that the image was already there."""
    config, picture = finished
    before = bytes_of(picture)
    if picture.is_dir():
        shutil.rmtree(picture)
        picture.mkdir()
    else:
        picture.write_bytes(b"")
    outcome = call("run", "-c", config)
    assert outcome.code == 0 and "already there" not in outcome.err
    assert bytes_of(picture).keys() == before.keys()
    assert a_file_of(picture).stat().st_size > 0


def test_a_picture_whose_record_was_lost_is_its_own(finished, call):
    """After a crash between rename and record, the next start would refuse its own image."""
    config, _picture = finished
    path = config.with_name("run") / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["record"]["type"] == "exported"
    path.write_bytes(b"".join(lines[:-1]))
    assert call("run", "-c", config).code == 0
    assert journal(config.with_name("run"))[-1]["type"] == "exported"


def test_an_older_picture_of_its_own_is_replaced_after_a_crash_before_the_rename(finished, call):
    """The new image is recorded, and the old one is still in place: both are the run's own."""
    config, picture = finished
    old = bytes_of(picture)
    (picture if picture.is_file() else picture.parent / picture.name).rename(config.with_name("aside"))
    assert call("run", "-c", config, "--set", OPTIONS[picture.suffix]).code == 0
    path = config.with_name("run") / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    shutil.rmtree(picture) if picture.is_dir() else picture.unlink()
    config.with_name("aside").rename(picture)
    assert bytes_of(picture) == old
    assert call("run", "-c", config).code == 0


def test_a_picture_that_moved_with_its_project_is_its_own(finished, call, tmp_path):
    """A finished project on another disk would ask for --force."""
    config, picture = finished
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
    moved = tmp_path / "elsewhere" / config.name
    assert call("run", "-c", moved).code == 0
    retouch(a_file_of(moved.with_name(picture.name)))
    assert call("run", "-c", moved).code == 3


def without_pictures(path: Path) -> None:
    """The journal of an older version, which recorded only the path of an image."""
    left_out = ("picture", "version", "tile_px")
    records = [{key: value for key, value in record.items() if key not in left_out} for record in journal(path.parent)]
    write_journal(path, records)


def test_a_run_of_an_older_version_goes_on(finished, call):
    """Its images are recognised by their paths, and from the next export on by their hashes."""
    config, picture = finished
    without_pictures(config.with_name("run") / "journal.jsonl")
    assert "already there" in call("run", "-c", config).err
    retouch(a_file_of(picture))
    assert "already there" in call("run", "-c", config).err
    assert call("run", "-c", config, "--set", OPTIONS[picture.suffix]).code == 0
    retouch(a_file_of(picture))
    assert call("run", "-c", config, "--set", OPTIONS[picture.suffix]).code == 3


def test_a_retouched_sheet_or_crop_is_not_overwritten(tmp_path, call):
    """Notes that the user drew onto the contact sheet would be lost with the next preview."""
    config = write_run(tmp_path, optimizer={"max_iterations": 1})
    assert call("run", "-c", config).code == 0
    for command, name in ((("preview",), "out.preview.png"), (("preview", "--crop", "8,8,32,32"), "out.crop.png")):
        assert call(*command, "-c", config).code == 0
        assert call(*command, "-c", config).code == 0  # the preview's own sheet
        retouch(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        outcome = call(*command, "-c", config)
        assert outcome.code == 3 and "is not what was written there" in outcome.err
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).write_bytes(b"")
        assert call(*command, "-c", config).code == 0


def test_a_kill_before_any_commit_of_an_export_leaves_its_own_picture(tmp_path):
    """After a crash at any moment, the run must recognise its own image."""
    nursery = Nursery(tmp_path)
    try:
        config = write_run(tmp_path, output="out.tif", optimizer={"max_iterations": 1})
        for kill_before in range(1, 40):
            child = nursery.start("run", "-c", config, kill_before=kill_before)
            if child.wait() == 0:
                break
        assert nursery.run("run", "-c", config).wait() == 0
        assert (tmp_path / "out.tif").stat().st_size > 0
    finally:
        nursery.close()


def test_the_picture_of_an_old_run_is_its_own_after_a_crash_before_the_rename(finished, call):
    """The new image is recorded; the old one, recorded by its path alone, is still in place."""
    config, picture = finished
    without_pictures(config.with_name("run") / "journal.jsonl")
    picture.rename(config.with_name("aside"))
    assert call("run", "-c", config, "--set", OPTIONS[picture.suffix]).code == 0
    path = config.with_name("run") / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    shutil.rmtree(picture) if picture.is_dir() else picture.unlink()
    config.with_name("aside").rename(picture)
    assert call("run", "-c", config, "--set", OPTIONS[picture.suffix]).code == 0


def test_tiles_that_changed_places_are_another_picture(tmp_path):
    """Neither the total size nor the time of a file shows it."""
    for name in ("a", "b"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(name.encode())
    picture = written_picture(tmp_path / "x")
    (tmp_path / "x" / "a").rename(tmp_path / "c")
    (tmp_path / "x" / "b").rename(tmp_path / "x" / "a")
    (tmp_path / "c").rename(tmp_path / "x" / "b")
    assert not is_as_written(tmp_path / "x", picture)


def test_names_that_a_record_cannot_keep_are_refused_at_once(tmp_path, call):
    """The journal would refuse such paths at the end of the run, with a traceback."""
    config = write_run(tmp_path)
    for name in ("a\nb.png", os.fsdecode(b"\xff.png")):
        for command in (("preview",), ("preview", "--crop", "0,0,32,32")):
            outcome = call(*command, "-c", config, "-o", str(tmp_path / name))
            assert outcome.code == 3 and "Traceback" not in outcome.err, outcome
    (tmp_path / "project").mkdir()
    write_run(tmp_path / "project")
    folder = (tmp_path / "project").rename(tmp_path / os.fsdecode(b"\xff"))
    outcome = call("run", "-c", folder / "config.yaml")
    assert outcome.code == 3 and "not valid UTF-8" in outcome.err, outcome
    assert not (folder / "run").exists()


def test_a_folder_differs_by_any_of_its_files(tmp_path):
    """Exchanging a tile for another of the same size, or renaming one, changes the image."""
    for name in ("a", "b/c"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(name.encode() * 3)
    picture = written_picture(tmp_path / "x")
    assert is_as_written(tmp_path / "x", picture)
    (tmp_path / "x" / "b" / "c").rename(tmp_path / "x" / "b" / "d")
    os.utime(tmp_path / "x" / "b" / "d", ns=(10**18, 10**18))
    os.utime(tmp_path / "x" / "a", ns=(10**18, 10**18))
    assert not is_as_written(tmp_path / "x", picture)
    assert not is_as_written(tmp_path / "nothing", picture) and not is_as_written(tmp_path / "nothing", None)


def test_a_link_or_a_pipe_under_the_name_is_foreign(tmp_path, call):
    """Reading a pipe would hang the start."""
    config = write_run(tmp_path, optimizer={"max_iterations": 1})
    os.mkfifo(tmp_path / "out.png")
    assert call("run", "-c", config).code == 3
    (tmp_path / "out.png").unlink()
    (tmp_path / "out.png").symlink_to(tmp_path / "nowhere.png")
    assert call("run", "-c", config).code == 3
    write_picture(tmp_path / "nowhere.png", 9, 9)
    assert call("run", "-c", config).code == 3
