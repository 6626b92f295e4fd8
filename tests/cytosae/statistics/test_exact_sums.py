"""Sums that do not depend on the order, against exact rational arithmetic."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae.statistics.exact_sums import ExactSums

numbers = st.floats(0, 2.0**30, width=32, allow_subnormal=False)


def words(sums):
    return sums._coarse.tolist(), sums._fine.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.randoms())
def test_any_split_order_and_merging_give_the_same_words(values, random):
    whole = ExactSums(1)
    whole.add(torch.tensor(values, dtype=torch.float32)[:, None])
    shuffled = values[:]
    random.shuffle(shuffled)
    parts = [ExactSums(1) for _ in range(3)]
    for value in shuffled:
        random.choice(parts).add(torch.tensor([[value]], dtype=torch.float32))
    first, second, third = parts
    third.merge(first)
    second.merge(third)
    assert words(second) == words(whole)
    assert second.result().tolist() == whole.result().tolist()
    exact = sum(Fraction(value) for value in values)
    assert abs(Fraction(whole.result().item()) - exact) <= len(values) * Fraction(1, 2**61) + exact / 2**52


def test_sums_of_groups_are_those_of_their_rows():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.exponential(size=(9000, 5)).astype(np.float32))
    groups = torch.from_numpy(rng.integers(0, 3, size=9000))
    found = ExactSums(3, 5)
    found.add_to(groups[:1000], values[:1000, :2], slice(0, 2))
    found.add_to(groups[:1000], values[:1000, 2:], slice(2, 5))
    found.add_to(groups[1000:], values[1000:])
    for group in range(3):
        alone = ExactSums(5)
        alone.add(values[groups == group])
        assert torch.equal(found.result()[group], alone.result())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**52])
def test_numbers_that_cannot_be_summed_exactly_are_refused(value):
    sums = ExactSums(2)
    sums.add(torch.tensor([[1.0, value]]))
    merged = ExactSums(2)
    merged.merge(sums)
    with pytest.raises(ValueError, match="are too large to sum 1 of them exactly"):
        merged.result()


def test_no_number_is_a_sum_of_zero():
    sums = ExactSums(3)
    sums.add(torch.empty(0, 3))
    assert sums.result().tolist() == [0, 0, 0]


def test_copies_and_what_is_sent_are_equal():
    sums = ExactSums(2)
    sums.add(torch.rand(7, 2))
    for again in (copy.deepcopy(sums), pickle.loads(pickle.dumps(sums))):
        assert words(again) == words(sums)
        again.add(torch.ones(1, 2))
        assert words(again) != words(sums)
