"""The training behind distill_network.py: warm start, losses, steps and scores.

The student starts as the teacher with fewer channels: each layer keeps the channels that best predict the others
linearly, and its convolution is fitted again, by ridge regression, to the retained channels of the layer before.
Then it is trained. At every convolution a linear map, discarded afterwards, predicts the teacher's features from the
student's; the loss compares features and Gram matrices. At some layers a second teacher can replace the first.

Axes in names: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import InputError
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import CONV_NAMES, LAYER_BY_NAME
from pipeline.network.padding import PADDINGS
from pipeline.network.vgg import Network
from pipeline.network.weights_file import conv_key
from tools.distill.training_images import make_batch, read_image, to_batch

State = dict[str, Tensor]
HELD_OUT_EVERY = 10  # in the order of their names, the first, eleventh, … image are for scores only
WARM_START_BATCHES = 20
RIDGE = 1e-5  # relative to the mean energy of the regressors
WARM_UP_STEPS = 100
INPUT_KEYS = ("input.weight", "input.bias")


@dataclass(frozen=True)
class Settings:
    """Everything that determines the result; a checkpoint can be resumed only with equal settings."""

    teacher_sha256: str
    widths: tuple[int, ...]
    steps: int
    batch: int
    crop_px: int
    generated: float
    learning_rate: float
    gram_weight: float
    teacher_padding: str
    paddings: tuple[str, ...]
    pooling: str
    seed: int
    images: int
    deep_teacher_sha256: str = ""
    deep_layers: tuple[str, ...] = ()
    deep_padding: str = "zeros"
    distinct_batches: int = 0  # 0: a new batch every step


@dataclass(frozen=True)
class Teacher:
    """A network whose features the student learns at the layers `taps`."""

    state: State
    network: Network
    padding: str
    taps: tuple[str, ...]


@dataclass
class Training:
    """The state of a training, which a checkpoint stores."""

    step: int
    student: State
    maps: State
    optimizer: torch.optim.Adam


class Distillation:
    """Trains students with a teacher, images and settings."""

    def __init__(
        self,
        settings: Settings,
        teacher_state: Mapping[str, Tensor],
        images: list[Path],
        device: str,
        deep_state: Mapping[str, Tensor] | None = None,
    ):
        """Compute what stays fixed during a training: the teachers' statistics and the held-out images.

        `deep_state`: the weights of the second teacher, if `settings.deep_layers` names layers to learn from it.
        Raises InputError if it lacks one of them.
        """
        self.settings = settings
        self.device = device
        self.train_images = [path for index, path in enumerate(images) if index % HELD_OUT_EVERY]
        self.held_out_images = images[::HELD_OUT_EVERY]
        deep = settings.deep_layers
        taps = tuple(name for name in layers_of(teacher_state) if name not in deep)
        self.teachers = [self.teacher(teacher_state, settings.teacher_padding, taps)]
        if deep_state is not None:
            if missing := set(deep).difference(layers_of(deep_state)):
                raise InputError(f"the second teacher has no {', '.join(sorted(missing))}. Correct --deep-layers.")
            self.teachers.append(self.teacher(deep_state, settings.deep_padding, deep))
        self.taps = tuple(name for name in CONV_NAMES if name in (*taps, *deep))
        self.kept: dict[int, tuple[Tensor, State]] = {}  # batches by their numbers, with their targets
        warm_batches = (self.batch((1, number)) for number in range(WARM_START_BATCHES))
        self.warm_batches = [(pixels, self.targets(pixels)) for pixels in warm_batches]
        moments = [second_moments(targets) for _, targets in self.warm_batches]
        self.energy = {tap: mean_of([moment[tap] for moment in moments]) for tap in self.taps}

    def teacher(self, state: Mapping[str, Tensor], padding: str, taps: tuple[str, ...]) -> Teacher:
        floats = {key: value.float() for key, value in state.items()}
        return Teacher(floats, self.network(floats, padding), padding, taps)

    def network(self, state: Mapping[str, Tensor], padding: str) -> Network:
        """The network of a state. Gradients flow to the tensors of `state`, so every step builds it again."""
        pooling = self.settings.pooling
        return Network(state, padding=padding, pooling=pooling, dtype=torch.float32, device=self.device)

    def batch(self, key: tuple[int, int]) -> Tensor:
        """The batch of `key`, which is (kind, number), (B, 3, H, W)."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, *key])
        images = make_batch(rng, self.train_images, settings.batch, settings.crop_px, settings.generated)
        return to_batch(images, self.device)

    def features(self, network: Network, pixels_BCHW: Tensor) -> State:
        """Features of whole images at every tap (convolution whose features are compared)."""
        return all_features(network, pixels_BCHW, self.taps)

    @torch.no_grad()
    def targets(self, pixels_BCHW: Tensor) -> State:
        """The features of whole images that the student learns, at every tap from its teacher."""
        found = [all_features(teacher.network, pixels_BCHW, teacher.taps) for teacher in self.teachers]
        return {tap: value for features in found for tap, value in features.items()}

    def training_batch(self, step: int) -> tuple[Tensor, State]:
        """The images of a step and their targets, which are kept in memory if the training repeats its batches."""
        repeat_after = self.settings.distinct_batches
        if not repeat_after:
            pixels = self.batch((0, step))
            return pixels, self.targets(pixels)
        number = step % repeat_after
        if number not in self.kept:
            pixels = self.batch((0, number))
            # Half the memory; bfloat16 has float32's range, which large features need.
            self.kept[number] = pixels, {tap: value.bfloat16() for tap, value in self.targets(pixels).items()}
        pixels, targets = self.kept[number]
        return pixels, {tap: value.float() for tap, value in targets.items()}

    def start(self) -> Training:
        """A warm-started student with its maps and optimiser."""
        student = warm_start(self)
        maps = fit_maps(self, student)
        return self.training(0, student, maps)

    def training(self, step: int, student: State, maps: State) -> Training:
        """Make student and maps trainable; the learning rate of a tensor is proportional to its root mean square."""
        trained = [value.requires_grad_() for key, value in student.items() if key not in INPUT_KEYS]
        trained += [value.requires_grad_() for value in maps.values()]
        groups = [{"params": [value], "size": max(1e-3, rms(value))} for value in trained]
        return Training(step, student, maps, torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99)))

    def train_step(self, training: Training) -> float:
        """One step of Adam; returns the loss."""
        settings = self.settings
        rate = settings.learning_rate * rate_factor(training.step, settings.steps)
        for group in training.optimizer.param_groups:
            group["lr"] = rate * group["size"]
        padding = np.random.default_rng([settings.seed, 2, training.step]).choice(settings.paddings)
        pixels, targets = self.training_batch(training.step)
        features = self.features(self.network(training.student, padding), pixels)
        losses = [self.tap_loss(tap, training.maps[tap], features[tap], targets[tap]) for tap in self.taps]
        loss = torch.stack(losses).mean()
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.step += 1
        return float(loss.detach())

    def tap_loss(self, tap: str, map_CC: Tensor, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Unexplained part of the teacher's variance, plus the squared relative error of the mean Gram matrices.

        Half of the first term is over all channels together, half is the mean over channels of their own unexplained
        parts, because weak channels carry the colours. Both terms follow from three small matrices, the means of ssᵀ,
        tsᵀ and ttᵀ over positions: mean (Ms − t)² of channel k is (M·ssᵀ·Mᵀ)ₖₖ − 2·(M·(tsᵀ)ᵀ)ₖₖ + (ttᵀ)ₖₖ.
        """
        energy_CC, mean_C = self.energy[tap]
        variance_C = (energy_CC.diagonal() - mean_C.square()).clamp_min(0)
        floor = 0.1 * variance_C.mean()  # channels without variance get no weight
        weight_C = (1 / variance_C.sum() + 1 / ((variance_C + floor) * len(variance_C))) / 2
        gram_BCC, target_BCC = map_CC @ grams(student_BCHW) @ map_CC.T, grams(teacher_BCHW)
        cross_BCC = teacher_BCHW.flatten(2) @ student_BCHW.flatten(2).transpose(1, 2) / student_BCHW[0, 0].numel()
        errors_BC = (gram_BCC + target_BCC).diagonal(dim1=1, dim2=2) - 2 * (map_CC * cross_BCC).sum(2)
        # A tenth of the mean energy keeps flat images, whose matrices are nearly 0, from dominating the loss.
        scale = target_BCC.square().sum((1, 2)) + 0.1 * energy_CC.square().sum()
        gram_error = (gram_BCC - target_BCC).square().sum((1, 2)) / scale
        return (errors_BC @ weight_C + self.settings.gram_weight * gram_error).mean()

    def scores(self, student: State, maps: State, paddings: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Explained variance by the student's padding and the tap, on the held-out images at their full size."""
        frozen = {key: value.detach() for key, value in student.items()}
        networks = {padding: self.network(frozen, padding) for padding in paddings}
        images = (to_batch([read_image(path)], self.device) for path in self.held_out_images)
        return explained_variance(networks, maps, self.targets, images)


def layers_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The convolutions that a state has, shallowest first."""
    return tuple(name for name in CONV_NAMES if conv_key(name, set(state)))


def all_features(network: Network, pixels_BCHW: Tensor, taps: tuple[str, ...]) -> State:
    """Features of whole images at `taps`, after ReLU."""
    height, width = pixels_BCHW.shape[2:]
    whole = Rect(0, height, 0, width)
    feature_maps = network.features(pixels_BCHW, whole, (height, width), set(taps), whole)
    return {feature_map.layer.name: feature_map.features_1CHW for feature_map in feature_maps}


def grams(features_BCHW: Tensor) -> Tensor:
    """The mean Gram matrix of every image, (B, C, C)."""
    flat = features_BCHW.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def second_moments(features: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean of φφᵀ and of φ over all positions of a batch, per tap."""
    return {tap: (grams(value).mean(0), value.mean((0, 2, 3))) for tap, value in features.items()}


def mean_of(moments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([energy for energy, _ in moments]).mean(0), torch.stack([mean for _, mean in moments]).mean(0)


def rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def rate_factor(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to a hundredth."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def explained_variance(
    students: Mapping[str, Network], maps: State, teachers: Callable[[Tensor], State], images_BCHW: Iterator[Tensor]
) -> dict[str, dict[str, float]]:
    """1 − Σ(mapped student − target)² / Σ(target − its mean)², over all channels, positions and images.

    By the student's name and the tap. `teachers` gives the targets of an image.
    """
    squares, sums, count = ({tap: torch.zeros((), dtype=torch.float64) for tap in maps} for _ in range(3))
    errors = {name: dict.fromkeys(maps, torch.zeros((), dtype=torch.float64)) for name in students}
    for pixels in images_BCHW:
        targets = teachers(pixels)
        for tap, target in targets.items():
            squares[tap] = squares[tap] + target.square().sum(dtype=torch.float64).cpu()
            sums[tap] = sums[tap] + target.sum((0, 2, 3), dtype=torch.float64).cpu()
            count[tap] = count[tap] + target.shape[0] * target.shape[2] * target.shape[3]
        for name, student in students.items():
            for tap, features in all_features(student, pixels, tuple(maps)).items():
                error = F.conv2d(features, maps[tap][:, :, None, None]) - targets[tap]
                errors[name][tap] = errors[name][tap] + error.square().sum(dtype=torch.float64).cpu()
    variances = {tap: (squares[tap] - (sums[tap].square() / count[tap]).sum()).clamp_min(1e-30) for tap in maps}
    return {name: {tap: float(1 - of[tap] / variances[tap]) for tap in maps} for name, of in errors.items()}


def choose_channels(energy_CC: Tensor, count: int) -> list[int]:
    """`count` channels that best predict the others linearly (greedy column subset selection)."""
    rest = energy_CC.double().clone()
    floor = 1e-9 * rest.diagonal().max()
    chosen: list[int] = []
    for _ in range(count):
        gain = rest.square().sum(0) / rest.diagonal().clamp_min(floor)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        rest = rest - rest[:, [best]] @ rest[[best]] / rest[best, best].clamp_min(floor)
    return sorted(chosen)


def solve_ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """The matrix M that minimises ‖M·s − t‖², from Σ s·sᵀ and Σ t·sᵀ."""
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, cross.T).T


@torch.no_grad()
def warm_start(task: Distillation) -> State:
    """The teachers with fewer channels, every convolution fitted to the retained channels of the layer before."""
    widths = task.settings.widths
    first = task.teachers[0].state
    student = {key: first[key].clone() for key in INPUT_KEYS if key in first}
    for name in task.taps:
        (teacher,) = (teacher for teacher in task.teachers if name in teacher.taps)
        stem = conv_key(name, set(teacher.state))
        weight, bias = (teacher.state[f"{stem}.{part}"].to(task.device) for part in ("weight", "bias"))
        count = min(widths[int(name[4]) - 1], len(bias))
        channels = choose_channels(task.energy[name][0], count) if count < len(bias) else list(range(count))
        weight, bias = weight[channels], bias[channels]
        if name != task.taps[0]:
            weight, bias = fit_convolution(task, student, name, teacher, (weight, bias))
        student[f"{name}.weight"], student[f"{name}.bias"] = weight.contiguous(), bias.contiguous()
    return student


def fit_convolution(
    task: Distillation, student: State, name: str, teacher: Teacher, convolution: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The 3×3 convolution of the student's features closest to the teacher's of its own features, before ReLU."""
    settings = task.settings
    network = task.network(student, settings.paddings[-1])
    before = CONV_NAMES[CONV_NAMES.index(name) - 1]
    gram: Tensor | None = None
    cross: Tensor | None = None
    for pixels, targets in task.warm_batches:
        own = targets if before in teacher.taps else all_features(teacher.network, pixels, (before,))
        target = F.conv2d(input_of(name, own[before], teacher.padding, settings.pooling), *convolution)
        features = all_features(network, pixels, (before,))[before]
        windows = F.unfold(input_of(name, features, settings.paddings[-1], settings.pooling), 3)
        rows = torch.cat([windows, torch.ones_like(windows[:, :1])], 1).transpose(0, 1).flatten(1)
        target = target.flatten(2).transpose(0, 1).flatten(1)
        gram = (rows @ rows.T).double() + (0 if gram is None else gram)
        cross = (target @ rows.T).double() + (0 if cross is None else cross)
    assert gram is not None and cross is not None
    fitted = solve_ridge(gram, cross).float()
    return fitted[:, :-1].reshape(len(target), -1, 3, 3), fitted[:, -1]


def input_of(name: str, features_BCHW: Tensor, padding: str, pooling: str) -> Tensor:
    """The input of convolution `name` (not the first): the features of the one before, pooled and padded."""
    before = CONV_NAMES[CONV_NAMES.index(name) - 1]
    if LAYER_BY_NAME[before].stride != LAYER_BY_NAME[name].stride:
        features_BCHW = (F.max_pool2d if pooling == "max" else F.avg_pool2d)(features_BCHW, 2)
    return PADDINGS[padding](features_BCHW, (False,) * 4)


@torch.no_grad()
def fit_maps(task: Distillation, student: State) -> State:
    """The linear maps from the student's features to the teachers' at every tap, by ridge regression."""
    network = task.network(student, task.settings.paddings[-1])
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for pixels, targets in task.warm_batches:
        features = task.features(network, pixels)
        for tap in task.taps:
            s, t = (value[tap].transpose(0, 1).flatten(1) for value in (features, targets))
            gram, cross = (s @ s.T).double(), (t @ s.T).double()
            old = sums.get(tap, (0, 0))
            sums[tap] = (gram + old[0], cross + old[1])
    return {tap: solve_ridge(gram, cross).float() for tap, (gram, cross) in sums.items()}
