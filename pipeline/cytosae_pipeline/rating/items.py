"""What a rater is shown: which images of a latent, in which order, with which intruders and decoys. Pure functions."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

STRONGEST = "strongest"
"""Title of the group of top images."""

_QUANTILES: dict[str, float | None] = {STRONGEST: None, "90 %": 0.9, "50 %": 0.5, "just above 0": 0.0}
"""Groups of examples, by the activation's quantile among images of the sample in which the latent is active."""

_PER_GROUP = 3
_IN_ROW = 4
_STRONGEST = 2 * _IN_ROW
"""So many of the strongest images are split between the row and the examples: an image in both would tell."""

FEWEST_ACTIVE = 4
"""A latent that is active on fewer of the candidate images cannot be rated."""

DECOY = -1
"""Stands for the latent of a decoy."""


class Candidates(NamedTuple):
    """Images that may be shown, and the scores of L latents on them."""

    latents: npt.NDArray[np.int64]
    """The latents, those to be rated first, shape `(L,)`."""
    rows: npt.NDArray[np.int64]
    """The images, rising, shape `(R,)`."""
    scores: npt.NDArray[np.float32]
    """Scores of docs/definitions.md, section 6, shape `(L, R)`."""
    sampled: npt.NDArray[np.bool_]
    """Whether an image belongs to the sample of the store, of which quantiles are taken, shape `(R,)`."""
    tops: npt.NDArray[np.bool_]
    """Whether an image is a top image of a latent, shape `(L, R)`."""


class Shown(NamedTuple):
    """An image on the page."""

    row: int
    """The image."""
    latent: int
    """The latent whose heat map it gets."""


class Item(NamedTuple):
    """What is rated at once: a latent, or a decoy."""

    latent: int
    """The latent, or DECOY."""
    groups: tuple[tuple[str, tuple[Shown, ...]], ...]
    """Examples by quantile."""
    row: tuple[Shown, ...]
    """Images of the intruder test."""
    intruder: int
    """Place of the intruder in the row; -1 for a decoy, of which every image is one."""

    @property
    def key(self) -> str:
        """Digest of what is shown."""
        shown = [self.latent, self.groups, self.row]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:32]


class Plan(NamedTuple):
    """All items of a rater, in the order in which they are shown."""

    items: tuple[Item, ...]
    """Latents and decoys."""
    too_rare: int
    """Latents left out because they are active on too few images."""
    no_intruder: int
    """Latents left out because they are active on the top images of all others."""


def plan_items(found: Candidates, n_rated: int, *, rater: str, seed: int, decoy_every: int) -> Plan:
    """Plan what a rater sees. The same arguments give the same plan, and another rater another order and other images.

    Args:
        found: Candidates.
        n_rated: How many of its latents are rated, the first ones; the others only lend images.
        rater: The rater.
        seed: Seed.
        decoy_every: One of so many items is a decoy; 0 for none. At least one is, if there are three latents.
    """
    items, too_rare, no_intruder = [], 0, 0
    for at in range(n_rated):
        rng = _generator(seed, rater, "latent", int(found.latents[at]))
        if int((found.scores[at] > 0).sum()) < FEWEST_ACTIVE:
            too_rare += 1
            continue
        item = _latent_item(found, at, rng)
        if item is None:
            no_intruder += 1
        else:
            items.append(item)
    _generator(seed, rater, "order", 0).shuffle(items)
    if decoy_every and items:
        items = _add_decoys(found, items, rater, seed, decoy_every)
    return Plan(tuple(items), too_rare, no_intruder)


def _latent_item(found: Candidates, at: int, rng: np.random.Generator) -> Item | None:
    """A latent's item; None if there is no image on which it is not active among the top images of others."""
    scores, latent = found.scores[at], int(found.latents[at])
    best = _strongest(scores, _STRONGEST)
    best = best[rng.permutation(len(best))]
    n_row = min(_IN_ROW, len(best) // 2)
    inside, shown = best[:n_row], best[n_row : n_row + _PER_GROUP]
    others = np.delete(found.tops, at, axis=0).any(axis=0)
    strangers = np.flatnonzero(others & (scores == 0))
    if not len(strangers):
        return None
    row = [*inside.tolist(), int(rng.choice(strangers))]
    order = rng.permutation(len(row))
    # Those of the strongest that are not shown stay out of the other groups, too.
    used = set(best.tolist())
    groups = [(STRONGEST, shown.tolist())]
    for title, quantile in _QUANTILES.items():
        if quantile is not None:
            near = _near_quantile(scores, found.sampled, quantile, used, _PER_GROUP)
            used.update(near)
            groups.append((title, near))
    return Item(
        latent,
        tuple((title, tuple(_show(found, at, place) for place in places)) for title, places in groups if places),
        tuple(_show(found, at, row[place]) for place in order.tolist()),
        int(np.flatnonzero(order == n_row)[0]),
    )


def _add_decoys(found: Candidates, items: Sequence[Item], rater: str, seed: int, decoy_every: int) -> list[Item]:
    """The items with one decoy at a random place of every `decoy_every`."""
    able = np.flatnonzero((found.scores > 0).sum(axis=1) >= FEWEST_ACTIVE)
    if len(able) < 3:
        return list(items)
    mixed: list[Item] = []
    between = decoy_every - 1
    # The last, incomplete part of the list gets none, unless it is all there is.
    n_decoys = max(1, len(items) // between)
    for number in range(n_decoys):
        rng = _generator(seed, rater, "decoy", number)
        part = list(items[number * between : (number + 1) * between])
        like = part[int(rng.integers(len(part)))]
        part.insert(int(rng.integers(len(part) + 1)), _decoy(found, able, like, rng))
        mixed += part
    return [*mixed, *items[n_decoys * between :]]


def _decoy(found: Candidates, able: npt.NDArray[np.int64], like: Item, rng: np.random.Generator) -> Item:
    """Images of several latents, each at the quantile of its group, as if they were of one.

    Args:
        found: Candidates.
        able: Places of the latents that lend images, shape `(n,)`.
        like: An item with as many images everywhere: their numbers must not tell what is a decoy.
        rng: Random numbers.
    """
    turn = itertools.cycle(rng.permutation(able).tolist())
    used: set[int] = set()

    def take(quantile: float | None, n: int) -> tuple[Shown, ...]:
        shown: list[Shown] = []
        # A latent whose images are all used is passed over.
        for at in itertools.islice(turn, n + len(able)):
            if len(shown) == n:
                break
            places = _of_group(found, at, quantile, used)
            used.update(places)
            shown += [_show(found, at, place) for place in places]
        return tuple(shown)

    row = take(None, len(like.row))
    groups = [(title, take(_QUANTILES[title], len(shown))) for title, shown in like.groups]
    return Item(DECOY, tuple(group for group in groups if group[1]), row, -1)


def _of_group(found: Candidates, at: int, quantile: float | None, used: set[int]) -> list[int]:
    """The place of one image of a latent at a quantile, or of its strongest for None; none if all are used."""
    if quantile is not None:
        return _near_quantile(found.scores[at], found.sampled, quantile, used, 1)
    return [place for place in _strongest(found.scores[at], _STRONGEST).tolist() if place not in used][:1]


def _strongest(scores: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int64]:
    """Places of the n largest scores above 0, descending; of equal ones the smaller place first."""
    order = np.argsort(-scores, kind="stable")[:n]
    return order[scores[order] > 0]


def _near_quantile(
    scores: npt.NDArray[np.float32], sampled: npt.NDArray[np.bool_], quantile: float, used: set[int], n: int
) -> list[int]:
    """Places of up to n images whose rank among the active ones of the sample is nearest to a quantile.

    Args:
        scores: Scores of a latent, shape `(R,)`.
        sampled: Which images belong to the sample, shape `(R,)`.
        quantile: 0 for the weakest.
        used: Places that are not taken again.
        n: How many.
    """
    active = np.flatnonzero(sampled & (scores > 0))
    ranked = active[np.argsort(scores[active], kind="stable")]
    distance = np.abs(np.arange(len(ranked)) - quantile * (len(ranked) - 1))
    near = ranked[np.argsort(distance, kind="stable")].tolist()
    return [place for place in near if place not in used][:n]


def _show(found: Candidates, at: int, place: int) -> Shown:
    """An image of a latent."""
    return Shown(int(found.rows[place]), int(found.latents[at]))


def _generator(seed: int, rater: str, what: str, number: int) -> np.random.Generator:
    """Random numbers of one purpose, which depend on nothing else."""
    digest = hashlib.sha256(f"{seed}:{rater}:{what}:{number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
