"""The page's server: what it shows of a run directory, what it refuses, and that it never writes there."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import pyvips

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.core.tiling import Rect
from pipeline.images.tile_codec import encode_tile
from pipeline.store import ChunkError, create_array, create_stage, open_array
from pipeline.store.overview import block_means
from pipeline.viewer import ViewerOptions, access, assets
from pipeline.viewer.canvas import TILE_PX, Canvas, Recent
from pipeline.viewer.snapshot import RunReader
from pipeline.viewer.state import remaining_s
from tests.support.e2e import canvases, write_run

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The config of a run of three stages that is done."""
    config = write_run(tmp_path_factory.mktemp("viewed"))
    pipeline.run(pipeline.load_config(config))
    return config


@pytest.fixture(scope="module")
def served(finished: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a viewer of the finished run, and the notes that it printed."""
    yield from serving(finished.parent / "run")


def serving(work_dir: Path, **options: object) -> Iterator[tuple[str, list[str]]]:
    stop, ready, found = threading.Event(), threading.Event(), []
    notes: list[str] = []

    def on_ready(address: str) -> None:
        found.append(address)
        ready.set()

    chosen = ViewerOptions(token=TOKEN, **options)
    arguments = {"options": chosen, "on_ready": on_ready, "stop": stop, "sink": lambda event: notes.append(str(event))}
    thread = threading.Thread(target=pipeline.view, args=(work_dir,), kwargs=arguments)
    thread.start()
    try:
        assert ready.wait(30)
        yield found[0], notes
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def get(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def state_of(address: str) -> dict:
    return json.loads(get(address + "state")[1])


def test_page_has_the_picture_before_any_script(served) -> None:
    """The first thing that one sees is the picture, and no name in a run can end the element with the state."""
    page = get(served[0])[1].decode()
    address = re.search(r'<img id="first" src="([^"]+)"', page)[1]
    code, data = get(served[0] + address)
    assert (code, pyvips.Image.new_from_buffer(data, "").width) == (200, 70)
    text = re.search(r'<script type="application/json" id="state">(.*)</script>', page)[1]
    assert all(json.loads(text)[key] == state_of(served[0])[key] for key in ("session", "phase", "stages", "log"))
    wicked = json.dumps({"pictures": [], "name": "</script><b>"})
    assert "<b>" not in assets.page_with(wicked).decode()


def newest_tile(address: str, level: int | None = None) -> str:
    picture = [one for one in state_of(address)["pictures"] if one["kind"] == "stage"][-1]
    top = (max(picture["width"], picture["height"]) - 1).bit_length()
    return f"{address}{picture['tiles']}{top if level is None else level}/0_0.jpg"


def test_tile_shows_the_pixels_of_the_exported_image(served, finished) -> None:
    """Otherwise people would choose a picture by what it is not."""
    code, data = get(newest_tile(served[0]))
    assert code == 200
    image = np.asarray(pyvips.Image.new_from_file(str(finished.parent / "out.png")).numpy())
    assert data == encode_tile(image, "jpg")  # the picture is one tile
    assert get(newest_tile(served[0], 0))[0] == 200


def test_state_has_stages_curves_and_every_picture(served) -> None:
    state = state_of(served[0])
    assert (state["phase"], state["width"], state["height"]) == ("done", 70, 52)
    assert [len(stage["curves"]["objective"]) for stage in state["stages"]] == [2] * len(state["stages"])
    assert any(name.startswith("style.") for name in state["stages"][0]["curves"]["layers"])
    assert {"stage_0", "content", "style_0"} <= {one["id"] for one in state["pictures"]}
    assert any("image written" in line["text"] for line in state["log"])


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("tiles/stage_0/old-00000000/3/0_0.jpg", 410),
        ("tiles/stage_9/1-00000000/3/0_0.jpg", 404),
        ("tiles/stage_0/../../run/journal.jsonl", 404),
        ("tiles/stage_0/..%2f..%2fjournal/3/0_0.jpg", 404),
        ("assets/../../server.py", 404),
        ("assets/..%2fserver.py", 404),
        ("assets/server.py", 404),
        ("../../../../etc/passwd", 404),
        ("%00", 404),
        ("maps/gradient", 404),
        ("maps/style/../../state", 404),
        ("maps/other", 404),
        ("crops/0.png", 404),
    ],
)
def test_other_addresses_are_refused_with_one_line(served, path: str, code: int) -> None:
    """Nothing outside the run may be served, and nobody should have to read a traceback."""
    address, notes = served
    answer, data = get(address + path)
    assert answer == code
    assert data.count(b"\n") == 1
    assert b"Traceback" not in data
    assert notes == []


def test_tile_numbers_out_of_range(served) -> None:
    tile = newest_tile(served[0])
    for wrong in ("99/0_0.jpg", "6/9999999_0.jpg", "6/0_7.jpg"):
        assert get(f"{tile.rsplit('/', 2)[0]}/{wrong}")[0] == 404


def test_token_and_host_are_needed(served) -> None:
    """Other users of the machine, and pages whose name resolves to 127.0.0.1, must not see the picture."""
    address = served[0]
    assert get(address.replace(TOKEN, TOKEN[:-1] + "x") + "state")[0] == 403
    assert get(address.replace(TOKEN + "/", ""))[0] == 403
    assert get(address + "state", Host="evil.example")[0] == 403
    assert get(address + "state", Host="127.0.0.1.evil.example:80")[0] == 403
    assert get(address + "state", Host="localhost:9000")[0] == 200  # ssh -L


@pytest.mark.parametrize(
    ("header", "listening", "allowed"),
    [
        ("127.0.0.1:80", "127.0.0.1", True),
        ("[::1]:80", "::1", True),
        ("10.0.0.7:80", "127.0.0.1", False),
        ("10.0.0.7:80", "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
        ("", "127.0.0.1", False),
        (None, "127.0.0.1", False),
        ("[::1", "127.0.0.1", False),
    ],
)
def test_host_headers(header: str | None, listening: str, allowed: bool) -> None:
    assert access.allowed_host(header, listening) is allowed


def test_beyond_this_machine_only_with_a_token(finished) -> None:
    with pytest.raises(ConfigError, match="unencrypted"):
        pipeline.view(finished.parent / "run", options=ViewerOptions(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="at least 16"):
        pipeline.view(finished.parent / "run", options=ViewerOptions(host="0.0.0.0", token="short"))


def test_crops_are_refused_unless_allowed(served) -> None:
    request = urllib.request.Request(
        served[0] + "crops",
        data=b'{"x": 0, "y": 0, "width": 8, "height": 8}',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="409"):
        urllib.request.urlopen(request, timeout=30)
    request.add_header("Origin", "http://evil.example")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)


def test_viewer_writes_nothing_into_the_run_directory(finished) -> None:
    """A viewer that writes could damage a day's work."""
    run = finished.parent / "run"

    def listing() -> list[tuple[str, int, int]]:
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(run.rglob("*"))]

    before, files = listing(), canvases(run)
    for address, _ in serving(run):
        assert get(newest_tile(address))[0] == 200
        get(address + "maps/progress")
    assert (listing(), canvases(run)) == (before, files)


def test_waits_for_a_run_and_survives_damage(tmp_path, finished) -> None:
    """The page is opened before the run, and stays open when the directory is damaged or repaired."""
    run, journal = tmp_path / "run", finished.parent / "run" / "journal.jsonl"
    reader = RunReader(run)
    assert reader.latest().manifest is None
    run.mkdir()
    (run / "journal.jsonl").write_bytes(journal.read_bytes())
    (run / "manifest.json").write_bytes((journal.parent / "manifest.json").read_bytes())
    whole = reader.latest()
    assert (whole.problem, len(whole.position.slots)) == ("", 2)
    assert remaining_s(whole) is None
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    (run / "journal.jsonl").write_bytes(data)
    damaged = reader.latest()
    assert "verify --repair" in damaged.problem
    assert damaged.position == whole.position  # what was shown stays
    (run / "journal.jsonl").write_bytes(journal.read_bytes())
    assert reader.latest().problem == ""


def test_damaged_chunk_is_reported_and_never_shown(tmp_path, finished) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished.parent / "run", run)
    chunk = sorted((run / "store.zarr").glob("stage_1/canvas_*/c/0/0/0"))[0]
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    for address, notes in serving(run):
        code, text = get(newest_tile(address))
        assert (code, b"verify" in text) == (502, True)
        assert "verify" in state_of(address)["problem"]
        assert len(notes) == 1


def test_input_that_is_not_the_runs_is_not_shown(tmp_path, finished) -> None:
    """A stranger's manifest may name any picture of this machine."""
    import shutil
    import time

    folder = tmp_path / "copy"
    shutil.copytree(finished.parent, folder)
    content = finished.parent / "content.png"
    original = content.read_bytes()
    shutil.copy(finished.parent / "style.png", content)
    try:
        for address, _ in serving(folder / "run"):
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                picture = next(one for one in state_of(address)["pictures"] if one["id"] == "content")
                if picture["problem"]:
                    break
                time.sleep(0.1)
            assert "has changed" in picture["problem"]
            assert "tiles" not in picture
    finally:
        content.write_bytes(original)


def test_levels_are_means_and_a_changed_chunk_is_refused(tmp_path) -> None:
    """Zoomed out, the picture has its mean colours; a chunk that a run overwrites is never shown half old, half new."""
    create_stage(tmp_path / "stage_0")
    create_array(tmp_path / "stage_0", "canvas_0", (600, 1000, 3), 64, "float32", "none")
    array = open_array(tmp_path / "stage_0", "canvas_0")
    pixels = np.random.default_rng(0).uniform(-5, 260, (600, 1000, 3)).astype(np.float32)
    sums = array.write_window(Rect(0, 600, 0, 1000), pixels)
    array = open_array(tmp_path / "stage_0", "canvas_0", array.packed(sums))
    canvas, shown = (
        Canvas(array, Recent(2**20, attrgetter("nbytes"))),
        np.rint(np.clip(pixels, 0, 255)).astype(np.uint8),
    )
    assert canvas.max_level == 10
    assert np.array_equal(canvas.tile(10, 1, 0), shown[:TILE_PX, TILE_PX:])
    for level in range(10):
        step = 2 ** (10 - level)
        tile = canvas.tile(level, 0, 0)
        assert tile.shape[:2] == (min(TILE_PX, -(-600 // step)), min(TILE_PX, -(-1000 // step)))
        inner = shown[: 600 // step * step, : 1000 // step * step]
        rows, columns = inner.shape[0] // step, inner.shape[1] // step
        means = inner.reshape(rows, step, columns, step, 3).mean(axis=(1, 3))
        part = tile[:rows, :columns].astype(float) - means[:TILE_PX, :TILE_PX]
        assert np.abs(part).max(initial=0) <= 1.01  # rounded twice
    changed = replace(array, checksums=array.checksums + np.uint32(1))
    with pytest.raises(ChunkError):
        Canvas(changed, Recent(2**20, attrgetter("nbytes"))).tile(10, 0, 0)
    assert block_means(np.full((3, 5, 3), 7, np.uint8), 3).tolist() == [[[7, 7, 7]]]


def test_recent_values_stay_within_their_bytes() -> None:
    """The viewer's memory is flat however long one walks around."""
    kept: Recent[np.ndarray] = Recent(100, attrgetter("nbytes"))
    for key in range(50):
        kept.put(key, np.zeros(30, np.uint8))
    assert [key for key in range(50) if kept.get(key) is not None] == [47, 48, 49]


# SHA-256 of the files of other projects: openseadragon@6.1.1 (BSD-3-Clause), uplot@1.6.32 (MIT).
VENDORED = {
    "openseadragon.min.js": "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad",
    "uplot.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def test_vendored_files_are_what_was_published() -> None:
    """A changed byte of a foreign script would run in the browsers of all users."""
    files = assets.page_files()
    for name, sha256 in VENDORED.items():
        assert hashlib.sha256(files[name]).hexdigest() == sha256
    folder = Path(assets.__file__).parent / "assets"
    assert all("copyright" in (folder / name).read_text().lower() for name in assets.LICENSES)


def test_page_names_no_other_host() -> None:
    """The page works offline, and tells nobody that it was opened."""
    for name, data in assets.page_files().items():
        if name in VENDORED:
            continue
        text = data.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name


def test_gallery_is_a_folder_that_any_host_serves(finished, tmp_path) -> None:
    """Every file that the page names is there, with the exported pixels and the content for before and after."""
    folder = pipeline.gallery(finished.parent / "run", tmp_path / "gallery")
    (state,) = json.loads((folder / "gallery.json").read_text())["works"]
    assert [one["id"] for one in state["pictures"]] == ["picture", "content"]
    page = (folder / "index.html").read_text()
    assert 'data-gallery="yes"' in page
    for name in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert (folder / name).is_file(), name
    for one, file in zip(state["pictures"], ("out.png", "content.png"), strict=True):
        top = (max(one["width"], one["height"]) - 1).bit_length()
        tile = pyvips.Image.new_from_file(str(folder / f"{one['tiles']}{top}/0_0.jpg"))
        image = pyvips.Image.new_from_file(str(finished.parent / file))
        assert (tile.width, tile.height) == (image.width, image.height) == (one["width"], one["height"])
        assert (tile.gaussblur(3).cast("double") - image.gaussblur(3)).abs().avg() < 4  # JPEG of noise
    with pytest.raises(ConfigError, match="exists"):
        pipeline.gallery(finished.parent / "run", tmp_path / "gallery")
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]
    before = {path: path.read_bytes() for path in (folder / "tiles").rglob("*.jpg")}
    pipeline.gallery(finished.parent / "run", folder, stage=0, title="small", credit="by me", add=True)
    works = json.loads((folder / "gallery.json").read_text())["works"]
    assert works[0] == state
    assert (works[1]["title"], works[1]["credit"]) == ("small", "by me")
    for one in (picture for work in works for picture in work["pictures"]):
        assert (folder / one["tiles"] / "0" / "0_0.jpg").is_file()
    assert all(path.read_bytes() == data for path, data in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]
    with pytest.raises(ConfigError, match="is no gallery"):
        pipeline.gallery(finished.parent / "run", tmp_path / "other", add=True)
