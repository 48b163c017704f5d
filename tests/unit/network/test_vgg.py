"""The network: the features of a whole image, and the files that it can be built from."""

from __future__ import annotations

import contextlib
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.core.errors import ConfigError, InputError
from pipeline.core.tiling import Rect, grid
from pipeline.core.vgg_layers import LAYER_BY_NAME, halo_px
from pipeline.network.cache import get_network
from pipeline.network.pooling import Pooling
from pipeline.network.vgg import Network, Step, random_state
from pipeline.network.weights import RANDOM_WIDTHS, NetworkSpec, WeightsSource, find_weights, read_widths
from pipeline.network.weights_file import check_shapes, load_state
from tests.support import reference

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
POOLINGS = ["mixed", "max", "average", "tent", "l2"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def noise(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(height, width, 3, generator=generator, dtype=torch.float64).to(dtype) * 255


def whole_image_features(state, image_HWC, names, padding="replicate", pooling="max", dtype="float64", scale=1.0):
    """Feature maps of an image in one piece, as {name: (C, H, W)}."""
    options = {"padding": padding, "pooling": pooling, "pooling_scale": scale}
    network = Network(state, **options, dtype=DTYPES[dtype], device="cpu")
    height, width, _ = image_HWC.shape
    whole = Rect(0, height, 0, width)
    pixels = image_HWC.permute(2, 0, 1)[None]
    actual = {}
    for feature_map in network.features(pixels, whole, (height, width), set(names), whole):
        stride = feature_map.layer.stride
        assert feature_map.region == (0, height // stride, 0, width // stride)
        actual[feature_map.layer.name] = feature_map.features_1CHW[0]
    return actual


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


# --- features ---


@pytest.mark.parametrize("padding", ["replicate", "zeros", "reflect"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("size", [(64, 80), (61, 47), (33, 95)])
def test_features_are_those_of_plain_torch(padding, pooling, size):
    """Another topology than VGG-19's renders another image, and no published weights would fit."""
    state, image = reference.narrow_state(), noise(*size)
    actual = whole_image_features(state, image, reference.CONVS, padding, pooling)
    expected = reference.features(state, image, padding, pooling)
    assert list(actual) == reference.CONVS  # shallowest first: memory of a tile is planned on it
    for name in reference.CONVS:
        assert relative(actual[name], expected[name]) < 1e-12


@pytest.mark.parametrize("pooling", ["average", "tent", "l2"])
def test_the_scale_of_poolings_is_a_factor_behind_each(pooling):
    """With a factor at another place the next layers would see magnitudes that they were not trained for."""
    state, image = reference.narrow_state(), noise(61, 47)
    actual = whole_image_features(state, image, reference.CONVS, pooling=pooling, scale=1.7)
    expected = reference.features(state, image, "replicate", pooling, 1.7)
    for name in reference.CONVS:
        assert relative(actual[name], expected[name]) < 1e-12
    assert relative(actual["conv5_1"], reference.features(state, image, "replicate", pooling)["conv5_1"]) > 0.1


def test_float32_features_are_near_those_of_float64():
    """The default precision must lose digits, not meaning."""
    state, image = reference.narrow_state(), noise(48, 48)
    actual = whole_image_features(state, image.float(), reference.CONVS, dtype="float32")
    expected = whole_image_features(state, image, reference.CONVS)
    for name in reference.CONVS:
        assert actual[name].dtype == torch.float32
        assert relative(actual[name], expected[name]) < 1e-5


def test_bfloat16_runs_on_the_cpu_and_is_near_float32():
    """Half the memory for less precision: a few per cent, which needs pixels scaled before they are converted."""
    state, image = reference.narrow_state(), noise(48, 48, torch.float32)
    actual = whole_image_features(state, image, ["conv1_1", "conv3_1", "conv5_1"], dtype="bfloat16")
    expected = whole_image_features(state, image, ["conv1_1", "conv3_1", "conv5_1"], dtype="float32")
    for name, features in expected.items():
        assert actual[name].dtype == torch.bfloat16
        assert relative(actual[name], features) < 0.05
    assert relative(actual["conv1_1"], expected["conv1_1"]) < 0.01


def test_torchvision_names_give_the_same_features():
    """A user's own vgg19.pth must give the same image as the same weights under our names."""
    state, image = reference.narrow_state(), noise(40, 40)
    ours = whole_image_features(state, image, reference.CONVS)
    theirs = whole_image_features(reference.torchvision_names(state), image, reference.CONVS)
    assert all(torch.equal(ours[name], theirs[name]) for name in reference.CONVS)


def test_other_tensors_of_a_torchvision_file_are_ignored():
    """torchvision's file also has the layers after conv5_1 and a classifier."""
    state, image = reference.narrow_state(), noise(40, 40)
    full = reference.torchvision_names(state) | {
        "features.30.weight": torch.zeros(8, 8, 3, 3),
        "features.30.bias": torch.zeros(8),
        "classifier.0.weight": torch.zeros(5, 5),
    }
    ours = whole_image_features(state, image, ["conv5_1"])
    assert torch.equal(whole_image_features(full, image, ["conv5_1"])["conv5_1"], ours["conv5_1"])


def test_an_input_convolution_replaces_the_imagenet_scaling():
    """Networks with an input convention of their own (ours) would receive wrong colours."""
    state = reference.narrow_state()
    state["input.weight"] = torch.tensor([[0.0, 0, 2], [0, 1, 0], [-1, 0, 0]])[:, :, None, None]
    state["input.bias"] = torch.tensor([0.5, -0.5, 1.0])
    image = noise(40, 40)
    with_input = whole_image_features(state, image, reference.CONVS)
    expected = reference.features(state, image, "replicate", "max")
    assert all(relative(with_input[name], expected[name]) < 1e-12 for name in reference.CONVS)
    del state["input.weight"], state["input.bias"]
    plain = whole_image_features(state, image, ["conv1_1"])["conv1_1"]
    assert relative(with_input["conv1_1"], plain) > 0.1


@given(st.data())
@settings(max_examples=25)
def test_features_of_a_tile_are_cut_from_those_of_the_image(data):
    """A tile's features must be those of the whole image, at cuts and at the border."""
    name = data.draw(st.sampled_from(reference.CONVS))
    padding = data.draw(st.sampled_from(["replicate", "zeros", "reflect"]))
    height, width = data.draw(st.integers(32, 110)), data.draw(st.integers(32, 110))
    tile = data.draw(st.sampled_from(grid(height, width, data.draw(st.sampled_from([16, 32, 48])))))
    pooling = data.draw(st.sampled_from(POOLINGS))
    halo = halo_px([name], pooling) + data.draw(st.sampled_from([0, 16]))
    state, image = reference.narrow_state(), noise(height, width)
    expected = reference.features(state, image, padding, pooling).get(name)
    network = Network(state, padding=padding, pooling=pooling, dtype=torch.float64, device="cpu")
    outer = tile.outer(halo)
    pixels = image[outer.y0 : outer.y1, outer.x0 : outer.x1].permute(2, 0, 1)[None]
    positions = tile.inner.positions(LAYER_BY_NAME[name])
    for feature_map in network.features(pixels, outer, (height, width), {name}, tile.inner):
        rows, columns = positions.within(feature_map.region)
        inner = feature_map.features_1CHW[0, :, rows, columns]
        assert inner.shape[1:] == (positions.height, positions.width)
        cut = expected[:, positions.y0 : positions.y1, positions.x0 : positions.x1]
        assert (inner - cut).abs().max() <= 1e-12 * expected.abs().max()
        return
    assert positions.area == 0


OUTERS = [(Rect(0, 61, 0, 70), (61, 70)), (Rect(0, 176, 48, 160), (400, 160)), (Rect(144, 368, 0, 208), (700, 700))]


def gradients(
    padding: str, pooling: str, dtype: torch.dtype, outer: Rect, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a tile, for random seeds at some layers: the network's own, and autograd's."""
    network = Network(reference.narrow_state(), padding=padding, pooling=pooling, dtype=dtype, device="cpu")
    pixels = noise(outer.height, outer.width, dtype).permute(2, 0, 1)[None]
    names = {"conv1_1", "conv2_1", "conv4_1", "conv4_2", "conv5_1"}
    canvas = pixels.clone().requires_grad_()
    maps = {
        feature_map.layer.name: feature_map.features_1CHW
        for feature_map in network.features(canvas, outer, size, names, outer)
    }
    seeds = {name: torch.randn_like(features) for name, features in maps.items()}
    (expected,) = torch.autograd.grad(list(maps.values()), canvas, list(seeds.values()))
    with torch.no_grad():
        tape: list[Step] = []
        for feature_map in network.features(pixels, outer, size, names, outer, tape):
            assert torch.equal(feature_map.features_1CHW, maps[feature_map.layer.name])
        actual = network.gradient(tape, lambda feature_map: seeds.get(feature_map.layer.name))
    assert not tape
    return actual, expected


@pytest.mark.parametrize("padding", ["replicate", "zeros", "reflect"])
@pytest.mark.parametrize("pooling", ["mixed", "max", "average"])
@pytest.mark.parametrize(("outer", "size"), OUTERS)
def test_the_written_backward_pass_gives_the_bits_of_autograd(padding, pooling, outer, size):
    """Runs that began when autograd computed gradients resume, and end with the same bytes."""
    actual, expected = gradients(padding, pooling, torch.float32, outer, size)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("padding", ["replicate", "zeros", "reflect"])
@pytest.mark.parametrize("pooling", ["tent", "l2"])
@pytest.mark.parametrize(("outer", "size"), OUTERS)
def test_the_backward_pass_of_filtered_poolings_is_that_of_autograd(padding, pooling, outer, size):
    """Any other gradient is one of another picture: the run would converge to it, without an error."""
    actual, expected = gradients(padding, pooling, torch.float64, outer, size)
    assert relative(actual, expected) < 1e-13


def test_l2_pooling_of_nothing_has_a_finite_gradient():
    """Whole channels are 0 where a picture is flat: one 0/0 would end the run."""
    pooling, cells = Pooling("l2", "replicate"), (slice(0, 4), slice(0, 4))
    x_1CHW = torch.zeros(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    x_1CHW[0, 0, 0, 0] = 1e-20
    pooled = pooling.forward(x_1CHW, cells, with_tape=True)
    assert pooled.features_1CHW.max() <= 1e-6
    assert pooling.backward(pooled, torch.ones_like(pooled.features_1CHW)).abs().max() <= 0.5


def test_layers_deeper_than_asked_for_are_not_run():
    """Each further layer takes time and memory that the plan does not count."""
    state = reference.narrow_state(last="conv3_1")
    assert list(whole_image_features(state, noise(32, 32), {"conv3_1", "conv1_2"})) == ["conv1_2", "conv3_1"]


# --- the seeded network and the cache ---


def test_the_random_network_is_the_same_for_the_same_seed():
    """A resume and every worker build it again; another network would render another image."""
    first = random_state(find_weights("random", None, 7))
    same = random_state(find_weights("random", None, 7))
    other = random_state(find_weights("random", None, 8))
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["conv1_1.weight"], other["conv1_1.weight"])
    assert check_shapes({key: tuple(value.shape) for key, value in first.items()}, Path("random")) == RANDOM_WIDTHS


def test_networks_are_cached_by_everything_they_depend_on(narrow_weights, tmp_path):
    """A network reused for other settings would silently compute with the wrong padding or weights."""
    save_file(reference.narrow_state(seed=3), tmp_path / "other.safetensors")
    spec = NetworkSpec(find_weights("vgg19", narrow_weights, 0), "zeros", "max", "float64", "cpu")
    other = find_weights("vgg19", tmp_path / "other.safetensors", 0)
    network = get_network(spec)
    assert get_network(replace(spec, source=find_weights("vgg19", narrow_weights, 0))) is network
    pickled = pickle.loads(pickle.dumps(spec))
    assert get_network(pickled) is network
    for changed in (
        replace(spec, padding="reflect"),
        replace(spec, pooling="average"),
        replace(spec, pooling_scale=2.0),
        replace(spec, dtype="float32"),
        replace(spec, source=other),
    ):
        assert get_network(changed) is not network


def test_tf32_on_a_cpu_is_refused(narrow_weights):
    """A user who requests it would otherwise expect a speed that a CPU does not have."""
    spec = NetworkSpec(find_weights("vgg19", narrow_weights, 0), "zeros", "max", "tf32", "cpu")
    with pytest.raises(ConfigError, match=r"compute\.dtype: tf32 needs a CUDA device"):
        get_network(spec)


# --- files ---


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("names", ["ours", "torchvision"])
def test_weights_load_from_both_formats_under_both_names(tmp_path, suffix, names):
    """Both formats and both namings are in use; widths come from the file."""
    state = reference.narrow_state((2, 3, 4, 5, 6))
    if names == "torchvision":
        state = reference.torchvision_names(state)
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    widths = read_widths(path)
    assert {name: widths[name] for name in ("conv1_2", "conv2_1", "conv3_4", "conv4_2", "conv5_1")} == {
        "conv1_2": 2,
        "conv2_1": 3,
        "conv3_4": 4,
        "conv4_2": 5,
        "conv5_1": 6,
    }
    loaded = load_state(path)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_pth_files_of_the_old_format_load(tmp_path):
    """torchvision's vgg19-dcbb9e9d.pth is of 2017, before torch wrote zip archives."""
    state = reference.torchvision_names(reference.narrow_state())
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_state(tmp_path / "old.pth")
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_network_that_ends_early_serves_the_layers_it_has(tmp_path):
    """Truncated networks are common; the plan names a layer that is missing."""
    save_file(reference.narrow_state(last="conv3_2"), tmp_path / "short.safetensors")
    assert list(read_widths(tmp_path / "short.safetensors")) == reference.CONVS[:6]


def refused(path: Path) -> str:
    """Both readers must refuse the file before anything is rendered; returns their messages."""
    with pytest.raises(InputError) as planned:
        read_widths(path)
    with pytest.raises(InputError) as loaded:
        load_state(path)
    for caught in (planned, loaded):
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    return f"{planned.value} {loaded.value}"


def test_a_missing_file_is_refused(tmp_path):
    """A wrong path is the most common mistake."""
    assert "not found" in refused(tmp_path / "none.safetensors")
    assert "not found" in refused(tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"none\.pth: not found.*Correct its path"):
        find_weights("vgg19", tmp_path / "none.pth", 0)


def test_a_folder_is_refused(tmp_path):
    """The path lacks its last component."""
    for name in ("folder.pth", "folder.safetensors"):
        (tmp_path / name).mkdir()
        refused(tmp_path / name)


def _without_first(state):
    return {key: value for key, value in state.items() if not key.startswith("conv1_1")}


def _other_shape(state):
    return state | {"conv3_1.weight": torch.zeros(8, 9, 3, 3)}


def _other_kernel(state):
    return state | {"conv2_1.weight": torch.zeros(8, 4, 5, 5)}


def _short_bias(state):
    return state | {"conv2_1.bias": torch.zeros(7)}


def _grey_input(state):
    return state | {"conv1_1.weight": torch.zeros(4, 1, 3, 3)}


def _resnet(_state):
    return {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}


def _empty(_state):
    return {}


def _odd_input(state):
    return state | {"input.weight": torch.zeros(4, 3, 1, 1), "input.bias": torch.zeros(4)}


def _input_without_bias(state):
    return state | {"input.weight": torch.zeros(3, 3, 1, 1)}


def _input_with_other_bias(state):
    return state | {"input.weight": torch.zeros(3, 3, 1, 1), "input.bias": torch.zeros(4)}


WRONG = [
    (_without_first, "conv1_1.weight"),
    (_other_shape, "another network's weights"),
    (_other_kernel, "another network's weights"),
    (_short_bias, "another network's weights"),
    (_grey_input, "another network's weights"),
    (_resnet, "not a VGG-19-shaped"),
    (_empty, "not a VGG-19-shaped"),
    (_odd_input, "input"),
    (_input_without_bias, "input"),
    (_input_with_other_bias, "input"),
]


@pytest.mark.parametrize(("spoil", "says"), WRONG, ids=[spoil.__name__.strip("_") for spoil, _ in WRONG])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_another_shape_are_refused(tmp_path, spoil, says, suffix):
    """They would crash hours later, or render with a network that is not VGG-19-shaped."""
    state = spoil(reference.narrow_state())
    path = tmp_path / f"wrong{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert says in refused(path)


def test_a_pickled_module_is_refused_unopened(tmp_path, monkeypatch):
    """Unpickling runs its sender's code, and an environment variable of torch's can even allow it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), tmp_path / "module.pth")
    refused(tmp_path / "module.pth")


class _Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    """A weights file from the internet must not run anything."""
    bomb = _Bomb(tmp_path / "victim")
    torch.save({"conv1_1.weight": bomb}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"conv1_1.weight": bomb}))
    refused(tmp_path / "evil.pth")
    refused(tmp_path / "raw.pth")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("value", [torch.zeros(3), [torch.zeros(3)], {"a": {"b": torch.zeros(3)}}, {"epoch": 3}])
def test_a_pth_without_a_flat_dict_of_tensors_is_refused(tmp_path, value):
    """Checkpoints of training scripts nest their state dict: the message must say so."""
    torch.save(value, tmp_path / "nested.pth")
    assert "state dict" in refused(tmp_path / "nested.pth")


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors"])
@pytest.mark.parametrize("content", [b"", b"x", b"just some text\n" * 50, bytes(range(256)) * 8, b"\xff" * 64])
def test_files_that_are_no_weights_are_refused(tmp_path, name, content):
    """A renamed text file, an empty download, an HTML error page."""
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


def _pth_bytes(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(reference.narrow_state((1, 1, 1, 1, 1)), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


PTH_BYTES = {zipped: _pth_bytes(zipped) for zipped in (True, False)}
flips = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4)


@given(flips, st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_in_a_pth_are_refused_or_read(tmp_path, flips, zipped):
    """A bad disk or download must end in a message about the file, never in a traceback about pickles."""
    data = bytearray(PTH_BYTES[zipped])
    for position, value in flips:
        data[position] = value
    (tmp_path / "damaged.pth").write_bytes(data)
    with contextlib.suppress(InputError):
        load_state(tmp_path / "damaged.pth")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95, 0.999])
def test_a_truncated_pth_is_refused(tmp_path, share):
    """A download that broke off."""
    torch.save(reference.narrow_state(), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: int(share * len(data))])
    refused(tmp_path / "w.pth")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95, 0.999])
def test_a_truncated_safetensors_is_refused(tmp_path, narrow_weights, share):
    """A download that broke off."""
    data = narrow_weights.read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"w\.safetensors"):
        load_state(tmp_path / "w.safetensors")


def test_a_truncated_safetensors_is_refused_by_the_plan_already(tmp_path, narrow_weights):
    """The plan reads only the header, which gives the length of the file: refuse it before the run starts."""
    data = narrow_weights.read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-1000])
    with pytest.raises(InputError, match=r"w\.safetensors"):
        read_widths(tmp_path / "w.safetensors")


@pytest.mark.parametrize("header", ["[]", "3", '{"a": 3}', '{"a": {"shape": "x"}}', '{"a": {"shape": [1, "x"]}}', "{"])
def test_a_safetensors_with_a_broken_header_is_refused(tmp_path, header):
    """A damaged or foreign header is an input error, not a traceback."""
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    refused(tmp_path / "w.safetensors")


def test_widths_are_those_that_the_network_has(narrow_weights):
    """The plan's memory is computed from them."""
    source = find_weights("vgg19", narrow_weights, 0)
    state = load_file(narrow_weights)
    assert source.widths == {name: len(state[f"{name}.bias"]) for name in reference.CONVS}
    assert isinstance(source, WeightsSource) and len(source.sha256) == 64


def test_half_precision_weights_are_widened(tmp_path):
    """Weights are published in float16 too; the network must still compute in its own precision."""
    state = {key: value.half() for key, value in reference.narrow_state().items()}
    save_file(state, tmp_path / "half.safetensors")
    actual = whole_image_features(load_state(tmp_path / "half.safetensors"), noise(32, 32), ["conv2_1"])["conv2_1"]
    assert actual.dtype == torch.float64
    assert np.isfinite(actual.numpy()).all()
