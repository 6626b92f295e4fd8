"""Activation functions of a dense training step, and their gradients, as Triton kernels that read a block once.

Each program walks down the tokens of a few latents and accumulates sums for each latent, in float32 and in a fixed
order. `cytosae.sae.kernels` decides where the kernels run.
"""

import torch
import triton
import triton.language as tl

from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import make_sae
from cytosae.sae.triton_kernels import launch
from cytosae.training.activation_rules import RULES

_ROWS, _COLUMNS, _STEPS, _WARPS = 4, 128, 64, 2
"""Tokens and latents that a program looks at together, how often it does, and its warps: on an H200, the best of 15."""
_TOLERANCE = 1e-5
"""Relative error up to which a kernel is right."""


@triton.jit
def load_constants(
    threshold_or_b_enc: tl.tensor, gain: tl.tensor, b_mag: tl.tensor, columns: tl.tensor, inside: tl.tensor,
    ARCHITECTURE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What belongs to some latents, as rows; 0 where the architecture has none."""
    offset = tl.zeros_like(columns).to(tl.float32)
    scale = offset
    bias = offset
    if ARCHITECTURE != "relu":
        offset = tl.load(threshold_or_b_enc + columns, mask=inside, other=0.0)
    if ARCHITECTURE == "gated":
        scale = tl.load(gain + columns, mask=inside, other=0.0)
        bias = tl.load(b_mag + columns, mask=inside, other=0.0)
    return offset[None, :], scale[None, :], bias[None, :]


@triton.jit
def compute_acts(
    value: tl.tensor, offset: tl.tensor, scale: tl.tensor, bias: tl.tensor, ARCHITECTURE: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Activations; NaN stays NaN, since it is not below 0."""
    if ARCHITECTURE == "relu":
        acts = tl.where(value < 0, 0.0, value)
    elif ARCHITECTURE == "jumprelu":
        acts = value * (value > offset).to(tl.float32)
    else:
        magnitude = (value - offset) * scale + bias
        acts = tl.where(magnitude < 0, 0.0, magnitude) * (value > 0).to(tl.float32)
    return acts


@triton.jit(do_not_specialize=["n"])
def activate_columns(
    pre: tl.tensor, acts: tl.tensor, gate: tl.tensor,
    threshold_or_b_enc: tl.tensor, gain: tl.tensor, b_mag: tl.tensor, sums: tl.tensor,
    n: tl.tensor, m: tl.tensor, pre_stride: tl.tensor, stride: tl.tensor,
    ARCHITECTURE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `activate`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < m
    start = tl.program_id(1).to(tl.int64) * (ROWS * STEPS)
    n_active = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_acts = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset, scale, bias = load_constants(threshold_or_b_enc, gain, b_mag, columns, inside, ARCHITECTURE)
    for step in range(STEPS):
        rows = start + step * ROWS + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & inside[None, :]
        value = tl.load(pre + rows[:, None] * pre_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        act = compute_acts(value, offset, scale, bias, ARCHITECTURE)
        if ARCHITECTURE == "gated":
            positive = compute_acts(value, offset, scale, bias, "relu")
            sum_gate += tl.where(mask, positive, 0.0)
            tl.store(gate + rows[:, None] * stride + columns[None, :], positive, mask=mask)
        n_active += (mask & (act > 0)).to(tl.float32)
        sum_acts += tl.where(mask, act, 0.0)
        tl.store(acts + rows[:, None] * stride + columns[None, :], act, mask=mask)
    to = sums + tl.program_id(1) * m + columns
    size = tl.num_programs(1) * m
    tl.store(to, tl.sum(n_active, axis=0), mask=inside)
    tl.store(to + size, tl.sum(sum_acts, axis=0), mask=inside)
    if ARCHITECTURE == "gated":
        tl.store(to + 2 * size, tl.sum(sum_gate, axis=0), mask=inside)


@triton.jit(do_not_specialize=["n"])
def differentiate_columns(
    pre: tl.tensor, acts: tl.tensor, product: tl.tensor, gate_product: tl.tensor,
    threshold_or_b_enc: tl.tensor, gain: tl.tensor, b_mag: tl.tensor, sums: tl.tensor,
    n: tl.tensor, m: tl.tensor, pre_stride: tl.tensor, stride: tl.tensor, constant: tl.tensor,
    ARCHITECTURE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `differentiate`; sums have the order of `Rule.backward`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < m
    start = tl.program_id(1).to(tl.int64) * (ROWS * STEPS)
    sum_pre = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_two = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_three = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_four = tl.zeros((ROWS, COLUMNS), tl.float32)
    offset, scale, bias = load_constants(threshold_or_b_enc, gain, b_mag, columns, inside, ARCHITECTURE)
    for step in range(STEPS):
        rows = start + step * ROWS + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & inside[None, :]
        at = rows[:, None] * stride + columns[None, :]
        value = tl.load(pre + rows[:, None] * pre_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
        if ARCHITECTURE == "relu":
            grad_pre = tl.where(value > 0, grad, 0.0)
        else:
            act = compute_acts(value, offset, scale, bias, ARCHITECTURE)
            tl.store(acts + at, act, mask=mask)
            grad_acts = grad * (act > 0).to(tl.float32)
            if ARCHITECTURE == "jumprelu":
                grad_pre = grad_acts
                near = (mask & (tl.abs(value - offset) < constant)).to(tl.float32)
                sum_two += grad * near
                sum_three += near
            else:
                further = tl.load(gate_product + at, mask=mask, other=0.0).to(tl.float32)
                grad_gate = (further + constant) * (value > 0).to(tl.float32)
                grad_pre = grad_acts * scale + grad_gate
                sum_two += grad_gate
                sum_three += tl.where(mask, grad_acts * (value - offset) * scale, 0.0)
                sum_four += grad_acts
        sum_pre += grad_pre
        tl.store(product + at, grad_pre, mask=mask)
    to = sums + tl.program_id(1) * m + columns
    size = tl.num_programs(1) * m
    tl.store(to, tl.sum(sum_pre, axis=0), mask=inside)
    if ARCHITECTURE != "relu":
        tl.store(to + size, tl.sum(sum_two, axis=0), mask=inside)
        tl.store(to + 2 * size, tl.sum(sum_three, axis=0), mask=inside)
    if ARCHITECTURE == "gated":
        tl.store(to + 3 * size, tl.sum(sum_four, axis=0), mask=inside)


def activate(
    architecture: str, pre: torch.Tensor, decoded: list[torch.Tensor], vectors: list[torch.Tensor]
) -> torch.Tensor:
    """Compute what is decoded, in float32.

    Args:
        architecture: `relu`, `jumprelu` or `gated`.
        pre: Latents before the nonlinearity, shape `(n, m)`, a row's numbers next to each other.
        decoded: Where it is written, in the type of `pre`: activations, and for `gated` the gate's, with equal strides.
            For `relu` it may be `pre`.
        vectors: Those of `Rule.constants`, float32, shape `(m,)` each; none for `relu`.

    Returns:
        For each latent the number of tokens on which it is active, and the sum of each of `decoded` before it is
        rounded; float64, shape `(1 + len(decoded), m)`.
    """
    n, m = pre.shape
    sums = _partial_sums(1 + len(decoded), pre)
    launch(
        activate_columns, _grid(n, m),
        pre, decoded[0], decoded[-1], *_filled(vectors, pre), sums, n, m, pre.stride(0), decoded[0].stride(0),
        ARCHITECTURE=architecture, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=_WARPS,
    )  # fmt: skip
    return sums.sum(dim=1, dtype=torch.float64)


def differentiate(
    architecture: str, pre: torch.Tensor, acts: torch.Tensor, products: list[torch.Tensor],
    constants: tuple[list[torch.Tensor], float], n_summed: int,
) -> torch.Tensor:  # fmt: skip
    """Replace the first of `products` by the gradient before the nonlinearity, computed in float32.

    Args:
        architecture: `relu`, `jumprelu` or `gated`.
        pre: As for `activate`; for `relu` it may be the activations.
        acts: Where the activations are written, with the strides of `products`; for `relu` nothing is.
        products: Gradient of the squared error by what is decoded, shape `(n, m)` each, in the type of `pre`.
        constants: Those of `Rule.constants`; for `relu` no vectors and any number.
        n_summed: Number of sums: that of `Rule.n_summed`, 1 for `relu`.

    Returns:
        For each latent the sums over tokens of what `Rule.backward` gives, in its order; float64, shape
        `(n_summed, m)`.
    """
    n, m = pre.shape
    vectors, constant = constants
    sums = _partial_sums(n_summed, pre)
    launch(
        differentiate_columns, _grid(n, m),
        pre, acts, products[0], products[-1], *_filled(vectors, pre), sums,
        n, m, pre.stride(0), products[0].stride(0), constant,
        ARCHITECTURE=architecture, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=_WARPS,
    )  # fmt: skip
    return sums.sum(dim=1, dtype=torch.float64)


def _grid(n: int, m: int) -> tuple[int, int]:
    """Programs by latents and by tokens."""
    return triton.cdiv(m, _COLUMNS), triton.cdiv(n, _ROWS * _STEPS)


def _partial_sums(n_sums: int, pre: torch.Tensor) -> torch.Tensor:
    """Room for the sums of all programs, shape `(n_sums, programs, m)`; each writes its own."""
    n, m = pre.shape
    return pre.new_empty((n_sums, _grid(n, m)[1], m), dtype=torch.float32)


def _filled(vectors: list[torch.Tensor], pre: torch.Tensor) -> list[torch.Tensor]:
    """Three vectors; an architecture that needs fewer does not read the others."""
    return [*(one.contiguous() for one in vectors), *[pre] * (3 - len(vectors))]


@torch.no_grad()
def compute_by_torch(
    architecture: str, pre: torch.Tensor, products: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[list[torch.Tensor], float]]:
    """What the kernels should compute, for an autoencoder with arbitrary parameters.

    Args:
        architecture: `relu`, `jumprelu` or `gated`.
        pre: Float32 on the CPU, shape `(n, m)`.
        products: Two of the same shape.

    Returns:
        What is decoded; the gradient before the nonlinearity and what else is summed over tokens; `Rule.constants`.
    """
    if architecture == "relu":
        return [torch.relu(pre)], [products[0] * (pre > 0)], ([], 0.0)
    m = pre.shape[1]
    sae = make_sae(architecture, 1, m, k=1, bandwidth=0.5, device="cpu")
    for number, parameter in enumerate(sae.parameters()):
        if parameter.shape == (m,):
            parameter.copy_(torch.arange(m, device="cpu").add(number).mul(1.7).sin().mul(0.5))
    inputs = LossInputs(pre.new_ones(()), LossWeights(l1_coefficient=0.25), torch.float32)
    rule = RULES[type(sae)](sae, inputs, 1)
    every = slice(None)
    backward = list(rule.backward(pre, every, products[: rule.n_decoded]))
    return rule.decoded(pre, every), [one.to(pre.dtype) for one in backward], rule.constants(every)


def find_problem(device: torch.device) -> str | None:
    """Compare all that the kernels write and sum, for a small matrix, with torch on the CPU; what is wrong, or None."""
    n, m = _ROWS * _STEPS + 40, _COLUMNS + 8  # several programs each way
    pre, *products = (torch.arange(n * m, device="cpu").view(n, m).mul(step).sin() for step in (1, 2, 3))
    for architecture in ("relu", "jumprelu", "gated"):
        decoded, backward, (vectors, constant) = compute_by_torch(architecture, pre, products)
        there = pre.to(device)
        given = [one.to(device) for one in vectors]
        room, changed = [torch.empty_like(there) for _ in decoded], [one.to(device, copy=True) for one in products]
        counted = activate(architecture, there, room, given)
        written = [one.clone() for one in room]
        acts = room[0] if architecture == "relu" else torch.empty_like(there)
        summed = differentiate(architecture, there, acts, changed, (given, constant), len(backward))
        expected = [
            *decoded, (decoded[0] > 0).sum(dim=0), *(one.sum(dim=0) for one in decoded),
            decoded[0], backward[0], *(one.sum(dim=0) for one in backward),
        ]  # fmt: skip
        for wanted, found in zip(expected, [*written, *counted, acts, changed[0], *summed], strict=True):
            difference = float((found.cpu() - wanted).double().norm() / wanted.double().norm())
            if not difference <= _TOLERANCE:
                return f"its activation function of {architecture} differs from torch's by {difference:.1e}"
    return None
