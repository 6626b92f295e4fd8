"""Everything that one pass of the encoder is asked for, collected from any range of shards and merged."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cytosae.statistics.accumulators import Accumulator
from cytosae.statistics.block_encoder import PooledActs
from cytosae.statistics.histograms import LatentProfiles
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.runtime.cluster import connect, count_workers, map_ranges, plan_ranges
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.counts import CountsAccumulator, GroupKind
from cytosae_pipeline.statistics.encode import ActsRequest, encode_shards, is_screened, rows_of
from cytosae_pipeline.statistics.features import FeaturesAccumulator
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.sharing import SharedInputs, share

States = list[Accumulator]
"""State of all accumulators of a pass, in an order that depends on what it is asked for alone."""


@dataclass(frozen=True)
class Asked:
    """What a pass is asked for."""

    features: bool = False
    """Feature data."""
    counts: tuple[GroupKind, ...] = ()
    """Kinds of counts."""
    profiles: bool = False
    """Profiles of all latents."""


class Collector:
    """The accumulators of a pass. A process alone and a worker of a cluster run the same one, on other shards.

    Args:
        inputs: Autoencoder and store.
        config: Options of the statistics.
        asked: What is collected.
        shards: Shards that may come; only their groups take memory. Default all.

    Raises:
        UserError: If counts are requested of groups that no image has.
    """

    def __init__(self, inputs: Inputs, config: StatisticsOptions, asked: Asked, shards: range | None = None) -> None:
        part = rows_of(inputs, range(inputs.store.n_shards) if shards is None else shards)
        rows = slice(part.start, part.stop)
        self._inputs, self._config = inputs, config
        self.features = FeaturesAccumulator(inputs, config) if asked.features else None
        """Collects feature data, if they are requested."""
        self.counts = {kind: CountsAccumulator(inputs, config, kind, rows) for kind in asked.counts}
        """Collect counts."""
        self._labels = torch.from_numpy(inputs.labels.numbers)
        self.profiles = LatentProfiles(inputs.n_latents, len(inputs.labels.names)) if asked.profiles else None
        """Collects profiles, if they are requested."""

    def run(
        self, shards: range, *, screened: bool | None = None, advance: Callable[[int], None] = lambda n_images: None
    ) -> None:
        """Collect from all readable images of some shards.

        Args:
            shards: Consecutive shards.
            screened: As for `make_encoder`.
            advance: Called with the number of images of each batch after it.
        """
        encode_shards(
            self._inputs,
            self._config,
            shards,
            [self._consume],
            thresholds=self._config.threshold if self.counts else (),
            on_acts=self._requests(),
            screened=screened,
            advance=advance,
        )

    @property
    def states(self) -> States:
        """What was collected so far."""
        several = [self.features, *self.counts.values()]
        found = [state for one in several if one is not None for state in one.state]
        return [*found, *([self.profiles] if self.profiles is not None else [])]

    def _requests(self) -> list[ActsRequest]:
        """Who takes the activations of all tokens."""
        found: list[ActsRequest] = []
        if self.features is not None and self.features.specificity is not None:
            found.append((self.features.specificity.add, self.features.specificity.wanted))
        if self.profiles is not None:
            found.append((self._profile, None))
        return found

    def _consume(self, rows: torch.Tensor, pooled: PooledActs) -> None:
        for one in (self.features, *self.counts.values()):
            if one is not None:
                one.update(rows, pooled)
        if self.profiles is not None:
            self.profiles.count_images(self._labels[rows])

    def _profile(self, rows: torch.Tensor, latents: slice, acts: torch.Tensor) -> None:
        assert self.profiles is not None
        self.profiles.add(acts, self._labels[rows], latents)


def merge_states(into: States, other: Sequence[Accumulator]) -> States:
    """Merge the states of a pass over other shards into the first ones, which are returned."""
    for one, another in zip(into, other, strict=True):
        one.merge(another)
    return into


def collect(inputs: Inputs, config: StatisticsOptions, asked: Asked, *, what: str) -> Collector:
    """Collect from all shards of a store, in this process or on the cluster that the options name.

    Args:
        inputs: Autoencoder and store.
        config: Options of the statistics.
        asked: What is collected.
        what: Name of the work, shown with the progress.

    Raises:
        UserError: If counts are requested of groups that no image has.
        ClusterError: If the cluster cannot be used.
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    store, total = inputs.store, Collector(inputs, config, asked)
    if config.dask is None:
        with Progress(what, store.n_images, "images") as bar:
            total.run(range(store.n_shards), advance=bar.advance)
        return total
    device: Any = inputs.sae.W_enc.device.type  # in Python; the verbs have an option
    shared = share(inputs, getattr(config, "device", device))
    with connect(config.dask) as client:
        function = functools.partial(_collect_range, shared, config, asked, is_screened(inputs, config))
        ranges = plan_ranges(store.n_shards, count_workers(client))
        with Progress(what, store.n_images, "images") as bar:
            found = map_ranges(
                client, function, ranges, merge_states, lambda part: bar.advance(len(rows_of(inputs, part)))
            )
    merge_states(total.states, found)
    return total


def _collect_range(
    shared: SharedInputs, config: StatisticsOptions, asked: Asked, screened: bool, shards: range
) -> States:
    """What a worker does for a range of shards."""
    part = Collector(shared.open(), config, asked, shards)
    part.run(shards, screened=screened)
    return part.states
