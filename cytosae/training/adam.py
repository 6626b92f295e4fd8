"""Adam that can be given a matrix's gradient a block of rows at a time."""

import inspect
from typing import Any

import torch
from torch.optim.adam import adam

from cytosae.training.gradients import RowGradient, by_latent

_FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which every supported torch has a fused Adam."""

_plain = {
    name: inspect.unwrap(getattr(torch.optim.Adam, name))
    for name in ("add_param_group", "step", "state_dict", "load_state_dict")
}
"""torch's methods without their wrappers, which import its compiler: that takes as long as importing torch."""


class RowwiseAdam(torch.optim.Adam):
    """torch's Adam (Kingma and Ba 2014), with the same numbers and the same state, whatever the blocks.

    Args:
        groups: Parameter groups.
        lr: Learning rate of groups without one of their own.
        betas: Decay of the mean gradient, and of the mean squared gradient.
        device: Device of the parameters.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], device: torch.device
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=device.type in _FUSED_DEVICES)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch."""
        _plain["add_param_group"](self, param_group)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """See torch."""
        _plain["step"](self)

    def state_dict(self) -> dict[str, Any]:
        """See torch."""
        state: dict[str, Any] = _plain["state_dict"](self)
        return state

    @torch.no_grad()
    def update_rows(self, parameter: torch.nn.Parameter, gradient: RowGradient) -> None:
        """Update some latents' weights; `finish_rows` counts the step once all latents were updated.

        Raises:
            ValueError: If the weights of a latent do not lie next to each other in memory.
        """
        group = next(group for group in self.param_groups if any(parameter is one for one in group["params"]))
        state = self._state_of(parameter)
        name, latents, values = gradient
        weights, first, second = (
            by_latent(name, part)[latents] for part in (parameter.data, state["exp_avg"], state["exp_avg_sq"])
        )
        if not weights.is_contiguous():
            raise ValueError(f"{name} must have its latents' weights next to each other in memory")
        beta1, beta2 = group["betas"]
        adam(
            [weights], [values.contiguous()], [first], [second], [], [state["step"].clone()],
            fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def finish_rows(self, parameter: torch.nn.Parameter) -> None:
        """Count a step of a parameter that was updated by rows."""
        self._state_of(parameter)["step"] += 1

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Moments of a parameter, in its own layout, and the number of its steps."""
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            where = parameter.device if parameter.device.type in _FUSED_DEVICES else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch; moments take the layout of their parameters."""
        _plain["load_state_dict"](self, state_dict)
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter).copy_(state[name])
