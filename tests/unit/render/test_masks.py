"""Masks: each style in its region, the content where it is wanted; exact over tiles, kept on disk like all else."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import pipeline
from pipeline import load_config
from pipeline.config.config import result_fields
from pipeline.config.regions import regions_of
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.events import IterationDone
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.store.guides import UNGUIDED, Guides
from pipeline.store.layout import gram_key, is_stage_array
from tests.support.configs import problems
from tests.support.inputs import write_config, write_image
from tests.support.masks import ramp
from tests.support.stages import EXACT, assert_exact, prepared, read_whole, write_mask

SIZES = {"style_sizes": ((50, 67), (40, 33), (33, 48)), "style_weights": (1.0, 2.0, 0.5)}
SMALL_LAYERS = {"content_layers": {"conv3_1": 1.0}, "style_layers": {"conv1_1": 1.0, "conv4_1": 0.5}}


def two_masks(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks that overlap, and leave a part to the rest."""
    return ramp(height, width, 0.35, 0.6), 255 - ramp(height, width, 0.1, 0.5)


# --- the objective ---


@pytest.mark.parametrize(("size", "tile_px"), [((64, 96), 96), ((65, 113), 48), ((33, 300), 96)])
@pytest.mark.parametrize("kind", ["normalized", "gatys", "wasserstein"])
def test_two_regions_and_the_rest_are_exact_for_any_partition(tmp_path, narrow_weights, size, tile_px, kind):
    """Soft edges, overlaps and what the masks leave: a seam between tiles, or a style that leaks, is an error here."""
    first, second = two_masks(*size)
    with prepared(
        tmp_path, narrow_weights, size, tile_px, masks=(first, None, second), loss={"kind": kind}, **SIZES
    ) as case:
        assert len(case.problem.regions()) == case.stage.layer_use.guides.regions == 3
        assert_exact(case)


@pytest.mark.parametrize("tile_px", [48, 144])
@pytest.mark.parametrize(
    ("color", "tv_weight", "network"),
    [
        ("content", 3.0, {"padding": "reflect", "pooling": "average"}),
        ("style", 0.0, {"padding": "zeros", "pooling": "tent"}),
        ("luminance", 3.0, {"content_layers": {"conv2_2": 0.3, "conv1_1": 1.0}, "style_layers": {"conv2_2": 1.7}}),
    ],
)
def test_masks_content_map_color_and_variation_together(tmp_path, narrow_weights, color, tv_weight, network, tile_px):
    """Artists use them together; each changes what the others are computed from."""
    size = (83, 131)
    first, second = two_masks(*size)
    with prepared(
        tmp_path,
        narrow_weights,
        size,
        tile_px,
        masks=(first, first, second),
        content_mask=ramp(*size, 0.2, 0.9),
        color=color,
        loss={"tv_weight": tv_weight},
        network=network,
        **SIZES,
    ) as case:
        assert case.stage.layer_use.guides == Guides(masks=2, rest=False, content=True)
        assert_exact(case)


@pytest.mark.parametrize(("size", "tile_px"), [((64, 96), 96), ((65, 113), 48)])
def test_a_content_map_is_exact_without_masks(tmp_path, narrow_weights, size, tile_px):
    """Where it is black the content must have no say at all."""
    with prepared(tmp_path, narrow_weights, size, tile_px, content_mask=ramp(*size, 0.3, 0.7)) as case:
        assert_exact(case)


def test_one_white_mask_is_no_mask(tmp_path, narrow_weights):
    """The weight of a style must mean the same with and without a mask, or every mask is a new search for it."""
    size, white = (65, 113), np.full((65, 113), 255, np.uint8)
    found = []
    for masks, content_mask in (((), None), ((white,), white)):
        (folder := tmp_path / str(len(masks))).mkdir()
        with prepared(folder, narrow_weights, size, 48, masks=masks, content_mask=content_mask) as case:
            found.append((case.iterate().objective, case.read("gradient")))
    assert found[0][0] == pytest.approx(found[1][0], rel=EXACT)
    assert np.abs(found[0][1] - found[1][1]).max() < EXACT * np.abs(found[0][1]).max()


def test_a_region_that_deep_layers_lose_is_left_out_there(tmp_path, narrow_weights):
    """The pools drop the last odd rows, and with them a region that lies only there: no 0/0, no refusal."""
    size = (67, 64)
    mask = np.zeros(size, np.uint8)
    mask[-3:] = 255
    with prepared(
        tmp_path,
        narrow_weights,
        size,
        32,
        masks=(mask, None),
        style_sizes=SIZES["style_sizes"][:2],
        style_weights=(1.0, 1.0),
    ) as case:
        assert case.started.areas["conv1_1_r0"] == 3 * 64 and case.started.areas["conv3_1_r0"] == 0
        assert_exact(case)
        assert "style.conv3_1_r0" not in case.iterate().layer_losses


def test_a_mask_that_is_black_is_refused_by_name(tmp_path, narrow_weights):
    """A style that silently paints nothing would be noticed after a day."""
    black, half = np.zeros((48, 64), np.uint8), ramp(48, 64, 0.4, 0.6)
    sizes = {"style_sizes": SIZES["style_sizes"][:2], "style_weights": (1.0, 1.0)}
    with (
        pytest.raises(InputError, match=r"mask .*mask_.*png: is black all over stage 1 .*style1.png would paint"),
        prepared(tmp_path, narrow_weights, (48, 64), 64, masks=(half, black), **sizes),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"styles without a mask: the masks are white .*style1.png would paint nothing"),
        prepared(tmp_path, narrow_weights, (48, 64), 64, masks=(255 - black, None), **sizes),
    ):
        pass


# --- regions, by their names ---


def test_styles_with_one_mask_share_its_region(tmp_path):
    """Their weights blend them there; what has no mask comes last."""
    path = write_config(
        tmp_path,
        styles=[
            {"image": "a.png", "mask": "sky.png"},
            {"image": "b.png"},
            {"image": "c.png", "mask": "sea.png"},
            {"image": "d.png", "mask": "sky.png"},
        ],
    )
    regions = regions_of(load_config(path).styles)
    assert [(region.mask and region.mask.name, region.styles) for region in regions] == [
        ("sky.png", (0, 3)),
        ("sea.png", (2,)),
        (None, (1,)),
    ]


def test_a_region_whose_styles_have_no_weight_is_refused(tmp_path):
    """0/0 of their shares would be a picture of NaN."""
    styles = [{"image": "a.png"}, {"image": "b.png", "mask": "m.png", "weight": 0.0}]
    (line,) = problems(write_config(tmp_path, styles=styles))
    assert "styles.1.weight" in line and "m.png" in line
    (line,) = problems(write_config(tmp_path, styles=[{**styles[1], "weight": 1.0}, {**styles[0], "weight": 0.0}]))
    assert "without a mask" in line


def test_names_of_arrays_are_known():
    """verify would move a stage's own files away as foreign."""
    guides = Guides(masks=2, rest=True, content=True)
    assert guides.arrays == ("guide_0", "guide_1", "guide_content")
    assert guides.keys("conv4_1") == ("conv4_1_r0", "conv4_1_r1", "conv4_1_r2")
    assert UNGUIDED.arrays == () and UNGUIDED.keys("conv4_1") == ("conv4_1",)
    for name in (*guides.arrays, "gram_conv4_1", "gram_conv4_1_r12"):
        assert is_stage_array(name)
    assert gram_key("gram_conv4_1_r12") == "conv4_1_r12"
    for name in ("guide_", "guide_x", "gram_conv9_1", "gram_conv4_1_r", "gram_conv4_1_rx"):
        assert not is_stage_array(name)


# --- files ---


@pytest.fixture
def masked(tmp_path, narrow_weights):
    """Makes a config of three stages with two masks, a rest and a content map; further keys go in as they are."""

    def make(**values):
        write_image(tmp_path / "content.png", 83, 131, seed=1)
        for index in range(3):
            write_image(tmp_path / f"style{index}.png", 40, 50 - index, seed=2 + index)
        first, second = two_masks(83, 131)
        names = [write_mask(tmp_path, mask) for mask in (first, None, second)]
        styles = [{"image": f"style{index}.png", "mask": name} for index, name in enumerate(names)]
        content_mask = write_mask(tmp_path, ramp(42, 66, 0.1, 0.8))
        keys = {
            "styles": styles,
            "loss": {"content_mask": content_mask},
            "initial_size": 66,
            "network": {"weights": str(narrow_weights), **SMALL_LAYERS},
            "optimizer": {"max_iterations": 4},
            "compute": {"device": "cpu", "tile_px": 64},
            "store": {"chunk_px": 32},
        }
        return load_config(write_config(tmp_path, **{**keys, **values}))

    return make


def canvas_of(config) -> np.ndarray:
    position = position_of(Journal(config.work_dir / "journal.jsonl").read())
    return read_whole(newest_canvas(config.work_dir, position, position.stage))


class _StopAfter:
    """Stops a run once so many iterations have been told."""

    def __init__(self, iterations: int):
        self.event, self._left = threading.Event(), iterations

    def __call__(self, event: object) -> None:
        if isinstance(event, IterationDone):
            self._left -= 1
            if self._left == 0:
                self.event.set()


def stopped_after(config, iterations: int) -> None:
    stop = _StopAfter(iterations)
    with pytest.raises(pipeline.errors.Stopped):
        pipeline.run(config, sink=stop, stop=stop.event)


@pytest.mark.e2e
def test_a_masked_run_goes_on_with_the_same_bytes_and_is_mended(masked):
    """Masks are state like any other: kept, checked, found when they rot, and made again with their stage."""
    config = masked()
    pipeline.run(config)
    whole = canvas_of(config)
    other = config.model_copy(
        update={"work_dir": config.work_dir.with_name("stopped"), "output": config.output.with_name("b.png")}
    )
    stopped_after(other, 6)
    assert pipeline.verify(other.work_dir).clean
    store = other.work_dir / "store.zarr" / "stage_1"
    for name in ("guide_1/c/0/1/0", "guide_content/c/0/0/0", "gram_conv4_1_r2/c/0/0"):
        path = store / name
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(pipeline.errors.DamagedStateError):
        pipeline.run(other)
    report = pipeline.verify(other.work_dir, repair=True)
    assert len(report.found) == 3 and report.clean and (report.stage, report.iteration) == (0, 4)
    pipeline.run(other)
    assert np.array_equal(canvas_of(other), whole)
    assert (store / "guide_0").exists() is False  # freed when the stage had ended


@pytest.mark.e2e
def test_a_masked_run_gives_the_same_picture_with_one_tile_and_with_many(masked):
    """Every stage has its own sums of the masks: none may depend on how much memory the machine had."""
    found = []
    for tile_px in (160, 64):
        compute = {"device": "cpu", "dtype": "float64", "tile_px": tile_px}
        config = masked(compute=compute, work_dir=f"run_{tile_px}", output=f"{tile_px}.png", color="luminance")
        pipeline.run(config)
        found.append(canvas_of(config))
    assert np.abs(found[0] - found[1]).max() <= 1e-6
    assert np.ptp(found[0]) > 50


@pytest.mark.e2e
def test_worker_processes_give_the_same_bytes(masked):
    """Specs of guided passes have to reach other processes whole."""
    threads = {"device": "cpu", "tile_px": 64, "threads": 1}
    here = masked(compute=threads)
    pipeline.run(here)
    there = masked(compute={**threads, "workers": 1}, work_dir="there", output="there.png")
    pipeline.run(there)
    assert np.array_equal(canvas_of(here), canvas_of(there))


def test_a_changed_mask_is_refused(masked):
    """Half a picture under one mask and half under another; but a mask may move."""
    config = masked()
    stopped_after(config, 1)
    mask = config.styles[0].mask
    moved = mask.rename(mask.with_name("moved.png"))
    first, *others = config.styles
    config = config.model_copy(update={"styles": (first.model_copy(update={"mask": moved}), *others)})
    stopped_after(config, 1)
    write_mask(moved.parent, ramp(83, 131, 0.5, 0.6))
    moved.write_bytes((moved.parent / write_mask(moved.parent, ramp(83, 131, 0.5, 0.6))).read_bytes())
    with pytest.raises(ConfigError, match=r"styles\.0\.mask: the content of the file has changed"):
        pipeline.run(config)
    without = config.model_copy(update={"loss": config.loss.model_copy(update={"content_mask": None})})
    with pytest.raises(ConfigError, match=r"loss\.content_mask: the content of the file has changed"):
        pipeline.verify(config.work_dir, config=without)


def test_which_styles_share_a_mask_decides_the_picture(tmp_path):
    """Two files with the same pixels are two regions, one file is one; the hashes of the files are the same."""
    fields = []
    for names in (("m.png", "m.png"), ("m.png", "copy.png")):
        styles = [{"image": f"{index}.png", "mask": name} for index, name in enumerate(names)]
        fields.append(result_fields(load_config(write_config(tmp_path, styles=styles))))
    assert fields[0] != fields[1]
    assert json.dumps(fields[0])


def test_a_mask_of_other_proportions_is_refused(masked, tmp_path):
    """Squeezed into the picture, it would lie elsewhere than it was drawn."""
    wrong = write_mask(tmp_path, np.full((80, 131), 255, np.uint8))
    for keys in ({"styles": [{"image": "style0.png", "mask": wrong}]}, {"loss": {"content_mask": wrong}}):
        with pytest.raises(
            InputError, match=r"131×80 px, which is another aspect ratio than that of the content \(131×83 px\)"
        ):
            pipeline.plan(masked(**keys))
    small = write_mask(tmp_path, np.full((33, 52), 255, np.uint8))  # as rounded from 131×83
    pipeline.plan(masked(loss={"content_mask": small}))


def test_masks_are_planned(masked):
    """Disk and memory that the plan did not count end a run after hours."""
    plans = {}
    for name, values in {"masks": {}, "none": {"styles": [{"image": "style0.png"}], "loss": {}}}.items():
        plans[name] = pipeline.plan(masked(**values))
    with_masks, without = plans["masks"], plans["none"]
    chunks = 3 * 5  # of 131×83 px in chunks of 32
    # two masks and the content's map, and the Grams of three regions
    grams = 3 * (4**2 + 8**2) * 8
    assert with_masks.stages[1].store_bytes - without.stages[1].store_bytes == 3 * chunks * 32**2 + grams
    assert with_masks.stages[1].store_chunks - without.stages[1].store_chunks == 3 * chunks + 3 * 2
    assert with_masks.host_bytes["gradient pass"] > without.host_bytes["gradient pass"]
    assert with_masks.host_bytes["export"] == without.host_bytes["export"]
