"""A run never writes through links, over its own state, or over images that it did not write."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.config.config import load_config
from pipeline.core.errors import ConfigError, DamagedStateError
from pipeline.core.files import read_regular
from pipeline.images.output_check import check_output
from pipeline.rundir.paths import links_in_store, refuse_links
from tests.support.e2e import Outcome, write_config, write_run

Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run that has ended: config.yaml, out.png, run/."""
    import pipeline

    folder = tmp_path_factory.mktemp("finished")
    pipeline.run(load_config(write_run(folder)))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the finished run to be damaged, beside a folder of another user."""
    shutil.copytree(finished, tmp_path / "here")
    write_config(tmp_path / "here")
    victim = tmp_path / "victim"
    (victim / "stage_0" / "m_0").mkdir(parents=True)
    (victim / "stage_0" / "m_0" / "thesis.txt").write_text("mine")
    (victim / "photo.raw").write_bytes(b"mine" * 3072)  # as long as a chunk of 32² px float32
    return tmp_path / "here"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert (outcome.code, outcome.err.count("\n")) == (code, 1), outcome
    assert outcome.err.startswith("pipeline: error: "), outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


# --- links in a run directory ---


def a_chunk(run: Path) -> Path:
    return sorted((run / "store.zarr").glob("stage_1/canvas_*/c/0/0/0"))[0]


def link_folder(place: str) -> Callable[[Path, Path], object]:
    def plant(run: Path, victim: Path) -> None:
        path = run / place
        if path.is_dir():
            shutil.rmtree(path)
        path.symlink_to(victim if "/" not in place else victim / "stage_0")

    return plant


def link_file(place: str) -> Callable[[Path, Path], object]:
    def plant(run: Path, victim: Path) -> None:
        (run / place).unlink(missing_ok=True)
        (run / place).symlink_to(victim / "photo.raw")

    return plant


def link_chunk(run: Path, victim: Path) -> None:
    chunk = a_chunk(run)
    chunk.unlink()
    chunk.symlink_to(victim / "photo.raw")


def second_name(run: Path, victim: Path) -> None:
    chunk = a_chunk(run)
    chunk.unlink()
    chunk.hardlink_to(victim / "photo.raw")


def pipe(run: Path, victim: Path) -> None:
    chunk = a_chunk(run)
    chunk.unlink()
    os.mkfifo(chunk)


def door(run: Path, victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(run)  # the whole path may be too long
        server.bind("door")
        os.chdir(here)


PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "store": link_folder("store.zarr"),
    "stage": link_folder("store.zarr/stage_0"),
    "next stage": link_folder("store.zarr/stage_2"),
    "partial stage": link_folder("store.zarr/stage_0.partial"),
    "array": link_folder("store.zarr/stage_1/m_0"),
    "chunks": lambda run, victim: link_folder(str(a_chunk(run).parents[1].relative_to(run)))(run, victim),
    "chunk": link_chunk,
    "hard link": second_name,
    "pipe": pipe,
    "lock": link_file("lock"),
    "lock owner": link_file("lock.owner"),
    "journal": link_file("journal.jsonl"),
    "manifest": link_file("manifest.json"),
    "partial manifest": link_file("manifest.json.partial"),
    "nowhere": lambda run, victim: (run / "manifest.json.partial").symlink_to(victim / "new"),
    "socket": door,
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("how", ["going on", "again", "from the start"])
def test_nothing_is_written_or_deleted_through_links(folder, call, plant, how):
    """Resuming a run directory from an archive could delete or overwrite files in a home folder."""
    victim = folder.parent / "victim"
    before = snapshot(victim)
    run = folder / "run"
    if how == "from the start":
        (run / "journal.jsonl").unlink()
    PLANTS[plant](run, victim)
    settings = ["--set=export.bits=16"] if how == "going on" else []
    refused(call("run", "-c", folder / "config.yaml", "--force", *settings), 6, str(run), "no run makes one")
    assert snapshot(victim) == before


@pytest.mark.parametrize("plant", PLANTS)
def test_a_picture_is_not_made_through_links(folder, call, plant):
    """An export could read files outside the run, or wait for a pipe forever."""
    victim = folder.parent / "victim"
    before = snapshot(victim)
    PLANTS[plant](folder / "run", victim)
    outcome = call("export", "--run", folder / "run", "-o", folder / "proof.png")
    refused(outcome, 6, str(folder / "run"))
    assert not (folder / "proof.png").exists()
    assert snapshot(victim) == before
    assert call("status", "--run", folder / "run").code in (0, 6)


def test_a_run_at_work_is_not_disturbed_by_the_look(tmp_path):
    """Files that an active run deletes during the scan are not damage."""
    (tmp_path / "store.zarr" / "stage_0" / "m_0").mkdir(parents=True)
    refuse_links(tmp_path)
    shutil.rmtree(tmp_path / "store.zarr")
    refuse_links(tmp_path)


class Untyped:
    """A directory entry of a file system that stores no types beside names: every query reads the file.

    Python has these where readdir(3) says DT_UNKNOWN: no file system that does can be mounted here.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = str(path), path.name

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_ISDIR)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(stat.S_ISREG)

    def is_symlink(self) -> bool:
        return self._is(stat.S_ISLNK)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return Path(self.path).lstat()

    def _is(self, kind: Callable[[int], bool]) -> bool:
        try:
            return kind(Path(self.path).lstat().st_mode)
        except FileNotFoundError:  # as os.DirEntry does
            return False


def test_a_file_that_a_run_deletes_during_the_look_is_no_pipe(tmp_path, monkeypatch):
    """On such a disk, `export` beside an active run would refuse it, and say to delete files that are gone."""
    store = tmp_path / "store.zarr"
    store.mkdir()

    @contextmanager
    def scandir(folder: str) -> Iterator[list[Untyped]]:
        entries = [Untyped(path) for path in sorted(Path(folder).iterdir())]
        (store / "gone").unlink(missing_ok=True)
        yield entries

    (store / "gone").touch()
    os.mkfifo(store / "pipe")
    (store / "stays").touch()
    (store / "link").symlink_to("stays")
    monkeypatch.setattr(os, "scandir", scandir)
    links = {path.name: what for path, what in links_in_store(tmp_path)}
    assert links == {"pipe": "is a pipe, a socket or a device", "link": "is a link"}


def test_the_work_dir_itself_may_be_a_link(folder, call):
    """A work_dir that links to a larger disk is common, and the user's own choice."""
    (folder / "run").rename(folder.parent / "elsewhere")
    (folder / "run").symlink_to(folder.parent / "elsewhere")
    assert call("run", "-c", folder / "config.yaml", "--force").code == 0
    assert call("export", "--run", folder / "run", "-o", folder / "proof.png").code == 0


# --- outputs ---


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".zarr", ".dz"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_an_output_that_is_a_link(folder, call, suffix, target):
    """With --force the image replaces the link; the target of the link is never changed."""
    victim = folder.parent / "victim"
    before = snapshot(victim)
    link = folder / f"link{suffix}"
    link.symlink_to({"file": victim / "photo.raw", "folder": victim, "nothing": victim / "new"}[target])
    for command in (
        ["run", "-c", folder / "config.yaml", f"--set=output={link}"],
        ["export", "--run", folder / "run", "-o", link],
    ):
        refused(call(*command), 3, str(link))
        outcome = call(*command, "--force")
        if outcome.code == 0:
            assert not link.is_symlink()
            shutil.rmtree(link) if link.is_dir() else link.unlink()
            link.symlink_to(victim)
        else:
            refused(outcome, 3, str(link))
        assert snapshot(victim) == before
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["store.zarr", "store.zarr/stage_0", "store.zarr/stage_1/x.png", "."])
def test_a_picture_never_replaces_the_state(folder, call, name):
    """A wrong output path with --force would delete the state of a run of days."""
    before = snapshot(folder / "run")
    path = folder / "run" / name
    if name in (".", "store.zarr/stage_0"):
        (folder / "run").rename(folder / "run.zarr")
        path = folder / "run.zarr" / name if name != "." else folder / "run.zarr"
    run = path if name == "." else next(parent for parent in path.parents if (parent / "manifest.json").exists())
    outcome = call("export", "--run", run, "-o", path if path.suffix else path.with_name("x.zarr"), "--force")
    assert outcome.code == 3, outcome
    config = folder / "config.yaml"
    if name != ".":
        outcome = call("run", "-c", config, f"--set=work_dir={run}", f"--set=output={run}/store.zarr/x.zarr", "--force")
        refused(outcome, 3, "the state of the run")
    assert snapshot(run) == before


def test_a_folder_that_is_no_pyramid_is_never_replaced(tmp_path):
    """--force replaces images; a folder with other files under that name is a mistake of the user."""
    for name, entry in (("a.zarr", "thesis.txt"), ("a.zarr", "labels"), ("a.dz", "thesis.txt")):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / entry).touch()
        with pytest.raises(ConfigError, match="would be lost"):
            check_output(tmp_path / name, 10, 10, 8, "deflate")
    (tmp_path / "b.zarr").mkdir()
    for entry in ("zarr.json", "0", "12"):
        (tmp_path / "b.zarr" / entry).touch()
    check_output(tmp_path / "b.zarr", 10, 10, 8, "deflate")
    (tmp_path / "c.zarr").touch()
    with pytest.raises(ConfigError, match="would be lost"):
        check_output(tmp_path / "c.zarr", 10, 10, 8, "deflate")


OF_THE_SYSTEM = [".DS_Store", "._0", "Thumbs.db", "Desktop.ini", ".directory", "@eaDir", ".nfs000000000000000100000001"]


def test_a_folder_that_a_desktop_has_looked_at_is_still_empty(tmp_path, call):
    """A new folder that was opened in Finder would be refused because of an invisible file."""
    config = write_run(tmp_path)
    for folder in (tmp_path / "run", tmp_path / "out.preview"):
        folder.mkdir()
        for name in OF_THE_SYSTEM:
            (folder / name).touch()
    assert call("run", "-c", config).code == 0
    assert call("preview", "-c", config, "--size", 48).code == 0
    for folder in (tmp_path / "run2", tmp_path / "other.preview"):
        folder.mkdir()
        (folder / ".DS_Store").touch()
        (folder / "thesis.txt").touch()
    refused(call("run", "-c", config, f"--set=work_dir={tmp_path / 'run2'}"), 3, "not a run's")
    refused(call("preview", "-c", config, f"--set=output={tmp_path / 'other.png'}"), 3, "contains other files")


@pytest.mark.parametrize("suffix", [".dz", ".zarr"])
def test_a_pyramid_that_a_desktop_has_looked_at_is_replaced(folder, call, suffix):
    """An output folder that was opened in Finder could not be replaced."""
    picture = folder / f"out{suffix}"
    command = ["export", "--run", folder / "run", "-o", picture]
    assert call(*command).code == 0
    for name in OF_THE_SYSTEM:
        (picture / name).touch()
    assert call(*command, "--force").code == 0
    assert not {entry.name for entry in picture.iterdir()} & {*OF_THE_SYSTEM}


def test_a_name_that_leaves_no_room_for_the_unfinished_picture(tmp_path):
    """If only the temporary file's name is too long, the export would fail at the end of the run."""
    with pytest.raises(ConfigError, match="too long"):
        check_output(tmp_path / f"{'x' * 251}.png", 10, 10, 8, "deflate")
    check_output(tmp_path / f"{'x' * 100}.png", 10, 10, 8, "deflate")


def test_init_writes_over_nothing(tmp_path, call):
    """Also not through a link without a target."""
    (tmp_path / "link.yaml").symlink_to(tmp_path / "new.yaml")
    refused(call("init", tmp_path / "link.yaml"), 3, "link.yaml")
    assert not (tmp_path / "new.yaml").exists()


# --- small files ---


def test_small_files_are_read_when_they_are_files(tmp_path):
    """A pipe as manifest would hang every command; a manifest of a terabyte would use all memory."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1]))
    assert read_regular(path, 3) == b"[1]"
    with pytest.raises(ValueError, match="3 bytes"):
        read_regular(path, 2)
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(ValueError, match="it is"):
            read_regular(tmp_path / name, 100)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 100)


def test_links_are_named_with_the_way_on(tmp_path):
    """The message says what is wrong with the file, and what to do."""
    (tmp_path / "store.zarr").symlink_to(tmp_path)
    with pytest.raises(DamagedStateError, match=r"store\.zarr: is a link, .* Delete it, and copy its target here"):
        refuse_links(tmp_path)
