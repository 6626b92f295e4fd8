"""What raters are shown: properties of the plan on random scores."""

import numpy as np
import pytest

from cytosae_pipeline.rating.items import DECOY, FEWEST_ACTIVE, Candidates, _near_quantile, plan_items


def _candidates(n_latents=20, n_rows=300, *, share=0.3, seed=0) -> Candidates:
    rng = np.random.default_rng(seed)
    scores = (rng.random((n_latents, n_rows)) * (rng.random((n_latents, n_rows)) < share)).astype(np.float32)
    order = np.argsort(-scores, axis=1)[:, :10]
    tops = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(tops, order, True, axis=1)
    latents = rng.permutation(1000)[:n_latents]
    return Candidates(latents, 7 + 3 * np.arange(n_rows), scores, rng.random(n_rows) < 0.9, tops)


def _plan(found, n_rated=12, **options):
    return plan_items(found, n_rated, **{"rater": "anna", "seed": 0, "decoy_every": 4, **options})


def _score(found, latent, row) -> float:
    (at,), (place,) = np.flatnonzero(found.latents == latent), np.flatnonzero(found.rows == row)
    return float(found.scores[at, place])


def test_the_plan_is_the_same_each_time_and_another_one_for_others():
    found = _candidates()
    plan = _plan(found)
    assert plan == _plan(found)
    assert (plan.too_rare, plan.no_intruder) == (0, 0)
    for other in (_plan(found, rater="bert"), _plan(found, seed=1)):
        assert [item.latent for item in other.items] != [item.latent for item in plan.items]
        assert {item.latent for item in other.items} == {item.latent for item in plan.items}
        assert not {item.key for item in other.items} & {item.key for item in plan.items}
    assert sorted(item.latent for item in plan.items if item.latent != DECOY) == sorted(found.latents[:12].tolist())


def test_an_image_is_shown_once_per_item_and_one_of_the_row_is_an_intruder():
    found = _candidates()
    for item in _plan(found, decoy_every=0).items:
        shown = [one.row for _, group in item.groups for one in group] + [one.row for one in item.row]
        assert len(set(shown)) == len(shown) == 17
        assert {one.latent for one in item.row} == {item.latent}
        scores = [_score(found, item.latent, one.row) for one in item.row]
        assert [at for at, score in enumerate(scores) if score == 0] == [item.intruder]
        (at,) = np.flatnonzero(found.latents == item.latent)
        least = np.sort(found.scores[at])[-8]
        assert all(score >= least for score in scores if score)
        assert all(_score(found, item.latent, one.row) >= least for one in item.groups[0][1])
        stranger = np.flatnonzero(found.rows == item.row[item.intruder].row)[0]
        assert np.delete(found.tops, at, axis=0)[:, stranger].any()
        assert [title for title, _ in item.groups] == ["strongest", "90 %", "50 %", "just above 0"]


def test_intruders_are_at_every_place():
    places = [item.intruder for item in _plan(_candidates(200), 200, decoy_every=0).items]
    assert min(np.bincount(places, minlength=5)) > 20


def test_quantiles_are_those_of_the_active_images_of_the_sample():
    rng = np.random.default_rng(3)
    scores = (rng.random(500) * (rng.random(500) < 0.5)).astype(np.float32)
    sampled = rng.random(500) < 0.7
    active = np.sort(scores[sampled & (scores > 0)])
    for quantile in (0.0, 0.5, 0.9):
        near = _near_quantile(scores, sampled, quantile, set(), 3)
        ranks = [int(np.flatnonzero(active == scores[place])[0]) for place in near]
        assert all(abs(rank - quantile * (len(active) - 1)) <= 2 for rank in ranks)
    assert scores[_near_quantile(scores, sampled, 0.0, set(), 1)[0]] == active[0]
    assert not set(near) & set(_near_quantile(scores, sampled, 0.9, set(near), 3))


def test_one_of_every_k_items_is_a_decoy_that_looks_like_the_others():
    found = _candidates()
    plan = _plan(found, decoy_every=4)
    kinds = [item.latent == DECOY for item in plan.items]
    assert [sum(kinds[at : at + 4]) for at in range(0, 16, 4)] == [1, 1, 1, 1]
    assert len(kinds) == 16
    shapes = {(len(item.row), tuple((title, len(group)) for title, group in item.groups)) for item in plan.items}
    assert len(shapes) == 1, "the number of images must not tell what is a decoy"
    for item in plan.items:
        if item.latent == DECOY:
            assert len({one.latent for one in item.row}) == 5
            assert all(_score(found, one.latent, one.row) > 0 for one in item.row)
            assert item.intruder == -1
            shown = [one.row for _, group in item.groups for one in group] + [one.row for one in item.row]
            assert len(set(shown)) == len(shown)
    assert len({item.key for item in plan.items}) == 16
    assert sum(item.latent == DECOY for item in _plan(found, 3, decoy_every=8).items) == 1
    assert all(item.latent != DECOY for item in _plan(found, decoy_every=0).items)
    two = _candidates(2)
    assert [item.latent == DECOY for item in _plan(two, 2).items] == [False, False], "two latents make no decoy"


def test_decoys_of_rare_latents_are_as_small_as_these():
    found = _candidates(12)
    rare = found.scores.copy()
    for at in range(6):
        rare[at, np.argsort(-rare[at])[5:]] = 0
    plan = _plan(found._replace(scores=rare), 12, decoy_every=3)
    sizes = {len(item.row) for item in plan.items if item.latent != DECOY}
    assert sizes == {3, 5}
    assert {len(item.row) for item in plan.items if item.latent == DECOY} <= sizes


def test_latents_that_cannot_be_rated_are_counted():
    found = _candidates(6)
    scores = found.scores.copy()
    scores[0] = 0
    scores[1, np.flatnonzero(scores[1])[FEWEST_ACTIVE - 1 :]] = 0
    scores[2] = 0.5 + scores[2]
    plan = _plan(found._replace(scores=scores), 6, decoy_every=0)
    assert (plan.too_rare, plan.no_intruder, len(plan.items)) == (2, 1, 3)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 9])
def test_a_latent_with_few_images_has_a_short_row(n):
    found = _candidates(5)
    scores = found.scores.copy()
    scores[0, np.argsort(-scores[0])[n:]] = 0
    (item,) = _plan(found._replace(scores=scores), 1, decoy_every=0).items
    assert len(item.row) == min(4, n // 2) + 1
    assert len(item.groups[0][1]) == min(3, min(n, 8) - min(4, n // 2))
