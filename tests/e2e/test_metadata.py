"""Metadata of a whole run: what its pictures say of the content and of themselves."""

from __future__ import annotations

import json
import shutil

import pyvips

from pipeline.images import read_metadata
from tests.support.e2e import write_run


def texts(path):
    return read_metadata(path, gps=False).texts()


def packet(path) -> str:
    return bytes(pyvips.Image.new_from_file(str(path)).get("xmp-data")).decode()


def test_a_run_and_its_exports_say_the_same(tmp_path, call):
    """An artist's name was dropped in silence; and a picture without a digest cannot be traced to its config."""
    config = write_run(tmp_path, optimizer={"max_iterations": 1})
    image = pyvips.Image.new_from_file(str(tmp_path / "content.png")).copy()
    image.set_type(pyvips.GValue.gstr_type, "png-comment-0-Author", "Åsa")
    image.pngsave(str(tmp_path / "signed.png"))
    (tmp_path / "signed.png").replace(tmp_path / "content.png")
    assert call("run", "-c", config).code == 0
    assert texts(tmp_path / "out.png") == {"dc:creator": ("Åsa",)}
    assert call("export", "-c", config, "-o", tmp_path / "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert all(name in packet(tmp_path / "out.png") for name in ("ConfigDigest>", "Seed>0<", "Network>random<"))

    assert call("export", "--run", tmp_path / "run", "-o", tmp_path / "o.zarr").code == 0
    attributes = json.loads((tmp_path / "o.zarr" / "zarr.json").read_text())["attributes"]
    assert attributes["xmp"]["dc:creator"] == ["Åsa"] and "multiscales" in attributes["ome"]
    assert call("export", "-c", config, "-o", tmp_path / "o.dz").code == 0
    tile = pyvips.Image.new_from_file(str(tmp_path / "o.dz" / "o_files" / "0" / "0_0.jpg"))
    assert tile.get("exif-ifd0-Artist").startswith("Åsa (")

    assert call("export", "-c", config, "-o", tmp_path / "none.png", "--metadata", "none").code == 0
    assert texts(tmp_path / "none.png") == {} and b"pipeline" not in (tmp_path / "none.png").read_bytes()

    shutil.copy(tmp_path / "style.png", tmp_path / "content.png")  # another picture, of another artist
    said = call("export", "-c", config, "-o", tmp_path / "late.png")
    assert said.code == 0 and "without its copyright" in said.err
    assert texts(tmp_path / "late.png") == {}
