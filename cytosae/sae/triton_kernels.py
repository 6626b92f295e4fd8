"""Products of sparse matrices, searches, and norms of rows as Triton kernels; `cytosae.sae.kernels` decides where.

Nothing is added atomically, so results repeat to the last bit, and all sums are in float32, whatever the type of the
factors. No product uses tensor cores, so float32 is never rounded to TF32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_LONGEST = 1024
"""Entries that one program adds up; longer rows, such as a latent active on all tokens, are divided at multiples."""


class _Blocks(NamedTuple):
    """How much a program looks at together."""

    entries: int
    channels: int
    warps: int


_SUMMED, _SAMPLED = _Blocks(2, 512, 2), _Blocks(4, 256, 1)
"""Of a sum and of sampled products: on an H200, the best of 50 at width 768 in both types, of rows and columns."""
_CHUNK, _CHUNKS = 256, 16
"""Columns of a row in which entries are counted together, and how many times as many one program looks at."""
_COUNT_WARPS, _TAKE_WARPS = 4, 1
"""A warp reads 256 numbers of bfloat16 at once. On an H200, all four are within a tenth of the best of 32."""
_NORMALISE_WARPS = 4
_TOLERANCE = 1e-5
"""Relative error of a product up to which it is right."""


@triton.jit(do_not_specialize=["n_rows"])
def sum_pieces(
    rows: tl.tensor, columns: tl.tensor, values: tl.tensor, bounds: tl.tensor, table: tl.tensor,
    out: tl.tensor, n_rows: tl.tensor, width: tl.tensor,
    LONGEST: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The first kernel of `sum_rows`: each program adds up a part of a row.

    The first programs begin the rows, the others continue one at every multiple of LONGEST.
    """
    program = tl.program_id(0).to(tl.int64)
    continues = program >= n_rows
    mark = (program - n_rows + 1) * LONGEST
    row = tl.load(rows + mark, mask=continues, other=program)
    first, last = tl.load(bounds + row), tl.load(bounds + row + 1)
    start = tl.where(continues, mark, first)
    end = tl.minimum(last, (start // LONGEST + 1) * LONGEST)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ENTRIES, CHANNELS), tl.float32)
    for block in range(start, end, ENTRIES):
        entries = block + tl.arange(0, ENTRIES)
        there = entries < end
        column = tl.load(columns + entries, mask=there, other=0)
        value = tl.load(values + entries, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & (channels < width)[None, :]
        found = tl.load(table + column[:, None] * width + channels[None, :], mask=mask, other=0.0)
        total += value[:, None] * found.to(tl.float32)
    tl.store(out + program * width + channels, tl.sum(total, axis=0), mask=channels < width)


@triton.jit(do_not_specialize=["n_rows"])
def join_pieces(
    rows: tl.tensor, bounds: tl.tensor, out: tl.tensor, n_rows: tl.tensor, width: tl.tensor,
    LONGEST: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The second kernel of `sum_rows`: what continues a row is added to its beginning."""
    mark = (tl.program_id(0).to(tl.int64) + 1) * LONGEST
    row = tl.load(rows + mark)
    first, last = tl.load(bounds + row), tl.load(bounds + row + 1)
    # The program of a row's first continuation adds all of them, in their order.
    if (first < mark) & (mark - LONGEST <= first):
        channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        inside = channels < width
        total = tl.load(out + row * width + channels, mask=inside, other=0.0)
        for number in range(mark // LONGEST, (last - 1) // LONGEST + 1):
            total += tl.load(out + (n_rows + number - 1) * width + channels, mask=inside, other=0.0)
        tl.store(out + row * width + channels, total, mask=inside)


@triton.jit(do_not_specialize=["n"])
def sample_products(
    rows: tl.tensor, columns: tl.tensor, left: tl.tensor, right: tl.tensor, out: tl.tensor,
    n: tl.tensor, width: tl.tensor,
    ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `multiply_sampled`: each program multiplies a few entries."""
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < n
    row = tl.load(rows + entries, mask=there, other=0)
    column = tl.load(columns + entries, mask=there, other=0)
    total = tl.zeros((ENTRIES, CHANNELS), tl.float32)
    for start in range(0, width, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        mask = there[:, None] & (channels < width)[None, :]
        one = tl.load(left + row[:, None] * width + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(right + column[:, None] * width + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        total += one * other
    tl.store(out + entries, tl.sum(total, axis=1), mask=there)


@triton.jit
def compare(
    pre: tl.tensor, bound: tl.tensor, row: tl.tensor, columns: tl.tensor, m: tl.tensor, BOUND_NDIM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The values of a row at some columns, and which of them are above the bound."""
    inside = columns < m
    values = tl.load(pre + row * m + columns, mask=inside, other=float("-inf"))
    if BOUND_NDIM == 1:
        limit = tl.load(bound + columns, mask=inside, other=0.0)
    else:
        limit = tl.load(bound + row if BOUND_NDIM else bound)
    return values, values.to(tl.float32) > limit.to(tl.float32)


@triton.jit
def count_chunks(
    pre: tl.tensor, bound: tl.tensor, counts: tl.tensor, m: tl.tensor,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BOUND_NDIM: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `count_above`: each program counts in some chunks of a row."""
    n_chunks = tl.cdiv(m, CHUNK)
    n_programs = tl.cdiv(n_chunks, CHUNKS)  # of a row
    row = (tl.program_id(0) // n_programs).to(tl.int64)
    chunks = tl.program_id(0) % n_programs * CHUNKS + tl.arange(0, CHUNKS)
    columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    _, above = compare(pre, bound, row, columns, m, BOUND_NDIM)
    tl.store(counts + row * n_chunks + chunks, tl.sum(above.to(tl.int32), axis=1), mask=chunks < n_chunks)


@triton.jit
def take_chunks(
    pre: tl.tensor, bound: tl.tensor, ends: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, values: tl.tensor, m: tl.tensor,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BOUND_NDIM: tl.constexpr,
) -> None:  # fmt: skip
    """The kernel of `take_above`: each program reads some chunks of a row again, but none without entries."""
    n_chunks = tl.cdiv(m, CHUNK)
    n_programs = tl.cdiv(n_chunks, CHUNKS)
    row = (tl.program_id(0) // n_programs).to(tl.int64)
    first = tl.program_id(0) % n_programs * CHUNKS
    ends += row * n_chunks
    start = tl.load(ends + first - 1, mask=row + first > 0, other=0)
    for chunk in range(first, tl.minimum(first + CHUNKS, n_chunks)):
        end = tl.load(ends + chunk)
        if start < end:
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            value, above = compare(pre, bound, row, column, m, BOUND_NDIM)
            place = tl.cumsum(above.to(tl.int32), axis=0) - 1
            tl.store(rows + start + place, row, mask=above)
            tl.store(columns + start + place, column, mask=above)
            tl.store(values + start + place, value, mask=above)
        start = end


@triton.jit
def normalise_row(
    matrix: tl.tensor, smallest: tl.tensor, width: tl.tensor, CHANNELS: tl.constexpr
) -> None:  # fmt: skip
    """The kernel of `normalise_rows_`: each program scales a row."""
    channels = tl.arange(0, CHANNELS)
    at = tl.program_id(0).to(tl.int64) * width + channels
    values = tl.load(matrix + at, mask=channels < width, other=0.0)
    norm = tl.sqrt_rn(tl.sum(values * values, axis=0))
    # Not `maximum`, which would hide a NaN.
    tl.store(matrix + at, tl.div_rn(values, tl.where(norm < smallest, smallest, norm)), mask=channels < width)


def normalise_rows_(matrix: torch.Tensor, smallest: float) -> None:
    """Divide every row by its norm, in place.

    Args:
        matrix: Float32, contiguous, shape `(n, D)` with D up to `kernels.WIDEST_ROW`.
        smallest: What rows of smaller norms are divided by.
    """
    n, width = matrix.shape
    launch(
        normalise_row, (n,), matrix, smallest, width,
        CHANNELS=triton.next_power_of_2(width), num_warps=_NORMALISE_WARPS,
    )  # fmt: skip


def sum_rows(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """For every row of a sparse matrix, the sum of its values times the rows of a table: `A @ table`.

    A program adds up a row's entries as far as the next multiple of `_LONGEST`; another one continues there and writes
    below the result; a second kernel joins the two.

    Args:
        rows: Row of each entry, ascending, int64, shape `(n,)`.
        columns: Column of each entry, int64, shape `(n,)`.
        values: Value of each entry, shape `(n,)`.
        bounds: Index of each row's first entry, and n, int64, shape `(N + 1,)`.
        table: Shape `(S, D)`, float32 or bfloat16.

    Returns:
        Shape `(N, D)`, in the type of the table.
    """
    n_rows, width = len(bounds) - 1, table.shape[1]
    n_marks = max(0, len(rows) - 1) // _LONGEST
    out = table.new_empty((n_rows + n_marks, width), dtype=torch.float32)
    entries, channels, warps = _SUMMED
    n_blocks = triton.cdiv(width, channels)
    _launch(
        sum_pieces, (n_rows + n_marks, n_blocks),
        rows, columns, values, bounds, table, out, n_rows, width,
        LONGEST=_LONGEST, ENTRIES=entries, CHANNELS=channels, num_warps=warps,
    )  # fmt: skip
    _launch(
        join_pieces, (n_marks, n_blocks),
        rows, bounds, out, n_rows, width,
        LONGEST=_LONGEST, CHANNELS=channels, num_warps=warps,
    )  # fmt: skip
    return out[:n_rows].to(table.dtype)


def multiply_sampled(
    rows: torch.Tensor, columns: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """`left[row] . right[column]` for every entry of a sparse matrix.

    Args:
        rows: Row of each entry, int64, shape `(n,)`.
        columns: Column of each entry, int64, shape `(n,)`.
        left: Shape `(N, D)`, float32 or bfloat16.
        right: Shape `(S, D)`, of the same type.

    Returns:
        Shape `(n,)`, in the type of the factors.
    """
    out = left.new_empty(len(rows))
    entries, channels, warps = _SAMPLED
    _launch(
        sample_products, (triton.cdiv(len(rows), entries),),
        rows, columns, left, right, out, len(rows), left.shape[1],
        ENTRIES=entries, CHANNELS=channels, num_warps=warps,
    )  # fmt: skip
    return out


def count_above(pre: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """How many entries of a matrix are above a bound, NaN never, added up from chunk to chunk of the rows.

    Args:
        pre: Shape `(n, m)`, float32 or bfloat16.
        bound: 0-dimensional, of each column, shape `(m,)`, or of each row, `(n, 1)`; rounded to the type of `pre`.

    Returns:
        Number of entries up to the end of each chunk, int64; the last one is that of all.
    """
    n, m = pre.shape
    if not pre.numel():
        return pre.new_zeros(1, dtype=torch.int64)
    counts = pre.new_empty(n * triton.cdiv(m, _CHUNK), dtype=torch.int64)
    _launch(
        count_chunks, (n * triton.cdiv(m, _CHUNK * _CHUNKS),),
        pre, bound.to(pre.dtype), counts, m,
        CHUNK=_CHUNK, CHUNKS=_CHUNKS, BOUND_NDIM=bound.ndim, num_warps=_COUNT_WARPS,
    )  # fmt: skip
    return counts.cumsum(0)


def take_above(
    pre: torch.Tensor, bound: torch.Tensor, ends: torch.Tensor, n_found: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of a matrix above a bound, row by row.

    Args:
        pre: As for `count_above`.
        bound: As for `count_above`.
        ends: What `count_above` returned.
        n_found: The last number of `ends`.

    Returns:
        Rows and columns, int64, and values, in the type of `pre`; shape `(n_found,)` each.
    """
    n, m = pre.shape
    rows, columns = (ends.new_empty(n_found) for _ in range(2))
    values = pre.new_empty(n_found)
    _launch(
        take_chunks, (n * triton.cdiv(m, _CHUNK * _CHUNKS) if n_found else 0,),
        pre, bound.to(pre.dtype), ends, rows, columns, values, m,
        CHUNK=_CHUNK, CHUNKS=_CHUNKS, BOUND_NDIM=bound.ndim, num_warps=_TAKE_WARPS,
    )  # fmt: skip
    return rows, columns, values


def find_problem(device: torch.device) -> str | None:
    """Compare products of a small matrix, and its entries, with those of torch on the CPU; what is wrong, or None."""
    n, width = 40, 136
    matrix, table = (torch.arange(n * m, device="cpu").view(n, m).sin() for m in (n, width))
    matrix[:, 3:] *= matrix[:, 3:] > 0.9
    rows, columns = matrix.nonzero(as_tuple=True)
    bounds = torch.searchsorted(rows, torch.arange(n + 1, device="cpu"))
    expected = matrix @ table, (table @ table.T)[rows, columns], table / table.norm(dim=1, keepdim=True)
    at = rows.to(device), columns.to(device)
    scaled = table.to(device, copy=True)
    normalise_rows_(scaled, _TOLERANCE)
    found = (
        sum_rows(*at, matrix[rows, columns].to(device), bounds.to(device), table.to(device)),
        multiply_sampled(*at, table.to(device), table.to(device)),
        scaled,
    )
    names = "matrix product", "sampled product", "row of norm 1"
    for name, wanted, product in zip(names, expected, found, strict=True):
        difference = float((product.cpu() - wanted).norm() / wanted.norm())
        if not difference <= _TOLERANCE:
            return f"its {name} differs from torch's by {difference:.1e}, more than {_TOLERANCE}"
    searched, bound = matrix.to(device), torch.zeros((), device=device)
    ends = count_above(searched, bound)
    above = (matrix > 0).nonzero(as_tuple=True)
    if int(ends[-1]) != len(above[0]):
        return f"it counts {int(ends[-1])} positive entries, torch {len(above[0])}"
    entries = take_above(searched, bound, ends, len(above[0]))
    if not all(torch.equal(one.cpu(), other) for one, other in zip(entries, (*above, matrix[above]), strict=True)):
        return "it finds other positive entries than torch"
    return None


def launch(
    kernel: Any,  # noqa: ANN401 - Triton has no types
    grid: tuple[int, ...],
    *arguments: torch.Tensor | float,
    **sizes: Any,  # noqa: ANN401
) -> None:
    """Start a kernel on the device of its first argument, a tensor, unless it has nothing to do."""
    if not all(grid):
        return
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        # By default, one version of Triton fuses products and sums and the next does not.
        kernel[grid](*arguments, **sizes, enable_fp_fusion=True)


def _launch(
    kernel: Any,  # noqa: ANN401
    grid: tuple[int, ...],
    *arguments: torch.Tensor | int,
    **sizes: int,
) -> None:
    """Start a kernel that computes addresses from the sizes alone: what it reads is made contiguous."""
    launch(kernel, grid, *(one.contiguous() if isinstance(one, torch.Tensor) else one for one in arguments), **sizes)
