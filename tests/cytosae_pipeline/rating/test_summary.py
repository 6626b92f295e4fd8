"""Which latents pass, and what `ratings` says of raters."""

import math
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

from cytosae_pipeline.config.rating import RateChoice, RatingRule
from cytosae_pipeline.config.report import ExploreConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.rating.answers import CONCEPTS, Ratings, check_answer
from cytosae_pipeline.rating.passed import find_passed, require_passed
from cytosae_pipeline.rating.summary import summarize


def _answer(letter: str, *, found: bool = True, n_row: int = 5):
    concept = {"y": "yes", "p": "partly", "n": "no"}[letter]
    return check_answer(
        {"item": "ab", "name": "x", "concept": concept, "confidence": 3, "clicked": 0, "n_row": n_row, "found": found}
    )


def _ratings(rater: str, letters: str, wrong: tuple[int, ...] = (), decoys: str = "") -> Ratings:
    latents = {at: _answer(letter, found=at not in wrong) for at, letter in enumerate(letters) if letter != " "}
    return Ratings(rater, latents, {str(at): _answer(letter, found=False) for at, letter in enumerate(decoys)})


def test_a_latent_passes_if_enough_raters_say_so_and_find_the_intruder():
    three = [
        _ratings("a", "yyy yn", wrong=(1,)),
        _ratings("b", "yypyyn", wrong=(1,)),
        _ratings("c", "y yyyn"),
    ]
    cases = {
        (2, "all"): [0, 3, 4],
        (3, "all"): [0, 4],
        (1, "all"): [0, 3, 4],
        (2, "majority"): [0, 2, 3, 4],
        (4, "majority"): [],
    }
    for (needed, yes_of), expected in cases.items():
        passed = find_passed(three, RatingRule(raters_needed=needed, yes_of=yes_of))
        assert passed.latents.tolist() == expected, (needed, yes_of)
        assert passed.n_rated == 6
    # Half of the raters is not a majority: neither for yes, nor for the intruder.
    half = [_ratings("a", "yy"), _ratings("b", "yn", wrong=(0,))]
    assert find_passed(half, RatingRule(yes_of="majority")).latents.tolist() == []
    assert "2 raters or more rated it, all of them say" in find_passed(half, RatingRule()).describe()


def test_agreement_is_computed_over_latents_that_both_or_all_have_rated():
    one, two, three = _ratings("a", "yypnny y"), _ratings("b", "ypppn  y"), _ratings("c", " yp nn")
    found = summarize([one, two, three], RatingRule(), Path("f"))
    both = [0, 1, 2, 3, 4, 7]
    categories = [[CONCEPTS.index(each.latents[at]["concept"]) for at in both] for each in (one, two)]
    pair = found.pairs[0]
    assert (pair.first, pair.second, pair.n_latents) == ("a", "b", 6)
    assert pair.kappa == pytest.approx(cohen_kappa_score(*categories))
    assert pair.weighted_kappa == pytest.approx(cohen_kappa_score(*categories, weights="quadratic"))
    assert found.all_raters.n_latents == 3
    assert found.all_raters.n_raters == 3
    # Latents 1, 2, 4: yes partly yes; partly x 3; no x 3. P = (1/3 + 1 + 1)/3; shares 2/9, 4/9, 3/9.
    chance = (4 + 16 + 9) / 81
    assert found.all_raters.kappa == pytest.approx((7 / 9 - chance) / (1 - chance))
    assert len(found.pairs) == 3
    assert "all 3 raters, 3 latents rated by all: Fleiss' kappa 0." in found.describe()


def test_what_is_said_of_a_rater():
    found = summarize([_ratings("a", "yypn", wrong=(1,), decoys="nny"), Ratings("b", {}, {"x": _answer("n")})],
                      RatingRule(raters_needed=1), Path("f"))  # fmt: skip
    first, second = found.raters
    assert (first.n_rated, first.n_yes, first.n_partly, first.n_no) == (4, 2, 1, 1)
    assert (first.n_found, first.chance, first.n_decoys, first.n_rejected) == (3, pytest.approx(0.2), 3, 2)
    assert first.describe() == (
        "a: 4 latents rated (2 yes, 1 partly, 1 no); intruder found 3 of 4 (75%, by chance 20%); decoys rejected "
        "2 of 3 (67%)"
    )
    assert second.chance is None
    assert (
        second.describe()
        == "b: 0 latents rated (0 yes, 0 partly, 0 no); no latent rated; decoys rejected 1 of 1 (100%)"
    )
    assert found.pairs == []
    assert found.all_raters is None
    assert found.passed == [0]
    assert "passed: 1 of 4 rated latents: 0" in found.describe()


def test_a_kappa_that_is_not_defined_is_said_so():
    found = summarize([_ratings("a", "yy"), _ratings("b", "yy")], RatingRule(), Path("f"))
    assert found.pairs[0].kappa is None
    assert "Cohen's kappa not defined" in found.describe()
    rows = {"a": _answer("y", n_row=3), "b": _answer("y", n_row=5)}
    mixed = summarize([Ratings("a", {1: rows["a"], 2: rows["b"]})], RatingRule(), Path("f"))
    assert mixed.raters[0].chance == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert not math.isnan(mixed.raters[0].chance)


def test_pages_of_passed_latents_need_ratings(tmp_path):
    with pytest.raises(UserError, match="--passed needs ratings, but there are none in .*explore --rate RATER"):
        require_passed(tmp_path, 10, RatingRule(), subject=None, keep=False)


def test_raters_have_short_names():
    for name in ("anna", "A", "rater-2", "x_1", "0", "x" * 40):
        assert RateChoice(rate=name).rate == name
    for name in ("", "-x", "_x", "a b", "a/b", "..", "ä", "x" * 41, "a.json", "a\n", "\u0661"):
        with pytest.raises(UserError, match="rate must be a rater's short name"):
            RateChoice(rate=name)
    with pytest.raises(UserError, match="decoy_every must be 0 or at least 2, found 1"):
        RateChoice(decoy_every=1)
    with pytest.raises(UserError, match="rate and passed exclude each other"):
        ExploreConfig(rate="anna", passed=True)
