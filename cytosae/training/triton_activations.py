"""Activation functions of a dense training step, and their gradients, as Triton kernels: a block is read once.

Programs go down the tokens of some latents and add up what belongs to a latent on the way, in float32 and in a fixed
order. `cytosae.sae.kernels` decides where they run; the names of rules are those of architectures.
"""

import torch
import triton
import triton.language as tl

from cytosae.sae.triton_kernels import launch

_ROWS, _COLUMNS, _STEPS, _WARPS = 4, 128, 64, 2
"""Tokens and latents that a program looks at together, how often it does, and its warps: on an H200, the best of 15."""

_N_SUMS = {"relu": (2, 1), "jumprelu": (2, 3), "gated": (3, 4)}
"""Sums for each latent of `activate` and of `differentiate`."""


@triton.jit(do_not_specialize=["n"])
def activate_columns(
    pre: tl.tensor, acts: tl.tensor, gate: tl.tensor, one: tl.tensor, two: tl.tensor, three: tl.tensor, sums: tl.tensor,
    n: tl.tensor, m: tl.tensor, pre_stride: tl.tensor, stride: tl.tensor,
    RULE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `activate`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < m
    start = tl.program_id(1).to(tl.int64) * (ROWS * STEPS)
    fired = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RULE != "relu":
        first = tl.load(one + columns, mask=inside, other=0.0)[None, :]
    if RULE == "gated":
        second = tl.load(two + columns, mask=inside, other=0.0)[None, :]
        third = tl.load(three + columns, mask=inside, other=0.0)[None, :]
    for step in range(STEPS):
        rows = start + step * ROWS + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & inside[None, :]
        value = tl.load(pre + rows[:, None] * pre_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        # NaN stays NaN: it is not below 0.
        positive = tl.where(value < 0, 0.0, value)
        if RULE == "relu":
            act = positive
        elif RULE == "jumprelu":
            act = value * (value > first).to(tl.float32)
        else:
            scaled = (value - first) * second + third
            act = tl.where(scaled < 0, 0.0, scaled) * (value > 0).to(tl.float32)
            gate_total += tl.where(mask, positive, 0.0)
            tl.store(gate + rows[:, None] * stride + columns[None, :], positive, mask=mask)
        fired += (mask & (act > 0)).to(tl.float32)
        total += tl.where(mask, act, 0.0)
        tl.store(acts + rows[:, None] * stride + columns[None, :], act, mask=mask)
    at = sums + tl.program_id(1) * m + columns
    size = tl.num_programs(1) * m
    tl.store(at, tl.sum(fired, axis=0), mask=inside)
    tl.store(at + size, tl.sum(total, axis=0), mask=inside)
    if RULE == "gated":
        tl.store(at + 2 * size, tl.sum(gate_total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["n"])
def differentiate_columns(
    pre: tl.tensor, acts: tl.tensor, product: tl.tensor, gate_product: tl.tensor,
    one: tl.tensor, two: tl.tensor, three: tl.tensor, sums: tl.tensor,
    n: tl.tensor, m: tl.tensor, pre_stride: tl.tensor, stride: tl.tensor, constant: tl.tensor,
    RULE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `differentiate`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < m
    start = tl.program_id(1).to(tl.int64) * (ROWS * STEPS)
    sum_pre = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_two = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_three = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_four = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RULE != "relu":
        first = tl.load(one + columns, mask=inside, other=0.0)[None, :]
    if RULE == "gated":
        second = tl.load(two + columns, mask=inside, other=0.0)[None, :]
        third = tl.load(three + columns, mask=inside, other=0.0)[None, :]
    for step in range(STEPS):
        rows = start + step * ROWS + tl.arange(0, ROWS)
        mask = (rows < n)[:, None] & inside[None, :]
        at = rows[:, None] * stride + columns[None, :]
        value = tl.load(pre + rows[:, None] * pre_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(product + at, mask=mask, other=0.0).to(tl.float32)
        if RULE == "relu":
            grad_pre = tl.where(value > 0, grad, 0.0)
        elif RULE == "jumprelu":
            active = (value > first).to(tl.float32)
            grad_pre = grad * active
            near = (mask & (tl.abs(value - first) < constant)).to(tl.float32)
            sum_two += grad * near
            sum_three += near
            tl.store(acts + at, value * active, mask=mask)
        else:
            scaled = (value - first) * second
            is_open = (value > 0).to(tl.float32)
            magnitude = scaled + third
            grad_magnitude = grad * is_open * (magnitude > 0).to(tl.float32)
            further = tl.load(gate_product + at, mask=mask, other=0.0).to(tl.float32)
            grad_gate = (further + constant) * is_open
            grad_pre = grad_magnitude * second + grad_gate
            sum_two += grad_gate
            sum_three += tl.where(mask, grad_magnitude * scaled, 0.0)
            sum_four += grad_magnitude
            tl.store(acts + at, tl.where(magnitude < 0, 0.0, magnitude) * is_open, mask=mask)
        sum_pre += grad_pre
        tl.store(product + at, grad_pre, mask=mask)
    to = sums + tl.program_id(1) * m + columns
    size = tl.num_programs(1) * m
    tl.store(to, tl.sum(sum_pre, axis=0), mask=inside)
    if RULE != "relu":
        tl.store(to + size, tl.sum(sum_two, axis=0), mask=inside)
        tl.store(to + 2 * size, tl.sum(sum_three, axis=0), mask=inside)
    if RULE == "gated":
        tl.store(to + 3 * size, tl.sum(sum_four, axis=0), mask=inside)


def activate(rule: str, pre: torch.Tensor, decoded: list[torch.Tensor], vectors: list[torch.Tensor]) -> torch.Tensor:
    """What is decoded, computed in float32.

    Args:
        rule: The architecture.
        pre: Latents before the nonlinearity, shape `(n, m)`, a row's numbers next to each other.
        decoded: Where it is written, in the type of `pre`: activations, and for `gated` the gate's, alike in memory.
            For `relu` it may be `pre`.
        vectors: Float32, shape `(m,)` each: for `jumprelu` its thresholds, at least 0; for `gated` `b_enc`,
            `exp(r_mag)` and `b_mag`.

    Returns:
        For each latent the number of tokens on which it is active, and the sum of each of `decoded` before it is
        rounded; float64, shape `(1 + len(decoded), m)`.
    """
    n, m = pre.shape
    sums = _partial_sums(_N_SUMS[rule][0], pre)
    launch(
        activate_columns, _grid(n, m),
        pre, decoded[0], decoded[-1], *_filled(vectors, pre), sums, n, m, pre.stride(0), decoded[0].stride(0),
        RULE=rule, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=_WARPS,
    )  # fmt: skip
    return sums.sum(dim=1, dtype=torch.float64)


def differentiate(
    rule: str, pre: torch.Tensor, acts: torch.Tensor, products: list[torch.Tensor], vectors: list[torch.Tensor],
    constant: float,
) -> torch.Tensor:  # fmt: skip
    """Gradients before the nonlinearity, computed in float32; they replace the first of `products`.

    Args:
        rule: The architecture.
        pre: As for `activate`; for `relu` the activations.
        acts: Where the activations are written, alike in memory with `products`; for `relu` nothing is.
        products: Gradient of the squared error by what is decoded, shape `(n, m)` each, in the type of `pre`.
        vectors: As for `activate`.
        constant: Half the bandwidth of `jumprelu`; gradient of the sparsity term of `gated` by an open gate.

    Returns:
        For each latent the sums over tokens of what the rule's `backward` gives, in its order; float64, shape `(q, m)`.
    """
    n, m = pre.shape
    sums = _partial_sums(_N_SUMS[rule][1], pre)
    launch(
        differentiate_columns, _grid(n, m),
        pre, acts, products[0], products[-1], *_filled(vectors, pre), sums,
        n, m, pre.stride(0), products[0].stride(0), constant,
        RULE=rule, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=_WARPS,
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
    """Three vectors; a rule that needs fewer does not read the others."""
    return [*(one.contiguous() for one in vectors), *[pre] * (3 - len(vectors))]


def find_problem(device: torch.device) -> str | None:
    """Compare each rule on a small matrix with torch on the CPU; what is wrong, or None."""
    n, m = 40, 136
    pre, one, two = (torch.arange(n * m, device="cpu").view(n, m).mul(step).sin() for step in (1, 2, 3))
    vectors = [pre[0].abs(), pre[1].exp(), pre[2]]
    for rule, n_vectors in (("relu", 0), ("jumprelu", 1), ("gated", 3)):
        wanted, sums = _expected(rule, pre, [one, two], vectors)
        there = [part.to(device).clone() for part in (pre, one, two)]
        room = [torch.empty_like(there[0]) for _ in range(2)]
        given = [part.to(device) for part in vectors[:n_vectors]]
        counted = activate(rule, there[0], room[: 2 if rule == "gated" else 1], given)
        kept = room[0].clone()
        source = kept if rule == "relu" else there[0]
        summed = differentiate(rule, source, room[0], there[1:], given, 0.25)
        found = [kept, there[1], counted[0], *summed]
        for expected, here in zip([*wanted, *sums], found, strict=True):
            difference = float((here.cpu() - expected).double().norm() / expected.double().norm())
            if not difference <= _TOLERANCE:
                return f"its activation function of {rule} differs from torch's by {difference:.1e}"
    return None


_TOLERANCE = 1e-5
"""Relative error up to which a kernel is right."""


def _expected(
    rule: str, pre: torch.Tensor, products: list[torch.Tensor], vectors: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Activations and gradients, and the number of active tokens and other sums, by torch."""
    first, second, third = vectors
    if rule == "gated":
        scaled, is_open = (pre - first) * second, pre > 0
        acts = torch.relu(scaled + third) * is_open
        magnitude, gate = products[0] * (acts > 0), (products[1] + 0.25) * is_open
        parts = [magnitude * second + gate, gate, magnitude * scaled, magnitude]
    else:
        above = pre > (first if rule == "jumprelu" else 0)
        acts, near = pre * above, (pre - first).abs() < 0.25
        parts = [products[0] * above]
        parts += [products[0] * near, near.float()] if rule == "jumprelu" else []
    return [acts, parts[0]], [(acts > 0).sum(dim=0), *(one.sum(dim=0) for one in parts)]
