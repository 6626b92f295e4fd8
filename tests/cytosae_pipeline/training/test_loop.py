"""Training from the store: reproducible, resumable to the bit, and nothing final after a crash."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae
from cytosae.sae.relu import ReluSae
from cytosae.training.geometric_median import geometric_median
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import iter_batches
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.reading.sampler import Sampler
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.training.init import sample_tokens
from cytosae_pipeline.training.loop import WaitingTime
from tests.support.losses import plain_loss
from tests.support.patience import patience, wait_until
from tests.support.pictures import HEARING_MAIN, LAYOUT, write_pictures, write_vit
from tests.support.stores import make_store

METRICS = {
    "losses/overall_loss", "losses/mse_loss", "losses/l1_loss", "losses/ghost_grad_loss", "metrics/explained_variance",
    "metrics/explained_variance_std", "metrics/l0", "metrics/mean_log10_feature_sparsity",
    "sparsity/mean_passes_since_fired", "sparsity/n_passes_since_fired_over_threshold", "sparsity/below_1e-5",
    "sparsity/below_1e-6", "sparsity/dead_features", "details/n_training_tokens", "details/current_learning_rate",
    "details/images_per_s", "details/data_wait_share",
}  # fmt: skip


def _metrics(place, run="r"):
    path = place.root / "out" / "checkpoints" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_config_metrics_checkpoints_and_the_autoencoder(with_sae):
    folder = with_sae.root / "out" / "checkpoints" / "r"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "20_sparse_autoencoder_toy_vit_-2_resid_96.pt",
        "40_sparse_autoencoder_toy_vit_-2_resid_96.pt",
        "final_sparse_autoencoder_toy_vit_-2_resid_96.pt",
    }
    lines = _metrics(with_sae)
    assert [line["step"] for line in lines] == [1, 5, 10, 15]
    assert all(set(line) == METRICS | {"step"} for line in lines)
    assert lines[-1]["details/n_training_tokens"] == 60
    value = torch.load(with_sae.sae(), weights_only=True)
    assert value["cfg"]["spec_hash"] == ActivationStore.open(with_sae.store).spec.hash
    assert value["cfg"]["block_layer"] == -2
    assert str(with_sae.root) not in json.dumps(value["cfg"])


def test_the_final_weights_are_those_of_a_plain_loop_over_the_definition(with_store):
    with_store.train("--run_name", "r", "--use_ghost_grads", "--dead_feature_window", 0, "--l1_coefficient", 0.001)
    store = ActivationStore.open(with_store.store)
    with StoreReader(store) as reader:
        activations = torch.from_numpy(reader.read(store.valid_rows)).float()
        sae = ReluSae(24, 96, seed=42)
        with torch.no_grad():
            sae.b_dec.copy_(geometric_median(sample_tokens(ConcatReader([reader]), store.spec.tokens)))
    optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999))
    since = torch.zeros(96)
    n_ghosts = 0
    for step, rows in enumerate(iter_batches(22, batch_rows=4, seed=42, samples_seen=0, stop=60)):
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        dead = since > 0
        n_ghosts += int(dead.any())
        loss = plain_loss(sae, activations[rows], l1_coefficient=0.001, dead_mask=dead)
        fired = loss.n_fired > 0
        since = torch.where(fired, 0, since + 1)
        optimizer.zero_grad()
        loss.terms.loss.backward()
        sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec
        optimizer.param_groups[0]["lr"] = 0.0004 * min(1, (step + 1) / 3)
        optimizer.step()
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    trained = load_sae(with_store.sae()).sae
    for name, expected in sae.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], expected, rtol=1e-4, atol=1e-6)
    assert n_ghosts > 0


def _state(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _assert_same_weights(first, second):
    for name, tensor in _state(first).items():
        assert torch.equal(tensor, _state(second)[name]), name


def test_the_same_seed_gives_the_same_bits_and_another_does_not(with_sae):
    with_sae.train("--run_name", "again")
    _assert_same_weights(with_sae.sae("r"), with_sae.sae("again"))
    with_sae.train("--run_name", "other", "--seed", 1)
    assert not torch.equal(_state(with_sae.sae("r"))["W_enc"], _state(with_sae.sae("other"))["W_enc"])


def test_the_same_command_again_says_that_it_is_done(with_sae):
    assert "already trained: nothing to do" in with_sae.train("--run_name", "r").output


def test_a_runs_name_is_made_from_its_options(with_store):
    first = with_store.train("--json")
    again = with_store.train("--json")
    assert json.loads(first.stdout)["sae"] == json.loads(again.stdout)["sae"]
    assert json.loads(again.stdout)["status"] == "already trained"
    other = with_store.train("--json", "--seed", 3)
    assert json.loads(other.stdout)["sae"] != json.loads(first.stdout)["sae"]


def test_a_runs_name_with_other_options_is_refused(with_sae):
    output = with_sae.train("--run_name", "r", "--lr", 0.1, code=1).output
    assert "exists with other options (lr: 0.0004 there, 0.1 now)" in output
    assert "--run_name" in output


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--shuffle", "windowed"],
        ["--batch_of", "tokens"],
        ["--shuffle", "windowed", "--batch_of", "tokens"],
        ["--resident", "ram"],
        ["--with_dataset", "more"],
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(with_store, monkeypatch, options):
    from cytosae.training.step import TrainStep

    if "--with_dataset" in options:
        _build_further(with_store)
    with_store.train("--run_name", "r", *options)
    original, calls = TrainStep.step, []

    def interrupted(self, x, **more):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, x, **more)

    monkeypatch.setattr(TrainStep, "step", interrupted)
    output = with_store.train("--run_name", "broken", *options, code=130).output
    assert "interrupted; finished work is kept" in output
    assert not list((with_store.root / "out/checkpoints/broken").glob("final_*"))
    entry, _ = json.loads(with_store.run("list", "--json").stdout)["runs"]
    assert (entry["name"], entry["n_latents"], entry["status"]) == ("broken", 96, "unfinished")
    assert (with_store.root / "out/checkpoints/broken/training_state.pt").stat().st_size < 100_000
    monkeypatch.setattr(TrainStep, "step", original)
    output = with_store.run("train", "--resume", "broken", "--resident", "none").output
    assert "from disk every epoch: --resident none" in output
    assert "resuming run 'broken' after 28 images" in output
    assert "(resumed, 15 steps" in output
    _assert_same_weights(with_store.sae("r"), with_store.sae("broken"))
    strip = {"details/images_per_s", "details/data_wait_share"}
    for first, second in zip(_metrics(with_store, "r"), _metrics(with_store, "broken"), strict=True):
        assert {key: value for key, value in first.items() if key not in strip} == {
            key: value for key, value in second.items() if key not in strip
        }
    assert not (with_store.root / "out/checkpoints/broken/training_state.pt").exists()


def _build_further(place, vit=None):
    """A further data set in the workspace."""
    write_pictures(place.root / "dataset" / "more", 17)
    source = ["--model_path", vit or place.vit, "--layout", LAYOUT]
    place.run("build", "--dataset_name", "more", *source, "--workers", 0, "--shard_images", 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bits(with_store, number):
    options = ["--total_training_tokens", 4000, "--n_checkpoints", 40]
    with_store.train("--run_name", "whole", *options)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    arguments = [
        "train", "--root_dir", with_store.root, "--dataset_name", "toy", "--expansion_factor", 4, "--batch_size", 4,
        "--lr_warm_up_steps", 3, "--wandb_log_frequency", 5, "--precision", "fp32", "--run_name", "killed", *options,
    ]  # fmt: skip
    command = [sys.executable, "-c", HEARING_MAIN, *map(str, arguments)]
    folder = with_store.root / "out" / "checkpoints" / "killed"
    for wanted in (3, 12):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(
            lambda child=child, wanted=wanted: (
                len(list(folder.glob("*_sparse_*.pt"))) >= wanted or child.poll() is not None
            )
        )
        time.sleep(0.01)  # somewhere in the middle of a step
        child.send_signal(number)
        child.wait()
        assert not list(folder.glob("final_*")) or child.returncode == 0
    with_store.run("train", "--resume", "killed")
    _assert_same_weights(with_store.sae("whole"), with_store.sae("killed"))


def test_sigterm_saves_like_ctrl_c(with_store):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    arguments = [
        "train",
        "--root_dir",
        with_store.root,
        "--dataset_name",
        "toy",
        "--run_name",
        "r",
        "--expansion_factor",
        4,
    ]
    command = [sys.executable, "-c", HEARING_MAIN, *map(str, arguments)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = with_store.root / "out/checkpoints/r/metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or child.poll() is not None)
    child.terminate()
    output, _ = child.communicate(timeout=patience())
    assert child.returncode == 130, output
    assert "interrupted" in output
    assert (with_store.root / "out/checkpoints/r/training_state.pt").exists()


def test_a_loss_that_is_not_finite_stops_without_a_final_file(with_store):
    output = with_store.train("--run_name", "r", "--lr", 1e30, code=1).output
    assert "the loss became nan" in output or "the loss became inf" in output
    assert "--lr" in output
    assert not list((with_store.root / "out/checkpoints/r").glob("final_*"))


def test_warm_up_is_not_ignored(with_sae):
    rates = {line["step"]: line["details/current_learning_rate"] for line in _metrics(with_sae)}
    assert rates[1] == pytest.approx(0.0004 / 3)
    assert rates[5] == pytest.approx(0.0004)


def test_explained_variance_and_l0_are_those_of_the_definition(with_store):
    # One batch that is the whole store, and a learning rate of 0: the logged step can be computed again.
    with_store.train("--run_name", "r", "--batch_size", 22, "--total_training_tokens", 22, "--lr", 0)
    store = ActivationStore.open(with_store.store)
    sae = load_sae(with_store.sae()).sae.double()
    with StoreReader(store) as reader:
        x = torch.from_numpy(reader.read(store.valid_rows)).double().flatten(0, 1)
    output = sae(x)
    error = (x - output.reconstruction).square().sum()
    (line,) = _metrics(with_store)
    assert line["metrics/explained_variance"] == pytest.approx(
        1 - float(error / (x - x.mean(0)).square().sum()), rel=1e-4
    )
    assert line["metrics/l0"] == pytest.approx(float((output.acts > 0).sum(1).double().mean()), rel=1e-4)
    assert line["metrics/mean_log10_feature_sparsity"] == pytest.approx(
        float(torch.log10((output.acts > 0).double().mean(0) + 1e-10).mean()), rel=1e-3
    )


def test_the_class_token_alone(with_store):
    with_store.train("--run_name", "r", "--class_token")
    assert len(_metrics(with_store)) == 4


@pytest.mark.parametrize("method", ["mean", "zeros"])
def test_other_starts_of_the_decoders_bias(with_store, method):
    with_store.train("--run_name", "r", "--b_dec_init_method", method, "--lr", 0)
    store = ActivationStore.open(with_store.store)
    found = load_sae(with_store.sae()).sae.b_dec
    with StoreReader(store) as reader:
        tokens = torch.from_numpy(reader.read(store.valid_rows)).double().flatten(0, 1)
    expected = tokens.mean(dim=0) if method == "mean" else torch.zeros(24).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_median_comes_from_tokens_spread_over_the_store(with_store):
    store = ActivationStore.open(with_store.store)
    with StoreReader(store) as reader:
        tokens = sample_tokens(ConcatReader([reader]), store.spec.tokens, n_images=4, n_tokens=7)
        everything = reader.read(store.valid_rows).reshape(-1, 24)
    assert tokens.shape == (7, 24)
    for token in tokens.numpy():
        assert (everything.astype(np.float32) == token).all(axis=1).any()


def test_a_store_of_another_width_is_refused(with_store):
    output = with_store.train("--clip_dim", 768, code=1).output
    assert "--clip_dim 768 was given, but store" in output
    assert "width 24" in output


def test_a_missing_store_is_built_first(with_images):
    result = with_images.train("--run_name", "r", "--layout", LAYOUT, "--model_path", with_images.vit)
    assert "no activation store of data set 'toy' yet: building it first" in result.output
    assert with_images.sae().exists()


def test_a_missing_store_without_a_checkpoint_is_explained(with_images):
    output = with_images.train(code=1).output
    assert "no activation store for block_layer -2" in output
    assert "cytosae-cache build" in output


def test_an_unfinished_store_is_refused_with_the_command_that_finishes_it(with_images):
    with_images.build("--strict-images", code=1)
    output = with_images.train(code=1).output
    assert "is unfinished" in output
    where = f"--root_dir {with_images.root} --dataset_name toy --model_path {with_images.vit} --layout {LAYOUT}"
    assert f"options that its build was given: cytosae-cache build {where} --workers 0 --shard_images 5 " in output
    shutil.rmtree(with_images.root / "out" / "builds")
    output = with_images.train(code=1).output
    where = f"--root_dir {with_images.root} --dataset_name toy --images PATH --model_path CHECKPOINT --block_layer -2"
    assert f"options that its build was given: cytosae-cache build {where}\n" in output


def test_a_store_of_other_weights_is_never_reused(with_store):
    first = with_store.store
    write_vit(with_store.vit, seed=1)
    result = with_store.train("--run_name", "r", "--layout", LAYOUT, "--model_path", with_store.vit)
    assert "building it first" in result.output
    assert len(list(first.parent.glob("*.zarr"))) == 2
    output = with_store.train("--run_name", "r2", code=1).output
    assert "2 stores of data set 'toy' fit" in output


def test_an_unknown_run_cannot_be_resumed(with_sae):
    output = with_sae.run("train", "--resume", "nothing", code=1).output
    assert "no run 'nothing'" in output
    assert "There are: r" in output


def test_the_nearest_runs_name_is_suggested(with_store):
    with_store.train("--run_name", "monocytes")
    output = with_store.run("train", "--resume", "monocyte", code=1).output
    assert "There are: monocytes. Did you mean 'monocytes'?" in " ".join(output.split())


def test_the_state_of_an_older_version_is_refused(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    def interrupted(self, x, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", interrupted)
        with_store.train("--run_name", "r", code=130)
    path = with_store.root / "out/checkpoints/r/training_state.pt"
    state = torch.load(path, weights_only=True)
    state["position"] = state.pop("samples_seen")
    torch.save(state, path)
    output = with_store.run("train", "--resume", "r", code=1).output
    assert "was written by an older version of cytosae-cache, whose unfinished runs cannot be resumed" in output


def test_damage_on_disk_stops_training_and_keeps_the_state(with_store):
    shard = with_store.store / "activations" / "c" / "1" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    output = with_store.train("--run_name", "r", "--b_dec_init_method", "zeros", code=1).output
    assert "fails its checksum" in output
    assert (with_store.root / "out/checkpoints/r/training_state.pt").exists()
    with_store.train("--run_name", "r2", "--b_dec_init_method", "zeros", "--no-verify")


def test_metrics_are_finite(with_sae):
    for line in _metrics(with_sae):
        assert all(value is not None and math.isfinite(value) for value in line.values())


def test_activations_in_memory_give_the_same_bits(with_sae):
    output = with_sae.train("--run_name", "ram", "--resident", "ram").output
    assert "activations (5.3 kB) are read once and kept in memory" in output
    _assert_same_weights(with_sae.sae("r"), with_sae.sae("ram"))
    output = with_sae.train("--run_name", "none", "--resident", "none").output
    assert "activations (5.3 kB) are read from disk every epoch: --resident none" in output
    _assert_same_weights(with_sae.sae("r"), with_sae.sae("none"))


def test_where_activations_are_kept_is_not_the_recipe(with_sae):
    assert "already trained" in with_sae.train("--run_name", "r", "--resident", "ram").output


def test_the_gpu_is_refused_where_there_is_none(with_store):
    if not torch.cuda.is_available():
        output = with_store.train("--resident", "gpu", code=1).output
        assert "--resident gpu needs a CUDA device" in output


@pytest.mark.parametrize(
    ("name", "value", "default"), [("shuffle", "windowed", "global"), ("batch_of", "tokens", "images")]
)
def test_another_order_is_another_recipe(with_sae, name, value, default):
    output = with_sae.train("--run_name", "r", f"--{name}", value, code=1).output
    assert f"exists with other options ({name}: '{default}' there, '{value}' now)" in output


def test_the_orders_train_on_what_the_sampling_says(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    seen = []
    original = TrainStep.step
    monkeypatch.setattr(
        TrainStep, "step", lambda self, x, **more: (seen.append(x.clone()), original(self, x, **more))[1]
    )
    with_store.train("--run_name", "r", "--shuffle", "windowed", "--batch_of", "tokens")
    with StoreReader(ActivationStore.open(with_store.store)) as reader:
        images = ConcatReader([reader])
        tokens = torch.from_numpy(images.read_all()).flatten(0, 1)
        sampling = Sampler(images.layout, images.image_shape[0], 4, 42, "windowed", "tokens")
    for x, parts in zip(seen, sampling.iter_batches(samples_seen=0, stop=60), strict=True):
        assert torch.equal(x.flatten(0, 1), tokens[parts].float())


@pytest.mark.parametrize("options", [["--class_token"], ["--mse_cls_coefficient", 2]])
def test_mixed_tokens_have_no_class_token(with_store, options):
    output = with_store.train("--batch_of", "tokens", *options, code=2).output
    name = options[0].strip("-")
    assert f"{name} needs batch_of images: with batch_of tokens the tokens are mixed" in output


def test_several_data_sets_are_one(with_store):
    _build_further(with_store)
    with_store.train("--run_name", "both", "--with_dataset", "more", "--resident", "ram", "--batch_of", "tokens")
    cfg = torch.load(with_store.sae("both"), weights_only=True)["cfg"]
    (more,) = (with_store.root / "out/activations/more").glob("*.zarr")
    assert (cfg["dataset_name"], cfg["with_dataset"]) == ("toy", ["more"])
    assert cfg["list_digest"] == ActivationStore.open(with_store.store).provenance.list_digest
    assert cfg["with_list_digest"] == [ActivationStore.open(more).provenance.list_digest]
    result = json.loads(with_store.train("--with_dataset", "more", "--json").stdout)
    assert "toy+more-" in result["sae"]
    with_store.run("features", "--dataset_name", "more", "--sae_path", with_store.sae("both"))
    by_path = ["--store", with_store.store, "--with_dataset", "more", "--expansion_factor", 4]
    output = with_store.run("train", *by_path, "--total_training_tokens", 8, "--json").stdout
    assert "toy+more-" in json.loads(output)["sae"]


def test_a_data_set_twice_is_refused(with_store):
    output = with_store.train("--with_dataset", "toy", code=1).output
    assert "was given twice: omit one --with_dataset" in output


def test_data_sets_of_other_specs_are_refused(with_store):
    vit = with_store.root / "other.pth"
    write_vit(vit, seed=1)
    _build_further(with_store, vit=vit)
    output = with_store.train("--with_dataset", "more", code=1).output
    assert "cannot be streamed as one: weights_sha256" in output
    assert not (with_store.root / "out/checkpoints").exists()


def test_a_further_data_set_that_is_missing_is_explained(with_store):
    output = with_store.train("--with_dataset", "nothing", code=1).output
    assert "no activation store for block_layer -2" in output
    assert "--dataset_name nothing" in output


def test_the_sample_is_spread_over_all_stores(tmp_path):
    stores = [make_store(tmp_path / f"{n}.zarr", np.full((n, 5, 8), n, dtype="<f2")) for n in (10, 30)]
    with StoreReader(stores[0]) as first, StoreReader(stores[1]) as second:
        tokens = sample_tokens(ConcatReader([first, second]), stores[0].spec.tokens, n_images=8, n_tokens=40)
    assert tokens[:, 0].tolist() == [10.0] * 10 + [30.0] * 30


def test_the_share_of_waiting_is_printed_and_logged(with_store):
    output = with_store.train("--run_name", "r").output
    share = float(re.search(r"waited for data during (\d+\.\d)% of the time", output)[1])
    assert 0 <= share <= 100
    assert all(0 <= line["details/data_wait_share"] <= 1 for line in _metrics(with_store))


def test_waiting_time_is_counted_from_its_start(monkeypatch):
    class Batches:
        waited_s = 1.0

    now = [100.0]
    monkeypatch.setattr("cytosae_pipeline.training.loop.time.perf_counter", lambda: now[0])
    waiting = WaitingTime(Batches())
    assert waiting.share() == 0
    now[0], Batches.waited_s = 110.0, 3.5
    assert waiting.share() == 0.25
    Batches.waited_s = 99.0
    assert waiting.share() == 1
