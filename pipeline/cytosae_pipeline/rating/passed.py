"""Which latents passed their rating."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config.rating import RatingRule
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.rating.answers import Answer, Ratings
from cytosae_pipeline.rating.files import read_all_ratings
from cytosae_pipeline.statistics.notes import Subject


class Passed(NamedTuple):
    """Latents that passed, and how many were rated."""

    latents: npt.NDArray[np.int64]
    """Those that passed, rising."""
    n_rated: int
    """Latents that anybody has rated."""
    rule: str
    """The rule, in a sentence."""

    def describe(self) -> str:
        """What a page says about it."""
        return (
            f"Only the {len(self.latents):,} of {self.n_rated:,} rated latents that passed have a page, and groups are "
            f"compared over these alone: q is adjusted over them. {self.rule}"
        )


def find_passed(ratings: Sequence[Ratings], rule: RatingRule) -> Passed:
    """Latents that passed: rated by enough raters, of whom all or most say yes, and most found the intruder.

    Args:
        ratings: Ratings of all raters.
        rule: How many raters are needed, and how many of them must say yes.
    """
    answers: dict[int, list[Answer]] = {}
    for one in ratings:
        for latent, answer in one.latents.items():
            answers.setdefault(latent, []).append(answer)
    passed = sorted(latent for latent, given in answers.items() if _passes(given, rule))
    return Passed(np.array(passed, dtype=np.int64), len(answers), describe_rule(rule))


def describe_rule(rule: RatingRule) -> str:
    """The rule, in a sentence."""
    who = "all of them say" if rule.yes_of == "all" else "more than half of them say"
    return (
        f"A latent passes if {say_count(rule.raters_needed, 'rater')} or more rated it, {who} that it is one concept, "
        "and more than half of them found the intruder."
    )


def require_passed(folder: Path, n_latents: int, rule: RatingRule, *, subject: Subject | None, keep: bool) -> Passed:
    """The latents that passed according to the files beside the feature data.

    Args:
        folder: Folder of the feature data.
        n_latents: Latents of the autoencoder.
        rule: The rule.
        subject: What the ratings must be about.
        keep: Take them whatever they are about.

    Raises:
        UserError: If there are no ratings, or no latent passed.
    """
    ratings = read_all_ratings(folder, n_latents, subject=subject, keep=keep)
    if not any(one.latents for one in ratings):
        raise UserError(
            f"--passed needs ratings, but there are none in '{folder}'. Rate latents with: cytosae-cache explore "
            "--rate RATER, and the options of this command"
        )
    passed = find_passed(ratings, rule)
    if not len(passed.latents):
        raise UserError(
            f"none of {say_count(passed.n_rated, 'rated latent')} passed. {passed.rule} See cytosae-cache ratings; let "
            "more raters rate them, or give --raters_needed or --yes_of"
        )
    return passed


def _passes(given: Sequence[Answer], rule: RatingRule) -> bool:
    """Whether a latent with these answers passes."""
    n = len(given)
    n_yes = sum(answer["concept"] == "yes" for answer in given)
    n_found = sum(answer["found"] for answer in given)
    enough = n_yes == n if rule.yes_of == "all" else 2 * n_yes > n
    return n >= rule.raters_needed and enough and 2 * n_found > n
