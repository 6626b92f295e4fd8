"""The k largest entries of every row as Triton kernels that read a matrix twice; `cytosae.sae.kernels` decides where.

Entries are divided into groups, of which the k-th largest maximum is a bound that at least k entries of the row reach
and few exceed. Among those few, the k largest are chosen. Numbers are compared by their bits, as integers:
non-negative floats order like their bits.
"""

import torch
import triton
import triton.language as tl

from cytosae.sae.triton_kernels import launch

_GROUPS, _GROUP_WARPS = 4096, 8
"""Groups of a row, whose maxima a program holds: every 4,096th entry belongs to the same one."""
_CHUNK, _TAKE_WARPS = 512, 1
"""Entries of a row that are compared together: with the sizes above, on an H100, the best of 12."""
_KEEP_WARPS = 4
_WIDEST = 4096
"""Candidates of a row that one program chooses from."""
_LOWEST_BIT = {torch.float32: 0, torch.bfloat16: 16}
"""The lowest bit of a number's float32 that its type has."""


@triton.jit
def kth_largest(bits: tl.tensor, k: tl.tensor, LOWEST_BIT: tl.constexpr) -> tl.tensor:
    """The largest number that at least k of some integers reach, which are not negative; 0 if fewer are above 0."""
    found = tl.zeros((), tl.int32)
    for number in tl.static_range(31 - LOWEST_BIT):
        tried = found | (1 << (30 - number))
        n = tl.sum((bits >= tried).to(tl.int32), axis=0)
        found = tl.where(n >= k, tried, found)
    return found


@triton.jit
def write_chosen(
    values: tl.tensor, columns: tl.tensor, at: tl.tensor, value: tl.tensor, column: tl.tensor,
    above: tl.tensor, equal: tl.tensor, n_equal: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Write entries above a bound, and the first `n_equal` at it, in their order from `at` on; returns how many."""
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= n_equal))
    place = at + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(values + place, value, mask=chosen)
    tl.store(columns + place, column, mask=chosen)
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def bound_rows(
    pre: tl.tensor, bounds: tl.tensor, m: tl.tensor, k: tl.tensor, GROUPS: tl.constexpr, LOWEST_BIT: tl.constexpr
) -> None:  # fmt: skip
    """The first kernel of `find_largest`: each program reads a row."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    largest = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, m, GROUPS):
        columns = start + groups
        values = tl.load(pre + row * m + columns, mask=columns < m, other=0.0).to(tl.float32)
        largest = tl.where(values > largest, values, largest)
    tl.store(bounds + row, kth_largest(largest.to(tl.int32, bitcast=True), k, LOWEST_BIT))


@triton.jit
def take_candidates(
    pre: tl.tensor, bounds: tl.tensor, values: tl.tensor, columns: tl.tensor, counts: tl.tensor,
    m: tl.tensor, k: tl.tensor, width: tl.tensor, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """The second kernel of `find_largest`: each program writes the entries of a row that reach its bound."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds + row)
    n_taken = tl.zeros((), tl.int32)
    n_equal = tl.zeros((), tl.int32)
    for start in range(0, m, CHUNK):
        column = start + tl.arange(0, CHUNK)
        value = tl.load(pre + row * m + column, mask=column < m, other=0.0).to(tl.float32)
        bits = tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)
        equal = (bits == bound) & (bits > 0)
        above = bits > bound
        if tl.sum((above | equal).to(tl.int32), axis=0) > 0:
            # The first k of those at the bound are enough; they may be many.
            n_taken += write_chosen(
                values, columns, row * width + n_taken, value, column, above, equal, k - n_equal
            )  # fmt: skip
            n_equal += tl.sum(equal.to(tl.int32), axis=0)
    tl.store(counts + row, n_taken)


@triton.jit
def keep_largest(
    values: tl.tensor, columns: tl.tensor, counts: tl.tensor, kept_values: tl.tensor, kept_columns: tl.tensor,
    k: tl.tensor, width: tl.tensor, WIDTH: tl.constexpr, LOWEST_BIT: tl.constexpr,
) -> None:  # fmt: skip
    """The third kernel of `find_largest`: each program chooses among the candidates of a row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, WIDTH)
    there = slots < tl.load(counts + row)
    value = tl.load(values + row * width + slots, mask=there, other=0.0).to(tl.float32)
    column = tl.load(columns + row * width + slots, mask=there, other=0)
    bits = value.to(tl.int32, bitcast=True)
    bound = kth_largest(bits, k, LOWEST_BIT)
    above = bits > bound
    n_equal = k - tl.sum(above.to(tl.int32), axis=0)
    write_chosen(kept_values, kept_columns, row * k, value, column, above, (bits == bound) & there, n_equal)


def can_find(n_columns: int, k: int) -> bool:
    """Whether `find_largest` can look for k entries in rows of a length: their candidates must fit one program."""
    return k > 0 and _n_candidates(n_columns, k) <= _WIDEST


def find_largest(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive ones among the k largest entries of every row; of equal ones the first. NaN is not positive.

    Args:
        pre: Float32 or bfloat16, contiguous, shape `(n, m)`.
        k: How many, for which `can_find` is true.

    Returns:
        Values in the type of `pre`, and their columns, int64, shape `(n, k)` each, by column; 0 behind the last one.
    """
    n, m = pre.shape
    width, lowest_bit = _n_candidates(m, k), _LOWEST_BIT[pre.dtype]
    bounds, counts = (pre.new_empty(n, dtype=torch.int32) for _ in range(2))
    values, columns = pre.new_empty((n, width)), pre.new_empty((n, width), dtype=torch.int32)
    kept_values, kept_columns = pre.new_zeros((n, k)), pre.new_zeros((n, k), dtype=torch.int64)
    launch(
        bound_rows, (n,), pre, bounds, m, k,
        GROUPS=_GROUPS, LOWEST_BIT=lowest_bit, num_warps=_GROUP_WARPS,
    )  # fmt: skip
    launch(
        take_candidates, (n,), pre, bounds, values, columns, counts, m, k, width,
        CHUNK=_CHUNK, num_warps=_TAKE_WARPS,
    )  # fmt: skip
    launch(
        keep_largest, (n,), values, columns, counts, kept_values, kept_columns, k, width,
        WIDTH=triton.next_power_of_2(width), LOWEST_BIT=lowest_bit, num_warps=_KEEP_WARPS,
    )  # fmt: skip
    return kept_values, kept_columns


def _n_candidates(m: int, k: int) -> int:
    """The most entries of a row that are taken: all of the k - 1 groups that exceed the bound, and k that reach it."""
    return -(-m // _GROUPS) * (k - 1) + k


def find_problem(device: torch.device) -> str | None:
    """Compare the largest entries of small matrices with torch's on the CPU; what is wrong, or None."""
    n, m, k = 3, 2 * _GROUPS + 9, 5
    for dtype in _LOWEST_BIT:
        pre = torch.arange(n * m, device="cpu").view(n, m).mul(1.7).sin().to(dtype)
        pre[1] = -pre[1].abs()
        pre[1, [3, _GROUPS + 9]] = 1.0  # fewer than k are positive
        pre[2, ::7] = 2.0  # more than k are equal
        wanted = pre.topk(k, dim=1).values.relu()
        values, columns = (part.cpu() for part in find_largest(pre.to(device), k))
        if not torch.equal(values.sort(dim=1, descending=True).values, wanted):
            return "its largest entries of a row differ from torch's"
        if not torch.equal(torch.where(values > 0, pre.gather(1, columns), 0.0), values):
            return "its largest entries of a row are in other columns"
        ascends = columns.diff(dim=1) > 0
        if not bool((ascends | (values[:, 1:] == 0)).all()):
            return "its largest entries of a row are not by column"
    return None
