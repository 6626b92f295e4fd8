"""A seventh architecture, known through the registry alone, passes through training, files and statistics."""

import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.formats.foreign import InteropError
from cytosae.formats.reference import reference_checkpoint
from cytosae.formats.saelens import to_saelens
from cytosae.formats.tensor_file import write_safetensors
from cytosae.sae import registry
from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossTerms, LossWeights, SaeLoss
from cytosae.sae.registry import ARCHITECTURES, make_sae, register
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.heatmaps import LatentEncoder
from cytosae.training.lr_schedule import LearningRateSchedule
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.errors import UserError

D, S = 6, 20


class SquareSae(Sae):
    """`a = (gain * relu(pre))^power`, with a learned gain per latent that is fitted to tokens."""

    architecture: ClassVar[str] = "square"
    setting_names: ClassVar[tuple[str, ...]] = ("power",)
    training_options: ClassVar[frozenset[str]] = frozenset({"l1_coefficient"})
    fits_to_tokens: ClassVar[bool] = True
    lr_factors: ClassVar[dict[str, float]] = {"gain": 3.0}

    def __init__(self, d_in: int, n_latents: int, *, power: int = 2, **more) -> None:
        super().__init__(d_in, n_latents, **more)
        self.power = power
        self.gain = torch.nn.Parameter(torch.ones_like(self.b_enc))

    def activate(self, pre, latents=slice(None)):
        return (torch.relu(pre) * self.gain[latents]) ** self.power

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        acts = self.activate(self.pre_activations(x))
        reconstruction = self.decode(acts)
        mse = (reconstruction - x).square().sum() / inputs.variance
        l1 = inputs.weights.l1_coefficient * acts.sum(dim=1).mean()
        return SaeLoss(LossTerms(mse + l1, mse, l1, x.new_zeros(())), (acts > 0).sum(dim=0), reconstruction)

    @torch.no_grad()
    def fit_to_tokens_(self, tokens: torch.Tensor) -> None:
        self.gain.fill_(1 / tokens.norm(dim=1).mean())


@pytest.fixture
def square():
    register(SquareSae)
    yield make_sae("square", D, S, power=3, k=7)
    del registry._architectures["square"]


def make_images() -> torch.Tensor:
    return torch.randn(9, 5, D, generator=torch.Generator().manual_seed(1))


def test_it_is_made_with_its_settings(square):
    assert type(square) is SquareSae
    assert square.settings == {"power": 3}
    assert "square" in ARCHITECTURES


def test_it_trains_at_its_rates_and_lowers_its_loss(square):
    x = make_images()
    square.fit_to_tokens_(x.flatten(0, 1))
    step = TrainStep(
        square, lr=0.01, weights=LossWeights(l1_coefficient=1e-3), use_ghost_grads=False, dead_feature_window=5,
        matmul=MatmulConfig(max_bytes=4 * S * 13),
    )  # fmt: skip
    schedule = LearningRateSchedule(step.optimizer, "constantwithwarmup", n_steps=60, warm_up_steps=2)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.005, 0.005 * 3.0]
    losses = []
    for _ in range(60):
        losses.append(step.step(x).terms.loss.item())
        schedule.step()
    assert losses[-1] < 0.8 * losses[0]


def test_options_that_it_does_not_use_are_refused(square):
    with pytest.raises(ValueError, match="architecture square has no option use_ghost_grads"):
        TrainStep(square, lr=0.1, weights=LossWeights(), use_ghost_grads=True, dead_feature_window=1)


def test_its_name_is_a_choice_of_train(square):
    assert TrainConfig(arch="square").arch == "square"
    with pytest.raises(UserError, match="use_ghost_grads is an option of arch relu, found arch square"):
        TrainConfig(arch="square", use_ghost_grads=True)


def test_an_architecture_that_is_not_registered_is_refused():
    with pytest.raises(UserError, match=r"arch must be relu, .* or matryoshka, found 'topkk'\. Did you mean 'topk'\?"):
        TrainConfig(arch="topkk")
    with pytest.raises(UserError, match=r"arch must be relu, .* or matryoshka, found \['topk'\]"):
        TrainConfig(arch=["topk"])


def test_names_are_listed_without_importing_torch():
    code = "import sys; from cytosae.sae.registry import ARCHITECTURES; print(*ARCHITECTURES, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "False"]


@pytest.mark.parametrize("name", ["sae.pt", "sae.safetensors"])
def test_it_is_saved_and_loaded(square, tmp_path, name):
    (save_sae if name == "sae.pt" else write_safetensors)(tmp_path / name, square, {"note": 1})
    loaded = load_sae(tmp_path / name)
    assert type(loaded.sae) is SquareSae
    assert loaded.sae.settings == {"power": 3}
    assert loaded.cfg == {"note": 1, "arch": "square", "settings": {"power": 3}}
    assert torch.equal(loaded.sae.encode(make_images()), square.encode(make_images()))


def test_formats_without_a_place_for_it_say_so(square):
    with pytest.raises(InteropError, match="SAELens has no architecture for square: use --format safetensors"):
        to_saelens(square, {})
    with pytest.raises(InteropError, match="the reference has no square autoencoders"):
        reference_checkpoint(square, {})


def test_statistics_encode_it(square):
    images = make_images()
    acts = square.encode(images).detach()
    pooled = BlockEncoder(square, [0.1]).reduce(images, first_row=3)
    torch.testing.assert_close(pooled.scores, acts.mean(dim=1))
    assert torch.equal(pooled.counts[0], (acts > 0.1).sum(dim=1, dtype=torch.int32))
    latents = np.array([3, 17])
    torch.testing.assert_close(LatentEncoder(square, latents)(images), acts[..., latents])


def test_a_name_or_a_saelens_architecture_cannot_be_taken_twice():
    class OtherRelu(SquareSae):
        architecture: ClassVar[str] = "relu"

    class OtherStandard(SquareSae):
        architecture: ClassVar[str] = "other"
        saelens_architecture: ClassVar[str | None] = "standard"

    with pytest.raises(ValueError, match="architecture 'relu' is registered already"):
        register(OtherRelu)
    with pytest.raises(ValueError, match="SAELens' standard is already read as relu"):
        register(OtherStandard)
    assert "other" not in ARCHITECTURES
    assert register(ARCHITECTURES["relu"]) is ARCHITECTURES["relu"]
