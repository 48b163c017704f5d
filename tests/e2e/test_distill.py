"""tools/distill/distill_network.py end to end on a tiny teacher, and the network that comes with the package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import pyvips
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipeline.config.sections import NetworkName
from pipeline.core.errors import InputError
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import CONV_NAMES, LAYER_BY_NAME
from pipeline.network.vgg import Network
from pipeline.network.weights import PACKAGED, find_weights, widths_for_plan
from pipeline.network.weights_file import load_state
from tools.distill import distill_network, distillation, training_images

ROOT = Path(__file__).parents[2]

WIDTHS = (4, 6, 8, 8, 8)
IMAGES = 11  # two of which are held out


@pytest.fixture(autouse=True)
def _short_warm_start(monkeypatch):
    monkeypatch.setattr(distillation, "WARM_START_BATCHES", 2)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = training_images.dead_leaves(rng, 70).clip(0, 255).astype(np.uint8)
        pyvips.Image.new_from_array(pixels).write_to_file(str(folder / f"{number:02}.png"))
    return folder


@pytest.fixture
def teacher(tmp_path):
    generator = torch.Generator().manual_seed(1)
    state, channels = {"input.weight": torch.eye(3)[:, :, None, None], "input.bias": torch.full((3,), -0.5)}, 3
    for name in CONV_NAMES:
        width = WIDTHS[int(name[4]) - 1]
        state[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1
        channels = width
    save_file(state, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def make_task(teacher, folder, deep_state=None, **changes):
    options = dict(
        teacher_sha256="", widths=(3, 4, 6, 6, 6), steps=5, batch=1, crop_px=64, generated=0.3, learning_rate=1e-3,
        gram_weight=0.5, teacher_padding="reflect", paddings=("replicate", "zeros"), pooling="max", seed=3,
        images=IMAGES,
    )  # fmt: skip
    settings = distillation.Settings(**(options | changes))
    paths = training_images.list_images((str(folder),))
    return distillation.Distillation(settings, load_state(teacher), paths, "cpu", deep_state)


def with_other_layer(teacher, name):
    """A second teacher, which differs from the first at one layer: its channels there are in reverse order."""
    state = load_file(teacher)
    changed = {key: state[key].flip(0) for key in (f"{name}.weight", f"{name}.bias")}
    save_file(state | changed, teacher.with_name("deep.safetensors"))
    return teacher.with_name("deep.safetensors")


def scores(task, student, maps, padding):
    return task.scores(student, maps, (padding,))[padding]


def train(task, output, **options):
    return distill_network.train(task, output, Console(quiet=True), evaluate_every=100, **options)


def test_writes_a_network_that_the_program_reads(teacher, folder, tmp_path):
    output, deep = tmp_path / "student.safetensors", with_other_layer(teacher, "conv5_1")
    arguments = ["--teacher", teacher, "--images", folder, "--output", output, "--widths", "3,4,6,6,6", "--steps", 3,
                 "--batch", 1, "--crop-px", 64, "--device", "cpu", "--source", "a test", "--deep-teacher", deep,
                 "--deep-layers", "conv4_4,conv5_1"]  # fmt: skip
    result = CliRunner().invoke(distill_network.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "explained variance on held-out images" in result.output

    source = find_weights("vgg19", output, 0)
    assert [source.widths[f"conv{block}_1"] for block in range(1, 6)] == [3, 4, 6, 6, 6]
    network = Network(load_state(output), padding="zeros", pooling="max", dtype=torch.float32, device="cpu")
    whole = Rect(0, 50, 0, 70)
    features = list(network.features(torch.rand(1, 3, 50, 70) * 255, whole, (50, 70), {"conv5_1"}, whole))
    assert features[-1].features_1CHW.shape == (1, 6, 3, 4)

    metadata = read_metadata(output)
    assert metadata["source"] == "a test"
    assert metadata["teacher_sha256"] == find_weights("vgg19", teacher, 0).sha256
    assert metadata["deep_teacher_sha256"] == find_weights("vgg19", deep, 0).sha256
    assert set(json.loads(metadata["held_out_explained_variance"])["zeros"]) == set(CONV_NAMES)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"deep.safetensors", "images", "student.safetensors", "teacher.safetensors"}


def test_teacher_may_have_torchvision_names(teacher, folder, tmp_path):
    ours = load_file(teacher)
    state = {
        f"features.{LAYER_BY_NAME[name].torchvision_index}.{part}": ours[f"{name}.{part}"]
        for name in CONV_NAMES
        for part in ("weight", "bias")
    }
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg19.pth")
    task = make_task(tmp_path / "vgg19.pth", folder, steps=1)
    training = train(task, tmp_path / "student.safetensors")
    distill_network.write_network(task, training, tmp_path / "student.safetensors", "a test")
    assert set(load_file(tmp_path / "student.safetensors")) == {key for key in ours if not key.startswith("input")}


@pytest.mark.parametrize("distinct_batches", [0, 2])
def test_resumed_training_is_identical_to_an_unbroken_one(teacher, folder, tmp_path, distinct_batches):
    def task():
        return make_task(teacher, folder, distinct_batches=distinct_batches)

    unbroken = train(task(), tmp_path / "unbroken")
    assert train(task(), tmp_path / "broken", stop_at=3).step == 3
    resumed = train(task(), tmp_path / "broken")
    assert resumed.step == unbroken.step == 5
    for name in ("student", "maps"):
        first, second = getattr(unbroken, name), getattr(resumed, name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoint_of_other_settings_is_refused(teacher, folder, tmp_path):
    train(make_task(teacher, folder), tmp_path / "network", stop_at=1)
    with pytest.raises(distill_network.click.UsageError, match=r"learning_rate 0\.001 → 0\.01"):
        train(make_task(teacher, folder, learning_rate=1e-2), tmp_path / "network")


def test_training_lowers_the_loss(teacher, folder):
    task = make_task(teacher, folder, steps=60, paddings=("replicate",), learning_rate=3e-3)
    training = task.start()
    before = sum(scores(task, training.student, training.maps, "replicate").values())
    for _ in range(60):
        task.train_step(training)
    assert sum(scores(task, training.student, training.maps, "replicate").values()) > before


def test_a_student_as_wide_as_the_teacher_explains_it_all(teacher, folder):
    task = make_task(teacher, folder, widths=WIDTHS, paddings=("reflect",), batch=2, crop_px=256)
    identity = {tap: torch.eye(WIDTHS[int(tap[4]) - 1]) for tap in CONV_NAMES}
    assert all(score == 1 for score in scores(task, load_state(teacher), identity, "reflect").values())

    student = distillation.warm_start(task)
    fitted = scores(task, student, distillation.fit_maps(task, student), "reflect")
    assert min(fitted.values()) > 0.99, fitted


def test_named_layers_are_learnt_from_the_second_teacher(teacher, folder):
    deep = load_state(with_other_layer(teacher, "conv5_1"))
    options = dict(widths=WIDTHS, paddings=("reflect",), deep_layers=("conv5_1",), deep_padding="reflect", batch=2)
    task = make_task(teacher, folder, deep_state=deep, crop_px=256, **options)
    identity = {tap: torch.eye(WIDTHS[int(tap[4]) - 1]) for tap in CONV_NAMES}
    assert all(score == 1 for score in scores(task, deep, identity, "reflect").values())
    assert scores(task, load_state(teacher), identity, "reflect")["conv5_1"] < 0.5

    student = distillation.warm_start(task)
    fitted = scores(task, student, distillation.fit_maps(task, student), "reflect")
    assert min(fitted.values()) > 0.99, fitted


def test_a_second_teacher_without_a_named_layer_is_refused(teacher, folder):
    cut_off = {key: value for key, value in load_state(teacher).items() if not key.startswith("conv5")}
    with pytest.raises(InputError, match=r"has no conv5_1. Correct --deep-layers"):
        make_task(teacher, folder, deep_layers=("conv5_1",), deep_state=cut_off)


def test_chosen_channels_predict_the_others():
    rng = np.random.default_rng(5)
    independent = rng.normal(size=(3, 500))
    channels = np.concatenate([independent * 2, independent, independent[:1] - independent[1:2]])
    chosen = distillation.choose_channels(torch.from_numpy(channels @ channels.T), 3)
    assert np.linalg.matrix_rank(channels[chosen]) == 3


@pytest.mark.parametrize("maker", [training_images.edges, training_images.dead_leaves, training_images.noise])
def test_generated_images_follow_from_the_seed(maker):
    first, second = (training_images.jitter(rng, maker(rng, 96)) for rng in map(np.random.default_rng, (2, 2)))
    assert first.shape == (96, 96, 3)
    assert first.min() >= 0
    assert first.max() <= 255
    assert first.std() > 1
    np.testing.assert_array_equal(first, second)


def test_packaged_network_is_small_complete_and_documented():
    for name, path in PACKAGED.items():
        assert name in get_args(NetworkName)
        assert path.stat().st_size <= 2_000_000
        state = load_file(path)
        assert all(torch.isfinite(value).all() and value.dtype == torch.float16 for value in state.values())
        source = find_weights(name, None, 0)
        assert tuple(source.widths) == CONV_NAMES
        assert source.widths == widths_for_plan(name, None)
        metadata = read_metadata(path)
        scores = json.loads(metadata["held_out_explained_variance"])["replicate"]
        assert min(scores[f"conv{block}_1"] for block in (1, 2, 3)) >= 0.9
        assert min(scores["conv4_2"], scores["conv5_1"]) >= 0.75
        assert metadata["teacher_sha256"] in (ROOT / "docs" / "networks.md").read_text()
        assert "MIT" in (path.parent / "NOTICE").read_text()


def test_sample_images_are_small():
    for name, size in (("landscape", (1024, 768)), ("strokes", (800, 640))):
        path = ROOT / "configs" / "samples" / f"{name}.jpg"
        image = pyvips.Image.new_from_file(str(path))
        assert (image.width, image.height) == size
        assert path.stat().st_size <= 250_000


def read_metadata(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))["__metadata__"]
