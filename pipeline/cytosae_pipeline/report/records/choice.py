"""Which latents and images get a page."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cytosae.analysis.differential import GroupComparison, largest_differences
from cytosae.analysis.latents import best_latents, select_latents
from cytosae_pipeline.config.report import PageConfig, parse_latents, parse_range
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.data.report_data import ReportData

Latents = npt.NDArray[np.int64]


def choose_latents(
    data: ReportData, comparisons: Sequence[GroupComparison] = (), *, explore: bool = False
) -> tuple[Latents, str]:
    """The latents that get a page, and a sentence that says which they are.

    At most half of them are those that differ most between groups of patients; the others are the most specific ones.

    Args:
        data: What the page is made of.
        comparisons: Groups of patients compared.
        explore: Whether all others can be looked at too, so that these are a choice to begin with.

    Raises:
        UserError: If one is out of range, or none is left.
    """
    config = data.config
    if config.latents is not None:
        return _asked_for(config.latents, data.n_latents, explore=explore)
    sparsity, mean = data.features.sparsity, data.features.mean_acts
    selected = select_latents(
        sparsity,
        mean,
        data.entropy,
        log10_sparsity=parse_range("log10_sparsity", config.log10_sparsity),
        log10_mean=parse_range("log10_mean", config.log10_mean),
        entropy_range=parse_range("entropy", config.entropy),
    )
    if config.cluster:
        selected &= np.isin(data.clusters, config.cluster)
    n_active, n_selected = int((sparsity > 0).sum()), int(selected.sum())
    if not n_selected:
        raise UserError(_nothing_left(config, n_active))
    differing = most_different(comparisons, selected, config.n_latents // 2)
    left = np.where(selected, sparsity, 0)
    left[differing] = 0
    specific = best_latents(left, mean, data.entropy, config.n_latents - len(differing))
    chosen = np.concatenate([differing, specific])
    shown = "The cards show" if explore else "This report holds pages of"
    more = (
        "Any other opens by a click or by its number." if explore else "More with --n_latents, others with --latents."
    )
    some = f"{n_selected:,} selected of the " if n_selected < n_active else ""
    groups = f"{len(differing):,} that differ most between groups of patients, then " if len(differing) else ""
    return chosen, (
        f"{shown} {len(chosen):,} of {some}{n_active:,} active latents: {groups}those with the lowest label entropy, "
        f"then the strongest. {more}"
    )


def most_different(comparisons: Sequence[GroupComparison], allowed: npt.NDArray[np.bool_], n: int) -> Latents:
    """Latents that differ between groups at a false discovery rate of 5 %, the most different of every side in turn.

    Args:
        comparisons: Groups compared.
        allowed: Whether a latent may be chosen, shape `(S,)`.
        n: Latents wanted at most.
    """
    sides = [
        side[(found.q_value[side] < SIGNIFICANT_Q) & allowed[side]][:n].tolist()
        for found in comparisons
        for side in largest_differences(found, len(allowed))
    ]
    rounds = itertools.zip_longest(*sides)
    turns = dict.fromkeys(latent for turn in rounds for latent in turn if latent is not None)
    return np.array(list(itertools.islice(turns, n)), dtype=np.int64)


def top_image_rows(data: ReportData, latents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of all top images of the latents, in the order of the page's numbers, shape `(n,)`."""
    rows = np.unique(data.top_rows[latents])
    rows = rows[rows >= 0]
    return rows[np.argsort(data.numbers[rows])]


def _asked_for(text: str, n_latents: int, *, explore: bool) -> tuple[Latents, str]:
    """The latents of `--latents`."""
    chosen = np.array(parse_latents(text), dtype=np.int64)
    if chosen.max() >= n_latents:
        raise UserError(f"--latents names {chosen.max()}, the autoencoder's latents are 0..{n_latents - 1}")
    shown = "The cards show" if explore else "This report holds"
    more = " Any other opens by a click or by its number." if explore else ""
    return chosen, f"{shown} the {len(chosen):,} latents that were asked for, of {n_latents:,}.{more}"


def _nothing_left(config: PageConfig, n_active: int) -> str:
    """What to do when the ranges leave no latent."""
    if not n_active:
        return "no latent of this autoencoder is active on any image of the store: there is nothing to show"
    return (
        f"no latent is left of {n_active:,} active ones by --log10_sparsity {config.log10_sparsity or ':'}, "
        f"--log10_mean {config.log10_mean or ':'}, --entropy {config.entropy or ':'} and --cluster "
        f"{', '.join(map(str, config.cluster)) or 'any'}: widen a range"
    )
