"""What the update changes: the LoRA, AdamW's state, float16's loss scale, and how far the run is."""

import dataclasses
from dataclasses import dataclass, field

import torch

from fdfo.config.train_options import TrainConfig
from fdfo.evaluation.health import StepStats
from fdfo.model.flow_model import FlowModel
from fdfo.run_folder.save_checkpoint import TrainingState
from rewards.spread import Spread


@dataclass
class LossScale:
    """Factor on the loss that keeps float16 gradients above underflow; halved on overflow, doubled after calm steps."""

    enabled: bool
    value: float
    calm_steps: int = 0

    GROWTH_INTERVAL = 200
    LARGEST = 2.0**28

    @classmethod
    def start(cls, precision: str) -> "LossScale":
        """Return the first scale: only float16 needs one; otherwise it is 1 and stays 1."""
        return cls(True, cls.LARGEST) if precision == "fp16" else cls(False, 1.0)

    def overflowed(self) -> bool:
        """Lower the scale; return False if it cannot go lower, so that the gradient itself is not finite."""
        self.calm_steps = 0
        if not self.enabled or self.value <= 1.0:
            return False
        self.value /= 2
        return True

    def succeeded(self) -> None:
        """Count a calm step, and raise the scale after enough of them."""
        self.calm_steps += 1
        if self.enabled and self.value < self.LARGEST and self.calm_steps >= self.GROWTH_INTERVAL:
            self.value, self.calm_steps = self.value * 2, 0


@dataclass
class Progress:
    """How far a run is. A run that was stopped inside an epoch samples the epoch again and skips the steps done."""

    epochs: int = 0  # whole ones
    steps: list[StepStats] = field(default_factory=list)  # optimizer steps done of the next epoch
    samples: int = 0  # samples of all optimizer steps so far; 0 before the first update
    epoch_start: list[torch.Tensor] = field(default_factory=list)  # the LoRA that samples the next epoch, on the CPU
    spread: Spread = field(default_factory=Spread)  # of the scorers' differences, over the whole epochs


@dataclass
class Learner:
    """What the update changes."""

    model: FlowModel
    optimizer: torch.optim.AdamW
    scale: LossScale
    progress: Progress

    @classmethod
    def start(cls, model: FlowModel, config: TrainConfig) -> "Learner":
        """Return the learner of a run's start, with AdamW for the model's LoRA (docs/method.md 4)."""
        optimizer = torch.optim.AdamW(
            model.trainable(),
            lr=config.train.learning_rate,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            weight_decay=config.train.adam_weight_decay,
            eps=config.train.adam_epsilon,
        )
        return cls(model, optimizer, LossScale.start(config.precision), Progress())

    def state(self) -> TrainingState:
        """Return all but the LoRA itself, as plain values and tensors on the CPU under the parameters' names."""
        progress, moments = self.progress, {}
        for name, parameter in self.model.named_trainable():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}:{name}"] = value.detach().cpu().contiguous()
        names = [name for name, _ in self.model.named_trainable()] if progress.steps else []
        steps = [dataclasses.asdict(step) for step in progress.steps]
        start = dict(zip(names, progress.epoch_start, strict=False))
        return TrainingState(
            progress.epochs, steps, progress.samples, dataclasses.asdict(self.scale), moments, start,
            spread=dataclasses.asdict(progress.spread),
        )  # fmt: skip

    def restore(self, state: TrainingState) -> None:
        """Restore what state() returned; the LoRA is loaded already. Raises KeyError, TypeError or ValueError if it does not fit."""
        for name, parameter in self.model.named_trainable() if state.optimizer else ():  # empty if no step was applied yet
            moments = {key: same_shape(state.optimizer[f"{key}:{name}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": state.optimizer[f"step:{name}"]} | {
                key: value.to(parameter.device) for key, value in moments.items()
            }
        start = self.model.adapter_copy()
        if state.steps:
            for (name, _), tensor in zip(self.model.named_trainable(), start, strict=True):
                tensor.copy_(same_shape(state.epoch_start[name], tensor))
        steps = [StepStats(**step) for step in state.steps]
        self.scale = LossScale(**state.loss_scale)
        self.progress = Progress(int(state.epochs), steps, int(state.samples), start, Spread(**state.spread))


def same_shape(tensor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the tensor. Raises ValueError if its shape is not the wanted one."""
    if tensor.shape != wanted.shape:
        raise ValueError(f"a tensor has the shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
    return tensor
