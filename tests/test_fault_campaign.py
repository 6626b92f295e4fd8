"""A small part of the fault campaign (scripts/fault_campaign.py): kills and failing calls at single system calls."""

import os

import pytest

from tests.support.fault_stages import IMPORTS, STAGES
from tests.support.fault_trials import Trials, find_strace
from tests.support.nursery import Nursery

TRIED = ("build --overwrite", "train", "features", "export csv", "export saelens --overwrite", "report")


@pytest.fixture(scope="module")
def nursery():
    if reason := find_strace():
        pytest.skip(reason)
    with Nursery(imports=IMPORTS, SOURCE_DATE_EPOCH="1700000000") as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name in TRIED], ids=lambda stage: stage.name)
def test_a_command_that_was_killed_or_failed_is_right_when_it_is_typed_again(stage, nursery, tmp_path):
    trials = Trials(stage, tmp_path / "trials", nursery)
    seed = os.getpid()  # other instants every time
    outcomes = [*trials.kills(4, seed), *trials.failures(3, seed)]
    assert len(outcomes) == 7
    assert [outcome for outcome in outcomes if outcome.problems] == []
