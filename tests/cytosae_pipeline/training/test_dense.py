"""An autoencoder with too many active latents is said to be one, with the option that makes the next one sparser."""

import pytest

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.training.evaluation import explain_dense


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


def test_a_third_is_allowed_and_what_is_not_known_is_not_said():
    assert explain_dense("relu", 333, 1000) == explain_dense("relu", None, 1000) == ""
    assert explain_dense("relu", 334, 1000)


def test_train_and_evaluate_say_it(with_store):
    assert "L0 is" not in with_store.train("--arch", "topk", "--k", 4, "--run_name", "sparse").output
    output = with_store.train("--arch", "topk", "--k", 40, "--run_name", "dense").output
    assert "run 'dense': L0 is 40.0: 42% of the 96 latents are active on a token" in output
    arguments = ("evaluate", "--dataset_name", "toy", "--sae_path")
    assert "L0 is 40.0: 42% of" in with_store.run(*arguments, "dense").output
    assert "L0 is" not in with_store.run(*arguments, "sparse").output
