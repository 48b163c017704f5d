"""A training step by step: the network, Adam, and the losses. Every step depends on the state and its number alone.

Axes in names: B batch, C channels, H rows, W columns, S styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.core.errors import ConfigError, DamagedStateError, DeviceMemoryError
from pipeline.feedforward.network import TransformNetwork
from pipeline.feedforward.objective import Losses, LossWeights, TrainingObjective
from pipeline.feedforward.photographs import lowered
from pipeline.feedforward.spec import TransformSpec
from pipeline.network.vgg import Network

_WEIGHT, _FIRST, _SECOND = "weight/", "adam.m/", "adam.v/"
_BLOCKS = {"style": 5, "super-resolution": 4}
# Super-resolution keeps the colours and the contrast of its input, which instance norm would take away.
_NORM = {"style": "instance", "super-resolution": "batch"}


def spec_of(config: TrainConfig) -> TransformSpec:
    """The network that a config trains."""
    network, is_style = config.network, config.task == "style"
    skip = network.skip or ("none" if is_style else "bicubic")
    return TransformSpec.model_validate(
        {
            "task": config.task,
            "factor": 1 if is_style else config.factor,
            "width": network.width,
            "blocks": _BLOCKS[config.task] if network.blocks is None else network.blocks,
            "norm": network.norm or _NORM[config.task],
            "upsampling": network.upsampling,
            "skip": skip,
            "output": "tanh" if skip == "none" else "linear",
            **({"styles": config.style_names} if is_style else {}),
        }
    )


def weights_of(config: TrainConfig) -> LossWeights:
    """What the losses of a config compare."""
    loss, network, is_style = config.loss, config.loss_network, config.task == "style"
    return LossWeights(
        loss.kind,
        loss.content_weight,
        loss.style_weight if is_style else 0.0,
        loss.tv_weight,
        network.content_layers if loss.content == "features" else {},
        network.style_layers if is_style else {},
        loss.pixel_weight,
    )


@dataclass(frozen=True)
class Batch:
    """What a step needs of the photographs: the network's input and what its output is compared with, (B, 3, H, W)."""

    input_BCHW: Tensor
    target_BCHW: Tensor


class Trainer:
    """The state of a training: the network, Adam's moments and the number of steps so far."""

    def __init__(
        self,
        config: TrainConfig,
        loss_network: Network,
        styles: Sequence[Tensor],
        device: str = "cpu",
        autocast: bool = False,
    ):
        """`styles`: the style pictures, (1, 3, H, W), 0..255. The first weights depend on the seed alone."""
        self._config, self._device, self._autocast = config, torch.device(device), autocast
        self.objective = TrainingObjective(
            loss_network, weights_of(config), [[picture_1CHW.to(self._device)] for picture_1CHW in styles]
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = TransformNetwork(spec_of(config))
        if self.network.spec.skip != "none":
            for parameter in self.network.layers["last"].parameters():
                nn.init.zeros_(parameter)  # it begins as the enlargement that it adds to
        self.network.to(self._device).train()
        # not fused, not foreach: each parameter by itself, so that the order of the sums is fixed
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.training.learning_rate, foreach=False)
        self.step = 0

    def batch_of(self, crops_BCHW: Tensor) -> Batch:
        """Input and target of a step, from its crops."""
        crops = crops_BCHW.to(self._device)
        if self._config.task == "style":
            return Batch(crops, crops)
        return Batch(lowered(crops, self._config.factor), crops)

    def train_step(self, batch: Batch) -> Losses:
        """One step of Adam. Raises ConfigError if the losses are not finite, DeviceMemoryError."""
        try:
            losses = self._gradients(batch)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self._device} is out of memory for {len(batch.input_BCHW)} crops of {self._config.crop_px} px. Use "
                "a smaller training.batch or training.crop_px, in another work_dir."
            ) from error
        if not np.isfinite(losses.objective):
            raise ConfigError(
                f"the losses are not finite at step {self.step + 1:,}: the training diverged. Use a smaller "
                "training.learning_rate, in another work_dir."
            )
        schedule = self._config.training
        halvings = self.step // schedule.halve_every if schedule.halve_every else 0
        for group in self.optimizer.param_groups:  # by the step alone: a resume continues with the same rate
            group["lr"] = schedule.learning_rate * 0.5**halvings
        self.optimizer.step()
        self.step += 1
        return losses

    def _gradients(self, batch: Batch) -> Losses:
        """The losses of a batch, whose gradients are those of the parameters afterwards."""
        styles = self.styles_of(self.step, len(batch.input_BCHW))
        self.optimizer.zero_grad()
        output_BCHW = self._run(batch.input_BCHW, styles)
        losses, gradient_BCHW = self.objective.evaluate(output_BCHW.detach(), batch.target_BCHW, styles)
        torch.autograd.backward(output_BCHW, gradient_BCHW)
        return losses

    def styles_of(self, step: int, batch: int) -> list[int]:
        """The style of each picture of a step: each style as often."""
        number = max(1, len(self._config.styles))
        return [(step * batch + index) % number for index in range(batch)]

    def _run(self, input_BCHW: Tensor, styles: Sequence[int]) -> Tensor:
        """The network's output, float32."""
        number = len(self.network.spec.styles)
        style_BS = F.one_hot(torch.tensor(list(styles)), number).float().to(self._device)
        with self._precision():
            output: Tensor = self.network(input_BCHW, style_BS)
        return output.float()

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    @torch.no_grad()
    def result(self, picture_1CHW: Tensor, style: int) -> Tensor:
        """The network's picture of one input, 0..255, clamped, on the CPU; as `apply` shows it."""
        self.network.eval()
        try:
            return self._run(picture_1CHW.to(self._device), [style]).clamp(0, 255).cpu()
        finally:
            self.network.train()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside its number."""
        found = {_WEIGHT + key: value for key, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            state = self.optimizer.state.get(parameter)
            if state:
                found |= {_FIRST + name: state["exp_avg"], _SECOND + name: state["exp_avg_sq"]}
        return found

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps. Raises DamagedStateError if the tensors are not of this network."""
        weights = {key.removeprefix(_WEIGHT): value for key, value in tensors.items() if key.startswith(_WEIGHT)}
        try:
            self.network.load_state_dict(weights)
            for name, parameter in self.network.named_parameters() if step else ():
                moments = {"exp_avg": tensors[_FIRST + name], "exp_avg_sq": tensors[_SECOND + name]}
                state = {key: value.to(self._device).clone() for key, value in moments.items()}
                # Adam's own loading would convert the step, which it keeps as a number on the CPU
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
        except (KeyError, RuntimeError) as error:
            raise DamagedStateError(
                f"the checkpoint does not hold this network ({error}). Delete the folder to train from the start."
            ) from error
        self.step = step
