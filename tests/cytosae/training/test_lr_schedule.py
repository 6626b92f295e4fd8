"""Learning-rate schedules: the reference's formulas, torch's own schedulers, and resuming."""

import math

import pytest
import torch

from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae
from cytosae.training.lr_schedule import SCHEDULERS, LearningRateSchedule
from cytosae.training.step import TrainStep

N, W, LR = 20, 4, 0.0037


def make_optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)], lr=lr)


def advance(optimizer, schedule, count: int) -> list[float]:
    """The rates of the coming steps."""
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == found[-1:]
        optimizer.step()
        schedule.step()
    return found


def factors(name: str, *, n_steps: int = N, count: int | None = None, **options) -> list[float]:
    optimizer = make_optimizer()
    schedule = LearningRateSchedule(optimizer, name, n_steps=n_steps, **options)
    return advance(optimizer, schedule, n_steps if count is None else count)


def by_torch(make) -> list[float]:
    optimizer = make_optimizer()
    return advance(optimizer, make(optimizer), N)


FORMULAS = {
    "constant": lambda s: 1.0,
    "constantwithwarmup": lambda s: min(1.0, (s + 1) / W),
    "linearwarmupdecay": lambda s: (s + 1) / W if s < W else (N - s) / (N - W),
    "cosineannealing": lambda s: 0.5 * (1 + math.cos(math.pi * s / N)),
    "cosineannealingwarmup": lambda s: (s + 1) / W if s < W else 0.5 * (1 + math.cos(math.pi * (s - W) / (N - W))),
    "cosineannealingwarmrestarts": lambda s: 0.5 * (1 + math.cos(math.pi * (s % 5) / 5)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_follows_its_formula(name):
    found = factors(name, warm_up_steps=W, n_cycles=4)
    assert found == pytest.approx([FORMULAS[name](step) for step in range(N)], abs=1e-9)


def test_annealing_is_torchs():
    schedulers = torch.optim.lr_scheduler
    annealing = by_torch(lambda o: schedulers.CosineAnnealingLR(o, T_max=N))  # a recursion that rounds at every step
    assert factors("cosineannealing") == pytest.approx(annealing, rel=1e-13)
    restarts = by_torch(lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=10))
    assert factors("cosineannealingwarmrestarts", n_cycles=2) == pytest.approx(restarts, rel=1e-15)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resuming_gives_the_same_bits(name):
    options = {"n_steps": N, "warm_up_steps": W, "n_cycles": 4, "decay_share": 0.2}
    whole = factors(name, **options)
    for stop in (0, 3, 11):
        optimizer = make_optimizer()
        first = LearningRateSchedule(optimizer, name, **options)
        advance(optimizer, first, stop)
        resumed = make_optimizer()
        second = LearningRateSchedule(resumed, name, **options)
        second.load_state_dict(first.state_dict())
        assert advance(resumed, second, N - stop) == whole[stop:]


def test_state_contains_only_plain_values(tmp_path):
    for name in SCHEDULERS:
        optimizer = make_optimizer()
        schedule = LearningRateSchedule(optimizer, name, n_steps=N, warm_up_steps=W)
        advance(optimizer, schedule, 1)
        torch.save(schedule.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_the_rates_of_a_step_are_the_common_rate_times_each_groups_factor():
    sae = make_sae("jumprelu", 3, 5, k=2)
    step = TrainStep(sae, lr=LR, weights=LossWeights(), use_ghost_grads=False, dead_feature_window=1)
    schedule = LearningRateSchedule(step.optimizer, "constantwithwarmup", n_steps=N, warm_up_steps=7)
    for number in range(9):
        lr = LR * min(1.0, (number + 1) / 7)
        assert [group["lr"] for group in step.optimizer.param_groups] == [lr, lr * 10.0]
        step.step(torch.ones(1, 2, 3))
        schedule.step()


@pytest.mark.parametrize("name", ["constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup"])
def test_without_warm_up_the_first_step_has_the_full_rate(name):
    assert factors(name, warm_up_steps=0)[0] == 1.0


def test_decay_falls_to_zero_over_the_last_steps():
    found = factors("constant", decay_share=0.2)
    assert found == pytest.approx([1.0] * 17 + [0.75, 0.5, 0.25])


def test_steps_beyond_the_end_do_not_fail():
    for name in SCHEDULERS:
        assert all(-1e-9 <= factor <= 1 + 1e-9 for factor in factors(name, n_steps=3, count=9, warm_up_steps=5))


def test_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="must be one of constantwithwarmup, constant, .*, found 'cosine'"):
        LearningRateSchedule(make_optimizer(), "cosine", n_steps=4)
