"""One run by several processes: the same results, one set of files, and one end for all."""

import json
import os
import signal
import sys

import pytest
import torch

from cytosae.formats.checkpoint import load_sae
from cytosae_cache.reading.permutation import iter_batches
from cytosae_cache.store import ActivationStore
from tests.support.patience import wait_until
from tests.support.torchrun import Torchrun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks' processes in /proc")

_NUMBERS = ("losses/overall_loss", "metrics/explained_variance", "metrics/explained_variance_std", "metrics/l0")


def _options(place, run, *more, images=60):
    return (
        "train", "--root_dir", place.root, "--dataset_name", "toy", "--run_name", run, "--expansion_factor", 4,
        "--batch_size", 4, "--total_training_tokens", images, "--lr_warm_up_steps", 3, "--wandb_log_frequency", 5,
        "--n_checkpoints", 2, "--precision", "fp32", *more,
    )  # fmt: skip


def _folder(place, run):
    return place.root / "out" / "checkpoints" / run


def _metrics(place, run):
    return [json.loads(line) for line in (_folder(place, run) / "metrics.jsonl").read_text().splitlines()]


def _assert_alike(place, one, other, tolerance=1e-4):
    first, second = _metrics(place, one), _metrics(place, other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b)
        for name in (*_NUMBERS, *(name for name in a if name.startswith("eval/"))):
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=1e-6), (a["step"], name)
    assert {path.name for path in _folder(place, one).iterdir()} == {
        path.name for path in _folder(place, other).iterdir()
    }


@pytest.mark.parametrize(
    "more",
    [
        ("--use_ghost_grads", "--dead_feature_window", 0, "--max_gradient_norm", 0.5, "--held_out", 0.3),
        (
            "--arch", "batchtopk", "--k", 5, "--batch_of", "tokens", "--dead_feature_window", 1, "--held_out", 0.3,
            "--input_noise", 0.5, "--weight_decay", 0.5,
        ),
        ("--split", "latents", "--arch", "relu", "--max_gradient_norm", 0.5, "--held_out", 0.3),
        (
            "--split", "latents", "--arch", "batchtopk", "--k", 5, "--dead_feature_window", 1, "--held_out", 0.3,
            "--input_noise", 0.5, "--weight_decay", 0.5,
        ),
        ("--arch", "jumprelu", "--k", 5, "--resident", "ram", "--shuffle", "windowed", "--tokens", "patches"),
    ],
)  # fmt: skip
def test_two_processes_give_the_run_of_one(with_store, more):
    # The last batch has 2 images.
    with_store.run_plain(*_options(with_store, "one", *more, images=58))
    code, output = Torchrun(*_options(with_store, "two", *more, images=58)).finish()
    assert code == 0, output
    assert output.count("autoencoder (trained") == 1
    assert output.count("matrix products in") == 1
    _assert_alike(with_store, "one", "two")
    one, two = (load_sae(with_store.sae(run)).sae for run in ("one", "two"))
    torch.testing.assert_close(two.W_dec, one.W_dec, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("first", "then"), [("data", "latents"), ("latents", "data")])
def test_ctrl_c_stops_all_ranks_at_one_step_and_three_resume(with_store, first, then):
    run = Torchrun(*_options(with_store, "r", "--split", first, images=100_000))
    run.wait_for(_folder(with_store, "r") / "metrics.jsonl")
    run.interrupt()
    code, output = run.finish()
    assert code != 0
    assert output.count("interrupted; finished work is kept. Run the same torchrun command again") == 1
    state = torch.load(_folder(with_store, "r") / "training_state.pt", weights_only=True)
    assert state["samples_seen"] == 4 * state["n_done"] < 100_000
    again = Torchrun(*_options(with_store, "r", "--split", then, images=100_000), n_ranks=3)
    wanted = state["n_done"] // 5 + 3
    path = _folder(with_store, "r") / "metrics.jsonl"
    wait_until(lambda: len(path.read_text().splitlines()) >= wanted or again.process.poll() is not None)
    again.interrupt()
    code, output = again.finish()
    assert f"resuming run 'r' after {state['samples_seen']:,} images" in output
    later = torch.load(_folder(with_store, "r") / "training_state.pt", weights_only=True)
    assert later["n_done"] > state["n_done"]
    steps = [line["step"] for line in _metrics(with_store, "r")]
    assert steps == [1, *range(5, steps[-1] + 1, 5)]


def test_a_killed_rank_is_one_message_and_a_restart_resumes(with_store):
    run = Torchrun(*_options(with_store, "r", images=3000), options=["--max-restarts", "1"])
    folder = _folder(with_store, "r")
    run.wait_for(folder / "1000_sparse_autoencoder_toy_vit_-2_resid_96.pt")
    os.kill(run.ranks()[1], signal.SIGKILL)
    code, output = run.finish()
    assert code == 0, run.output
    assert output.count("Error: ") == 1
    assert output.count("Error: another process of this training has ended") == 1
    assert "resuming run 'r' after" in output
    assert output.count("autoencoder (resumed") == 1
    assert "Traceback" not in run.output.split("torch/distributed")[0]
    assert not (folder / "training_state.pt").exists()


def test_a_shard_that_one_rank_cannot_read_stops_all_and_keeps_the_state(with_store):
    store = ActivationStore.open(with_store.store)
    third = list(iter_batches(22, batch_rows=4, seed=42, samples_seen=0, stop=12))[2]
    row = int(store.valid_rows[third[3]])
    shard = with_store.store / f"activations/c/{row // 5}/0/0"
    data = bytearray(shard.read_bytes())
    data[row % 5 * store.image_bytes] ^= 0xFF
    shard.write_bytes(data)
    code, output = Torchrun(*_options(with_store, "r", "--b_dec_init_method", "zeros", images=1000), n_ranks=5).finish()
    assert code != 0
    assert output.count("Error: ") == 1, output
    assert "checksum" in output
    assert output.count("batches of 4 images leave 1 of 5 processes without work: raise --batch_size") == 1
    state = torch.load(_folder(with_store, "r") / "training_state.pt", weights_only=True)
    assert (state["samples_seen"], state["n_done"]) == (8, 2)


def test_verbs_that_one_process_does_refuse_several(with_sae):
    code, output = Torchrun("features", "--root_dir", with_sae.root, "--dataset_name", "toy", n_ranks=2).finish()
    assert code != 0
    assert output.count("features runs in one process, but torchrun started 2, which would all do the same") == 1


def test_parts_smaller_than_k_are_refused(with_store):
    code, output = Torchrun(*_options(with_store, "r", "--arch", "topk", "--k", 50, "--split", "latents")).finish()
    assert code != 0
    assert output.count("Error: ") == 1
    assert output.count("gives each of 2 processes 48 of 96 latents, fewer than --k 50. Start fewer processes") == 1


def test_one_process_says_that_it_splits_nothing(with_store, messages):
    with_store.run_plain(*_options(with_store, "r", "--split", "latents", images=8))
    assert "--split latents changes nothing: torchrun has not started several processes" in messages()
    with_store.run_plain(*_options(with_store, "s", images=8))
    one, other = (load_sae(with_store.sae(run)).sae.W_dec for run in ("r", "s"))
    assert torch.equal(one, other)
    output = with_store.run_plain(*_options(with_store, "t", "--arch", "gated", "--split", "latents"), code=2).output
    assert "split latents is for arch relu, topk, batchtopk, found arch gated: give split data" in output


def test_a_message_of_all_ranks_is_printed_once(with_store):
    code, output = Torchrun(*_options(with_store, "r", "--arch", "topk", "--k", 1000)).finish()
    assert code != 0
    assert output.count("Error: k must be a whole number from 1 to the 96 latents") == 1
    assert output.count("Error: ") == 1
    code, output = Torchrun(*_options(with_store, "r", "--arch", "gated", "--split", "latents")).finish()
    assert code != 0
    assert output.count("Error: split latents is for arch relu, topk, batchtopk, found arch gated") == 1
    assert output.count("Error: ") == 1


def test_a_sweep_is_dealt_out_to_the_ranks(with_store):
    grid = with_store.root / "grid.toml"
    grid.write_text('arch = "topk"\nk = [2, 3, 4]\n')
    code, output = Torchrun(*_options(with_store, "s", "--sweep", grid)).finish()
    assert code == 0, output
    rows = (_folder(with_store, "s") / "sweep.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["s-k_2", "s-k_3", "s-k_4"]
    assert all(",trained," in row for row in rows[1:])
    assert output.count("table: ") == 1
    code, output = Torchrun(*_options(with_store, "s", "--sweep", grid, "--split", "latents")).finish()
    assert code != 0
    assert output.count("leave out --split latents, or train one run") == 1
    again = with_store.run_plain(*_options(with_store, "s", "--sweep", grid)).output
    assert again.count("already trained") == 3
    with_store.run_plain(*_options(with_store, "t", "--sweep", grid))
    for run in ("k_2", "k_3", "k_4"):
        dealt, alone = (load_sae(with_store.sae(f"{name}-{run}")).sae.W_dec for name in ("s", "t"))
        assert torch.equal(dealt, alone)
