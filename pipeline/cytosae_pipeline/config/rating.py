"""Options about ratings of latents: of `ratings`, and those that pages and rating itself add."""

import re
from dataclasses import dataclass
from typing import Literal

from cytosae_pipeline.config.fields import MAX_SEED, Config, option
from cytosae_pipeline.config.statistics import SaeChoice
from cytosae_pipeline.config.store import JoinChoice
from cytosae_pipeline.errors import UserError

_RATER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RatingRule(Config):
    """Options that say which latents passed their rating."""

    raters_needed: int = option(2, "Raters who must have rated a latent before it can pass.", minimum=1)
    yes_of: Literal["all", "majority"] = option(
        "all", "Which of its raters must say that a latent is one concept; majority is more than half of them."
    )


@dataclass(frozen=True, kw_only=True)
class PassedChoice(RatingRule):
    """Options of a page that can be limited to latents that passed."""

    passed: bool = option(
        False,
        "Only latents that passed their rating (`explore --rate`): groups are compared over these alone, and q is "
        "adjusted over them.",
    )


@dataclass(frozen=True, kw_only=True)
class RateChoice(Config):
    """Options of rating latents blindly."""

    rate: str | None = option(
        None,
        "Serve a blinded rating of latents instead of the page, for the rater of this short name; the same command "
        "continues it. --latents or --n_latents say which latents.",
    )
    rate_seed: int = option(
        0, "Seed of the order, the images and the decoys of a rating, beside the rater's name.", minimum=0,
        maximum=MAX_SEED,
    )  # fmt: skip
    decoy_every: int = option(
        8, "One of so many items is a decoy: images of several latents as if they were one; 0 for none.", minimum=0
    )

    def __post_init__(self) -> None:
        """Check the rater's name, which becomes the name of a file."""
        super().__post_init__()
        if self.rate is not None:
            check_rater(self.rate)
        if self.rate is not None and getattr(self, "passed", False):
            raise UserError("rate and passed exclude each other: latents are rated before it is known which passed")
        if self.decoy_every == 1:
            raise UserError("decoy_every must be 0 or at least 2, found 1: every item would be a decoy")


@dataclass(frozen=True, kw_only=True)
class RatingsConfig(RatingRule, JoinChoice, SaeChoice):
    """Options of `ratings`."""

    keep_notes: bool = option(False, "Take ratings even if they were made of another autoencoder or other images.")


def check_rater(name: str) -> str:
    """The name of a rater.

    Raises:
        UserError: If it is not up to 40 letters, digits, - and _, the first a letter or digit.
    """
    if _RATER.fullmatch(name) is None:
        raise UserError(
            "rate must be a rater's short name: up to 40 letters of English, digits, - and _, the first of them a "
            f"letter or digit, such as anna or rater-2, found {name[:60]!r}"
        )
    return name
