"""Adam that can be given a matrix's gradient a block of rows at a time."""

import inspect
from typing import Any

import torch
from torch.optim.adam import adam

from cytosae.sae.kernels import WIDEST_ROW, find_kernels
from cytosae.training.gradients import RowGradient, by_latent

_FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which every supported torch has a fused Adam."""

_KERNELS = "cytosae.training.triton_adam"
"""The module that updates rows on a GPU."""

_UNWRAPPED = {
    name: inspect.unwrap(getattr(torch.optim.Adam, name))
    for name in ("add_param_group", "step", "state_dict", "load_state_dict")
}
"""torch's methods without their wrappers, which import its compiler: that takes as long as importing torch."""


class RowwiseAdam(torch.optim.Adam):
    """torch's Adam (Kingma and Ba 2014), with the same numbers and the same state, whatever the blocks.

    On a GPU that has kernels of our own, rows are updated by one of them: the same up to rounding.

    Args:
        groups: Parameter groups. A group's `weight_decay` is decoupled from the gradient (AdamW; Loshchilov and Hutter
            2019, arXiv:1711.05101, algorithm 2) and holds for parameters that are updated by rows, for chosen rows.
        lr: Learning rate of groups without one of their own.
        betas: Decay of the mean gradient, and of the mean squared gradient.
        device: Device of the parameters.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], device: torch.device
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=device.type in _FUSED_DEVICES)
        self._counts: dict[torch.nn.Parameter, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See torch, which copies nothing that it does not know."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._counts = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch."""
        _UNWRAPPED["add_param_group"](self, param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401 - as torch
        """See torch."""
        return _UNWRAPPED["step"](self, closure)

    def state_dict(self) -> dict[str, Any]:
        """See torch."""
        state: dict[str, Any] = _UNWRAPPED["state_dict"](self)
        return state

    @torch.no_grad()
    def update_rows(
        self,
        parameter: torch.nn.Parameter,
        gradient: RowGradient,
        *,
        on_sphere: bool = False,
        scale: torch.Tensor | None = None,
        decaying: torch.Tensor | None = None,
    ) -> None:
        """Update some latents' weights; `finish_rows` counts the step once all latents were updated.

        Args:
            parameter: The matrix.
            gradient: Its gradient, which may be overwritten.
            on_sphere: Whether the component along each row is removed from the gradient first.
            scale: Factor of the gradient, applied afterwards, 0-dimensional; None for 1.
            decaying: Which of all latents' weights decay, bool, shape `(S,)`; None for all.

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
        kept = None
        if decay := group["lr"] * group["weight_decay"]:
            kept = weights.new_full((len(weights),), 1 - decay)
            if decaying is not None:
                kept.masked_fill_(~decaying[latents], 1.0)
        kernels = find_kernels(weights, values, _KERNELS) if weights.dtype == torch.float32 else None
        if kernels is not None and weights.shape[1] <= WIDEST_ROW:
            kernels.update_rows(
                weights, values, first, second, n_steps=self._n_steps(parameter) + 1, lr=group["lr"], beta1=beta1,
                beta2=beta2, eps=group["eps"], on_sphere=on_sphere, scale=scale, kept=kept,
            )  # fmt: skip
            return
        values = gradient.widen(weights)
        if on_sphere:
            remove_radial_(values, weights)
        if scale is not None:
            values.mul_(scale)
        if kept is not None:
            weights.mul_(kept[:, None])
        adam(
            [weights], [values.contiguous()], [first], [second], [], [state["step"].clone()],
            fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=0.0, eps=group["eps"], maximize=False,
        )  # fmt: skip

    def finish_rows(self, parameter: torch.nn.Parameter) -> None:
        """Count a step of a parameter that was updated by rows."""
        n_steps = self._n_steps(parameter) + 1
        self._state_of(parameter)["step"] += 1
        self._counts[parameter] = n_steps

    def _n_steps(self, parameter: torch.nn.Parameter) -> int:
        """Steps of a parameter that were finished, on the host."""
        if parameter not in self._counts:
            # CPU-GPU sync point, once: later steps are counted.
            self._counts[parameter] = int(self._state_of(parameter)["step"])
        return self._counts[parameter]

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
        _UNWRAPPED["load_state_dict"](self, state_dict)
        self._counts = {}
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(parameter).copy_(state[name])


def remove_radial_(gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """Remove the component along each row of norm 1 from its gradient, in place; both of shape `(n, D)`."""
    gradient.addcmul_((gradient * rows).sum(dim=1, keepdim=True), rows, value=-1)
