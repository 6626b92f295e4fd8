"""Which autoencoders a campaign trains, which lines it has already, and which learning rate is best. No I/O."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.campaign.environments import RIVALS

OURS = "cytosae-cache"
"""Our name in a line."""

ARCHS = ("batchtopk", "topk", "jumprelu", "matryoshka")
"""Architectures that are compared."""

_MOST_OF_K = 1.25
"""Active latents, in terms of k, up to which explained variances are compared."""

Line = dict[str, Any]
"""A measured line."""


class Setting(NamedTuple):
    """What can be chosen about a program's training."""

    rate: float | None = None
    """Learning rate; None for the program's default."""
    scaled: bool = False
    """Whether its option that scales activations is switched on."""


class Run(NamedTuple):
    """One autoencoder to train and evaluate; the names are those of a line."""

    program: str
    arch: str
    k: int
    seed: int
    precision: str
    asked_rate: float | None
    scaled: bool
    settings: str
    """`default`, `tuning` (candidates) or `tuned` (the best of them)."""


class Campaign(NamedTuple):
    """What is compared."""

    programs: tuple[str, ...]
    archs: tuple[str, ...]
    ks: tuple[int, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """Learning rates to try; empty to tune nothing."""
    given: Mapping[tuple[str, str], Setting]
    """Settings by program and architecture that need no tuning."""
    tune_scaling: bool
    """Whether tuning also tries the option that scales activations."""
    tuned_only: bool = False
    """Whether a program that has a best setting is not trained with its defaults, too."""

    def trained(self) -> list[tuple[str, str]]:
        """Pairs of program and architecture."""
        return [
            (program, arch)
            for arch in self.archs
            for program in self.programs
            if program == OURS or arch in RIVALS[program].archs
        ]

    def candidates(self, program: str, arch: str) -> list[Setting]:
        """Settings among which the best is taken; empty if nothing is tuned, as for us."""
        if program == OURS:
            return []
        if (setting := self.given.get((program, arch))) is not None:
            return [setting]
        if not self.rates:
            return []
        scalings = [False, True] if self.tune_scaling and RIVALS[program].can_scale else [False]
        return [Setting(rate, scaled) for scaled in scalings for rate in (None, *self.rates)]


def tuning_runs(campaign: Campaign) -> list[Run]:
    """Runs of all candidates, with the first k and the first seed."""
    return [
        Run(program, arch, campaign.ks[0], campaign.seeds[0], "fp32", *setting, "tuning")
        for program, arch in campaign.trained()
        if len(candidates := campaign.candidates(program, arch)) > 1
        for setting in candidates
    ]


def reaches_k(line: Mapping[str, Any]) -> bool:
    """Whether an autoencoder is about as sparse as asked: one with more active latents explains more."""
    return line["l0"] is not None and bool(line["l0"] <= _MOST_OF_K * line["k"])


def best_setting(candidates: Sequence[Setting], lines: Iterable[Line]) -> Setting | None:
    """The candidate with the highest explained variance of those that reach k; if none does, the sparsest.

    Args:
        candidates: Settings of one program and architecture; the only one if it needs no tuning.
        lines: Their lines.

    Returns:
        The candidate, or None if there is none.
    """
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    def rank(line: Line) -> tuple[bool, float]:
        reached = reaches_k(line)
        return reached, line["explained_variance"] if reached else -line["l0"]

    # A run that diverged has no metrics.
    finished = [line for line in lines if line["l0"] is not None]
    if not finished:
        return candidates[0]
    best = max(finished, key=rank)
    return Setting(best["asked_rate"], best["scaled"])


def table_runs(campaign: Campaign, best: Mapping[tuple[str, str], Setting | None]) -> list[Run]:
    """Runs of the table: every program with its defaults, and with its best setting.

    Args:
        campaign: What is compared.
        best: Best setting by program and architecture.
    """
    runs = []
    for program, arch in campaign.trained():
        setting = best[program, arch]
        settings = [] if setting and campaign.tuned_only else [("default", Setting())]
        settings += [("tuned", setting)] if setting else []
        runs += [
            Run(program, arch, k, seed, precision, *setting, name)
            for k in campaign.ks
            for seed in campaign.seeds
            for name, setting in settings
            for precision in (("fp32", "auto") if program == OURS else ("fp32",))
        ]
    return runs


def key_of(line: Mapping[str, Any]) -> tuple[object, ...]:
    """What two lines of the same training have in common."""
    names = (
        "program", "arch", "k", "seed", "precision", "asked_rate", "scaled", "steps", "batch_images", "latents",
        "held_out", "store", "device",
    )  # fmt: skip
    return tuple(line[name] for name in names)
