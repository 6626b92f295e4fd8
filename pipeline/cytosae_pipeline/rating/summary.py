"""`ratings`: how carefully each rater rated, how well raters agree, and which latents passed."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cytosae.analysis.agreement import cohen_kappa, fleiss_kappa
from cytosae_pipeline.config.rating import RatingRule, RatingsConfig
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.rating.answers import CONCEPTS, Ratings
from cytosae_pipeline.rating.files import FOLDER_NAME, read_all_ratings
from cytosae_pipeline.rating.passed import describe_rule, find_passed
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.notes import Subject
from cytosae_pipeline.workspace.runs import resolve_sae

_MOST_SHOWN = 20


@dataclass(frozen=True)
class RaterSummary:
    """One rater."""

    rater: str
    """Short name."""
    n_rated: int
    """Latents rated."""
    n_yes: int
    """Of them, those called one concept."""
    n_partly: int
    """Those called partly one."""
    n_no: int
    """Those called none."""
    n_found: int
    """Latents of which the intruder was found."""
    chance: float | None
    """Share of intruders that clicks at random would find: the mean of 1 / images of the row; None without ratings."""
    n_decoys: int
    """Decoys rated."""
    n_rejected: int
    """Decoys that were called no concept."""

    def describe(self) -> str:
        """The same as text."""
        if not self.n_rated:
            found = "no latent rated"
        else:
            assert self.chance is not None
            found = (
                f"intruder found {self.n_found} of {self.n_rated} ({self.n_found / self.n_rated:.0%}, by chance "
                f"{self.chance:.0%})"
            )
        decoys = "no decoy rated"
        if self.n_decoys:
            decoys = f"decoys rejected {self.n_rejected} of {self.n_decoys} ({self.n_rejected / self.n_decoys:.0%})"
        counts = f"{self.n_yes} yes, {self.n_partly} partly, {self.n_no} no"
        return f"{self.rater}: {say_count(self.n_rated, 'latent')} rated ({counts}); {found}; {decoys}"


@dataclass(frozen=True)
class PairAgreement:
    """Two raters, over the latents that both have rated."""

    first: str
    """One rater."""
    second: str
    """The other."""
    n_latents: int
    """Latents that both have rated."""
    kappa: float | None
    """Cohen's kappa of yes, partly and no; None where it is not defined."""
    weighted_kappa: float | None
    """The same with quadratic weights."""


@dataclass(frozen=True)
class AllAgreement:
    """All raters, over the latents that all have rated."""

    n_raters: int
    """Raters."""
    n_latents: int
    """Latents that all have rated."""
    kappa: float | None
    """Fleiss' kappa; None where it is not defined."""


@dataclass(frozen=True)
class RatingsSummary:
    """What `ratings` says."""

    folder: Path
    """Folder of the files."""
    raters: list[RaterSummary]
    """In the order of their names."""
    pairs: list[PairAgreement]
    """Every two of them."""
    all_raters: AllAgreement | None
    """Three or more of them; None for fewer."""
    n_latents: int
    """Latents that anybody has rated."""
    passed: list[int]
    """Latents that passed."""
    rule: str
    """The rule, in a sentence."""

    def describe(self) -> str:
        """The same as text."""
        lines = [one.describe() for one in self.raters]
        lines += [
            f"{pair.first} and {pair.second}, {say_count(pair.n_latents, 'latent')} rated by both: Cohen's kappa "
            f"{_say(pair.kappa)}, with quadratic weights {_say(pair.weighted_kappa)}"
            for pair in self.pairs
        ]
        if self.all_raters is not None:
            every = self.all_raters
            lines.append(
                f"all {every.n_raters} raters, {say_count(every.n_latents, 'latent')} rated by all: Fleiss' kappa "
                f"{_say(every.kappa)}"
            )
        shown = ", ".join(map(str, self.passed[:_MOST_SHOWN])) + (" ..." if len(self.passed) > _MOST_SHOWN else "")
        lines.append(f"passed: {len(self.passed):,} of {say_count(self.n_latents, 'rated latent')}: {shown or 'none'}")
        return "\n".join([*lines, self.rule, f"files: {self.folder}"])


def run_ratings(config: RatingsConfig) -> RatingsSummary:
    """Read all ratings beside the feature data and sum them up.

    Args:
        config: Options.

    Raises:
        ValueError: If the autoencoder or store is missing or they do not fit, or there are no ratings.
    """
    inputs = open_inputs(resolve_sae(config))
    ratings = read_all_ratings(inputs.folder, inputs.n_latents, subject=Subject.of(inputs), keep=config.keep_notes)
    if not ratings:
        raise UserError(
            f"there are no ratings in '{inputs.folder}'. Rate latents with: cytosae-cache explore --rate RATER, and "
            "the options of this command"
        )
    return summarize(ratings, config, inputs.folder / FOLDER_NAME)


def summarize(ratings: Sequence[Ratings], rule: RatingRule, folder: Path) -> RatingsSummary:
    """Sum up the ratings of all raters.

    Args:
        ratings: Those of each rater.
        rule: Which latents pass.
        folder: Folder of the files.
    """
    passed = find_passed(ratings, rule)
    rated = [one for one in ratings if one.latents]
    return RatingsSummary(
        folder=folder,
        raters=[_sum_up(one) for one in ratings],
        pairs=[_compare(first, second) for first, second in itertools.combinations(rated, 2)],
        all_raters=_compare_all(rated) if len(rated) > 2 else None,
        n_latents=passed.n_rated,
        passed=passed.latents.tolist(),
        rule=describe_rule(rule),
    )


def _sum_up(ratings: Ratings) -> RaterSummary:
    """One rater."""
    answers = list(ratings.latents.values())
    n_yes, n_partly, n_no = (
        sum(answer["concept"] == concept for answer in answers) for concept in ("yes", "partly", "no")
    )
    return RaterSummary(
        rater=ratings.rater,
        n_rated=len(answers),
        n_yes=n_yes,
        n_partly=n_partly,
        n_no=n_no,
        n_found=sum(answer["found"] for answer in answers),
        chance=math.fsum(1 / answer["n_row"] for answer in answers) / len(answers) if answers else None,
        n_decoys=len(ratings.decoys),
        n_rejected=sum(answer["concept"] == "no" for answer in ratings.decoys.values()),
    )


def _compare(first: Ratings, second: Ratings) -> PairAgreement:
    """Two raters."""
    both = sorted(first.latents.keys() & second.latents.keys())
    one, other = (_categories(ratings, both) for ratings in (first, second))
    return PairAgreement(
        first.rater,
        second.rater,
        len(both),
        _defined(cohen_kappa(one, other, len(CONCEPTS))),
        _defined(cohen_kappa(one, other, len(CONCEPTS), weights="quadratic")),
    )


def _compare_all(ratings: Sequence[Ratings]) -> AllAgreement:
    """Three raters or more."""
    every = sorted(set.intersection(*(set(one.latents) for one in ratings)))
    table = [list(item) for item in zip(*(_categories(one, every) for one in ratings), strict=True)]
    kappa = fleiss_kappa(table, len(CONCEPTS)) if every else math.nan
    return AllAgreement(len(ratings), len(every), _defined(kappa))


def _categories(ratings: Ratings, latents: Sequence[int]) -> list[int]:
    """Answers to "is it one concept?", as numbers in their order."""
    return [CONCEPTS.index(ratings.latents[latent]["concept"]) for latent in latents]


def _defined(value: float) -> float | None:
    """None for NaN, which JSON cannot express."""
    return None if math.isnan(value) else value


def _say(value: float | None) -> str:
    """A kappa for people."""
    return "not defined" if value is None else f"{value:.3f}"
