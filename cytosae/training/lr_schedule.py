"""Learning-rate schedules by the reference's names, through torch's own schedulers."""

import math
from typing import Any

import torch
from torch.optim import lr_scheduler

SCHEDULERS = (
    "constantwithwarmup", "constant", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
)  # fmt: skip
"""Names that `LearningRate` knows."""


class LearningRate:
    """What the learning rate is multiplied by, step after step.

    With s steps done, w of warm-up and n in all: `constantwithwarmup` is `min(1, (s + 1) / w)`; `linearwarmupdecay`
    rises so and falls linearly to 0 at n; `cosineannealing` is torch's over n steps; `cosineannealingwarmup` rises so
    and falls like half a cosine to 0 at n; `cosineannealingwarmrestarts` is torch's, `n_cycles` times.

    Args:
        name: One of `SCHEDULERS`.
        n_steps: Steps of the whole run.
        warm_up_steps: Steps over which the rate rises, where the schedule has a warm-up; 0 for none.
        n_cycles: Cycles of `cosineannealingwarmrestarts`.
        decay_share: Share of the steps, at the end, over which the rate falls linearly to 0 besides.

    Raises:
        ValueError: If the name is unknown.
    """

    def __init__(
        self, name: str, *, n_steps: int, warm_up_steps: int = 0, n_cycles: int = 1, decay_share: float = 0.0
    ) -> None:
        if name not in SCHEDULERS:
            raise ValueError(f"lr_scheduler_name must be one of {', '.join(SCHEDULERS)}, found {name!r}")
        self._n_steps, self._n_decaying = n_steps, math.ceil(decay_share * n_steps)
        falling = max(1, n_steps - warm_up_steps)

        def rise(step: int) -> float:
            return min(1.0, (step + 1) / warm_up_steps) if warm_up_steps else 1.0

        def linear(step: int) -> float:
            return rise(step) if step < warm_up_steps else max(0.0, (n_steps - step) / falling)

        def cosine(step: int) -> float:
            done = min(1.0, (step - warm_up_steps) / falling)
            return rise(step) if step < warm_up_steps else 0.5 * (1 + math.cos(math.pi * done))

        # The schedulers want an optimizer; this one's rate is the factor.
        self._optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
        scheduler: Any
        match name:
            case "cosineannealing":
                scheduler = lr_scheduler.CosineAnnealingLR(self._optimizer, T_max=n_steps)
            case "cosineannealingwarmrestarts":
                length = max(1, n_steps // n_cycles)
                scheduler = lr_scheduler.CosineAnnealingWarmRestarts(self._optimizer, T_0=length)
            case _:
                lambdas = {"constantwithwarmup": rise, "linearwarmupdecay": linear, "cosineannealingwarmup": cosine}
                scheduler = lr_scheduler.LambdaLR(self._optimizer, lambdas.get(name, lambda step: 1.0))
        self._scheduler = scheduler

    @property
    def factor(self) -> float:
        """The factor of the coming step."""
        factor: float = self._optimizer.param_groups[0]["lr"]
        left = self._n_steps - self._scheduler.last_epoch
        return factor * (min(1.0, max(0, left) / self._n_decaying) if self._n_decaying else 1.0)

    def advance(self) -> None:
        """Count a step."""
        self._optimizer.step()  # without parameters to change; the scheduler warns if it comes first
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers from which the schedule goes on."""
        state = {name: value for name, value in self._scheduler.state_dict().items() if name != "lr_lambdas"}
        return {"scheduler": state, "factor": self._optimizer.param_groups[0]["lr"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self._scheduler.load_state_dict({**self._scheduler.state_dict(), **state["scheduler"]})
        self._optimizer.param_groups[0]["lr"] = state["factor"]
