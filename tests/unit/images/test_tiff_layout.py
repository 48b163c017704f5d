"""How TIFFs are stored: what layout programs and viewers can open, and files around the limit of classic TIFF."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.core.image_formats import TIFF_COMPRESSIONS
from pipeline.images.tiff_layout import TILES, TiffLayout, largest_bytes, tiff_options
from tests.support.e2e import Outcome, journal, make_call, write_journal, write_run
from tests.support.pictures import picture, write

STRIPS, SUBIFDS = TiffLayout(strips=True), TiffLayout(subifds=True)
_STRIP_OFFSETS, _TILE_WIDTH, _ROWS_PER_STRIP, _SUB_IFDS = 273, 322, 278, 330


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    return make_call(capfd, monkeypatch)


def directories(path: Path) -> list[dict[int, int]]:
    """The pages of a classic TIFF: the first value of each tag, or its offset."""
    data = path.read_bytes()
    assert struct.unpack("<2sH", data[:4]) == (b"II", 42)
    pages, offset = [], struct.unpack_from("<I", data, 4)[0]
    while offset:
        (count,) = struct.unpack_from("<H", data, offset)
        entries = [struct.unpack_from("<HHI4s", data, offset + 2 + 12 * index) for index in range(count)]
        pages.append({tag: struct.unpack("<H2x" if kind == 3 else "<I", value)[0] for tag, kind, _, value in entries})
        (offset,) = struct.unpack_from("<I", data, offset + 2 + 12 * count)
    return pages


def test_a_tiff_for_print_is_a_single_classic_page_of_strips(tmp_path: Path) -> None:
    """A RIP refuses tiles and 64-bit offsets, and prints the last page instead of the first."""
    pixels = picture(300, 700)
    write(tmp_path / "a.tif", pixels, pyramid=False, layout=STRIPS)
    (page,) = directories(tmp_path / "a.tif")
    assert page[_ROWS_PER_STRIP] == 16 and _TILE_WIDTH not in page and _SUB_IFDS not in page
    assert np.array_equal(pyvips.Image.new_from_file(str(tmp_path / "a.tif")).numpy(), pixels)


@pytest.mark.parametrize(("layout", "pages", "subifds"), [(TILES, 3, 0), (SUBIFDS, 1, 2)])
def test_levels_are_pages_or_subifds(tmp_path: Path, layout: TiffLayout, pages: int, subifds: int) -> None:
    """OpenSlide finds levels only as pages, Bio-Formats only as SubIFDs."""
    pixels = picture(700, 900)
    write(tmp_path / "a.tif", pixels, layout=layout)
    found = directories(tmp_path / "a.tif")
    assert len(found) == pages and (_SUB_IFDS in found[0]) == bool(subifds)
    if subifds:
        second = pyvips.Image.new_from_file(str(tmp_path / "a.tif"), subifd=1)
        assert (second.width, second.height) == (225, 175)
    assert np.array_equal(pyvips.Image.new_from_file(str(tmp_path / "a.tif")).numpy(), pixels)


@pytest.mark.parametrize("compression", TIFF_COMPRESSIONS)
@pytest.mark.parametrize("layout", [STRIPS, TILES, SUBIFDS])
def test_noise_is_not_larger_than_the_bound(tmp_path: Path, compression: str, layout: TiffLayout) -> None:
    """A classic TIFF that grows beyond 4 GiB fails at the end of a run."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 500, 3)).astype(np.uint8)
    pyramid = not layout.strips
    write(tmp_path / "a.tif", pixels, compression=compression, quality=100, pyramid=pyramid, layout=layout)
    bound = largest_bytes((600, 500), 3, compression, pyramid, layout)
    # Without what is reserved for the profiles and metadata of each page, which the file does not have.
    assert (tmp_path / "a.tif").stat().st_size <= bound - (3 if pyramid else 1) * 8 * 2**20 + 2**16


@pytest.mark.parametrize(
    ("size", "bits", "compression", "layout", "big"),
    [
        ((30_000, 30_000), 8, "deflate", STRIPS, False),  # 2.5 GiB
        ((30_000, 30_000), 8, "deflate", TILES, False),  # 3.4 GiB with its levels
        ((30_000, 30_000), 8, "lzw", STRIPS, False),
        ((30_000, 30_000), 8, "lzw", TILES, True),
        ((30_000, 30_000), 16, "deflate", STRIPS, True),
        ((37_600, 37_600), 8, "none", STRIPS, False),
        ((37_900, 37_900), 8, "none", STRIPS, True),  # 4.01 GiB
        ((3, 1_000_000), 8, "none", STRIPS, False),
    ],
)
def test_only_what_may_exceed_4_gib_has_64_bit_offsets(
    size: tuple[int, int], bits: int, compression: str, layout: TiffLayout, big: bool
) -> None:
    """Layout programs do not open BigTIFF; a classic TIFF ends at 4 GiB."""
    options = tiff_options(size, 3 * bits // 8, compression, not layout.strips, layout)
    assert options["bigtiff"] == big


def test_the_key_survives_in_a_run_directory(tmp_path: Path, call: Callable[..., Outcome]) -> None:
    """`for` is a keyword of Python: under another name in the manifest, a resume or a check would not know it."""
    config = write_run(tmp_path, output="out.tif", export={"for": "print", "compression": "lzw", "pyramid": False})
    assert call("run", "-c", config).code == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["export"]["for"] == "print"
    (exported,) = (record for record in journal(tmp_path / "run") if record["type"] == "exported")
    assert exported["options"]["for"] == "print"
    for command in ("run", "verify", "plan", "status"):
        outcome = call(command, "-c", config)
        assert outcome.code == 0, outcome.err


REFUSED = [
    ("x.tif", ["--for", "print", "--pyramid"], "pyramid: a TIFF for print has no smaller levels"),
    ("x.tif", ["--for", "print", "--compression", "jpeg"], "choose one of deflate, lzw, none"),
    ("x.tif", ["--for", "print", "--levels", "subifds"], "levels: applies only to a TIFF with smaller levels"),
    ("x.tif", ["--no-pyramid", "--levels", "subifds"], "levels: applies only to a TIFF with smaller levels"),
    ("x.png", ["--levels", "pages"], "levels: applies only to a TIFF with smaller levels"),
    ("x.png", ["--for", "viewer"], "for: PNG has no smaller levels, which viewers need; omit it, or choose .tif"),
    ("x.dz", ["--for", "print"], "for: DeepZoom is for viewers alone; omit it, or choose .tif or .png or .jpg"),
]


def test_one_key_makes_a_run_write_for_print(tmp_path: Path, call: Callable[..., Outcome]) -> None:
    """A finished run must write its image again for another reader, also if it finished before the key existed."""
    config = write_run(tmp_path, output="out.tif")
    assert call("run", "-c", config).code == 0
    output = tmp_path / "out.tif"
    assert _TILE_WIDTH in directories(output)[0]
    records = journal(tmp_path / "run")
    for record in records:
        if record["type"] == "exported":  # as an older version wrote it
            record["options"] = {
                name: record["options"][name] for name in ("bits", "compression", "quality", "pyramid")
            }
    write_journal(tmp_path / "run" / "journal.jsonl", records)
    before = output.read_bytes()
    assert call("run", "-c", config).code == 0
    assert output.read_bytes() == before
    outcome = call("run", "-c", config, "--set", "export.for=print", "--set", "export.compression=lzw")
    assert outcome.code == 0, outcome.err
    assert _TILE_WIDTH not in directories(output)[0]
    for name, options, why in REFUSED:
        outcome = call("export", "-c", config, "-o", tmp_path / name, *options)
        assert outcome.code == 3 and why in outcome.err, outcome.err
    outcome = call("plan", "-c", config, "--set", "export.compression=zst")
    assert outcome.code == 3 and "expected one of deflate, lzw, jpeg, none, found" in outcome.err, outcome.err
    assert call("plan", "-c", config, "--set", "export.for=prnt").err.endswith("did you mean 'print'?\n")
