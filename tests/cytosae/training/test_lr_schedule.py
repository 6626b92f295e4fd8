"""Learning-rate schedules: the reference's formulas, torch's own schedulers, and going on."""

import math

import pytest
import torch

from cytosae.training.lr_schedule import SCHEDULERS, LearningRate

N, W = 20, 4


def factors(name: str, *, n_steps: int = N, count: int | None = None, **options) -> list[float]:
    rate, found = LearningRate(name, n_steps=n_steps, **options), []
    for _ in range(n_steps if count is None else count):
        found.append(rate.factor)
        rate.advance()
    return found


def by_torch(make) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(N):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


FORMULAS = {
    "constant": lambda s: 1.0,
    "constantwithwarmup": lambda s: min(1.0, (s + 1) / W),
    "linearwarmupdecay": lambda s: (s + 1) / W if s < W else (N - s) / (N - W),
    "cosineannealing": lambda s: 0.5 * (1 + math.cos(math.pi * s / N)),
    "cosineannealingwarmup": lambda s: (s + 1) / W if s < W else 0.5 * (1 + math.cos(math.pi * (s - W) / (N - W))),
    "cosineannealingwarmrestarts": lambda s: 0.5 * (1 + math.cos(math.pi * (s % 5) / 5)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_its_formula(name):
    found = factors(name, warm_up_steps=W, n_cycles=4)
    assert found == pytest.approx([FORMULAS[name](step) for step in range(N)], abs=1e-9)


def test_annealing_is_torchs():
    schedulers = torch.optim.lr_scheduler
    assert factors("cosineannealing") == by_torch(lambda o: schedulers.CosineAnnealingLR(o, T_max=N))
    restarts = by_torch(lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=10))
    assert factors("cosineannealingwarmrestarts", n_cycles=2) == restarts


@pytest.mark.parametrize("name", SCHEDULERS)
def test_going_on_gives_the_same_bits(name):
    options = {"warm_up_steps": W, "n_cycles": 4, "decay_share": 0.2}
    whole = factors(name, **options)
    for stop in (0, 3, 11):
        first = LearningRate(name, n_steps=N, **options)
        for _ in range(stop):
            first.advance()
        second = LearningRate(name, n_steps=N, **options)
        second.load_state_dict(first.state_dict())
        found = []
        for _ in range(N - stop):
            found.append(second.factor)
            second.advance()
        assert found == whole[stop:]


def test_state_holds_plain_values_alone(tmp_path):
    for name in SCHEDULERS:
        rate = LearningRate(name, n_steps=N, warm_up_steps=W)
        rate.advance()
        torch.save(rate.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("name", ["constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup"])
def test_without_warm_up_the_first_step_is_whole(name):
    assert factors(name, warm_up_steps=0)[0] == 1.0


def test_decay_falls_to_zero_over_the_last_share():
    found = factors("constant", decay_share=0.2)
    assert found == pytest.approx([1.0] * 17 + [0.75, 0.5, 0.25])


def test_steps_beyond_the_end_are_no_error():
    for name in SCHEDULERS:
        assert all(-1e-9 <= factor <= 1 + 1e-9 for factor in factors(name, n_steps=3, count=9, warm_up_steps=5))


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="must be one of constantwithwarmup, constant, .*, found 'cosine'"):
        LearningRate("cosine", n_steps=4)
