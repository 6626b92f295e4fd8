"""Runs with too many active latents, too many dead ones, or an L0 off its target say so, with the option to change."""

import re

import pytest

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.expectations import (
    Expectations,
    explain_dead,
    explain_dense,
    explain_off_target,
)


@pytest.mark.parametrize(
    ("architecture", "advice"),
    [
        ("relu", "raise --l1_coefficient"), ("gated", "raise --l1_coefficient"), ("topk", "lower --k"),
        ("batchtopk", "lower --k"), ("matryoshka", "lower --k"), ("jumprelu", "lower --k or raise --l0_coefficient"),
    ],
)  # fmt: skip
def test_every_architecture_has_its_option(architecture, advice):
    assert set(ARCHITECTURES) >= {architecture}
    text = explain_dense(architecture, 400.5, 1000)
    assert text.startswith("L0 is 400.5: 40% of the 1,000 latents are active on a token, ")
    assert text.endswith(f". To train a sparser one: {advice}")


def test_a_tenth_is_allowed_and_what_is_not_known_is_not_said():
    assert explain_dense("relu", 100, 1000) == explain_dense("relu", None, 1000) == ""
    assert explain_dense("relu", 101, 1000)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"arch": "relu"}, "lower --lr, give --use_ghost_grads, give --encoder_init decoder, or"),
        ({"arch": "relu", "use_ghost_grads": True, "encoder_init": "decoder"}, "lower --lr, or"),
        ({"arch": "topk", "encoder_init": "decoder"}, "lower --lr, raise --aux_coefficient, or"),
        ({"arch": "jumprelu", "encoder_init": "decoder"}, "lower --lr, give --pre_act_coefficient 0.03125, or"),
        ({"arch": "jumprelu", "preset": "modern"}, "lower --lr, or"),
    ],
)
def test_dead_latents_have_their_options(options, advice):
    config = TrainConfig(dataset_name="toy", **options)
    assert explain_dead(config, 0.1, 1000, 90) == ""
    text = explain_dead(config, 0.25, 1000, 90)
    assert text.startswith("25% of the 1,000 latents have not fired for more than 90 steps. For fewer dead ones: ")
    assert f": {advice} lower --expansion_factor" in text


def test_a_latent_that_is_revived_soon_is_not_called_dead_soon(with_store):
    config = TrainConfig(dataset_name="toy")
    assert [Expectations(config, 9, 99, steps).dead_after_steps for steps in (0, 2, 16, 17)] == [16, 16, 16, 17]
    # One of 96 latents is active on a token, and nothing is learned: nearly all are dead from the first step on.
    options = ("--arch", "topk", "--k", 1, "--lr", 0, "--lr_warm_up_steps", 1, "--dead_feature_window", 1)
    pace = ("--batch_size", 2, "--total_training_tokens", 60, "--wandb_log_frequency", 1)
    output = with_store.train(*options, *pace, "--run_name", "r").output
    (step,) = re.findall(r"step (\d+) of 30: \d+% of the 96 latents have not fired for more than 16 steps", output)
    assert int(step) == 17


def test_an_l0_off_its_target():
    assert explain_off_target(38, 32) == explain_off_target(900, None) == ""
    assert "L0 is 40.0 and should be 32" in explain_off_target(40, 32)


def test_a_run_is_judged_after_a_quarter_and_each_fault_is_said_once():
    config = TrainConfig(dataset_name="toy", arch="jumprelu", lr_warm_up_steps=0)
    expectations = Expectations(config, 1000, 100, 3)
    assert expectations.check(24, 500, 0.9) == []
    assert expectations.check(25, 33, 0.05) == []
    first = expectations.check(26, 50, 0.05)
    assert [text[:11] for text in first] == ["L0 is 50.0 "]
    assert len(expectations.check(27, 500, 0.9)) == 2
    assert expectations.check(28, 500, 0.9) == []


def test_train_and_evaluate_say_it(with_store):
    assert "L0 is" not in with_store.train("--arch", "topk", "--k", 4, "--run_name", "sparse").output
    output = with_store.train("--arch", "topk", "--k", 40, "--run_name", "dense").output
    assert "run 'dense': L0 is 40.0: 42% of the 96 latents are active on a token" in output
    short = ("--lr_warm_up_steps", 1, "--dead_feature_window", 1, "--run_name", "early")
    output = with_store.train("--arch", "topk", "--k", 40, *short).output
    assert re.search(r"run 'early', step \d+ of \d+: L0 is 40.0: 42%", output)
    arguments = ("evaluate", "--dataset_name", "toy", "--sae_path")
    assert "L0 is 40.0: 42% of" in with_store.run(*arguments, "dense").output
    assert "L0 is" not in with_store.run(*arguments, "sparse").output
