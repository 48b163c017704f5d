"""The plan: its sizes, work, disk and memory, computed from numbers alone, and the configs that it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil, log2
from pathlib import Path

import pytest
import pyvips
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.tiling import grid
from pipeline.core.vgg_layers import VGG19_WIDTHS, halo_px
from pipeline.executors.threads import ThreadExecutor
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.memory import BASE_BYTES
from pipeline.plan.network_cost import LayerUse, layers_in_use
from pipeline.plan.plan import Plan, computed_px
from pipeline.plan.sizes import fit
from pipeline.render.preparation import prepare
from pipeline.render.stage import Stage
from pipeline.store.layout import content_features_name
from tests.support.inputs import write_image
from tests.support.plans import planned, sizes_of

MIB, GIB = 2**20, 2**30


# --- stages ---


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {144: 198, 245: 68, 416: 40, 707: 40, 1024: 40}),
        ({"optimizer": {"max_iterations": 10}}, {144: 49, 245: 17, 416: 10, 707: 10, 1024: 10}),
        ({"optimizer": {"coarse_iterations": 1}}, {144: 40, 245: 40, 416: 40, 707: 40, 1024: 40}),
        ({"optimizer": {"coarse_iterations": 2}}, {144: 80, 245: 68, 416: 40, 707: 40, 1024: 40}),
        (
            {"stages": [{"up_to": 200, "optimizer": {"max_iterations": 7}}]},
            {144: 7, 245: 68, 416: 40, 707: 40, 1024: 40},
        ),
        ({"size": 144}, {144: 40}),
    ],
)
def test_small_stages_have_more_iterations(tmp_path, values, expected):
    """In as many as the others, a flat content gets neither the style's colours nor its forms; a number that somebody
    gives to a stage, and that of the last, is what it says."""
    write_image(tmp_path / "content.png", 60, 90)
    write_image(tmp_path / "style.png", 64, 64)
    base = {"content": "content.png", "styles": [{"image": "style.png"}], "output": "o.png", "size": 1024}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**base, "network": {"name": "vgg19-lite"}, **values}))
    stages = pipeline.plan(pipeline.load_config(path)).stages
    assert {max(stage.size): stage.max_iterations for stage in stages} == expected


def test_stages_are_those_of_the_algorithm():
    """512, 1,024, 2,048 and then the exact size: without a stage its strokes are missing (Fig. 5)."""
    stages = sizes_of((3000, 1501), [(800, 600)], 512, None)
    assert [canvas for canvas, _ in stages] == [(512, 256), (1024, 512), (2048, 1025), (3000, 1501)]
    assert [styles for _, styles in stages] == [((512, 384),), ((800, 600),), ((800, 600),), ((800, 600),)]


def test_a_style_larger_than_the_content_adds_stages():
    """The detail of a large painting needs its full size; the canvas keeps the content's (second term of K)."""
    stages = sizes_of((100, 80), [(1000, 700)], 256, None)
    assert [canvas for canvas, _ in stages] == [(100, 80)] * 3
    assert [styles[0] for _, styles in stages] == [(256, 179), (512, 358), (1000, 700)]


def test_size_replaces_the_contents_long_side():
    """Enlarging is what the program is for; making smaller must work too."""
    assert [canvas for canvas, _ in sizes_of((300, 400), [(10, 10)], 512, 2048)] == [
        (384, 512),
        (768, 1024),
        (1536, 2048),
    ]
    assert [canvas for canvas, _ in sizes_of((300, 400), [(10, 10)], 512, 100)] == [(75, 100)]


sides = st.integers(1, 40_000)
sizes = st.tuples(sides, sides)


@given(sizes, st.lists(sizes, min_size=1, max_size=3), st.integers(16, 4096), st.none() | st.integers(16, 40_000))
def test_stages_grow_to_exactly_the_target(content, styles, initial_px, target_px):
    """An image one pixel off does not fit its frame, and a stage that shrinks discards work."""
    stages = sizes_of(content, styles, initial_px, target_px)
    canvases = [canvas for canvas, _ in stages]
    target = target_px or max(content)
    longest = max(target, *(max(style) for style in styles))
    assert len(stages) == max(ceil(log2(longest / initial_px)), 0) + 1
    assert max(canvases[-1]) == target
    if target_px is None:
        assert canvases[-1] == content
    for number, (canvas, style_sizes) in enumerate(stages):
        assert max(canvas) == min(initial_px * 2**number, target)
        assert min(canvas) >= 1
        for size, original in zip(style_sizes, styles, strict=True):
            assert max(size) == min(initial_px * 2**number, max(original))
    for before, after in pairwise(canvases):
        assert before[0] <= after[0] and before[1] <= after[1]
    assert stages[-1][1] == tuple(styles)


@given(
    sizes,
    st.lists(sizes, max_size=2),
    st.integers(16, 4096),
    st.none() | st.integers(16, 40_000),
    st.floats(1.2, 4).filter(lambda ratio: ratio != 2),
)
def test_stages_of_any_ratio_grow_to_exactly_the_target(content, styles, initial_px, target_px, ratio):
    """A ratio that keeps the canvas out of phase with the poolings must not cost the exact size, nor a stage twice."""
    loss = {} if styles else {"style_weight": 0.0}
    stages = sizes_of(content, styles, initial_px, target_px, stage_ratio=ratio, loss=loss)
    canvases = [max(canvas) for canvas, _ in stages]
    target = target_px or max(content)
    assert (canvases[0], canvases[-1]) == (min(initial_px, target), target)
    growing = [side for number, side in enumerate(canvases) if number == 0 or side != canvases[number - 1]]
    assert growing == sorted(growing) and canvases == sorted(canvases)
    for number, (before, after) in enumerate(pairwise(growing)):
        assert after <= (before + 0.5) * ratio * (1.1 if after == target else 1) + 1
        assert after >= 1.1 * before or number == 0
    assert len(stages) <= 64 and stages[-1][1] == tuple(styles)


def test_a_stage_just_below_the_end_is_left_out():
    """It would be rendered twice: 984 px and then 1,000."""
    assert [max(canvas) for canvas, _ in sizes_of((1000, 800), [(10, 10)], 200, None, stage_ratio=1.7)] == [
        200, 340, 578, 1000,
    ]  # fmt: skip
    assert [max(canvas) for canvas, _ in sizes_of((1000, 800), [(10, 10)], 490, None)] == [
        490,
        980,
        1000,
    ]  # the paper's


@pytest.mark.parametrize(
    ("content", "styles", "values", "expected_px"),
    [
        ((3000, 2000), [{}], {}, 144),  # conv5_1 sees 156 px
        ((3000, 2000), [{}], {"loss": {"style_weight": 0.0}}, 96),  # conv4_2 sees 84: the short side needs 64
        ((3000, 2000), [{}], {"stages": [{"up_to": 200, "loss": {"style_weight": 0.0}}]}, 96),
        ((100, 4096), [{}], {}, 2622),  # a panorama of 64 px
        ((100, 80), [{}], {}, 100),
        ((3000, 2000), [{"scale": 0.1}], {}, 230),  # a style of 23×16 px
    ],
)
def test_an_automatic_first_stage_is_what_the_network_sees_at_once(content, styles, values, expected_px):
    """A larger one keeps the photograph's shapes, because no position sees far enough to move them."""
    stages = sizes_of(content, [(1000, 720)], "auto", None, styles, **values)
    assert max(stages[0][0]) == expected_px
    assert sizes_of(content, [(1000, 720)], expected_px, None, styles, **values) == stages


@given(st.tuples(st.integers(16, 9000), st.integers(16, 9000)), st.tuples(sides, sides), st.floats(0.01, 100))
def test_an_automatic_first_stage_is_one_that_the_network_can_use(content, style, scale):
    """`auto` must not choose a size that the plan then refuses, if there is another."""
    values = {"initial_size": "auto", "styles": [{"image": "/s0.png", "scale": scale}], "memory": {"limit": "1TiB"}}
    try:
        planned(content, [style], **{**values, "initial_size": max(content)})
    except InputError:
        return
    assert planned(content, [style], **values).stages[0].size <= content


@given(sizes, st.integers(1, 40_000))
def test_fit_keeps_the_aspect_ratio(size, long_px):
    """A distorted face is the most visible error."""
    height, width = fit(size, long_px)
    scale = long_px / max(size)
    assert max(height, width) == long_px
    assert abs(height - max(1, size[0] * scale)) <= 0.5 and abs(width - max(1, size[1] * scale)) <= 0.5


# --- pixels, work ---


def test_computed_pixels_are_those_of_the_tiles_outer_rectangles():
    """ETA and FLOP depend on this number: counted here tile by tile."""
    tiles = grid(200, 300, 64)
    by_hand = 0
    for y in range(0, 200, 64):
        for x in range(0, 300, 64):
            rows = min(200, min(y + 64, 200) + 32) - max(0, y - 32)
            columns = min(300, min(x + 64, 300) + 32) - max(0, x - 32)
            by_hand += rows * columns
    assert computed_px((200, 300), 64, 32) == by_hand == sum(tile.outer(32).area for tile in tiles)
    assert computed_px((200, 300), 304, 160) == 200 * 300


def test_at_1024_px_tiles_at_most_1_75_pixels_are_computed_for_one_kept():
    """The bound holds at 16K and at the paper's 8K: more halo would be time without effect."""
    for size in ((16_384, 16_384), (4320, 7680), (30_000, 20_000)):
        stage = planned(size, memory={"limit": "64GiB"}, compute={"tile_px": 1024, "device": "cpu"}).stages[-1]
        assert stage.size == size
        assert 1.0 < stage.halo_overhead <= 1.75
        assert stage.gradient_px == computed_px(size, 1024, 160)
        assert stage.gram_px == computed_px(size, 1024, 80)
        assert stage.tiles == ceil(size[0] / 1024) * ceil(size[1] / 1024)


@pytest.mark.parametrize(
    ("size", "style", "padding", "wanted"),
    [
        ((1024, 1024), (700, 900), "replicate", [1, 2, 3]),
        ((1000, 1000), (700, 900), "replicate", [1, 2, 2]),  # a quarter, 250 px, is less than the first stage's 256
        ((1024, 63), (700, 900), "replicate", [1, 2, 2]),  # 15 px have no position at conv5_1
        ((1024, 1024), (60, 60), "reflect", [1, 1, 1]),  # 30 px of the style have one, and reflect needs two
    ],
)
def test_a_stage_has_the_scales_that_it_is_large_enough_for(size, style, padding, wanted):
    """`loss.scales: 3` for all stages must neither fail in the small ones nor change what the first one does."""
    keys = {"memory": {"limit": "64GiB"}, "network": {"padding": padding}, "loss": {"scales": 3}}
    plan = planned(size, (style,), initial_size=256, **keys)
    assert [stage.scales for stage in plan.stages] == wanted


def test_scales_add_their_pixels_and_targets_to_the_work():
    """Time left and free disk space are computed from them. A tile of 512 px is one of 256 px at half the size."""
    keys = {"memory": {"limit": "64GiB"}, "initial_size": 512, "compute": {"tile_px": 512, "device": "cpu"}}
    one, two = (planned((1024, 1024), **keys, loss={"scales": scales}).stages[-1] for scales in (1, 2))
    assert two.gradient_px == one.gradient_px + computed_px((512, 512), 256, 160)
    assert two.gram_px == one.gram_px + computed_px((512, 512), 256, 80)
    # content features in float32 at conv4_2, of which a chunk of 512 px has 64 × 64 positions, and a quarter
    assert two.store_bytes == one.store_bytes + 4 * 32 * 32 * 512 * 4


def test_tiles_are_aligned_at_every_scale():
    """Pooling windows of a coarse scale that lie in two tiles would be seams."""
    keys = {"memory": {"limit": "64GiB"}, "initial_size": 256, "loss": {"scales": 3}, "store": {"chunk_px": 48}}
    with pytest.raises(ConfigError, match=r"tile_px: 240 is not a multiple of 192, .* loss.scales .* Use 384"):
        planned((1024, 1024), compute={"tile_px": 240, "device": "cpu"}, **keys)
    assert planned((1024, 1024), compute={"tile_px": 384, "device": "cpu"}, **keys).tile_px == 384
    small = keys | {"memory": {"limit": "1500MiB"}}
    chosen = planned((1024, 1024), compute={"tile_px": "auto", "device": "cpu"}, **small).tile_px
    assert 0 < chosen < 1024 and chosen % 192 == 0


# Convolutions of VGG-19 to conv5_1: (C_in, C_out, stride), copied from the paper of Simonyan and Zisserman, table 1, E
VGG19_E = [
    (3, 64, 1),
    (64, 64, 1),
    (64, 128, 2),
    (128, 128, 2),
    (128, 256, 4),
    (256, 256, 4),
    (256, 256, 4),
    (256, 256, 4),
    (256, 512, 8),
    (512, 512, 8),
    (512, 512, 8),
    (512, 512, 8),
    (512, 512, 16),
]


def test_flop_of_vgg19_per_pixel():
    """Users see from it if a run takes hours or weeks. Sum of 2·9·C_in·C_out per position: 722,304 per pixel."""
    layer_use = LayerUse(VGG19_WIDTHS, tuple(f"conv{block}_1" for block in range(1, 6)), ("conv4_2",), 4)
    assert sum(18 * c_in * c_out // stride**2 for c_in, c_out, stride in VGG19_E) == 722_304
    assert layer_use.flop_per_px() == 722_304
    assert replace(layer_use, style_layers=("conv1_1",), content_layers=()).flop_per_px() == 18 * 3 * 64


def test_flop_of_a_run_are_passes_times_pixels_times_iterations():
    """One forward pass in the Gram pass; forward and backward in the gradient pass, without gradients of weights.

    A canvas of one tile needs no Gram pass: its cost was told half as large again, and so was the time that is left.
    """
    keys = {"memory": {"limit": "64GiB"}, "optimizer": {"max_iterations": 7}}
    plan = planned((600, 400), **keys)
    assert [stage.tiles for stage in plan.stages] == [1] * len(plan.stages)
    for stage in plan.stages:
        assert stage.flop_per_iteration == 722_304 * 2 * stage.gradient_px
    tiled = planned((600, 400), **keys, compute={"tile_px": 512, "device": "cpu"}, initial_size=600, style_stages=False)
    (stage,) = tiled.stages
    assert stage.flop_per_iteration == 722_304 * (stage.gram_px + 2 * stage.gradient_px)
    assert tiled.flop == stage.prepare_flop + 7 * stage.flop_per_iteration
    assert stage.prepare_flop > 722_304 * stage.pixels  # the content's features, and the style


def test_a_loss_of_weight_0_takes_no_work():
    """Its layers are not run: less work and a smaller halo."""
    both = planned(memory={"limit": "64GiB"}, compute={"tile_px": 512, "device": "cpu"})
    content_only = planned(
        memory={"limit": "64GiB"}, compute={"tile_px": 512, "device": "cpu"}, loss={"style_weight": 0}
    )
    assert (both.halo_px, content_only.halo_px) == (80, 48)
    assert content_only.stages[-1].gram_px == 0
    assert content_only.flop < both.flop


def test_tent_pooling_is_planned_with_its_larger_halo():
    """Its tiles read and compute more: time, memory and the chunks that a Gram task waits for follow from this."""
    keys = {"memory": {"limit": "64GiB"}, "compute": {"tile_px": 512, "device": "cpu"}}
    plans = [planned((3000, 2000), **keys, network={"pooling": pooling}) for pooling in ("max", "tent")]
    for plan, halo in zip(plans, (80, 96), strict=True):
        stage = plan.stages[-1]
        assert plan.halo_px == halo
        assert (stage.gram_px, stage.gradient_px) == tuple(computed_px(stage.size, 512, n * halo) for n in (1, 2))


# --- disk ---


@pytest.mark.parametrize(
    ("codec_values", "network"),
    [
        ({"store": {"chunk_px": 32}}, {}),
        ({"store": {"chunk_px": 64}, "compute": {"dtype": "float64", "device": "cpu"}}, {}),
        ({"store": {"chunk_px": 32, "state_dtype": "compact"}}, {}),
        ({"store": {"chunk_px": 48}}, {"content_layers": {"conv1_1": 1.0, "conv5_1": 1.0, "conv3_3": 0.5}}),
        ({"store": {"chunk_px": 32, "state_dtype": "compact"}, "optimizer": {"average": 0.9}}, {}),
    ],
)
@pytest.mark.parametrize("alpha", [False, True])
def test_planned_disk_is_what_a_stage_allocates(make_config, narrow_weights, codec_values, network, alpha):
    """The check of free disk space before a run rests on this number: else a disk fills up after days."""
    network = {"weights": str(narrow_weights), **network}
    config = make_config((83, 131), (70, 50), initial_size=131, network=network, **codec_values)
    if alpha:
        style = pyvips.Image.new_from_file(str(config.styles[0].image), memory=True)
        style.bandjoin(200).write_to_file(str(config.styles[0].image))
    (stage_plan,) = (plan := pipeline.plan(config)).stages
    source = find_weights("vgg19", narrow_weights, 0)
    spec = NetworkSpec(source, "replicate", "max", config.compute.dtype, "cpu")
    stage_dir = config.work_dir / "stage_0"
    peak = 0

    def watch(_event) -> None:
        nonlocal peak
        folder = stage_dir.with_name("stage_0.partial")
        peak = max(peak, chunk_bytes(folder) if folder.exists() else 0)

    with ThreadExecutor(2) as executor:
        layer_use = layers_in_use(config, source.widths)
        stage = Stage(config, stage_plan, layer_use, spec, stage_dir, executor, watch, plan.tile_px)
        prepare(stage, None)
    style_bytes = (
        ceil(70 / config.store.chunk_px)
        * ceil(50 / config.store.chunk_px)
        * config.store.chunk_px**2
        * (4 if alpha else 3)
    )
    assert peak == chunk_bytes(stage_dir) + style_bytes  # the style is deleted once its Grams are known
    assert stage_plan.store_bytes == peak
    names = {path.name for path in stage_dir.iterdir() if path.is_dir() and not path.name.startswith("gram_")}
    averages = {"average_0", "average_1"} if config.optimizer.average else set()
    assert names == {"content", "gradient", "canvas_0", "canvas_1", "m_0", "m_1", "v_0", "v_1"} | averages | {
        content_features_name(layer) for layer in config.network.content_layers
    }


def chunk_bytes(stage_dir: Path) -> int:
    """Bytes of the chunks of pixel arrays, without Gram matrices and metadata, which are small."""
    arrays = [path for path in stage_dir.iterdir() if path.is_dir() and not path.name.startswith("gram_")]
    return sum(path.stat().st_size for array in arrays for path in (array / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("carry", [False, True])
def test_planned_disk_of_a_run_holds_at_every_moment(make_config, narrow_weights, carry):
    """All stages together: a finished stage keeps its canvas, maybe m and v, and the current one has all its arrays."""
    optimizer = {"max_iterations": 1, "carry": carry}
    config = make_config((83, 131), (70, 50), initial_size=40, store={"chunk_px": 32}, optimizer=optimizer)
    plan = pipeline.plan(config)
    assert len(plan.stages) == 3
    largest = 0

    def watch(_event) -> None:
        nonlocal largest
        stages = (config.work_dir / "store.zarr").glob("stage_*")
        largest = max(largest, sum(chunk_bytes(stage) for stage in stages if stage.exists()))

    pipeline.run(config, sink=watch)
    assert plan.disk_bytes * 0.9 <= largest <= plan.disk_bytes
    for stage in plan.stages:
        assert chunk_bytes(config.work_dir / "store.zarr" / f"stage_{stage.index}") == stage.kept_bytes


# --- memory ---


def refusal(**values) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(**values)
    return str(caught.value)


def test_a_limit_that_is_too_small_is_refused_by_its_name():
    """Refused in a second instead of killed out of memory after a day; the message names the setting to change."""
    text = refusal(memory={"limit": "300MiB"})
    assert "memory.limit" in text and "300.00 MiB is the limit" in text and "even with the smallest tile" in text
    assert "store.chunk_px" in text


def test_a_result_beyond_the_limit_is_refused_by_its_name():
    """One zero too many in `size` would plan for minutes and fill the disk for days."""
    assert "limits.max_result_pixels (10,000,000,000)" in refusal(content_size=(1000, 1000), size=100_001)
    planned(content_size=(1000, 1000), size=100_000)
    text = refusal(content_size=(1000, 1000), size=5000, limits={"max_result_pixels": 24_999_999})
    assert "5000×5000 px" in text and "limits.max_result_pixels" in text


def test_more_chunks_than_files_can_be_is_refused_by_its_name():
    """A billion files of 3 KB: listing them would take hours, and no disk has that many inodes."""
    assert "store.chunk_px" in refusal(content_size=(40_000, 40_000), store={"chunk_px": 16})
    large = {"limits": {"max_result_pixels": 10**12}, "size": 600_000}
    assert "store.chunk_px" in refusal(content_size=(1000, 1000), **large)
    assert "store.chunk_px" in refusal(style_sizes=((60_000, 60_000),), store={"chunk_px": 16})


def test_a_tile_that_does_not_fit_is_refused_by_its_name():
    """A tile size that the user chose must not be changed silently."""
    text = refusal(content_size=(8192, 8192), memory={"limit": "4GiB"}, compute={"tile_px": 4096, "device": "cpu"})
    assert "compute.tile_px: 4096 needs" in text and "compute.tile_px: auto" in text and "memory.limit" in text


def test_a_device_that_is_too_small_is_refused_as_such():
    """On a GPU the remedy is not memory.limit."""
    text = refusal(device="cuda:0", device_bytes=200 * MIB, memory={"limit": "64GiB"})
    assert "cuda:0" in text and "memory.limit" not in text


limits = st.floats(0.9, 64).map(lambda gib: int(gib * GIB))


@given(st.tuples(st.integers(2000, 60_000), st.integers(2000, 60_000)), limits, st.sampled_from([64, 256, 512]))
@settings(max_examples=30)
def test_the_automatic_tile_fits_the_limit_and_is_the_largest_that_does(content, limit, chunk_px):
    """Larger tiles waste less halo; tiles that are too large run out of memory."""
    values = {"memory": {"limit": limit}, "store": {"chunk_px": chunk_px}, "size": max(content)}
    try:
        plan = planned(content, **values)
    except ConfigError as error:
        assert "memory.limit" in str(error)
        return
    assert plan.projected_mem_bytes <= limit == plan.memory_limit_bytes
    assert plan.tile_px % chunk_px == 0
    if plan.tile_px < max(content):
        larger = {**values, "compute": {"tile_px": plan.tile_px + chunk_px, "device": "cpu"}}
        assert "memory.limit" in refusal(content_size=content, **larger)


def test_the_automatic_tile_fits_a_gpu():
    """On a GPU its memory sets the tile size, not the host's."""
    for gib in (6, 12, 80):
        plan = planned((20_000, 20_000), device="cuda:0", device_bytes=gib * GIB, memory={"limit": "32GiB"})
        assert plan.device_bytes <= gib * GIB
        assert plan.tile_px >= 512
    small, large = (
        planned((20_000, 20_000), device="cuda:0", device_bytes=gib * GIB, memory={"limit": "32GiB"}).tile_px
        for gib in (6, 80)
    )
    assert small < large


def test_memory_does_not_grow_with_the_image():
    """A machine that renders 10,000 px renders 60,000 px: only rows of the widest stage grow."""
    small, large = (
        planned((side, side), memory={"limit": "4GiB"}, compute={"tile_px": 512, "device": "cpu"})
        for side in (10_000, 60_000)
    )
    assert large.host_bytes["gradient pass"] == small.host_bytes["gradient pass"]
    assert large.host_bytes["update pass"] == small.host_bytes["update pass"]
    assert large.projected_mem_bytes <= 4 * GIB
    assert large.disk_bytes > 30 * small.disk_bytes


def test_stages_that_fit_beside_their_tiles_stay_in_memory():
    """A stage that does not fit would be killed; tiles that depend on it would change the last bits of the image."""
    cpu = {"device": "cpu", "tile_px": 512}
    on_disk, some = (
        planned((6000, 6000), memory={"limit": "4GiB"}, compute=cpu, store={"commit_interval": interval})
        for interval in (0, "30s")
    )
    held = [stage.resident_bytes for stage in some.stages]
    assert [bool(size) for size in held] == sorted((bool(size) for size in held), reverse=True)  # small ones first
    assert 0 < sum(map(bool, held)) < len(held) and not any(stage.resident_bytes for stage in on_disk.stages)
    for stage, size in zip(some.stages, held, strict=True):
        assert size == 0 or size > 84 * stage.pixels + 32 * stage.pixels
    grown = {phase: some.host_bytes[phase] - size for phase, size in on_disk.host_bytes.items()}
    assert {phase for phase, size in grown.items() if size} == {"Gram pass", "gradient pass", "update pass"}
    assert set(grown.values()) == {0, max(held)}
    assert some.projected_mem_bytes <= some.memory_limit_bytes

    gpu = {"device": "cuda:0", "device_bytes": 80 * GIB, "memory": {"limit": "8GiB"}, "compute": {"tile_px": 4096}}
    card = planned((12_000, 9000), **gpu)
    assert max(stage.resident_bytes for stage in card.stages) == card.device_bytes - card.tile_device_bytes > 0
    assert card.device_bytes <= 80 * GIB
    for keys in ({"store": {"state_dtype": "compact"}}, {"compute": {"tile_px": 512, "workers": 2}}):
        assert not any(stage.resident_bytes for stage in planned((4000, 3000), **{**gpu, **keys}).stages)


def test_every_worker_process_is_counted():
    """Eight workers with a tile each take eight times the memory; the limit is for all of them together."""
    one, two, eight = (
        planned(
            (8192, 8192),
            memory={"limit": "64GiB"},
            compute={"tile_px": 512, "device": "cpu", "workers": workers},
            store={"commit_interval": 0},
        )
        for workers in (0, 2, 8)
    )
    for phase in one.host_bytes:
        assert two.host_bytes[phase] > 2 * BASE_BYTES["cpu"] + one.host_bytes[phase]
        assert eight.host_bytes[phase] > two.host_bytes[phase] + 6 * BASE_BYTES["cpu"]
    assert two.host_bytes["gradient pass"] > 2 * one.host_bytes["gradient pass"] > two.host_bytes["ingest"]
    smaller, larger = (
        planned((8192, 8192), memory={"limit": "8GiB"}, compute={"device": "cpu", "workers": workers}).tile_px
        for workers in (2, 0)
    )
    assert smaller < larger
    text = refusal(content_size=(8192, 8192), memory={"limit": "8GiB"}, compute={"device": "cpu", "workers": 16})
    assert "fewer compute.workers" in text and "memory.limit" in text


def test_worker_processes_share_the_gpu():
    """Each worker has its own tile and its own CUDA context there."""
    one, two = (
        planned((20_000, 20_000), device="cuda:0", device_bytes=24 * GIB, memory={"limit": "32GiB"}, compute=compute)
        for compute in ({}, {"workers": 2})
    )
    assert two.tile_px < one.tile_px
    assert two.device_bytes <= 24 * GIB


def test_wider_networks_and_more_precision_take_more_memory():
    """float64 and VGG-19 take more than float32 and a narrow network."""
    narrow = {name: width // 4 for name, width in VGG19_WIDTHS.items()}
    tile = {"tile_px": 512, "device": "cpu"}
    host = [
        planned(widths=widths, memory={"limit": "64GiB"}, compute={**tile, "dtype": dtype}).host_bytes["gradient pass"]
        for widths, dtype in ((narrow, "float32"), (VGG19_WIDTHS, "float32"), (VGG19_WIDTHS, "float64"))
    ]
    assert host == sorted(host) and len(set(host)) == 3


# --- refusals ---


def test_a_layer_that_the_weights_lack_is_named():
    """Refused before the run, with the layers that the file has."""
    short = {name: width for name, width in VGG19_WIDTHS.items() if not name.startswith("conv5")}
    with pytest.raises(InputError, match=r"no layer conv5_1.*It has conv1_1, .*conv4_4\.$"):
        planned(widths=short)
    layers = {"style_layers": {"conv3_1": 1.0}, "content_layers": {"conv4_2": 1.0}}
    assert planned(widths=short, network=layers).halo_px == halo_px(["conv4_2"], "max")


@pytest.mark.parametrize(
    ("padding", "content", "style", "refused"),
    [
        ("replicate", (16, 400), (16, 16), None),
        ("replicate", (15, 400), (16, 16), "content"),
        ("replicate", (16, 400), (400, 15), "style"),
        ("zeros", (1, 1), (16, 16), "content"),
        ("reflect", (32, 400), (32, 32), None),
        ("reflect", (31, 400), (32, 32), "content"),
        ("reflect", (32, 400), (31, 99), "style"),
    ],
)
def test_images_too_small_for_the_deepest_layer_are_refused(padding, content, style, refused):
    """They would crash in a pooling; the message names the image, its size and the remedies."""
    values = {"network": {"padding": padding}, "memory": {"limit": "64GiB"}}
    if refused is None:
        assert isinstance(planned(content, (style,), **values), Plan)
        return
    with pytest.raises(InputError, match=rf"{refused} image .*{padding} padding.*shallower layers"):
        planned(content, (style,), **values)


def test_a_long_image_may_be_too_small_at_its_first_stage_only():
    """A panorama of 4,096 × 100 px starts at 512 × 13: refused with initial_size as a remedy, which works."""
    with pytest.raises(InputError, match="initial_size"):
        planned((100, 4096), memory={"limit": "64GiB"})
    assert planned((100, 4096), memory={"limit": "64GiB"}, initial_size=1024).stages[0].size == (25, 1024)


def test_a_shallow_network_takes_smaller_images():
    """The minimum size follows from the layers in use."""
    layers = {"style_layers": {"conv1_1": 1.0}, "content_layers": {"conv2_2": 1.0}}
    assert planned((2, 2), ((1, 1),), network=layers).stages[0].size == (2, 2)


def test_a_plan_is_plain_data():
    """`pipeline plan --json` is read by other programs."""
    document = json.loads(json.dumps(planned(memory={"limit": "64GiB"}).as_dict()))
    assert document["projected_mem_bytes"] == max(document["host_bytes"].values())
    assert document["stages"][0]["size"] == [512, 410]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_levels_of_a_tiff_take_disk_and_little_memory(device):
    """A large print would be refused for memory that its levels do not need, or fill the disk after days."""
    values = {"device": device, "device_bytes": 64 * GIB, "memory": {"limit": 6 * GIB}, "store": {"chunk_px": 128}}
    for size in (8_192, 30_000, 60_000):
        levels, plain = (planned(**values, size=size, export={"pyramid": pyramid}) for pyramid in (True, False))
        more = levels.host_bytes["export"] - plain.host_bytes["export"]
        assert 0 < more < 137 * MIB
        pixels = levels.stages[-1].pixels
        assert levels.levels_bytes == (
            pixels if size > 20_000 else 0
        )  # a third of three bytes per pixel; those of 8K stay in memory
        assert plain.levels_bytes == planned(**values, size=size, output="/o.dz").levels_bytes == 0
