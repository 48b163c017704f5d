"""`pipeline export`: the run's own options, what is changed for one image, and files of an earlier export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import pyvips
import yaml

from tests.support.e2e import Outcome, journal, write_journal, write_run

TINY = {"initial_size": 48, "style_stages": False, "optimizer": {"max_iterations": 1}}
SIZE = (48, 40)
BLEED_PX = 20  # 2 mm at 254 dpi


def size_of(path: Path) -> tuple[int, int]:
    image = pyvips.Image.new_from_file(str(path))
    return image.width, image.height


def notes(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome
    return " ".join(outcome.err.split())


def write_profile(path: Path, name: str) -> None:
    path.write_bytes(pyvips.Operation.call("profile_load", name))


def test_an_export_is_as_the_run_writes_its_image_but_for_what_is_changed(tmp_path, call):
    """The section `export` was ignored by this command: a copy for the shop had neither its bleed nor its strips."""
    export = {"for": "print", "compression": "lzw", "dpi": 254, "bleed": "2mm"}
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, output="out.tif", export=export)
    assert call("run", "-c", config).code == 0
    of_run = (tmp_path / "out.tif").read_bytes()
    for number, of_what in enumerate((["-c", config], ["--run", tmp_path / "run"])):
        again = tmp_path / f"again{number}.tif"
        assert notes(call("export", *of_what, "-o", again)) == ""
        assert again.read_bytes() == of_run
        wider = tmp_path / f"wider{number}.tif"
        assert call("export", *of_what, "-o", wider, "--set", "export.bleed=4mm", "--dpi", "508").code == 0
        assert size_of(wider) == tuple(side_px + 8 * BLEED_PX for side_px in SIZE)
        # what another format cannot hold is said where it is the run's, and refused where it is asked for
        said = notes(call("export", *of_what, "-o", tmp_path / f"{number}.png"))
        assert "export.compression of the run is not used: PNG supports only deflate" in said
        assert "export.for: print changes nothing in a PNG" in said
        assert size_of(tmp_path / f"{number}.png") == tuple(side_px + 2 * BLEED_PX for side_px in SIZE)
        refused = call("export", *of_what, "-o", tmp_path / "x.png", "--set", "export.compression=lzw")
        assert refused.code == 3 and "compression: PNG supports only deflate" in refused.err
    for setting, why in (
        ("export.bleed=6", "--set export.bleed=6: export.bleed"),
        ("export.panels.overlap=1mm", "needs the width of a panel"),
        ("export.blead=6mm", "did you mean 'bleed'?"),
        ("export.bleed=900m", "Choose smaller edges"),
    ):
        refused = call("export", "-c", config, "-o", tmp_path / "x.tif", "--set", setting)
        assert refused.code == 3 and why in refused.err, refused
    assert call("export", "--run", tmp_path / "run", "-o", tmp_path / "x.tif", "--set", "size=64").code == 2
    assert not (tmp_path / "x.tif").exists()


def test_panels_of_a_former_count_are_named(tmp_path, call):
    """Three of four panels beside three new ones look like a set, and a shop prints what lies in the folder."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, output="wall.tif", export={"dpi": 254, "panels": "3mm"})
    assert "not part of it" not in notes(call("run", "-c", config))
    assert len(list(tmp_path.glob("wall-*of2.tif"))) == 2
    said = notes(call("run", "-c", config, "--set", "export.panels=2mm"))
    assert "beside the 3 images of this export lie others that are not part of it: wall-1of2.tif, wall-2of2.tif" in said
    said = notes(call("run", "-c", config, "--set", "export.panels=null"))
    assert "wall-1of2.tif, wall-1of3.tif, wall-2of2.tif and 2 more" in said
    for panel in tmp_path.glob("wall-*"):
        panel.unlink()
    exported = call("export", "-c", config, "-o", tmp_path / "wall.tif", "--set", "export.panels=3mm")
    assert exported.out.split() == [str(tmp_path / f"wall-{number}of2.tif") for number in (1, 2)]
    assert "the 2 images of this export lie others that are not part of it: wall.tif" in notes(exported)


def test_a_profile_that_is_replaced_under_its_name_means_another_export(tmp_path, call):
    """Shops send a new profile under the old name, and the file with the old inks would have been printed."""
    shop, output = tmp_path / "shop.icc", tmp_path / "out.tif"
    write_profile(shop, "p3")
    keys = {**TINY, "output": "out.tif", "working_space": "display-p3"}
    config = write_run(tmp_path, SIZE, (32, 32), **keys, export={"profile": "shop.icc"})
    assert call("run", "-c", config).code == 0
    first = output.read_bytes()
    assert "already there" in notes(call("run", "-c", config))
    write_profile(shop, "srgb")
    assert f"writes {output} from the finished run" in call("plan", "-c", config).out
    assert call("run", "-c", config).code == 0
    assert output.read_bytes() != first
    records = journal(tmp_path / "run")
    for record in records:
        (record.get("options") or {}).pop("profile_sha256", None)  # as older versions wrote it
    write_journal(tmp_path / "run" / "journal.jsonl", records)
    write_profile(shop, "p3")
    assert "already there" in notes(call("run", "-c", config))


def test_a_proof_that_is_replaced_is_refused(tmp_path, call):
    """It changes the canvas, so that to resume would mix two."""
    write_profile(tmp_path / "shop.icc", "cmyk")
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, proof="shop.icc")
    assert call("run", "-c", config).code == 0
    write_profile(tmp_path / "shop.icc", "srgb")
    refused = call("run", "-c", config)
    assert refused.code == 3 and "proof: the content of the file has changed" in refused.err


@pytest.mark.parametrize("key", ["export.profile", "proof"])
def test_a_bad_profile_is_named_with_its_key_and_line(tmp_path, call, key):
    """The path alone does not say which of two keys, in which of ten configs, has it."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    *section, name = key.split(".")
    data = yaml.safe_load(config.read_text())
    (data.setdefault(section[0], {}) if section else data)[name] = "shop.icc"
    config.write_text(yaml.safe_dump(data))
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "shop.icc" in text)
    for make, why in (
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: (path.rmdir(), path.write_bytes(b"no profile" * 20)), "is not an ICC profile"),
    ):
        make(tmp_path / "shop.icc")
        refused = call("run", "-c", config)
        assert refused.code == 3 and f"{config}:{line}:" in refused.err, refused
        assert f"{key}: " in refused.err and why in refused.err


def test_what_changes_nothing_in_a_format_is_said(tmp_path, call):
    """An option that is silently ignored is taken for one that works."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, output="out.dz", export={"dpi": 150, "intent": "perceptual"})
    said = call("plan", "-c", config).out
    assert "export.dpi: DeepZoom has no place for it" in said
    assert "export.intent is for profiles of tables, and changes nothing for sRGB" in said


def test_plan_has_the_stages_that_were_added(tmp_path, call: Callable[..., Outcome]):
    """The table was of the config alone: without the stage that is being rendered."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, work_dir=None)
    assert call("run", "-c", config).code == 0
    renamed = write_run(tmp_path, SIZE, (32, 32), **TINY, work_dir=None, output="other.png")
    said = notes(call("run", "-c", renamed, "--more-iterations", "2"))
    assert "it is continued" in said and "nothing is rendered" not in said
    planned = json.loads(call("plan", "-c", renamed, "--json").out)
    assert [stage["max_iterations"] for stage in planned["stages"]] == [1, 2]
