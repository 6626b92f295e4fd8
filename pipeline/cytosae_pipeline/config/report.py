"""Options of `report` and `explore`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cytosae_pipeline.config.fields import option
from cytosae_pipeline.config.masks import MaskChoice
from cytosae_pipeline.config.rating import PassedChoice, RateChoice
from cytosae_pipeline.config.statistics import StatisticsConfig
from cytosae_pipeline.config.subjects import SubjectChoice
from cytosae_pipeline.errors import UserError

Range = tuple[float | None, float | None]
"""A closed range, as `cytosae.analysis.latents` takes it; None leaves an end open."""


@dataclass(frozen=True, kw_only=True)
class PageConfig(PassedChoice, SubjectChoice, MaskChoice, StatisticsConfig):
    """Options of every verb that makes the page."""

    latents: str | None = option(
        None, "Latents that get a page, as numbers and ranges: 12,77,500-520. [default: the best by the options below]"
    )
    n_latents: int = option(
        200,
        "How many get a page: up to half differ between groups of patients, the others are the most specific.",
        minimum=1,
    )
    log10_sparsity: str | None = option(
        None, "Only latents in this range, LO:HI with either end left out: -3:-1 = active on 0.1 to 10 % of the images."
    )
    log10_mean: str | None = option(None, "Only latents whose log10 mean activation is in LO:HI.")
    entropy: str | None = option(None, "Only latents whose label entropy is in LO:HI; 0 means a single label.")
    clusters: int = option(5, "Clusters of latents by mean and sparsity (k-means).", minimum=1, maximum=100)
    cluster: tuple[int, ...] = option(
        (), "Only latents of this cluster, numbered from 0 by falling sparsity; may be given several times."
    )
    groups: Path | None = option(
        None, "CSV with columns patient,group. [default: the label, if every patient has exactly one]"
    )
    group_test: Literal["mann-whitney", "permutation"] = option("mann-whitney", "Test that compares two groups.")
    cells: Literal["all", "equal"] = option(
        "all",
        "Images that comparisons and classification of groups count. all: every image of a subject. equal: as many of "
        "every subject as the one with fewest has, drawn at random, for groups with different numbers of images "
        "(docs/statistics.md).",
    )
    shuffles: int = option(
        100,
        "Shuffles of the groups that say what their classification reaches by chance, about 0.1 s each; 0 skips them.",
        minimum=0,
    )
    min_images: int = option(1, "Leave subjects with fewer readable images out of comparisons.", minimum=1)
    strata: str | None = option(
        None,
        "Column of --covariates or of the manifest, such as site or scanner: groups are compared within its levels, "
        "so that what differs between these cannot become a difference of the groups (van Elteren's test).",
    )
    adjust: tuple[str, ...] = option(
        (),
        "Such a column, as age or sex: groups are compared at equal values of it, in a linear model; may be given "
        "several times.",
    )
    quantile_images: int = option(
        3,
        "Images shown at the 90 % and 50 % quantile of each latent's activation and just above 0, beside its largest; "
        "0 shows none.",
        minimum=0,
        maximum=50,
    )
    site_column: str | None = option(
        None,
        "Column of --covariates, or of the manifest that the store was built from, that names the hospital, scanner or "
        "laboratory: the page shows each latent's share of activity by it. [default: site, if there is one]",
    )
    other_sae_path: tuple[Path, ...] = option(
        (),
        "Another autoencoder, such as one of another seed, named as for --sae_path: the page shows the nearest latent "
        "in it. Repeatable.",
    )
    image_values: Path | None = option(
        None,
        "CSV with a column path, as in the store, and columns of numbers, such as nucleus_area: the page shows their "
        "rank correlation with each latent, beside those of numbers in the manifest.",
    )
    masking_images: int = option(
        2000, "Images of the masking experiment, spread over the store; 0 skips it.", minimum=0
    )
    map: Literal["pca", "umap"] = option(
        "pca", "Plane of the map of cells: exact principal components, or UMAP (extra `map`)."
    )
    map_images: int = option(5000, "Images of the map of cells, spread over the store; 0 skips it.", minimum=0)
    keep_notes: bool = option(
        False,
        "Take names, notes and ratings of latents even if they are about another autoencoder or other images.",
    )
    seed: int = option(
        0, "Seed of clusters, folds, permutations, UMAP and the masking experiment.", minimum=0, maximum=2**32 - 1
    )

    def __post_init__(self) -> None:
        """Check ranges, the list of latents and the clusters."""
        super().__post_init__()
        for name in ("log10_sparsity", "log10_mean", "entropy"):
            parse_range(name, getattr(self, name))
        if self.latents is not None:
            parse_latents(self.latents)
        if self.adjust and (self.strata is not None or self.group_test != "mann-whitney"):
            other = "--strata" if self.strata is not None else f"--group_test {self.group_test}"
            raise UserError(
                f"--adjust compares groups in a linear model, {other} by another test: give one of them. A linear "
                "model takes names such as sites, too: --adjust site --adjust age"
            )
        wrong = [number for number in self.cluster if not 0 <= number < self.clusters]
        if wrong:
            raise UserError(
                f"cluster must lie in 0..{self.clusters - 1}, as clusters is {self.clusters}, found {wrong[0]}"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(PageConfig):
    """Options of `report`."""

    out: Path | None = option(None, "Folder of the report. [default: report/ beside the feature data]")
    figures: bool = option(False, "Also write PNG and SVG figures for papers, in figures/ beside the page.")
    pseudonymize: bool = option(
        False, "Replace patients by keyed hashes and leave paths out; the key stays beside the feature data."
    )


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(RateChoice, PageConfig):
    """Options of `explore`."""

    masking_images: int = option(
        0, "Images of the masking experiment, run before the page opens; 0 skips it.", minimum=0
    )
    map_images: int = option(
        1000, "Images of the map of cells, spread over the store; computed when the map is opened.", minimum=0
    )
    port: int = option(0, "Port on 127.0.0.1; 0 takes a free one.", minimum=0, maximum=65535)


def parse_range(name: str, text: str | None) -> Range | None:
    """A range written `LO:HI`; None if none was given.

    Raises:
        UserError: If the text is not a range; the message names the option.
    """
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        ends = (float(low) if low.strip() else None, float(high) if high.strip() else None)
    except ValueError:
        colon = ""
    if not colon or any(end != end for end in ends):
        raise UserError(f"{name} must be LO:HI, such as -3:-1 or -3: or :-1, found {text!r}")
    if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        raise UserError(f"{name} must rise from LO to HI, found {text!r}")
    return ends


def parse_latents(text: str) -> list[int]:
    """Latents written as `12,77,500-520`, each once, in the order given.

    Raises:
        UserError: If the text is not such a list, or names more than 100,000 latents.
    """
    chosen: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise UserError(f"latents must be numbers and ranges, such as 12,77,500-520, found {part!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if len(chosen) + last - first >= 100_000:
            raise UserError(f"latents names more than 100,000 latents: {text[:60]!r}")
        chosen.update(dict.fromkeys(range(first, last + 1)))
    return list(chosen)
