"""A small part of the mutations of scripts/fault_campaign.py: every kind of input file, a few mutations each."""

import json

import pytest

from tests.support.fault_stages import IMPORTS
from tests.support.mutation_kinds import make_kinds
from tests.support.mutation_trials import MutationTrials, find_faults
from tests.support.mutations import mutate
from tests.support.nursery import Ended, Nursery

TRIED = {
    "manifest": (9,), "store: table": (1, 11), "store: shard": (2,), "autoencoder .pt": (0, 8),
    "autoencoder .safetensors": (1, 9), "finished run: config.json": (8, 11), "results: features.json": (8, 10),
    "results: cls_sae_cnt.npy": (3, 15), "groups of patients": (8,),
}  # fmt: skip
"""Kinds, and the seeds of their mutations; seed 3 of the counts once ended in a traceback of numpy."""

_EXAMPLES = {
    "bytes": b"0123456789abcdef" * 90,
    "json": b'{"a": {"b": [1, 2]}, "c": "text"}',
    "json lines": b'{"a": 1}\n{"a": 2}\n',
    "toml": b'a = 1\nb = "x"\n',
    "csv": b"path,label\na.png,x\nb.png,y\n",
}


@pytest.mark.slow
def test_mutated_files_are_refused_or_harmless(tmp_path):
    with Nursery(imports=IMPORTS, SOURCE_DATE_EPOCH="1700000000") as nursery:
        trials = MutationTrials(tmp_path / "trials", nursery)
        kinds = [kind for kind in make_kinds() if kind.name in TRIED]
        assert len(kinds) == len(TRIED)
        every = [tried for kind in kinds for tried in trials.run(kind, TRIED[kind.name])]
    assert [tried for tried in every if tried.problems] == []
    assert len(every) == sum(map(len, TRIED.values()))
    assert "refused" in {tried.verdict for tried in every}
    assert all(tried.ended.peak_bytes > 0 and tried.ended.cpu_s > 0 for tried in every)


@pytest.mark.parametrize("form", _EXAMPLES)
def test_a_seed_makes_one_mutation_and_seeds_make_all_kinds(form):
    data = _EXAMPLES[form]
    every = [mutate(data, form, seed) for seed in range(120)]
    assert every == [mutate(data, form, seed) for seed in range(120)]
    assert all(made != data for _, made in every)
    assert len({made for _, made in every}) > 60
    names = {name for name, _ in every}
    assert {"flip a bit", "cut off", "cut out", "double", "swap", "zeros", "extreme number"} <= names


def test_json_is_mutated_by_structure_and_stays_json_where_it_can():
    every = dict(mutate(_EXAMPLES["json"], "json", seed) for seed in range(400))
    assert {"replace a json value", "remove a json value", "repeat a json key", "invalid text"} <= every.keys()
    made = [text for name, text in (mutate(_EXAMPLES["json"], "json", seed) for seed in range(400)) if "remove" in name]
    assert all(isinstance(json.loads(text), dict) for text in made)
    assert max(len(text) for _, text in (mutate(_EXAMPLES["json"], "json", seed) for seed in range(400))) > 100_000


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(1, "Error: a\n", 1, []), None),
        (Ended(0, "done\n", 1, []), None),
        (Ended(-11, "", 1, []), "exit code -11"),
        (Ended(70, "x", 1, []), "exit code 70"),
        (Ended(1, "Traceback (most recent call last):\n", 1, []), "a traceback"),
        (Ended(1, "", 1, []), "no single message"),
        (Ended(1, "Error: a\nError: b\n", 1, []), "no single message"),
        (Ended(1, "Error: a\n" + "b\n" * 10, 1, []), "a message of 11 lines"),
        (Ended(1, "Error: " + "b" * 5000, 1, []), "and 5000 characters"),
        (Ended(1, "Error: \x1b[31m", 1, []), "reaches the terminal"),
        (Ended(1, "Error: a\n", 1, [], 2_000_000_000), "2000 MB"),
        (Ended(1, "Error: a\n", 1, [], 0, 61), "61 s of computing"),
        (Ended(1, "Error: a\n", 1, ["7"]), "processes are left"),
    ],
)
def test_what_counts_as_a_fault(ended, fault):
    problems = find_faults(ended)
    assert (not problems) if fault is None else any(fault in problem for problem in problems)
