"""A refused start leaves nothing on the disk, and no run works in a folder that is not a run's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import LockedError
from pipeline.network import weights
from pipeline.rundir.lock import RunLock, running_owner
from pipeline.rundir.manifest import _manifest_text
from tests.support.e2e import journal, write_journal, write_picture, write_run

Refusal = Callable[[Path, pytest.MonkeyPatch], list[str]]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def foreign_output(folder: Path, _patch: pytest.MonkeyPatch) -> list[str]:
    write_picture(folder / "out.png", 9, 9)
    return []


def failing_download(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(weights, "VGG19_URL", "http://127.0.0.1:9/vgg19-dcbb9e9d.pth")  # no server listens on port 9
    patch.setenv("TORCH_HOME", str(folder / "hub"))
    (folder / "hub" / "hub" / "checkpoints").mkdir(parents=True)
    return ["--set", "network.name=vgg19"]


def cut_content(folder: Path, _patch: pytest.MonkeyPatch) -> list[str]:
    """Its header is intact, so that the damage is found after the run has begun."""
    data = write_picture(folder / "content.png", 200, 200).read_bytes()
    (folder / "content.png").write_bytes(data[: len(data) // 2])
    return []


def black_mask(folder: Path, _patch: pytest.MonkeyPatch) -> list[str]:
    import pyvips

    pyvips.Image.black(70, 52).write_to_file(str(folder / "mask.png"))
    return ["--set", "styles=[{image: style.png, mask: mask.png}, {image: style.png}]"]


def too_little_memory(folder: Path, _patch: pytest.MonkeyPatch) -> list[str]:
    return ["--set", "memory.limit=64MiB"]


REFUSALS: list[Refusal] = [foreign_output, failing_download, cut_content, black_mask, too_little_memory]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
@pytest.mark.parametrize("work_dir", ["run", "some/new/run", "there"])
def test_a_refused_start_leaves_nothing(tmp_path, call, monkeypatch, refusal, work_dir):
    """Every mistake would leave a folder with manifest, journal and store, or with a lock."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    config = write_run(tmp_path, work_dir=work_dir)
    options = refusal(tmp_path, monkeypatch)
    before = tree(tmp_path)
    outcome = call("run", "-c", config, *options)
    assert outcome.code == 3, outcome
    assert tree(tmp_path) == before


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
@pytest.mark.parametrize("command", [["preview"], ["preview", "--vary", "loss.style_weight=1,2"]], ids=len)
def test_a_refused_preview_leaves_nothing(tmp_path, call, monkeypatch, refusal, command):
    """The same for the folder of previews, and for the runs in it."""
    monkeypatch.chdir(tmp_path)
    config = write_run(tmp_path)
    options = refusal(tmp_path, monkeypatch)
    (tmp_path / "out.png").rename(tmp_path / "out.preview.png") if refusal is foreign_output else None
    before = tree(tmp_path)
    outcome = call(*command, "-c", config, *options)
    assert outcome.code == 3, outcome
    assert tree(tmp_path) == before


def test_a_refused_crop_leaves_nothing(tmp_path, call):
    """A crop only reads the run, which may not exist."""
    config = write_run(tmp_path)
    before = tree(tmp_path)
    assert call("preview", "-c", config, "--crop", "0,0,32,32").code == 3
    assert tree(tmp_path) == before
    assert call("run", "-c", config).code == 0
    write_picture(tmp_path / "out.crop.png", 9, 9)
    before = tree(tmp_path)
    assert call("preview", "-c", config, "--crop", "0,0,32,32").code == 3
    assert tree(tmp_path) == before


def test_what_a_run_has_rendered_stays_when_it_is_refused(tmp_path, call):
    """An image that the user saved at the output path meanwhile must not cost the rendered stages."""
    config = write_run(tmp_path)
    assert call("run", "-c", config).code == 0
    (tmp_path / "out.png").unlink()
    write_picture(tmp_path / "out.png", 9, 9)
    before = tree(tmp_path)
    assert call("run", "-c", config).code == 3
    assert tree(tmp_path) == before
    assert call("run", "-c", config, "--force").code == 0


def test_pictures_of_a_preview_stay_when_a_later_one_is_refused(tmp_path, call, monkeypatch):
    """Its journal identifies the folder and the images in it."""
    monkeypatch.chdir(tmp_path)
    config = write_run(tmp_path)
    data = write_picture(tmp_path / "second.png", 60, 50).read_bytes()
    (tmp_path / "second.png").write_bytes(data[: len(data) // 2])
    arguments = ("preview", "-c", config, "--vary", "styles.0.image=style.png,second.png")
    assert call(*arguments).code == 3
    (picture,) = (tmp_path / "out.preview").glob("*/picture.png")
    before = picture.stat().st_mtime_ns
    (tmp_path / "second.png").write_bytes(data)
    assert call(*arguments).code == 0
    assert picture.stat().st_mtime_ns == before


def test_files_of_others_in_a_folder_are_left_alone(tmp_path, call):
    """Files with the names of a run's files may belong to others: a refused start must not delete them."""
    config = write_run(tmp_path)
    (tmp_path / "run" / "store.zarr").mkdir(parents=True)
    (tmp_path / "run" / "store.zarr" / "mine").write_text("mine")
    assert call("run", "-c", config).code == 3
    assert (tmp_path / "run" / "store.zarr" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["lock", "lock.owner", "manifest.json.partial"])
def test_files_of_the_names_of_a_start_are_left_alone(tmp_path, call, name):
    """They look like the rest of a killed start; a refused start must not delete them for that."""
    config = write_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    write_picture(tmp_path / "out.png", 9, 9)
    before = tree(tmp_path)
    assert call("run", "-c", config).code == 3
    assert tree(tmp_path) | {"run/lock.owner"} == before | {"run/lock.owner"}


def test_a_folder_with_a_manifest_of_its_own_is_no_runs(tmp_path, call):
    """Every web project has a `manifest.json`: a run would overwrite it, and delete the files beside it."""
    config = write_run(tmp_path)
    (tmp_path / "run").mkdir()
    for name, text in (("manifest.json", '{"name": "my web app"}'), ("style.css", "b {}")):
        (tmp_path / "run" / name).write_text(text)
    before = tree(tmp_path)
    outcome = call("run", "-c", config)
    assert outcome.code == 3 and "holds files that are not a run's" in outcome.err
    assert tree(tmp_path) == before
    assert (tmp_path / "run" / "manifest.json").read_text() == '{"name": "my web app"}'


def test_a_foreign_journal_gets_no_lock_beside_it(tmp_path, call):
    """The folder is not a run's, so that nothing is created in it."""
    config = write_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    before = tree(tmp_path)
    assert call("run", "-c", config).code == 6
    assert tree(tmp_path) == before


def test_a_lock_that_was_made_anew_keeps_its_owner(tmp_path):
    """The end of a refused start would delete the owner file of a run that has started since."""
    first = RunLock(tmp_path).__enter__()
    (tmp_path / "lock").unlink()
    with RunLock(tmp_path):
        first.__exit__()
        assert running_owner(tmp_path) == os.getpid()
    assert running_owner(tmp_path) is None


def test_a_lock_in_a_folder_that_is_gone_is_told_as_such(tmp_path):
    """A start beside a refused one would report a failing disk."""
    with pytest.raises(LockedError, match="Try again"), RunLock(tmp_path / "gone"):
        pass


def test_a_lock_on_a_folder_that_was_taken_away_is_none(tmp_path, monkeypatch):
    """A start that waited for a refused one would work in a folder that another run creates again."""
    acquire = RunLock._acquire

    def slow(self: RunLock) -> None:
        acquire(self)
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").touch()

    monkeypatch.setattr(RunLock, "_acquire", slow)
    with pytest.raises(LockedError, match="by another run"), RunLock(tmp_path):
        pass


# --- a plan that is not the run's ---


def forge_stages(run: Path, change: Callable[[list[dict]], None]) -> None:
    """As if another version had planned other stages when the run began."""
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest.pop("crc")
    change(manifest["stages"])
    (run / "manifest.json").write_bytes(_manifest_text(manifest))
    records = journal(run)
    next(record for record in records if record["type"] == "begun")["manifest"] = manifest
    write_journal(run / "journal.jsonl", records)


def one_row_less(stages: list[dict]) -> None:
    stages[-1]["size"][0] -= 1


def another_style_size(stages: list[dict]) -> None:
    stages[0]["style_sizes"][0][1] += 1


def one_stage_more(stages: list[dict]) -> None:
    stages.append(stages[-1])


def one_stage_less(stages: list[dict]) -> None:
    stages.pop()


@pytest.mark.parametrize("change", [one_row_less, another_style_size, one_stage_more, one_stage_less])
def test_a_resume_compares_its_plan_with_the_runs_stages(tmp_path, call, change):
    """A run with a store of 34 rows and a plan of 35 resumed, and wrote rows outside the image."""
    config = write_run(tmp_path)
    assert call("run", "-c", config).code == 0
    forge_stages(tmp_path / "run", change)
    for command in (["run"], ["preview", "--crop", "0,0,32,32"]):
        outcome = call(*command, "-c", config)
        assert outcome.code == 3 and outcome.err.count("\n") == 1, outcome
        assert "of this run is" in outcome.err and "plans it as" in outcome.err
