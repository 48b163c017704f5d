"""The promise itself: whatever the tiles, the picture is the whole image's.

A real stage, prepared from files into a real store, in float64, against autograd of the whole-image formula in
reference.py. "Relative" is the largest error over the largest value.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import pipeline
from pipeline.config.config import load_config
from pipeline.core.vgg_layers import halo_px
from pipeline.network.vgg import Network
from pipeline.plan import fit
from pipeline.render import tile_tasks, update
from pipeline.render.tile_specs import GradientSpec, GramSpec
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.rundir.records import as_json, iterations_of
from tests.support import reference
from tests.support.inputs import write_config, write_image
from tests.support.stages import (
    EXACT,
    TILES,
    InOrder,
    Rendering,
    assert_exact,
    delayed,
    final_canvas,
    literal_stage,
    make_problem,
    prepared,
    read_whole,
    relative,
)

DEFAULT_STYLE = {f"conv{block}_1": 0.2 for block in range(1, 6)}


# --- partitions ---

# (size, tile_px, rows × columns of tiles). Strips are long enough that tiles at the default layers have real cuts
# (a gradient tile reads 160 px around), squares are not, but have corners.
PARTITIONS = [
    ((64, 96), 96, (1, 1)),
    ((96, 128), 64, (2, 2)),
    ((96, 160), 64, (2, 3)),
    ((65, 129), 64, (2, 3)),  # last row and last column of one pixel
    ((83, 131), 48, (2, 3)),
    ((33, 449), 96, (1, 5)),
    ((417, 47), 128, (4, 1)),
]


@pytest.mark.parametrize(("size", "tile_px", "shape"), PARTITIONS)
def test_any_partition_gives_the_whole_images_gradient(tmp_path, narrow_weights, size, tile_px, shape):
    """Tiles that change the gradient change the picture: seams, or a style that differs from tile to tile."""
    with prepared(tmp_path, narrow_weights, size, tile_px) as case:
        assert (len({t.y0 for t in case.tiles}), len({t.x0 for t in case.tiles})) == shape
        assert_exact(case)


SHALLOW = {"content_layers": {"conv4_1": 1.0}, "style_layers": {"conv2_1": 0.7, "conv4_1": 1.3}}


@pytest.mark.parametrize(
    ("size", "tile_px", "network", "halo"),
    [
        ((217, 225), 48, SHALLOW, 32),
        ((289, 291), 64, SHALLOW | {"pooling": "tent"}, 48),
        ((513, 517), 176, {}, 80),
    ],
)
def test_a_tile_with_cuts_on_all_sides_is_exact(tmp_path, narrow_weights, size, tile_px, network, halo):
    """Only such a tile shows that the corners of the halo are right; in a large picture nearly all are like that."""
    with prepared(tmp_path, narrow_weights, size, tile_px, network=network) as case:
        outers = [tile.outer(2 * halo) for tile in case.stage.tiles]
        assert any(o.y0 > 0 and o.x0 > 0 and o.y1 < size[0] and o.x1 < size[1] for o in outers)
        assert_exact(case)


# --- every setting of the objective ---

KINDS = ["normalized", "gatys", "wasserstein"]
PADDINGS, POOLINGS = ["replicate", "zeros", "reflect"], ["mixed", "max", "average", "tent", "l2"]
COMBINATIONS = [
    *itertools.product(PADDINGS, POOLINGS, ["wasserstein"]),
    *itertools.product(PADDINGS, POOLINGS[:2], ["normalized", "gatys"]),
]


@pytest.mark.parametrize(("padding", "pooling", "kind"), COMBINATIONS)
def test_every_padding_pooling_and_loss_is_exact(tmp_path, narrow_weights, padding, pooling, kind):
    """A padding that leaks into a cut, or a seed of the other loss, draws borders around every tile."""
    network = {
        "padding": padding,
        "pooling": pooling,
        "content_layers": {"conv3_2": 1.0},
        "style_layers": {"conv1_1": 0.5, "conv3_1": 0.5},
    }
    with prepared(tmp_path, narrow_weights, (113, 97), 48, network=network, loss={"kind": kind}) as case:
        assert_exact(case)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_the_deepest_layer_is_exact_with_other_paddings(tmp_path, narrow_weights, padding):
    """conv5_1 sees 70 px far, over the border and a cut at once."""
    with prepared(tmp_path, narrow_weights, (35, 433), 96, network={"padding": padding}) as case:
        assert_exact(case)


@pytest.mark.parametrize(("pooling", "padding"), [*(("tent", padding) for padding in PADDINGS), ("l2", "reflect")])
def test_the_deepest_layer_is_exact_with_filtered_poolings(tmp_path, narrow_weights, pooling, padding):
    """With tent pooling conv5_1 sees 85 px far, and every pooling reaches over the border of maps of odd sizes."""
    network = {"padding": padding, "pooling": pooling, "pooling_scale": 1.5}
    with prepared(tmp_path, narrow_weights, (47, 495), 96, network=network) as case:
        assert case.stage.layer_use.halo_px == {"tent": 96, "l2": 80}[pooling]
        assert_exact(case)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_weights_and_layers_that_are_both_content_and_style(tmp_path, narrow_weights, kind):
    """Artists mix layers; a layer in both lists gets both seeds, a weight belongs to its own layer."""
    layers = {
        "content_layers": {"conv2_2": 0.3, "conv3_4": 2.0, "conv1_1": 0.01},
        "style_layers": {"conv2_2": 1.7, "conv1_1": 0.4, "conv3_4": 0.05},
    }
    loss = {"kind": kind, "content_weight": 0.7, "style_weight": 3.0}
    with prepared(tmp_path, narrow_weights, (81, 145), 48, network=layers, loss=loss) as case:
        assert_exact(case)


@pytest.mark.parametrize("off", ["content_weight", "style_weight"])
def test_content_alone_and_style_alone_are_exact(tmp_path, narrow_weights, off):
    """A weight of 0 leaves its pass out; what is left must not change."""
    with prepared(tmp_path, narrow_weights, (49, 81), 32, loss={off: 0.0}) as case:
        result = case.iterate()
        assert relative(case.read("gradient"), case.problem.gradient(case.canvas)) < EXACT
        assert getattr(result, off.replace("weight", "loss")) == 0


def test_several_styles_are_mixed_by_their_weights(tmp_path, narrow_weights):
    """Two styles at 3 : 1 must look like 3 : 1, whatever their sizes."""
    sizes, shares = ((40, 70), (96, 33), (64, 64)), (3.0, 1.0, 0.0)
    with prepared(tmp_path, narrow_weights, (64, 80), 48, style_sizes=sizes, style_weights=shares) as case:
        assert_exact(case)


def test_image_of_the_least_size(tmp_path, narrow_weights):
    """The smallest image the plan lets through has one position at conv5_1: it must still be right."""
    with prepared(tmp_path, narrow_weights, (16, 31), 16, style_sizes=((31, 16),)) as case:
        assert_exact(case)


def test_a_network_with_an_input_convolution(tmp_path):
    """The packaged network has its own 1×1 input convolution instead of ImageNet's mean and deviation."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    extra = {
        "input.weight": torch.randn(3, 3, 1, 1, generator=generator),
        "input.bias": torch.randn(3, generator=generator),
    }
    save_file(reference.narrow_state((3, 5, 4, 6, 7), seed=9) | extra, tmp_path / "own.safetensors")
    with prepared(tmp_path, tmp_path / "own.safetensors", (65, 97), 64, network={"padding": "zeros"}) as case:
        assert_exact(case)


# --- the check can fail ---


@pytest.mark.parametrize(
    ("layer", "size", "tile_px", "pooling"),
    [
        ("conv5_1", (33, 449), 96, "max"),
        ("conv4_1", (112, 144), 32, "max"),
        ("conv5_1", (33, 513), 96, "tent"),
    ],
)
def test_a_gradient_halo_16_px_smaller_is_seen(tmp_path, narrow_weights, monkeypatch, layer, size, tile_px, pooling):
    """If this error went unseen, the tests above would prove nothing."""
    network = {"content_layers": {layer: 1.0}, "pooling": pooling}
    with prepared(tmp_path, narrow_weights, size, tile_px, network=network, loss={"style_weight": 0.0}) as case:
        wanted = case.problem.gradient(case.canvas)
        case.iterate()
        assert relative(case.read("gradient"), wanted) < EXACT
        monkeypatch.setattr(tile_tasks, "halo_px", lambda *names: halo_px(*names) - 16)
        case.iterate()
        assert relative(case.read("gradient"), wanted) > 1e-6


@pytest.mark.parametrize("layer", ["conv4_1", "conv5_1"])
def test_a_gram_halo_16_px_smaller_is_seen(tmp_path, narrow_weights, monkeypatch, layer):
    """As above, for the Gram pass: its tiles would miss positions at their cuts."""
    with prepared(tmp_path, narrow_weights, (48, 225), 96) as case:
        with torch.no_grad():
            found = case.problem.features(torch.from_numpy(case.canvas))[layer].flatten(1)
        wanted = (found @ found.T).numpy()
        specs = [
            GramSpec(case.stage.stage_dir, "canvas_0", tile, case.stage.network, {}, (layer,))
            for tile in case.stage.tiles
        ]
        assert relative(sum(tile_tasks.gram_task(spec)[layer] for spec in specs), wanted) < EXACT
        monkeypatch.setattr(tile_tasks, "halo_px", lambda *names: halo_px(*names) - 16)
        assert relative(sum(tile_tasks.gram_task(spec)[layer] for spec in specs), wanted) > 1e-6


def test_tasks_give_the_same_bits_when_run_twice(tmp_path, narrow_weights):
    """A task that is repeated after a kill must not change the picture."""
    with prepared(tmp_path, narrow_weights, (65, 113), 48) as case:
        gram = GramSpec(case.stage.stage_dir, "canvas_0", case.stage.tiles[1], case.stage.network, {}, ("conv3_1",))
        assert np.array_equal(tile_tasks.gram_task(gram)["conv3_1"], tile_tasks.gram_task(gram)["conv3_1"])
        first = case.iterate()
        before = {name: case.read(name) for name in ("gradient", "canvas_1", "m_1", "v_1")}
        second = case.iterate()
        assert first.objective == second.objective and first.mean_abs_u == second.mean_abs_u
        for name, values in before.items():
            assert np.array_equal(case.read(name), values), name


def test_a_gradient_that_is_not_finite_is_refused(tmp_path, narrow_weights):
    """A single NaN would spread over the picture in a few iterations, and a day of work with it."""
    with prepared(tmp_path, narrow_weights, (32, 48), 16) as case:
        spec = GradientSpec(
            case.stage.stage_dir, "canvas_0", case.stage.tiles[0], case.stage.network, {}, {"conv4_2": np.inf}, {}
        )
        before = case.read("gradient")
        with pytest.raises(pipeline.errors.ConfigError, match="not finite"):
            tile_tasks.gradient_task(spec)
        assert np.array_equal(case.read("gradient"), before)


# --- whole runs ---


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"init": "noise", "network": {"padding": "reflect", "pooling": "tent"}, "loss": {"kind": "gatys"}},
        {"optimizer": {"schedule": "constant", "stop_condition": 0, "clip": False}},
    ],
    ids=["defaults", "noise", "paper"],
)
def test_a_whole_run_gives_the_same_picture_with_one_tile_and_with_many(tmp_path, narrow_weights, values):
    """The picture must not depend on how much memory the machine had."""
    whole, records = final_canvas(tmp_path / "one", narrow_weights, 144, **values)
    parts, parts_records = final_canvas(tmp_path / "many", narrow_weights, 48, **values)
    assert np.abs(whole - parts).max() <= 1e-6
    assert np.ptp(whole) > 50  # a picture, not a grey area
    keys = ("objective", "content_loss", "style_loss", "mean_abs_u", "max_abs_u", "alpha")
    for one, many in zip(records, parts_records, strict=True):
        assert one["type"] == many["type"]
        if one["type"] == "iteration":
            assert [one[key] for key in keys] == pytest.approx([many[key] for key in keys], rel=1e-8)


@pytest.mark.parametrize(
    ("optimizer", "iterations"),
    [
        pytest.param({"schedule": "cosine", "max_iterations": 6, "average": 0.9}, 6, id="averaged"),
        pytest.param({"max_iterations": 6, "color_space": "decorrelated"}, 6, id="decorrelated"),
        pytest.param({"schedule": "cosine", "max_iterations": 6}, 6, id="cosine", marks=pytest.mark.e2e),
        pytest.param(
            {"schedule": "constant", "max_iterations": 6, "stop_condition": 0, "clip": False, "beta1": 0.8},
            6,
            id="constant",
            marks=pytest.mark.e2e,
        ),
        pytest.param(
            {"schedule": "constant", "max_iterations": 30, "stop_condition": 0.35},
            None,
            id="stopped early",
            marks=pytest.mark.e2e,
        ),
    ],
)
def test_a_run_of_two_stages_is_the_algorithm(tmp_path, narrow_weights, optimizer, iterations):
    """Everything at once: step size, bias correction, schedule, clipping, early stop, average, a fresh start per stage.

    The style is larger than the content, so the second stage has the result of the first and nothing is resized.
    """
    content = write_image(tmp_path / "content.png", 48, 61, seed=1).astype(np.float64)
    style = write_image(tmp_path / "style.png", 93, 100, seed=2).astype(np.float64)
    config = load_config(
        write_config(
            tmp_path,
            initial_size=64,
            network={"weights": str(narrow_weights)},
            compute={"dtype": "float64", "device": "cpu", "tile_px": 32},
            optimizer=optimizer,
            store={"chunk_px": 32},
        )
    )
    pipeline.run(config)
    records = Journal(config.work_dir / "journal.jsonl").read()
    position = position_of(records)
    first, second = (read_whole(newest_canvas(config.work_dir, position, stage)) for stage in (0, 1))
    problem = make_problem(config, content, [style], load_file(narrow_weights))
    wanted, measured = literal_stage(problem, first, config.optimizer)
    made = [as_json(record) for record in iterations_of(records, stage=1)]
    assert len(made) == len(measured) == (iterations or len(measured))
    assert iterations or 1 < len(measured) < config.optimizer.max_iterations
    for found, expected in zip(made, measured, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-8)
    assert np.abs(second - wanted).max() < 1e-6
    assert np.abs(second - first).max() > 1


def run_in_own_style(folder: Path, weights: Path, **values) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Run a picture in the style of its own file; gives the content, the final canvas and the journal."""
    content = write_image(folder / "content.png", 97, 130, seed=1)
    path = write_config(
        folder,
        styles=[{"image": "content.png"}],
        network={"weights": str(weights)},
        optimizer={"max_iterations": 2},
        store={"chunk_px": 64},
        **values,
    )
    config = load_config(path)
    pipeline.run(config)
    records = Journal(config.work_dir / "journal.jsonl").read()
    canvas = newest_canvas(config.work_dir, position_of(records), 0)
    return content, read_whole(canvas), [as_json(record) for record in records]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tile_px", [64, 192])
def test_a_picture_in_its_own_style_is_left_as_it_is(tmp_path, narrow_weights, dtype, tile_px, kind):
    """Nothing to optimise: the run ends with the content. The first step has a fixed size: it would turn the rounding
    between one tile and another into a picture of noise, and 0/0 into NaN."""
    compute = {"dtype": dtype, "device": "cpu", "tile_px": tile_px}
    content, canvas, records = run_in_own_style(tmp_path, narrow_weights, compute=compute, loss={"kind": kind})
    assert [record.get("reason") for record in records if record["type"] == "stage_done"] == ["converged"]
    assert np.array_equal(canvas, content)


@pytest.mark.parametrize("weight", [1e-12, 1e12])
def test_tiny_and_huge_loss_weights_are_no_reason_to_end(tmp_path, narrow_weights, weight):
    """What counts as nothing to optimise is the difference, not the number a user gave it."""
    _, records = final_canvas(
        tmp_path / "run", narrow_weights, 144, loss={"kind": "gatys", "content_weight": weight, "style_weight": weight}
    )
    assert [record["reason"] for record in records if record["type"] == "stage_done"] == ["max_iterations"] * 2


def test_a_run_lowers_the_objective(tmp_path, narrow_weights):
    """An exact gradient with the wrong sign would be exact too."""
    _, records = final_canvas(tmp_path / "one", narrow_weights, 144, optimizer={"max_iterations": 10})
    for stage in (0, 1):
        losses = [
            record["objective"] for record in records if record["type"] == "iteration" and record["stage"] == stage
        ]
        assert len(losses) == 10
        assert losses[-1] < 0.9 * losses[0]


# --- what no one thought of ---


@st.composite
def cases(draw):
    """Sizes, tiles and layers at random; at most about a dozen tiles."""
    style = draw(st.sets(st.sampled_from(reference.CONVS), max_size=3))
    content = draw(st.sets(st.sampled_from(reference.CONVS), max_size=2, min_size=0 if style else 1))
    padding = draw(st.sampled_from(["replicate", "zeros", "reflect"]))
    least = max(reference.STRIDES[name] for name in style | content) * (2 if padding == "reflect" else 1)
    side = st.integers(max(16, least), 150)
    size, style_size = draw(st.tuples(side, side)), draw(st.tuples(side, side))
    held = min(fit(style_size, min(max(style_size), max(size))))  # a style is held to the canvas
    assume(held >= least)  # a smaller one is refused
    sides = min(*size, *style_size)
    fitting = [n for n in (1, 2, 3) if n == 1 or (sides >> n - 1 >= max(16, least) and held >> n - 1 >= least)]
    scales = draw(st.sampled_from(fitting))
    tiles = [px for px in (16, 32, 48, 64, 96, 160) if size[0] * size[1] <= 14 * px * px and not px % (8 << scales)]
    tile_px = draw(st.sampled_from(tiles))
    return {
        "size": size,
        "scales": scales,
        "tile_px": tile_px,
        "chunk_px": draw(st.sampled_from([px for px in (tile_px, tile_px // 2) if px % 16 == 0])),
        "style_sizes": (style_size,),
        "network": {
            "padding": padding,
            "pooling": draw(st.sampled_from(POOLINGS)),
            "style_layers": {name: draw(st.sampled_from([0.1, 1.0])) for name in sorted(style)},
            "content_layers": {name: draw(st.sampled_from([0.1, 1.0])) for name in sorted(content)},
        },
        "loss": {
            "kind": draw(st.sampled_from(KINDS)),
            "content_weight": 1.0 if content else 0.0,
            "style_weight": 0.5 if style else 0.0,
        },
        "optimizer": {"color_space": draw(st.sampled_from(["rgb", "decorrelated"]))},
    }


@given(cases())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_sizes_tiles_and_layers_are_exact(narrow_weights, case):
    """What no one thought of: sizes, tiles and layers together."""
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder), narrow_weights, **case) as made:
        target = float(made.problem.objective(torch.from_numpy(made.canvas)))
        if not math.isfinite(target):  # a layer whose features are all zero: nothing to divide by
            with pytest.raises(pipeline.errors.ConfigError, match="energy"):
                made.iterate()
        elif target > 0:
            result = made.iterate()
            assert result.objective == pytest.approx(target, rel=EXACT)
            assert relative(made.read("gradient"), made.problem.gradient(made.canvas)) < EXACT


# --- what runs side by side ---


@pytest.fixture
def one_after_another(tmp_path, narrow_weights):
    """A rendering whose nodes run one after another, and the size of its canvas and tiles."""
    size, tile_px = (80, 112), 32
    (folder := tmp_path / "one").mkdir()
    with prepared(folder, narrow_weights, size, tile_px) as case:
        case.stage.executor = InOrder()
        return Rendering(case).finish(), size, tile_px


def test_passes_beside_each_other_read_only_what_is_written(tmp_path, narrow_weights, monkeypatch, one_after_another):
    """A chunk that is read a moment too early mixes two iterations into one picture, and no error would tell."""
    expected, size, tile_px = one_after_another
    delays = iter(np.random.default_rng(0).uniform(0, 0.02, 100_000))
    monkeypatch.setattr(update, "CHUNKS_PER_TASK", 1)
    monkeypatch.setattr(update, "update_task", delayed(update.update_task, delays))
    monkeypatch.setattr(tile_tasks, "gradient_task", delayed(tile_tasks.gradient_task, delays))
    with prepared(tmp_path, narrow_weights, size, tile_px, chunk_px=16) as case:
        assert Rendering(case).finish()[0] == expected[0]


def test_the_update_begins_before_the_last_gradient(tmp_path, narrow_weights, monkeypatch):
    """On a slow disk its bytes, three quarters of all, would have nothing but the Gram pass beside them."""
    begun: list[str] = []
    for module, name in ((tile_tasks, "gradient_task"), (update, "update_task")):
        task = getattr(module, name)
        monkeypatch.setattr(module, name, lambda spec, name=name, task=task: begun.append(name) or task(spec))
    with prepared(tmp_path, narrow_weights, (64, 192), 32) as case:
        rendering = Rendering(case)
        rendering.iterate()
        assert begun == sorted(begun)  # the first step size takes all gradients
        begun.clear()
        rendering.iterate()
        assert begun.index("update_task") < len(case.tiles) // 2


def test_a_stage_that_ends_early_leaves_the_next_gram_pass(tmp_path, narrow_weights, monkeypatch):
    """A pass over a thousand tiles for an iteration that does not follow would take half an hour."""
    ended, begun = threading.Event(), list[int]()

    def gram_task(spec, original=tile_tasks.gram_task):
        begun.append(spec.tile.index)
        assert ended.wait(60)
        time.sleep(0.2)  # meanwhile the executor learns that no iteration follows
        return original(spec)

    with prepared(tmp_path, narrow_weights, (64, 192), 32) as case:
        rendering = Rendering(case)
        rendering.iterate()
        monkeypatch.setattr(tile_tasks, "gram_task", gram_task)
        rendering.follows, rendering.committed = False, ended
        rendering.iterate()
        assert len(rendering.results) == 2
        assert len(begun) <= TILES


@pytest.mark.parametrize(
    ("module", "name"), [(tile_tasks, "gradient_task"), (update, "update_task"), (tile_tasks, "gram_task")]
)
def test_a_pass_that_fails_ends_the_others_and_is_done_again(
    tmp_path, narrow_weights, monkeypatch, one_after_another, module, name
):
    """The run would wait for ever, tell another error than the one that came first, or mix in what was half done."""
    (wanted, checksums), size, tile_px = one_after_another
    task, calls = getattr(module, name), itertools.count()
    with prepared(tmp_path, narrow_weights, size, tile_px) as case:
        rendering = Rendering(case)
        rendering.iterate()
        done = len(rendering.results)
        failing_at = 4 if name == "gram_task" else 5

        def failing(spec):
            if next(calls) == failing_at:
                raise OSError("no room")
            return task(spec)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match="no room"):
                rendering.iterate()
            begun = next(calls)
        assert begun < len(case.tiles)  # the rest was not begun
        # the Gram pass runs ahead of its iteration: the iteration before may have been committed already
        assert len(rendering.results) in ((done, done + 1) if name == "gram_task" else (done,))
        assert rendering.finish() == (wanted, checksums)


def fail_in_the_update(case, monkeypatch, failed: threading.Event, gradient_task) -> Rendering:
    """An iteration whose updates set `failed` and raise an error, after one that works; the error comes out."""
    rendering = Rendering(case)
    rendering.iterate()

    def update_task(_spec):
        failed.set()
        raise OSError("no room")

    monkeypatch.setattr(tile_tasks, "gradient_task", gradient_task)
    monkeypatch.setattr(update, "update_task", update_task)
    with pytest.raises(OSError, match="no room"):
        rendering.iterate()
    return rendering


def test_an_update_that_fails_ends_the_iteration_at_once(tmp_path, narrow_weights, monkeypatch):
    """A full disk would be reported when every other gradient is computed: after minutes."""
    failed, begun = threading.Event(), list[int]()

    def gradient_task(spec, original=tile_tasks.gradient_task):
        begun.append(spec.tile.index)
        if spec.tile.index:  # the first is enough for an update to fail
            assert failed.wait(60)
            time.sleep(0.2)  # meanwhile the executor learns of it
        return original(spec)

    with prepared(tmp_path, narrow_weights, (64, 192), 32) as case:
        rendering = fail_in_the_update(case, monkeypatch, failed, gradient_task)
    assert len(begun) <= 1 + TILES  # none is begun after the failure
    assert len(rendering.results) == 1


def test_the_first_of_two_errors_is_raised(tmp_path, narrow_weights, monkeypatch):
    """A damaged chunk would be hidden by the device that has no memory, or the other way: the remedy would be wrong."""
    failed = threading.Event()

    def gradient_task(spec, original=tile_tasks.gradient_task):
        if spec.tile.index:
            assert failed.wait(60)
            time.sleep(0.2)
            raise ValueError("came later")
        return original(spec)

    with prepared(tmp_path, narrow_weights, (64, 192), 32) as case:
        fail_in_the_update(case, monkeypatch, failed, gradient_task)


def test_a_gram_pass_that_fails_ahead_begins_no_more_tiles(tmp_path, narrow_weights, monkeypatch):
    """Its other tiles would be computed for nothing."""
    begun = list[int]()

    def gram_task(spec):
        begun.append(spec.tile.index)
        raise OSError("no room")

    with prepared(tmp_path, narrow_weights, (192, 64), 32) as case:
        rendering = Rendering(case)
        rendering.iterate()
        monkeypatch.setattr(tile_tasks, "gram_task", gram_task)
        with pytest.raises(OSError, match="no room"):
            rendering.iterate()
        assert len(begun) <= TILES


def test_a_single_tile_has_one_forward(tmp_path, narrow_weights, monkeypatch):
    """Small stages would take a third longer for features that the gradient pass computes anyway."""
    calls = []
    features = Network.features
    monkeypatch.setattr(Network, "features", lambda *args: calls.append(1) or features(*args))
    with prepared(tmp_path, narrow_weights, (48, 64), 64) as case:
        calls.clear()
        case.iterate()
        assert len(calls) == 1
