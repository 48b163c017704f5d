"""The `train` command: trains an image transformation network, or resumes that. The computations are in `feedforward`.

The checkpoint is the state: after a kill, the steps since then are computed again, with the same crops and bits.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrainConfig, result_fields
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, InputError, Stopped, storage
from pipeline.core.events import Note, Sink, TrainingDone, TrainingStep, ignore
from pipeline.core.files import taken
from pipeline.core.text import count, shown
from pipeline.core.vgg_layers import min_side_px
from pipeline.feedforward.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.feedforward.network_file import load_network, save_network
from pipeline.feedforward.photographs import Crops, Photograph, find_photographs
from pipeline.feedforward.samples import fitted, preview_text, read_tensor, sample_pictures, sample_sheet
from pipeline.feedforward.train_folder import TrainFolder, locked_train_folder
from pipeline.feedforward.training import Trainer, spec_of
from pipeline.images import ImageHeader, read_header
from pipeline.network import NetworkSpec, WeightsSource, find_weights, sha256_of
from pipeline.network.cache import get_network
from pipeline.plan import resolve_device
from pipeline.plan.device import Device, default_threads
from pipeline.rundir.process_settings import process_settings

# Steps of which the file's metadata give the mean losses.
_LAST_STEPS = 100
_IDENTITY = "training"  # key of the notes in the trained file: the digest of what decides its weights


@process_settings()
def train(
    config: TrainConfig, *, force: bool = False, sink: Sink = ignore, stop: threading.Event | None = None
) -> Path:
    """Train the network of `config`, or resume an earlier training of the same config; returns the network's path.

    `force`: overwrite an output that this training did not write. `stop`: set it from any thread to stop after a step.
    Raises the errors of errors.py; after Stopped, or any crash, the same call resumes.
    """
    started, cancel = time.monotonic(), CancelToken(stop)
    device = resolve_device(config.compute.device)
    styles = [read_header(style.image, config.limits) for style in config.styles]
    photographs = find_photographs(config.photographs, config.crop_px, config.limits, sink, cancel)
    network = config.loss_network
    weights = find_weights(network.name, network.weights, config.seed, sink, cancel)
    _check_layers(config, weights)
    _check_styles(config, styles)
    identity = _identity(config, device, weights, photographs, [style.path for style in styles], cancel)
    _refuse_foreign_output(config, identity, force)
    sink(Note(f"{count(len(photographs), 'photograph')}, {device.label}"))
    with storage(config.work_dir), locked_train_folder(config.work_dir) as folder:
        training = _Training(config, device, weights, photographs, identity, folder, sink, cancel)
        training.run()
        training.write_network()
    sink(TrainingDone(str(config.output), time.monotonic() - started, str(config.work_dir)))
    return config.output


def _check_layers(config: TrainConfig, weights: WeightsSource) -> None:
    """Raise ConfigError if the loss network lacks a layer of the losses."""
    network = config.loss_network
    missing = {*network.content_layers, *network.style_layers} - set(weights.widths)
    if missing:
        raise ConfigError(
            f"loss_network: {weights.path} ends before {min(missing)}. Use other layers, or a network that has it."
        )


def _check_styles(config: TrainConfig, headers: Sequence[ImageHeader]) -> None:
    """Raise ConfigError for a style that is too narrow for the layers of the losses at the size it is compared at."""
    least_px = min_side_px(config.loss_network.style_layers, config.loss_network.padding)
    for index, (style, header) in enumerate(zip(config.styles, headers, strict=True)):
        picture = fitted(Photograph(style.image, header.width_px, header.height_px, 0), style.size)
        if min(picture.width_px, picture.height_px) < least_px:
            raise ConfigError(
                f"styles.{index}: {style.image.name} has {picture.width_px}×{picture.height_px} px at size "
                f"{style.size}, but the layers of the losses need {least_px} px on each side. Use a larger size, or a "
                "part of the image."
            )


def _identity(
    config: TrainConfig,
    device: Device,
    weights: WeightsSource,
    photographs: Sequence[Photograph],
    styles: Sequence[Path],
    cancel: CancelToken,
) -> dict[str, Any]:
    """What decides the weights, by the words that a refused resume is told in."""
    names = [f"{photo.path.relative_to(config.photographs).as_posix()}\0{photo.size_bytes}" for photo in photographs]
    return {
        **result_fields(config),
        "compute.device": device.name,
        "compute.dtype": _dtype(config, device),
        **({} if (skip := spec_of(config).skip) == "none" else {"network.skip": skip}),  # trainings before it had none
        "the photographs": f"{len(names)}, {hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:16]}",
        "the style images": [sha256_of(path, cancel) for path in styles],
        "the weights of the loss network": weights.sha256,
    }


def _dtype(config: TrainConfig, device: Device) -> str:
    return {"auto": "float32" if device.name == "cpu" else "bfloat16"}.get(config.compute.dtype, config.compute.dtype)


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _earlier(config: TrainConfig, folder: TrainFolder, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint of an earlier call. Raises ConfigError if it is of another training."""
    if not taken(folder.checkpoint):
        return None
    checkpoint = load_checkpoint(folder.checkpoint)
    now = json.loads(json.dumps(identity))
    changed = [key for key in {**checkpoint.identity, **now} if checkpoint.identity.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"{folder.path}: holds a training that differs in {', '.join(map(shown, changed))}, so it cannot "
            "be resumed with this config. Restore them, or choose another work_dir."
        )
    if checkpoint.step > config.training.steps:
        raise ConfigError(
            f"training.steps: {config.training.steps:,}, but {folder.path} has {checkpoint.step:,} steps "
            "already. Use as many, or choose another work_dir."
        )
    return checkpoint


def _refuse_foreign_output(config: TrainConfig, identity: Mapping[str, Any], force: bool) -> None:
    """Raise ConfigError if the output is a file that this training did not write."""
    output = config.output
    if force or not taken(output):
        return
    try:
        ours = load_network(output).notes.get(_IDENTITY) == _digest(identity)
    except InputError:
        ours = False
    if not ours:
        _earlier(config, TrainFolder(config.work_dir), identity)  # where keys differ, --force is no remedy
        raise ConfigError(
            f"output {output}: exists, and was not written by this training. Choose another output, or use --force to "
            "overwrite it."
        )


@dataclass
class _Training:
    """A training in this process, from its start or resume to the file of the network."""

    config: TrainConfig
    device: Device
    weights: WeightsSource
    photographs: Sequence[Photograph]
    identity: Mapping[str, Any]
    folder: TrainFolder
    sink: Sink
    cancel: CancelToken
    _saved_step: int = 0

    def __post_init__(self) -> None:
        checkpoint, threads = _earlier(self.config, self.folder, self.identity), self.config.compute.threads
        self.threads = default_threads(0) if threads == "auto" else threads
        if checkpoint is not None:
            self.threads = checkpoint.threads  # on which the last bits depend
        self.trainer = self._trainer()
        if checkpoint is not None:
            self.trainer.restore(checkpoint.step, checkpoint.tensors)
            self._saved_step = checkpoint.step
            self.sink(Note(f"resuming after step {checkpoint.step:,}"))
        self._samples: list[Tensor] = sample_pictures(self.config, self.photographs, self.cancel)

    def _trainer(self) -> Trainer:
        network, dtype = self.config.loss_network, _dtype(self.config, self.device)
        spec = NetworkSpec(
            self.weights,
            network.padding,
            network.pooling,
            dtype,
            self.device.name,
            self.threads,
            pooling_scale=network.pooling_scale,
        )
        styles = []
        for style in self.config.styles:
            header = read_header(style.image, self.config.limits)
            if max(header.width_px, header.height_px) < style.size:
                self.sink(Note(f"{style.image.name} is enlarged to {style.size} px (styles.size)"))
            picture = Photograph(style.image, header.width_px, header.height_px, 0)
            styles.append(read_tensor(fitted(picture, style.size), self.cancel))
        return Trainer(self.config, get_network(spec), styles, self.device.name, dtype == "bfloat16")

    def run(self) -> None:
        """Train up to the last step. Raises Stopped after a checkpoint."""
        config, steps = self.config, self.config.training.steps
        self.folder.begin_losses(self.trainer.step)
        crops = Crops(self.photographs, config.crop_px, config.seed, config.task == "style", self.sink)
        begun, first = time.monotonic(), self.trainer.step
        with ThreadPoolExecutor(1, "photographs") as reader:
            pending = reader.submit(crops.batch, self.trainer.step, config.training.batch)
            while self.trainer.step < steps:
                if self.cancel.is_set():
                    self._checkpoint()
                    raise Stopped
                start = time.monotonic()
                batch = self.trainer.batch_of(pending.result())
                pending = reader.submit(crops.batch, self.trainer.step + 1, config.training.batch)
                losses = self.trainer.train_step(batch)
                step, now = self.trainer.step, time.monotonic()
                self.folder.append_losses(step, losses, now - start)
                eta = (now - begun) / (step - first) * (steps - step)
                self.sink(TrainingStep(step, steps, losses.objective, losses.content, losses.style, eta))
                if step % config.training.checkpoint_every == 0:
                    self._checkpoint()
                if config.training.sample_every and step % config.training.sample_every == 0:
                    self._sample()
        self._checkpoint()

    def _checkpoint(self) -> None:
        step = self.trainer.step
        if step == self._saved_step:
            return
        self.folder.sync_losses()
        save_checkpoint(self.folder.checkpoint, Checkpoint(step, self.threads, self.identity, self.trainer.tensors()))
        self._saved_step = step

    def _sample(self) -> None:
        self.folder.write_sample(self.trainer.step, sample_sheet(self.trainer, self.config, self._samples))

    def write_network(self) -> None:
        """Write the trained network with its config, its provenance and a preview."""
        self._sample()
        with storage(self.config.output):
            self.config.output.parent.mkdir(parents=True, exist_ok=True)
        save_network(self.config.output, self.trainer.network, self._notes())

    def _notes(self) -> dict[str, str]:
        named = {key: value for key, value in self.identity.items() if not key.startswith("the ")}
        notes = {
            _IDENTITY: _digest(self.identity),
            "software": f"pipeline {version('pipeline')}, torch {torch.__version__}",
            "steps": str(self.trainer.step),
            "config": json.dumps(named),
            "styles": json.dumps(dict(zip(self.config.style_names, self.identity["the style images"], strict=True))),
            "photographs": self.identity["the photographs"],
            "loss_network": f"{self.config.loss_network.name}, SHA-256 {self.weights.sha256}",
            "preview": preview_text(self.trainer, self.config, self._samples[0]),
        }
        if recent := self.folder.last_losses(_LAST_STEPS):
            means = {name: sum(vars(losses)[name] for losses in recent) / len(recent) for name in vars(recent[0])}
            notes["losses"] = json.dumps({f"mean of the last {count(len(recent), 'step')}": means})
        return notes
