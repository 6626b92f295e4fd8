"""Which latents and images get a page."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cytosae.analysis.differential import GroupComparison, largest_differences
from cytosae.analysis.latents import select_latents
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.config.report import PageConfig, parse_latents, parse_range
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.data.report_data import LatentData, ReportData
from cytosae_pipeline.report.measures.evidence import LatentEvidence

Latents = npt.NDArray[np.int64]


def choose_latents(
    data: LatentData, comparisons: Sequence[GroupComparison] = (), *, explore: bool = False
) -> tuple[Latents, str]:
    """Choose the featured latents: those that get a page in a report, or a card in the explorer.

    Up to half of them differ most between groups of patients; the others are the most specific to a label
    (docs/definitions.md, section 10).

    Args:
        data: Store, autoencoder and statistics.
        comparisons: Comparisons of groups of patients.
        explore: Whether the explorer serves the page, so that every other latent can be opened, too.

    Returns:
        The latents, and a sentence that describes the choice.

    Raises:
        UserError: If a latent is out of range, or no latent is left.
    """
    config = data.config
    if config.latents is not None:
        return _asked_for(config.latents, data, explore=explore)
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
    if data.passed is not None:
        selected &= np.isin(np.arange(data.n_latents), data.passed.latents)
    n_active, n_selected = int((sparsity > 0).sum()), int(selected.sum())
    if not n_selected:
        raise UserError(_nothing_left(config, n_active))
    differing = most_different(comparisons, selected, config.n_latents // 2)
    selected[differing] = False
    specific = data.features.first_latents(config.n_latents - len(differing), selected)
    chosen = np.concatenate([differing, specific])
    shown = "The cards show" if explore else "This report has pages for"
    more = (
        "Click a point or enter a number to open any other."
        if explore
        else "Use --n_latents for more, --latents for others."
    )
    some = f"{n_selected:,} selected of the " if n_selected < n_active else ""
    groups = f"{len(differing):,} that differ most between groups of patients, then " if len(differing) else ""
    found = data.features.specificity
    n_specific = 0 if found is None else int((found.lift[specific].max(axis=1, initial=0) > 1).sum())
    labels = f"{n_specific:,} that are most specific to a label, labels in turn, " if n_specific else ""
    others = "those with the lowest label entropy" if n_specific < len(specific) else ""
    by = labels.rstrip(", ") if not others else f"{labels}then {others}" if labels else others
    return chosen, f"{shown} {len(chosen):,} of {some}{n_active:,} active latents: {groups}{by}. {more}"


def most_different(comparisons: Sequence[GroupComparison], allowed: npt.NDArray[np.bool_], n: int) -> Latents:
    """Latents that differ significantly between groups: the most different of each side of each comparison in turn.

    Args:
        comparisons: Comparisons of groups.
        allowed: Whether a latent may be chosen, shape `(S,)`.
        n: Most latents to return.
    """
    sides = [
        side[(found.q_value[side] < SIGNIFICANT_Q) & allowed[side]][:n].tolist()
        for found in comparisons
        for side in largest_differences(found, len(allowed))
    ]
    rounds = itertools.zip_longest(*sides)
    turns = dict.fromkeys(latent for turn in rounds for latent in turn if latent is not None)
    return np.array(list(itertools.islice(turns, n)), dtype=np.int64)


def image_rows(
    data: ReportData, latents: npt.NDArray[np.int64], evidence: Sequence[LatentEvidence] = ()
) -> npt.NDArray[np.int64]:
    """Rows of all images on the pages of latents, in the order of the page's numbers, shape `(n,)`.

    Args:
        data: Store, autoencoder and statistics.
        latents: The latents, shape `(M,)`: their top images.
        evidence: Of each of them: the images at quantiles.
    """
    rows = np.unique(np.concatenate([data.top_rows[latents].ravel(), *(one.rows for one in evidence)]))
    rows = rows[rows >= 0]
    return rows[np.argsort(data.numbers[rows])]


def _asked_for(text: str, data: LatentData, *, explore: bool) -> tuple[Latents, str]:
    """The latents of `--latents`, of those that passed if the page is limited to them."""
    n_latents = data.n_latents
    chosen = np.array(parse_latents(text), dtype=np.int64)
    if chosen.max() >= n_latents:
        near = suggest(chosen.max(), map(str, range(n_latents)))
        raise UserError(f"--latents names {chosen.max()}, but the autoencoder's latents are 0..{n_latents - 1}{near}")
    if data.passed is not None:
        chosen = chosen[np.isin(chosen, data.passed.latents)]
        if not len(chosen):
            raise UserError("none of the latents of --latents passed its rating: leave out --latents or --passed")
    shown = "The cards show" if explore else "This report has pages for"
    more = " Click a point or enter a number to open any other." if explore else ""
    return chosen, f"{shown} the {len(chosen):,} latents of --latents, of {n_latents:,} in total.{more}"


def _nothing_left(config: PageConfig, n_active: int) -> str:
    """Message for ranges that leave no latent."""
    if not n_active:
        return "no latent of this autoencoder is active on any image of the store: there is nothing to show"
    return (
        f"none of the {n_active:,} active latents passes --log10_sparsity {config.log10_sparsity or ':'}, "
        f"--log10_mean {config.log10_mean or ':'}, --entropy {config.entropy or ':'} and --cluster "
        f"{', '.join(map(str, config.cluster)) or 'any'}{' and --passed' if config.passed else ''}: widen a range"
    )
