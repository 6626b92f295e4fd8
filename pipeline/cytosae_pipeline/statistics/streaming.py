"""Parts of a pass whose results are taken in order, in this process or on a cluster."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.runtime.cluster import connect, iter_ranges
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.sharing import SharedInputs, share

T = TypeVar("T")


def iter_parts(
    inputs: Inputs,
    config: StatisticsOptions,
    function: Callable[[Inputs, Sequence[range]], Iterator[T]],
    parts: Sequence[range],
) -> Iterator[T]:
    """What a function yields for each part, in their order; workers compute it if the options name a cluster.

    Args:
        inputs: Autoencoder and store.
        config: Options.
        function: Function of the inputs, whose decoder workers do not have, and any parts, which yields a result for
            each, independent of the others; picklable, as are the results.
        parts: The ranges. Results of a few are in memory at once.

    Raises:
        ClusterError: If the cluster cannot be used.
        Exception: Whatever `function` raises.
    """
    if config.dask is None:
        yield from function(inputs, parts)
        return
    device: Any = inputs.sae.W_enc.device.type  # in Python; the verbs have an option
    shared = share(inputs, getattr(config, "device", device))
    with connect(config.dask) as client:
        yield from iter_ranges(client, functools.partial(_call, function, shared), parts, unit="images")


def split_evenly(n: int, size: int) -> list[range]:
    """The numbers below `n` in ranges of a size, of which the last may be shorter."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _call(function: Callable[[Inputs, Sequence[range]], Iterator[T]], shared: SharedInputs, part: range) -> T:
    """What a worker does for a range of images."""
    (found,) = function(shared.open(), [part])
    return found
