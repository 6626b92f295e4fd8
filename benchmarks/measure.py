"""Interleaved timing of a baseline and our code: medians of several rounds, after a warm-up."""

import json
import platform
import statistics
import time
from collections.abc import Callable


def compare(
    name: str,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    *,
    between: Callable[[], object] | None = None,
    rounds: int = 7,
    repeats: int = 1,
    images_per_round: int | None = None,
    **sizes: object,
) -> dict[str, object]:
    """Time two functions alternately, A B A B ..., and print a JSON line.

    Args:
        name: Name of the line.
        baseline: What ours is compared with.
        ours: Our code.
        between: Called after both in every round; not timed.
        rounds: Rounds after one that warms up.
        repeats: How often each function does its work when it is called: times are divided by it.
        images_per_round: Images that each function handles; with it, the line contains CPU microseconds per image.
        **sizes: Further entries of the line.

    Returns:
        The line. `ratio` is the baseline's median time over ours: 1 means equally fast, more means that we are faster.
        `ratio_best` compares the fastest rounds, which other users of the machine disturbed least. `ratio_cpu` compares
        the CPU time of all threads, which they hardly disturb.
    """
    times: tuple[list[float], list[float]] = ([], [])
    cpu_times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 1):
        for function, kept, kept_cpu in zip((baseline, ours), times, cpu_times, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            function()
            if round_number:
                kept.append((time.perf_counter() - start) / repeats)
                kept_cpu.append((time.process_time() - start_cpu) / repeats)
        if between is not None:
            between()
    baseline_s, ours_s = (statistics.median(kept) for kept in times)
    baseline_cpu_s, ours_cpu_s = (max(statistics.median(kept), 1e-9) for kept in cpu_times)
    ratios = sorted(first / second for first, second in zip(*times, strict=True))
    line: dict[str, object] = {
        "name": name,
        "ratio": round(baseline_s / ours_s, 3),
        "ratio_best": round(min(times[0]) / min(times[1]), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "baseline_s": round(baseline_s, 6),
        "ours_s": round(ours_s, 6),
        "ratio_cpu": round(baseline_cpu_s / ours_cpu_s, 3),
        **(
            {}
            if images_per_round is None
            else {
                "baseline_cpu_us": round(1e6 * baseline_cpu_s / images_per_round, 1),
                "ours_cpu_us": round(1e6 * ours_cpu_s / images_per_round, 1),
            }
        ),
        "rounds": rounds,
        **sizes,
        "machine": platform.machine(),
    }
    print_line(line)
    return line


def print_line(line: dict[str, object]) -> None:
    """Print a JSON line on stdout."""
    print(json.dumps(line), flush=True)
