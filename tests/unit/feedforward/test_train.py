"""`pipeline train`, in this process: resume, samples, the trained file, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
import yaml

import pipeline
from pipeline.core.errors import ConfigError, DamagedStateError, LockedError, SpaceError, Stopped
from pipeline.core.events import Note, TrainingStep
from pipeline.feedforward.checkpoint import load_checkpoint
from pipeline.feedforward.network_file import load_network
from pipeline.feedforward.training import Trainer
from pipeline.network.vgg import Network
from pipeline.rundir.lock import RunLock
from tests.support.inputs import write_image
from tests.support.reference import narrow_state

TINY = {
    "photographs": "photographs",
    "output": "out/net.safetensors",
    "network": {"width": 0.05, "blocks": 1},
    "training": {"steps": 6, "batch": 2, "crop_px": 64, "checkpoint_every": 2, "sample_every": 0},
    "compute": {"device": "cpu", "threads": 1},
}


@pytest.fixture
def make(tmp_path, narrow_weights):
    """Writes photographs, a style and the config of a tiny training; returns the config's path."""

    def write(**values):
        folder = tmp_path / "photographs"
        (folder / "inner").mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(["a.png", "b.jpg", "inner/c.png"]):
            write_image(folder / name, 70 + 20 * number, 96, number)
        write_image(tmp_path / "style.png", 64, 80, 9)
        layers = {"content_layers": {"conv2_2": 1.0}, "style_layers": {"conv1_2": 0.5, "conv3_1": 0.5}}
        config = {
            "styles": [{"image": "style.png", "size": 80}],
            **TINY,
            "loss_network": {"weights": str(narrow_weights), **layers},
            **values,
        }
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return path

    return write


def trained(path, *overrides, **options):
    return pipeline.train(pipeline.load_train_config(path, overrides), **options)


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.fault
def test_a_stopped_and_a_killed_training_end_with_the_weights_of_one_that_was_not(make, tmp_path):
    """Stopped after 3 steps; then killed after the checkpoint of a later one, in a process of its own."""
    path = make(training={**TINY["training"], "halve_every": 2})
    apart = f"work_dir={tmp_path / 'whole'}", f"output={tmp_path / 'whole.safetensors'}"
    trained(path, *apart)
    stop = threading.Event()

    def stop_after_three(event):
        if isinstance(event, TrainingStep) and event.step == 3:
            stop.set()

    with pytest.raises(Stopped):
        trained(path, sink=stop_after_three, stop=stop)
    work_dir = tmp_path / "out" / "net.train"
    assert steps_of(work_dir) == [1, 2, 3]

    command = [sys.executable, "-m", "pipeline", "train", "-c", str(path), "--log-format", "plain"]
    options = ["--set", "training.steps=100000", "--set", "training.checkpoint_every=1"]
    child = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while steps_of(work_dir)[-1:] < [5] and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    killed_at = load_step(work_dir)
    assert killed_at > 3, child.stderr.read().decode()
    config = f"training.steps={killed_at + 3}"
    resumed = trained(path, config)
    reference = trained(path, config, *apart)
    ours, theirs = load_network(resumed), load_network(reference)
    assert ours.notes == theirs.notes  # the bytes differ: safetensors writes metadata in any order
    assert all(torch.equal(value, theirs.state[key]) for key, value in ours.state.items())
    assert steps_of(work_dir) == list(range(1, killed_at + 4))


def test_a_full_disk_costs_no_more_than_the_steps_since_the_checkpoint(make, small_disk):
    """Refused with what to do; the same command then ends with the weights of a training that had space."""
    path, filler = make(), small_disk / "filler"

    def fill(event):
        if isinstance(event, TrainingStep) and event.step == 3:
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
                    file.flush()

    places = f"work_dir={small_disk / 'work'}", f"output={small_disk / 'net.safetensors'}"
    with pytest.raises(SpaceError, match="Free disk space"):
        trained(path, *places, sink=fill)
    filler.unlink()
    assert load_step(small_disk / "work") == 2
    ours, theirs = load_network(trained(path, *places)), load_network(trained(path))
    assert all(torch.equal(value, theirs.state[key]) for key, value in ours.state.items())


def load_step(folder):
    return load_checkpoint(folder / "checkpoint.safetensors").step


def test_the_file_has_its_config_provenance_and_preview_and_learns(make, tmp_path):
    """Two styles share a network; the losses fall; an unreadable photograph is skipped and named."""
    write_image(tmp_path / "other.png", 64, 64, 5)
    path = make(
        styles=[{"image": "style.png", "size": 64}, {"image": "other.png", "size": 64, "name": "second"}],
        training={**TINY["training"], "steps": 12, "learning_rate": 0.02, "sample_every": 10},
    )
    (tmp_path / "photographs" / "broken.jpg").write_bytes(b"not a photograph")
    write_image(tmp_path / "photographs" / "small.png", 40, 90)
    data = bytearray((tmp_path / "photographs" / "a.png").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # a good header, no pixels
    (tmp_path / "photographs" / "cut.png").write_bytes(data)
    events = []
    file = load_network(trained(path, sink=events.append))
    notes = [event.message for event in events if isinstance(event, Note)]
    for name in ("broken.jpg", "small.png", "cut.png"):
        assert sum(note.startswith("skipped") and name in note for note in notes) == 1, (name, notes)
    assert file.spec.styles == ("style", "second") and file.spec.width == 0.05
    assert json.loads(file.notes["config"])["loss.kind"] == "wasserstein"
    assert file.notes["steps"] == "12" and str(tmp_path) not in str(file.notes)
    assert base64.b64decode(file.notes["preview"].partition("base64,")[2]).startswith(b"\xff\xd8")
    work_dir = tmp_path / "out" / "net.train"
    assert {sample.name for sample in (work_dir / "samples").iterdir()} == {"step-00000010.jpg", "step-00000012.jpg"}
    losses = [json.loads(line)["objective"] for line in (work_dir / "losses.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    # a finished training has nothing to do, and may write its own file again
    before = file.state
    again = load_network(trained(path))
    assert all(torch.equal(value, before[key]) for key, value in again.state.items())


@pytest.mark.parametrize(("factor", "content", "dtype"), [(4, "features", "bfloat16"), (8, "pixels", "float32")])
def test_super_resolution(make, factor, content, dtype):
    """The network enlarges by its factor, with either loss, in either number format; its weights are float32."""
    path = make(
        styles=None,
        task="super-resolution",
        factor=factor,
        loss={"content": content, "tv_weight": 0.0},
        training={**TINY["training"], "steps": 2},
        compute={**TINY["compute"], "dtype": dtype},
    )
    file = load_network(trained(path))
    assert {value.dtype for value in file.state.values()} == {torch.float32, torch.int64}
    assert (file.spec.task, file.spec.factor, file.spec.norm) == ("super-resolution", factor, "batch")
    assert file.spec.skip == "bicubic"
    with torch.no_grad():
        assert file.network()(torch.rand(1, 3, 12, 16) * 255).shape == (1, 3, 12 * factor, 16 * factor)


def test_the_first_picture_is_the_bicubic_enlargement(make):
    """Otherwise a short training would end below it, in colours that drift."""
    config = pipeline.load_train_config(make(styles=None, task="super-resolution"))
    picture = torch.rand(1, 3, 20, 24) * 255
    trainer = Trainer(config, None, [])
    expected = F.interpolate(picture, (80, 96), mode="bicubic", align_corners=False).clamp(0, 255)
    torch.testing.assert_close(trainer.result(picture, 0), expected)


def test_the_learning_rate_is_halved(make):
    """Otherwise the last steps would be as long as the first, and leave their noise in the picture, as a grid."""
    path = make(styles=None, task="super-resolution", training={**TINY["training"], "halve_every": 2})
    config = pipeline.load_train_config(path)
    loss_network = Network(narrow_state(), padding="reflect", pooling="average", dtype=torch.float32, device="cpu")
    trainer, rates = Trainer(config, loss_network, []), []
    for _ in range(5):
        trainer.train_step(trainer.batch_of(torch.rand(2, 3, 64, 64) * 255))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.001, 0.001, 0.0005, 0.0005, 0.00025]


def test_a_training_from_before_the_skip(make, tmp_path):
    """It resumes as it began once its config says so; otherwise it is refused, not continued as another network."""
    plain = {"training": {**TINY["training"], "steps": 2}, "network": {**TINY["network"], "skip": "none"}}
    path = make(styles=None, task="super-resolution", loss={"tv_weight": 0.0}, **plain)
    first = load_network(trained(path))
    identity = load_checkpoint(tmp_path / "out" / "net.train" / "checkpoint.safetensors").identity
    added = {"network.skip", "loss.pixel_weight", "training.halve_every"}
    assert not added & identity.keys()  # it is that of a training from before these keys
    with pytest.raises(ConfigError, match=r"differs in network\.skip"):
        trained(path, "network.skip=bicubic", "training.steps=3", force=True)
    assert (first.spec.skip, first.spec.output) == ("none", "tanh")
    assert load_network(trained(path, "training.steps=3")).notes["steps"] == "3"


def test_what_is_refused(make, tmp_path):
    """Each with one sentence that names the place; nothing is left behind."""
    path = make()
    empty = tmp_path / "empty"
    empty.mkdir()
    for overrides, error in {
        (f"photographs={empty}",): "empty has no usable photograph",
        ("photographs=nowhere",): "no such file",
        ("photographs=style.png",): "is not a folder",
        ("training.crop_px=112",): "all 3 were skipped",
        ("styles=[]",): "needs a style",
        ("output=net.png",): "is a .safetensors file",
        ("training.crop_px=70",): "multiple of 16",
        ("task=super-resolution",): "has no styles",
        ("loss.content=pixels",): "use features",
        ("loss.pixel_weight=1",): "remove pixel_weight",
        ("network.skip=bicubic",): "remove skip",
        (f"work_dir={tmp_path / 'photographs' / 'state'}",): "inside the folder of the photographs",
        ("network.norm=batch", "styles=[{image: style.png}, {image: style.png}]"): "need norm: instance",
        ("styles=[{image: style.png}, {image: style.png}]",): "two styles have the name 'style'",
        ("loss_network.style_layers={conv9_1: 1}",): "unknown layer",
    }.items():
        with pytest.raises(ConfigError, match=error):
            trained(path, *[o.replace("style.png", str(tmp_path / "style.png")) for o in overrides])
        assert not (tmp_path / "out").exists(), overrides
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis.txt"):
        trained(path, f"work_dir={tmp_path / 'mine'}")
    (tmp_path / "taken.safetensors").write_bytes(b"another file")
    with pytest.raises(ConfigError, match="was not written by this training"):
        trained(path, f"output={tmp_path / 'taken.safetensors'}")


def test_a_panorama_as_a_sample_and_a_style_that_is_a_line(make, tmp_path):
    """A sample that the network cannot take would end a training of hours in a traceback."""
    write_image(tmp_path / "wide.png", 2, 700)
    path = make(samples=["wide.png"], training={**TINY["training"], "steps": 1})
    assert trained(path).exists()
    super_resolution = {"task": "super-resolution", "styles": None, "loss": {"content": "pixels"}}
    path = make(samples=["wide.png"], training={**TINY["training"], "steps": 1}, **super_resolution)
    assert trained(path, f"output={tmp_path / 'sr.safetensors'}", f"work_dir={tmp_path / 'sr'}").exists()
    path = make(styles=[{"image": "style.png", "size": 80}, {"image": "wide.png", "size": 80, "name": "line"}])
    with pytest.raises(ConfigError, match=r"styles.1: wide.png has 80×1 px at size 80, but the layers .* need 8 px"):
        trained(path, f"work_dir={tmp_path / 'other'}", f"output={tmp_path / 'other.safetensors'}")
    assert not (tmp_path / "other").exists()


def test_another_config_another_run_and_damage_are_found(make, tmp_path):
    """A resume needs the same config and inputs, an unlocked folder, and an intact checkpoint."""
    path, work_dir = make(training={**TINY["training"], "steps": 2}), tmp_path / "out" / "net.train"
    output = trained(path)
    with pytest.raises(ConfigError, match=r"differs in training\.learning_rate"):
        trained(path, "training.learning_rate=0.01", "training.steps=3")  # --force, which is no remedy, is not named
    with pytest.raises(ConfigError, match="has 2 steps already"):
        trained(path, "training.steps=1")
    with RunLock(work_dir), pytest.raises(LockedError):
        trained(path, "training.steps=3")
    write_image(tmp_path / "photographs" / "new.png", 80, 80)
    with pytest.raises(ConfigError, match="differs in the photographs"):
        trained(path, "training.steps=3", force=True)
    (tmp_path / "photographs" / "new.png").unlink()
    output.unlink()
    checkpoint = work_dir / "checkpoint.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(DamagedStateError, match="was changed after it was written"):
        trained(path, "training.steps=3")
