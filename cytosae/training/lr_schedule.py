"""Learning-rate schedules under the reference's names, as a torch scheduler."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

SCHEDULERS = (
    "constantwithwarmup", "constant", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
)  # fmt: skip
"""Names that `LearningRateSchedule` accepts."""


class LearningRateSchedule(LRScheduler):
    """Sets an optimiser's learning rate before every step.

    The rate is the optimiser's default `lr` times a factor. With s steps done, w warm-up steps and n steps in all:
    `constantwithwarmup` is `min(1, (s + 1) / w)`; `linearwarmupdecay` rises in the same way and falls linearly to 0 at
    n; `cosineannealing` is half a cosine over n steps; `cosineannealingwarmup` rises first and then follows half a
    cosine to 0 at n; `cosineannealingwarmrestarts` repeats half a cosine `n_cycles` times. A parameter group's
    `lr_factor`, if it has one, multiplies its rate.

    Args:
        optimizer: The optimiser.
        name: One of `SCHEDULERS`.
        n_steps: Steps of the whole run.
        warm_up_steps: Steps over which the rate rises, if the schedule has a warm-up; 0 for none.
        n_cycles: Cycles of `cosineannealingwarmrestarts`.
        decay_share: Share of the steps, at the end, over which the rate additionally falls linearly to 0.

    Raises:
        ValueError: If the name is unknown.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        *,
        n_steps: int,
        warm_up_steps: int = 0,
        n_cycles: int = 1,
        decay_share: float = 0.0,
    ) -> None:
        if name not in SCHEDULERS:
            raise ValueError(f"lr_scheduler_name must be one of {', '.join(SCHEDULERS)}, found {name!r}")
        self._name, self._n_steps, self._warm_up_steps = name, n_steps, warm_up_steps
        self._n_decaying = math.ceil(decay_share * n_steps)
        self._cycle_steps = max(1, n_steps // n_cycles)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of each parameter group for the coming step."""
        lr = self.optimizer.defaults["lr"] * (self._factor(self.last_epoch) * self._decay(self.last_epoch))
        return [lr * group.get("lr_factor", 1.0) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done; everything else follows from the arguments."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly where `state_dict` was taken."""
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def _factor(self, step: int) -> float:
        """The schedule's factor after so many steps."""
        if "warmup" in self._name and step < self._warm_up_steps:
            return min(1.0, (step + 1) / self._warm_up_steps)
        falling = max(1, self._n_steps - self._warm_up_steps)
        match self._name:
            case "linearwarmupdecay":
                return max(0.0, (self._n_steps - step) / falling)
            case "cosineannealing":
                return _half_cosine(step / self._n_steps)
            case "cosineannealingwarmup":
                return _half_cosine(min(1.0, (step - self._warm_up_steps) / falling))
            case "cosineannealingwarmrestarts":
                return _half_cosine(step % self._cycle_steps / self._cycle_steps)
        return 1.0

    def _decay(self, step: int) -> float:
        """The factor of the final decay after so many steps."""
        if not self._n_decaying:
            return 1.0
        return min(1.0, max(0, self._n_steps - step) / self._n_decaying)


def _half_cosine(progress: float) -> float:
    """From 1 at a progress of 0 to 0 at a progress of 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
