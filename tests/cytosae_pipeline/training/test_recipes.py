"""Options of modern recipes, presets, held-out evaluation, states that are kept: `train` from the command line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae
from cytosae.sae.topk import BatchTopKSae
from cytosae_cache.format.spec import TokenLayout
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import PRESETS, TrainConfig
from cytosae_pipeline.training.holdout import held_out
from cytosae_pipeline.training.init import choose_tokens, find_scaling
from cytosae_pipeline.training.loop import train
from cytosae_pipeline.training.runs import TrainingError, prepare_run
from tests.support.interruptions import interrupted_at_step
from tests.support.stores import make_activations, make_store

ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")


def _metrics(place, run="r"):
    path = place.root / "out" / "checkpoints" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _tokens(place) -> torch.Tensor:
    store = ActivationStore.open(place.store)
    with StoreReader(store) as reader:
        return torch.from_numpy(reader.read(store.valid_rows)).float()


def _same(first, second) -> bool:
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


# --- architectures


@pytest.mark.parametrize(("option", "arch"), [("k", "relu"), ("l1_coefficient", "topk"), ("bandwidth", "relu")])
def test_an_option_of_another_architecture_is_refused(with_store, option, arch):
    output = with_store.train("--arch", arch, f"--{option}", 32, code=2).output
    assert f"{option} is an option of arch " in output
    assert f"found arch {arch}: leave it out, or choose another --arch" in output
    assert not (with_store.root / "out" / "checkpoints").exists()


def test_a_run_that_an_older_version_began_is_resumed(with_store, monkeypatch):
    """Its config has a value for every option, those of other architectures included."""
    from cytosae.training.step import TrainStep

    original, calls = TrainStep.step, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", interrupted)
        with_store.train("--run_name", "old", code=130)
    folder = with_store.root / "out" / "checkpoints" / "old"
    record = json.loads((folder / "config.json").read_text())
    others = {"k": 32, "aux_coefficient": 0.03125, "l0_coefficient": 1.0, "bandwidth": 1.0}
    assert others.items() <= record["recipe"].items()
    for values in (record["recipe"], record["options"]):
        values |= others | {"k": 64}
    for name in ("weight_decay", "input_noise", "pre_act_coefficient"):  # which today's preset would fill in
        del record["options"][name]
        assert name not in record["recipe"]
    record["options"]["preset"] = "modern"
    (folder / "config.json").write_text(json.dumps(record))
    state = torch.load(folder / "training_state.pt", weights_only=True)
    torch.save({**state, "recipe": record["recipe"]}, folder / "training_state.pt")
    assert "(resumed, 15 steps" in with_store.run("train", "--resume", "old").output


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_resumes_and_is_read(with_store, arch):
    options = ["--arch", arch, "--lr_decay_share", 0.2, "--held_out", 0.2, "--standardise", "--input_noise", 0.1]
    options += [] if arch in ("relu", "gated") else ["--k", 5]
    with_store.train("--run_name", "r", *options)
    with interrupted_at_step(9):
        with_store.train("--run_name", "broken", *options, code=130)
    assert "(resumed, 15 steps" in with_store.run("train", "--resume", "broken").output
    assert _same(with_store.sae("r"), with_store.sae("broken"))
    loaded = load_sae(with_store.sae())
    assert loaded.cfg["arch"] == arch
    torch.testing.assert_close(loaded.sae.W_dec.norm(dim=1), torch.ones(96))
    with_store.run("features", "--dataset_name", "toy", "--sae_path", with_store.sae())
    scores = loaded.sae.encode(_tokens(with_store)).mean(dim=1)
    indices = torch.load(with_store.features() / "max_activating_image_indices.pt", weights_only=True)
    latent = int(scores.sum(dim=0).argmax())
    assert indices[latent, 0] == scores[:, latent].argmax()


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_more_active_latents_than_there_are_is_refused(with_store, arch):
    output = with_store.train("--arch", arch, "--k", 97, code=1).output
    assert "k must be a whole number from 1 to the 96 latents, found 97" in output
    assert "--expansion_factor 4 at width 24 gives 96 latents: change --k or --expansion_factor" in output
    config = TrainConfig(root_dir=with_store.root, dataset_name="toy", arch=arch, k=25, expansion_factor=1)
    with pytest.raises(TrainingError, match="from 1 to the 24 latents, found 25"):
        prepare_run(config)
    assert not (with_store.root / "out" / "checkpoints").exists()


def test_a_preset_is_checked_with_the_other_options(with_store):
    output = with_store.train("--preset", "modern", "--expansion_factor", 1, "--tokens", "all", code=1).output
    assert "k must be a whole number from 1 to the 24 latents, found 32" in output


@pytest.mark.parametrize("option", [["--use_ghost_grads"], ["--norm_weighted_l1"], ["--mse_cls_coefficient", 2]])
def test_options_of_relu_are_refused_elsewhere(with_store, option):
    output = with_store.train("--arch", "gated", *option, code=2).output
    assert f"{option[0].strip('-')} is an option of arch relu, found arch gated" in output


def test_the_pre_activation_loss_is_an_option_of_jumprelu_alone(with_store):
    output = with_store.train("--arch", "topk", "--pre_act_coefficient", 0.1, code=2).output
    assert "pre_act_coefficient is an option of arch jumprelu, found arch topk" in output


def test_training_of_jumprelu_uses_the_pre_activation_loss(with_store, monkeypatch):
    from cytosae_pipeline.training.trainer import Trainer

    weights, train_on = set(), Trainer.train_on

    def watched(self, *arguments):
        weights.add(self.step._weights.pre_act_coefficient)
        return train_on(self, *arguments)

    monkeypatch.setattr(Trainer, "train_on", watched)
    with_store.train("--arch", "jumprelu", "--k", 4, "--pre_act_coefficient", 0.1)
    assert weights == {0.1}


def test_an_older_run_of_jumprelu_is_resumed_without_the_pre_activation_loss(with_store):
    with_store.train("--preset", "modern", "--arch", "jumprelu", "--k", 4, "--run_name", "old")
    path = with_store.root / "out" / "checkpoints" / "old" / "config.json"
    record = json.loads(path.read_text())
    config = TrainConfig(root_dir=with_store.root, resume="old")
    assert prepare_run(config).config.pre_act_coefficient == record["options"].pop("pre_act_coefficient") == 0.03125
    path.write_text(json.dumps(record))
    assert prepare_run(config).config.pre_act_coefficient == 0


def test_jumprelu_without_it_keeps_the_name_of_earlier_runs(with_store):
    recipes = [
        prepare_run(
            TrainConfig(root_dir=with_store.root, dataset_name="toy", arch="jumprelu", pre_act_coefficient=value)
        ).recipe
        for value in (0.0, 0.1)
    ]
    assert "pre_act_coefficient" not in recipes[0]
    assert recipes[1] == {**recipes[0], "pre_act_coefficient": 0.1}


# --- options


def test_standardised_training_is_that_of_a_standardised_store_and_folds_back(with_store):
    with_store.train("--run_name", "r", "--standardise", "--lr", 0, "--b_dec_init_method", "zeros")
    x = _tokens(with_store).double().flatten(0, 1)
    scaling = find_scaling([ActivationStore.open(with_store.store)])
    torch.testing.assert_close(scaling.mean.double(), x.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert scaling.scale == pytest.approx(x.var(dim=0, correction=0).mean().sqrt().item(), rel=1e-5)
    scaled = scaling.apply(x)
    assert scaled.square().sum(dim=1).mean().item() == pytest.approx(24, rel=1e-4)
    torch.testing.assert_close(load_sae(with_store.sae()).sae.b_dec.double(), x.mean(dim=0), rtol=1e-5, atol=1e-5)


def test_a_store_without_variance_is_scaled_by_1(tmp_path):
    store = make_store(tmp_path / "s.zarr", np.ones((4, 5, 8), dtype="<f2"))
    assert find_scaling([store]).scale == 1.0


def test_several_stores_are_scaled_as_one(tmp_path):
    first, second = make_activations(5), 3 * make_activations(9, seed=1) + 1
    stores = [make_store(tmp_path / "a.zarr", first), make_store(tmp_path / "b.zarr", second)]
    both = np.concatenate([first, second]).astype(np.float64).reshape(-1, 8)
    scaling = find_scaling(stores)
    np.testing.assert_allclose(scaling.mean.numpy(), both.mean(axis=0), rtol=1e-5)
    assert scaling.scale == pytest.approx(math.sqrt(both.var(axis=0).mean()), rel=1e-6)


def test_free_decoder_rows_are_folded_into_the_encoder(with_store):
    with_store.train("--run_name", "r", "--norm_weighted_l1", "--lr", 0.01, "--l1_coefficient", 0.01)
    with_store.train("--run_name", "unit", "--lr", 0.01, "--l1_coefficient", 0.01)
    free, unit = load_sae(with_store.sae()).sae, load_sae(with_store.sae("unit")).sae
    torch.testing.assert_close(free.W_dec.norm(dim=1), torch.ones(96))
    assert not torch.allclose(free.W_dec, unit.W_dec, atol=1e-3)


def test_the_encoder_may_start_as_the_decoders_transpose(with_store):
    with_store.train("--run_name", "r", "--encoder_init", "decoder", "--lr", 0)
    sae = load_sae(with_store.sae()).sae
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)


def test_sparsity_warms_up(with_store):
    with_store.train("--run_name", "r", "--l1_warm_up_steps", 10, "--lr", 0, "--l1_coefficient", 1)
    with_store.train("--run_name", "whole", "--lr", 0, "--l1_coefficient", 1)
    shares = [
        one["losses/l1_loss"] / other["losses/l1_loss"]
        for one, other in zip(_metrics(with_store), _metrics(with_store, "whole"), strict=True)
    ]
    assert shares == pytest.approx([0.1, 0.5, 1.0, 1.0], rel=1e-5)


def test_warm_up_by_share_and_options_of_adam_reach_the_step(with_store, monkeypatch):
    from cytosae_pipeline.training.trainer import Trainer

    rates, encoder_rates, betas = [], [], []
    train_on = Trainer.train_on

    def watched(self, *arguments):
        rates.append(self.step.optimizer.param_groups[0]["lr"])
        common, encoder = self.step.optimizer.param_groups
        assert encoder["params"] == [self.step.sae.W_enc]
        encoder_rates.append(encoder["lr"])
        betas.append(common["betas"])
        assert encoder["betas"] == betas[-1]
        assert (common["weight_decay"], encoder["weight_decay"]) == (0, 0.125)
        return train_on(self, *arguments)

    monkeypatch.setattr(Trainer, "train_on", watched)
    with_store.train(
        "--run_name", "r", "--lr", 0.5, "--lr_warm_up_share", 0.4, "--adam_beta1", 0.8,
        "--adam_beta2", 0.9, "--encoder_lr_factor", 0.25, "--weight_decay", 0.125,
    )  # fmt: skip
    assert len(rates) == 15
    assert rates[:7] == pytest.approx([0.5 * step / 6 for step in range(1, 7)] + [0.5])
    assert encoder_rates == pytest.approx([rate / 4 for rate in rates])
    assert set(betas) == {(0.8, 0.9)}
    recipe = json.loads((with_store.root / "out/checkpoints/r/config.json").read_text())["recipe"]
    given = {
        "lr_warm_up_share": 0.4, "adam_beta1": 0.8, "adam_beta2": 0.9, "encoder_lr_factor": 0.25, "weight_decay": 0.125
    }  # fmt: skip
    assert given.items() <= recipe.items()


def test_options_of_later_versions_leave_the_names_of_older_runs(with_store):

    options = {"root_dir": with_store.root, "dataset_name": "toy", "model_path": with_store.vit, "precision": "fp32"}
    plain = prepare_run(TrainConfig(**options))
    later = {
        "lr_warm_up_share": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "encoder_lr_factor": 0.5, "weight_decay": 0.1,
        "input_noise": 0.1,
    }  # fmt: skip
    assert not later.keys() & plain.recipe.keys()
    for name, value in later.items():
        other = prepare_run(TrainConfig(**options, **{name: value}))
        assert other.folder != plain.folder


@pytest.mark.parametrize(
    ("latents", "tokens", "options", "expected"),
    [
        (3072, 257, {}, 1),  # a latent of average frequency fires 43 times in a step
        (3072, 257, {"k": 8}, 2),  # 10.7 times
        (24_576, 257, {}, 4),  # 5.4 times
        (24_576, 257, {"batch_size": 4}, 15),
        (24_576, 257, {"batch_size": 4, "dead_feature_window": 7}, 7),
        (24_576, 257, {"dead_feature_window": 64}, 64),
        (49_152, 1, {}, 64),  # once in 96 steps
        (3072, 257, {"arch": "relu"}, 64),  # nothing says how often
        (3072, 257, {"preset": None, "arch": "topk"}, 64),
    ],
)
def test_rare_latents_are_revived_later_with_the_preset(latents, tokens, options, expected):
    config = TrainConfig(**{"preset": "modern", "batch_size": 16, **options})
    assert config.revive_after_steps(latents, tokens) == expected


@pytest.mark.parametrize(
    ("arch", "decay", "noise", "pull"),
    [
        ("relu", 0, 0, 0),
        ("topk", 0.4, 0.2, 0),
        ("batchtopk", 0.4, 0.2, 0),
        ("matryoshka", 0.4, 0.2, 0),
        ("jumprelu", 0.4, 0.1, 0.03125),
        ("gated", 0, 0, 0),
    ],
)
def test_the_preset_has_what_suits_an_architecture(arch, decay, noise, pull):
    def found(config):
        config = config.filled()
        return config.weight_decay, config.input_noise, config.pre_act_coefficient

    assert found(TrainConfig(preset="modern", arch=arch)) == (decay, noise, pull)
    assert found(replace(TrainConfig(preset="modern"), arch=arch)) == (decay, noise, pull)
    assert found(TrainConfig(preset="modern", arch=arch, input_noise=0.3)) == (decay, 0.3, pull)
    assert found(TrainConfig(preset="modern", arch=arch, weight_decay=0.3)) == (0.3, noise, pull)
    assert found(TrainConfig(arch=arch)) == (0, 0, 0)


def test_a_run_records_after_how_many_steps_latents_are_revived(with_store):
    with_store.train("--preset", "modern", "--expansion_factor", 4, "--k", 5, "--run_name", "r", "--tokens", "all")
    recipe = json.loads((with_store.root / "out/checkpoints/r/config.json").read_text())["recipe"]
    n_tokens = ActivationStore.open(with_store.store).n_tokens
    steps = 20 * recipe["n_latents"] / (5 * recipe["batch_size"] * n_tokens)
    assert recipe["dead_feature_window"] == math.ceil(steps) > 2
    # What was derived is kept, whatever later versions derive.
    config = TrainConfig(root_dir=with_store.root, resume="r")
    assert prepare_run(config).revive_after_steps == recipe["dead_feature_window"]
    assert (recipe["weight_decay"], recipe["input_noise"]) == (0.4, 0.2)


def test_gradients_are_clipped(with_store, monkeypatch):
    from cytosae.training.adam import RowwiseAdam, remove_radial_
    from cytosae.training.gradients import by_latent

    norms, squares = [], []
    update_rows, step = RowwiseAdam.update_rows, RowwiseAdam.step

    def watched_rows(self, parameter, gradient, *, on_sphere, scale, decaying):
        values = gradient.values.clone()
        if on_sphere:
            remove_radial_(values, by_latent(gradient.name, parameter.detach())[gradient.latents])
        squares.append(values.square().sum().item() * (1 if scale is None else float(scale) ** 2))
        update_rows(self, parameter, gradient, on_sphere=on_sphere, scale=scale, decaying=decaying)

    def watched_step(self, closure=None):
        given = (part.grad for group in self.param_groups for part in group["params"])
        squares.extend(grad.square().sum().item() for grad in given if grad is not None)
        norms.append(math.sqrt(sum(squares)))
        squares.clear()
        return step(self, closure)

    monkeypatch.setattr(RowwiseAdam, "update_rows", watched_rows)
    monkeypatch.setattr(RowwiseAdam, "step", watched_step)
    with_store.train("--run_name", "free")
    free = norms.copy()
    with_store.train("--run_name", "clipped", "--max_gradient_norm", 1e-3)
    clipped = norms[len(free) :]
    assert len(clipped) == len(free) == 15
    assert 0.999e-3 < max(clipped) <= 1.001e-3 < min(free)


@pytest.mark.parametrize("choice", ["patches", "cls", "all"])
def test_the_tokens_chosen_are_those_trained_on(with_store, monkeypatch, choice):
    from cytosae.training.step import TrainStep

    seen, original = [], TrainStep.step

    def watched(self, x, **more):
        seen.append(tuple(x.shape))
        return original(self, x, **more)

    monkeypatch.setattr(TrainStep, "step", watched)
    with_store.train("--run_name", "r", "--tokens", choice)
    n_tokens = ActivationStore.open(with_store.store).n_tokens
    assert {found[1] for found in seen} == {{"patches": n_tokens - 1, "cls": 1, "all": n_tokens}[choice]}


def test_registers_are_no_patches():
    layout = TokenLayout(1, 3, (2, 2))
    x = torch.arange(8.0).view(1, 8, 1)
    assert choose_tokens(x, "patches", layout).flatten().tolist() == [4, 5, 6, 7]
    assert choose_tokens(x, "cls", layout).flatten().tolist() == [0]
    assert choose_tokens(x, "all", layout).shape == (1, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_token", "--tokens", "patches"], "class_token means tokens cls, but tokens patches was given"),
        (["--batch_of", "tokens", "--tokens", "patches"], "tokens patches needs batch_of images"),
        (["--tokens", "patches", "--mse_cls_coefficient", 2], "trains on no CLS token"),
        (["--held_out", 0.95], "held_out must be at most 0.9"),
        (["--lr_decay_share", 1.5], "lr_decay_share must be at most 1"),
        (["--max_memory", 0], "max_memory must be above 0"),
        (["--max_gradient_norm", 0], "max_gradient_norm must be above 0"),
        (["--k", 0], "k must be at least 1"),
        (
            ["--lr", 0.5, "--encoder_lr_factor", 0.5, "--weight_decay", 4],
            "weight_decay 4 takes 1 of the encoder's weights in a step (lr x encoder_lr_factor x weight_decay), "
            "which must be less than 1",
        ),
    ],
)
def test_options_that_contradict_are_usage_errors(with_store, options, message):
    assert message in with_store.train(*options, code=2).output


def test_a_memory_budget_splits_batches_and_hardly_changes_the_numbers(with_store):
    with_store.train("--run_name", "r")
    with_store.train("--run_name", "split", "--max_memory", 96 * 4 * 7 / 2**30)
    for first, second in zip(_metrics(with_store), _metrics(with_store, "split"), strict=True):
        assert second["losses/overall_loss"] == pytest.approx(first["losses/overall_loss"], rel=1e-4)


def test_the_order_has_a_seed_of_its_own(with_store):
    with_store.train("--run_name", "a", "--seed", 7)
    with_store.train("--run_name", "b", "--seed", 7, "--order_seed", 7)
    with_store.train("--run_name", "c", "--seed", 7, "--order_seed", 42)
    assert _same(with_store.sae("a"), with_store.sae("b"))
    assert not _same(with_store.sae("a"), with_store.sae("c"))


# --- precision


def test_bfloat16_ends_near_float32_and_says_so_in_the_file(with_store):
    options = ["--lr", 0.005, "--total_training_tokens", 600]
    with_store.train("--run_name", "r", *options)
    with_store.train("--run_name", "half", *options, "--precision", "bf16")
    last, half = _metrics(with_store)[-1], _metrics(with_store, "half")[-1]
    assert half["metrics/explained_variance"] == pytest.approx(last["metrics/explained_variance"], rel=0.05)
    state = torch.load(with_store.sae("half"), weights_only=True)
    assert state["cfg"]["precision"] == "bf16"
    assert {tensor.dtype for tensor in state["state_dict"].values()} == {torch.float32}


def test_auto_is_resolved_when_the_run_begins(with_store, monkeypatch):
    monkeypatch.setattr("cytosae_pipeline.training.matmul._multiplies_bfloat16", lambda device: True)
    output = with_store.train("--run_name", "r", "--precision", "auto", "--max_memory", 1e-30).output
    assert "trained" in output
    config = json.loads((with_store.root / "out/checkpoints/r/config.json").read_text())
    assert config["recipe"]["precision"] == "bf16"
    # Resumed on a machine without such products, the numbers stay what they were to be.
    with_store.sae().unlink()
    monkeypatch.setattr("cytosae_pipeline.training.matmul._multiplies_bfloat16", lambda device: False)
    with_store.run("train", "--resume", "r")
    assert torch.load(with_store.sae(), weights_only=True)["cfg"]["precision"] == "bf16"


# --- presets


def test_presets_fill_in_what_the_command_line_leaves_out(with_store):
    options = ["--preset", "modern", "--total_training_tokens", 60, "--expansion_factor", 4, "--k", 5]
    with_store.run("train", "--dataset_name", "toy", "--run_name", "r", "--batch_size", 4, *options)
    recipe = json.loads((with_store.root / "out/checkpoints/r/config.json").read_text())["recipe"]
    assert recipe["k"] == 5
    assert recipe["arch"] == PRESETS["modern"]["arch"]
    assert recipe["standardise"] is True
    assert "preset" not in recipe


def test_presets_fill_in_what_python_leaves_out():
    config = TrainConfig(preset="modern", k=5, encoder_init="kaiming")
    assert (config.arch, config.lr, config.standardise) == ("batchtopk", 0.006, True)
    assert (config.k, config.encoder_init) == (5, "kaiming")
    assert replace(config, lr=0.0004).lr == 0.0004
    assert replace(config, arch="topk") == replace(config, arch="topk", preset="modern")
    assert replace(TrainConfig(preset="modern"), arch="relu").k is None
    assert TrainConfig(preset="modern", arch="relu").arch == "relu"


def test_every_preset_is_made_of_options():
    for values in PRESETS.values():
        TrainConfig(**values)


def test_the_published_command_is_the_preset():
    published = {
        "seed": 42, "expansion_factor": 64, "b_dec_init_method": "geometric_median", "batch_size": 64,
        "n_checkpoints": 20, "l1_coefficient": 0.00008, "lr": 0.0004, "use_ghost_grads": True,
        "total_training_tokens": 1_000_000, "arch": "relu",
    }  # fmt: skip
    assert PRESETS["cytosae"] == published


# --- held-out images


def test_held_out_images_are_never_trained_on_and_measured_exactly(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    seen, original = [], TrainStep.step

    def watched(self, x, **more):
        seen.append(x.clone())
        return original(self, x, **more)

    monkeypatch.setattr(TrainStep, "step", watched)
    with_store.train("--run_name", "r", "--held_out", 0.3)
    store = ActivationStore.open(with_store.store)
    apart = held_out(store, 0.3, "image")
    with StoreReader(store) as reader:
        images = torch.from_numpy(reader.read(np.flatnonzero(apart & store.valid))).float()
    assert 2 <= len(images) <= 14
    trained = torch.cat(seen)
    assert not any((image == other).all() for image in images for other in trained)
    loaded = load_sae(with_store.sae())
    found = loaded.cfg["evaluation"]
    x = images.double().flatten(0, 1)
    acts = loaded.sae.encode(images).flatten(0, 1)
    again = loaded.sae.decode(acts).detach().double()
    error, total = (x - again).square().sum(), (x - x.mean(dim=0)).square().sum()
    assert found["explained_variance"] == pytest.approx(1 - float(error / total), rel=1e-5)
    assert found["l0"] == pytest.approx(float((acts > 0).double().sum(dim=1).mean()))
    assert found["dead_share"] == pytest.approx(float((acts > 0).sum(dim=0).eq(0).double().mean()))
    assert found["cosine"] == pytest.approx(float(torch.nn.functional.cosine_similarity(x, again).mean()), rel=1e-5)
    assert found["n_images"] == len(images)
    lines = [line for line in _metrics(with_store) if "eval/l0" in line]
    assert [line["details/n_training_tokens"] for line in lines] == [20, 40, 60], "at every checkpoint and at the end"
    assert lines[-1]["eval/explained_variance"] == pytest.approx(found["explained_variance"])
    checkpoints = sorted((with_store.root / "out/checkpoints/r").glob("[0-9]*_sparse_*.pt"))
    assert all(load_sae(path).cfg["evaluation"] for path in checkpoints)


def test_without_held_out_images_nothing_is_claimed(with_sae):
    assert load_sae(with_sae.sae()).cfg["evaluation"] is None


# --- states


def test_a_damaged_state_falls_back_to_the_one_before(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    with_store.train("--run_name", "r")
    original, calls = TrainStep.step, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    monkeypatch.setattr(TrainStep, "step", interrupted)
    with_store.train("--run_name", "broken", code=130)
    monkeypatch.setattr(TrainStep, "step", original)
    folder = with_store.root / "out/checkpoints/broken"
    newest, before = folder / "training_state.pt", folder / "training_state.before.pt"
    assert before.exists()
    newest.write_bytes(newest.read_bytes()[:1000])
    output = with_store.run("train", "--resume", "broken").output
    assert "trying the state before it" in output
    assert "resuming run 'broken' after 40 images" in output
    assert _same(with_store.sae("r"), with_store.sae("broken"))
    assert not newest.exists()
    assert not before.exists()


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    original, calls = TrainStep.step, []

    def poisoned(self, x, **more):
        calls.append(1)
        return original(self, x * math.nan if len(calls) == 8 else x, **more)

    monkeypatch.setattr(TrainStep, "step", poisoned)
    output = with_store.train("--run_name", "r", "--n_checkpoints", 14, code=1).output
    assert "the loss became nan at step 8 of run 'r'" in output
    folder = with_store.root / "out/checkpoints/r"
    newest = max(folder.glob("[0-9]*_sparse_*.pt"), key=lambda path: path.stat().st_mtime)
    assert f"The last good autoencoder is '{newest}'" in output
    assert "--max_gradient_norm" in output
    assert torch.isfinite(load_sae(newest).sae.W_enc).all()
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert state["samples_seen"] == 28
    assert torch.isfinite(state["step"]["sae"]["W_enc"]).all()


def test_parameters_that_are_no_numbers_are_never_saved(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    original, calls = TrainStep.step, []

    def poisoned(self, x, **more):
        result = original(self, x, **more)
        calls.append(1)
        if len(calls) == 4:
            self.sae.W_enc.data[0, 0] = math.inf
        return result

    monkeypatch.setattr(TrainStep, "step", poisoned)
    output = with_store.train("--run_name", "r", "--n_checkpoints", 14, "--wandb_log_frequency", 100, code=1).output
    assert "the parameters are no longer finite at step 4" in output


def test_training_error_is_one_that_users_can_put_right():
    assert issubclass(TrainingError, ValueError)


def test_the_threshold_is_found_once_for_evaluation_and_file(tmp_path, monkeypatch):
    activations = make_activations(40)
    store = make_store(tmp_path / "s.zarr", activations)
    calls, plain = [], BatchTopKSae.calibrate_
    monkeypatch.setattr(BatchTopKSae, "calibrate_", lambda sae, tokens: [calls.append(1), plain(sae, tokens)])
    config = {
        "root_dir": tmp_path, "store": store.path, "run_name": "r", "preset": "modern", "k": 3, "batch_size": 8,
        "total_training_tokens": 32, "held_out": 0.2, "device": "cpu",
    }  # fmt: skip
    result = train(TrainConfig(**config))
    assert calls == [1]
    apart = torch.from_numpy(activations[held_out(store, 0.2, "image")]).float()
    n_active = (result.load().encode(apart) > 0).sum(dim=2).double().mean()
    assert result.metrics["eval/l0"] == pytest.approx(float(n_active), rel=1e-3)


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_images_that_were_not_trained_on_set_the_threshold(tmp_path, arch, share):
    """Few directions explain an image, and others explain the next one: unseen images have more active latents."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(200, 16))
    parts = rng.exponential(size=(200, 5, 200)) * (rng.random((200, 5, 200)) < 0.02)
    activations = (parts @ directions + 0.1 * rng.normal(size=(200, 5, 16))).astype(np.float32)
    store = make_store(tmp_path / "s.zarr", activations.astype(np.float16), shard_images=50)
    result = train(
        TrainConfig(
            root_dir=tmp_path,
            store=store.path,
            run_name="r",
            preset="modern",
            arch=arch,
            k=3,
            expansion_factor=8,
            batch_size=32,
            total_training_tokens=200 * 32,
            held_out=share,
            device="cpu",
            precision="fp32",
        )
    )
    apart = held_out(store, share, "image")
    acts = result.load().encode(torch.from_numpy(activations.astype(np.float16)).float())
    l0 = (acts > 0).sum(dim=2).float().mean(dim=1)
    assert (apart.sum() >= 32) == (share == 0.3)
    calibrated = l0[torch.from_numpy(apart if share == 0.3 else ~apart)]
    assert calibrated.mean() == pytest.approx(3, rel=0.03)
