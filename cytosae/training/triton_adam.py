"""Adam for rows of a matrix as a Triton kernel: weights and moments are read and written once.

`cytosae.sae.kernels` decides where it runs.
"""

import math

import torch
import triton
import triton.language as tl

from cytosae.sae.triton_kernels import launch

_WARPS = 4
_TOLERANCE = 1e-5
"""Relative error up to which the kernel is right."""


@triton.jit
def update_row(
    weights: tl.tensor, gradient: tl.tensor, exp_avg: tl.tensor, exp_avg_sq: tl.tensor, scale: tl.tensor,
    kept: tl.tensor, width: tl.tensor, step_size: tl.tensor, beta1: tl.tensor, one_minus_beta1: tl.tensor,
    beta2: tl.tensor, one_minus_beta2: tl.tensor, bias_correction2_sqrt: tl.tensor, eps: tl.tensor,
    ON_SPHERE: tl.constexpr, SCALED: tl.constexpr, DECAYS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `update_rows`: each program updates a row."""
    channels = tl.arange(0, CHANNELS)
    inside = channels < width
    at = tl.program_id(0).to(tl.int64) * width + channels
    weight = tl.load(weights + at, mask=inside, other=0.0)
    grad = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(exp_avg + at, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    if ON_SPHERE:
        grad -= tl.sum(grad * weight, axis=0) * weight
    if SCALED:
        grad *= tl.load(scale)
    mean = beta1 * mean + one_minus_beta1 * grad
    square = beta2 * square + one_minus_beta2 * grad * grad
    tl.store(exp_avg + at, mean, mask=inside)
    tl.store(exp_avg_sq + at, square, mask=inside)
    divisor = tl.sqrt_rn(square) / bias_correction2_sqrt + eps
    if DECAYS:
        weight *= tl.load(kept + tl.program_id(0))
    tl.store(weights + at, weight - step_size * mean / divisor, mask=inside)


def update_rows(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *,
    n_steps: int, lr: float, beta1: float, beta2: float, eps: float, on_sphere: bool, scale: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> None:  # fmt: skip
    """Take a step of Adam (Kingma and Ba 2014, algorithm 1), in place.

    Args:
        weights: Float32, contiguous, shape `(n, D)`.
        gradient: Of the same shape; it is not changed.
        exp_avg: Decaying mean of the gradients, as `weights`.
        exp_avg_sq: Decaying mean of their squares, as `weights`.
        n_steps: Steps with this one.
        lr: Learning rate.
        beta1: Decay of the mean.
        beta2: Decay of the mean of squares.
        eps: What is added to the root of the latter.
        on_sphere: Whether the component along each row is removed from the gradient first.
        scale: Factor of the gradient, applied afterwards, 0-dimensional; None for 1.
        kept: Factor of every row before the step, by weight decay, float32, shape `(n,)`; None for 1.
    """
    n, width = weights.shape
    launch(
        update_row, (n,),
        weights, gradient.contiguous(), exp_avg, exp_avg_sq, weights if scale is None else scale,
        weights if kept is None else kept, width, lr / (1 - beta1**n_steps), beta1, 1 - beta1, beta2, 1 - beta2,
        math.sqrt(1 - beta2**n_steps), eps,
        ON_SPHERE=on_sphere, SCALED=scale is not None, DECAYS=kept is not None,
        CHANNELS=triton.next_power_of_2(width), num_warps=_WARPS,
    )  # fmt: skip


def find_problem(device: torch.device) -> str | None:
    """Compare two steps of a small matrix with torch on the CPU; what is wrong, or None."""
    n, width = 5, 24
    start, gradient = (torch.arange(n * width, device="cpu").view(n, width).mul(step).sin() for step in (1, 2))
    start /= start.norm(dim=1, keepdim=True)
    wanted = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([wanted], lr=0.01, weight_decay=0.5, foreach=False)
    found = [part.to(device) for part in (start.clone(), torch.zeros(n, width), torch.zeros(n, width))]
    scale = torch.tensor(0.5)
    for number in (1, 2):
        rows = wanted.detach()
        wanted.grad = 0.5 * (gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows)
        adam.step()
        update_rows(
            found[0], gradient.to(device), *found[1:], n_steps=number, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8,
            on_sphere=True, scale=scale.to(device), kept=torch.full((n,), 0.995, device=device),
        )  # fmt: skip
    difference = float((found[0].cpu() - wanted.detach()).norm() / (wanted.detach() - start).norm())
    return None if difference <= _TOLERANCE else f"its Adam differs from torch's by {difference:.1e}"
