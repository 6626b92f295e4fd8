"""One process trains a run; what killed processes left is removed, and damaged states are never passed over."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from cytosae.formats.checkpoint import load_sae, read_torch
from cytosae_cache.store import ActivationStore
from tests.support.patience import patience, wait_until
from tests.support.pictures import HEARING_MAIN, change_pictures

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}


def _start(place, run, *more, verb="train"):
    arguments = [
        verb, "--root_dir", place.root, "--dataset_name", "toy", "--expansion_factor", 4, "--batch_size", 4,
        "--lr_warm_up_steps", 3, "--wandb_log_frequency", 1, "--precision", "fp32", "--run_name", run,
        "--total_training_tokens", 400_000, "--n_checkpoints", 2000, *more,
    ]  # fmt: skip
    command = [sys.executable, "-c", HEARING_MAIN, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _folder(place, run):
    return place.root / "out" / "checkpoints" / run


def _state_after_kill(place, run="r"):
    """Folder of a run that was killed when it had two states."""
    child = _start(place, run)
    before = _folder(place, run) / "training_state.before.pt"
    wait_until(lambda: before.exists() or child.poll() is not None)
    child.kill()
    child.communicate()
    assert before.exists()
    return before.parent


@pytest.mark.slow
def test_a_second_process_refuses_and_the_first_is_not_disturbed(with_store):
    grid = with_store.root / "r.toml"
    grid.write_text("seed = [1, 2]\n")
    first = _start(with_store, "r", "--sweep", grid)
    metrics = _folder(with_store, "r-seed_2") / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.stat().st_size) or first.poll() is not None)
    config = (metrics.parent / "config.json").read_bytes()
    for command in (("--sweep", grid), ("--resume", "r-seed_2")):
        arguments = ["train", "--root_dir", with_store.root, *command]
        if command[0] == "--sweep":
            second = _start(with_store, "r", *command)
        else:
            words = [sys.executable, "-c", HEARING_MAIN, *map(str, arguments)]
            second = subprocess.Popen(
                words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        output, _ = second.communicate(timeout=patience())
        assert second.returncode == 1
        assert f"another process (process {first.pid} on " in output
        assert "Wait for it to finish, then run the command again" in output
        assert "Traceback" not in output
    assert (metrics.parent / "config.json").read_bytes() == config
    listed = json.loads(with_store.run("list", "--json").stdout)["runs"]
    assert [run["name"] for run in listed] == ["r-seed_1", "r-seed_2"]
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=patience())
    assert first.returncode == 130, output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(metrics.parent.parent.glob("*/*.lock*"))


def test_a_lock_that_a_killed_process_left_is_taken(with_store):
    folder = _folder(with_store, "r")
    folder.mkdir(parents=True)
    (folder / "training.lock").write_bytes(b'{"mark": "cytosae-cache lock", "host": "h", "pid": 1, "since": "then"}')
    assert "(trained, " in with_store.train("--run_name", "r").output
    assert not (folder / "training.lock").exists()


def test_a_run_that_another_process_holds_is_left_alone(with_sae):
    folder = with_sae.sae().parent
    shutil.copytree(folder, _folder(with_sae, "held"))
    with_sae.sae("held").unlink()
    before = {path: path.read_bytes() for path in _folder(with_sae, "held").iterdir()}
    with (_folder(with_sae, "held") / "training.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        output = with_sae.run("train", "--resume", "held", code=1).output
    assert f"another process is writing '{_folder(with_sae, 'held')}'" in output
    assert all(path.read_bytes() == data for path, data in before.items())


def test_what_was_left_beside_a_finished_run_is_removed(with_sae):
    folder = with_sae.sae().parent
    whole = {path.name for path in folder.iterdir()}
    for name in ("training_state.pt", "training_state.before.pt", "config.json.4194304.partial"):
        (folder / name).write_bytes(b"left")
    assert "already trained: nothing to do" in with_sae.train("--run_name", "r").output
    assert {path.name for path in folder.iterdir()} == whole


def test_an_empty_folder_does_not_block_its_name(with_store):
    _folder(with_store, "r").mkdir(parents=True)
    (_folder(with_store, "r") / "config.json.4194304.partial").write_bytes(b"half")
    with_store.train("--run_name", "r")
    assert not list(_folder(with_store, "r").glob("*.partial"))


@pytest.mark.slow
def test_states_that_cannot_be_read_stop_instead_of_losing_the_work(with_store):
    folder = _state_after_kill(with_store)
    newest, before = folder / "training_state.pt", folder / "training_state.before.pt"
    torch.save([1, 2], newest)
    whole = before.read_bytes()
    before.write_bytes(b"")
    metrics = (folder / "metrics.jsonl").read_bytes()
    output = with_store.run("train", "--resume", "r", code=1).output
    assert f"'{newest}' is no state of a run; trying the state before it" in output
    assert f"run 'r' cannot be resumed: '{newest}' and '{before}' cannot be read" in output
    assert "move both away and run the command again to train from the start" in output
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    before.write_bytes(whole)
    child = _start(with_store, "r")
    assert child.stdout is not None
    lines = iter(child.stdout.readline, "")
    assert any("resuming run 'r' after" in line for line in lines)
    child.kill()
    child.communicate()


@pytest.mark.slow
def test_a_full_disk_loses_no_metrics_and_each_step_is_there_once(with_store):
    with_store.train("--run_name", "whole", "--total_training_tokens", 400, "--wandb_log_frequency", 1)
    child = _start(with_store, "r", "--total_training_tokens", 400, "--n_checkpoints", 2)
    metrics = _folder(with_store, "r") / "metrics.jsonl"
    wait_until(lambda: (metrics.exists() and metrics.read_bytes().count(b"\n") > 40) or child.poll() is not None)
    child.kill()
    child.communicate()
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n{HEARING_MAIN}"
    words = [sys.executable, "-c", limited, "train", "--root_dir", str(with_store.root), "--resume", "r"]
    before = metrics.read_text().splitlines()
    ended = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "metrics.jsonl" in ended.stderr
    kept = metrics.read_text().splitlines()
    assert kept == before[: len(kept)]
    with_store.run("train", "--resume", "r")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 101))
    first, second = (torch.load(with_store.sae(run), weights_only=True)["state_dict"] for run in ("whole", "r"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _make_again(place):
    change_pictures(place.images)
    place.build("--overwrite")


def test_a_run_is_not_resumed_on_a_store_that_was_made_again(with_store):
    folder = _state_after_kill(with_store)
    before = (folder / "metrics.jsonl").read_bytes()
    _make_again(with_store)
    output, _ = _start(with_store, "r").communicate(timeout=patience())
    expected = f"run 'r' was trained on other activations: store '{with_store.store}' was made again since, with other "
    assert expected + "contents. Choose another --run_name, or move" in output
    assert (folder / "metrics.jsonl").read_bytes() == before
    (folder / "config.json").unlink()  # the states say it, too
    output, _ = _start(with_store, "r").communicate(timeout=patience())
    assert expected in output


def test_a_finished_run_is_not_taken_for_one_on_a_store_that_was_made_again(with_sae):
    _make_again(with_sae)
    assert "run 'r' was trained on other activations" in with_sae.train("--run_name", "r", code=1).output
    with_sae.train("--run_name", "again")


def test_a_run_that_had_not_begun_takes_the_store_of_now(with_sae):
    for path in _folder(with_sae, "r").iterdir():
        if path.name != "config.json":
            path.unlink()
    _make_again(with_sae)
    with_sae.train("--run_name", "r")
    config = json.loads((_folder(with_sae, "r") / "config.json").read_text())
    assert config["contents"] == [ActivationStore(with_sae.store).contents]
    assert load_sae(with_sae.sae()).cfg["contents"] == config["contents"]


def test_a_state_of_a_version_that_did_not_record_the_contents_is_taken_with_a_warning(with_store):
    folder = _state_after_kill(with_store)
    for path in folder.glob("training_state*.pt"):
        state = torch.load(path, weights_only=True)
        del state["contents"]
        torch.save(state, path)
    config = json.loads((folder / "config.json").read_text())
    del config["contents"]
    (folder / "config.json").write_text(json.dumps(config))
    child = _start(with_store, "r")
    wait_until(lambda: "resuming run" in child.stdout.readline())
    child.kill()
    child.communicate()


def test_a_checkpoint_that_could_not_be_written_is_written_when_the_run_is_resumed(with_store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("cytosae_pipeline.training.trainer.save_sae", fail)
        output = with_store.train("--run_name", "r", code=1).output
    assert "sparse_autoencoder_toy_vit_-2_resid_96.pt' cannot be written: No space left on device" in output
    with_store.train("--run_name", "r")
    with_store.train("--run_name", "whole")
    found, whole = (
        {path.name: read_torch(path)["state_dict"]["W_enc"] for path in _folder(with_store, run).glob("*_sparse_*.pt")}
        for run in ("r", "whole")
    )
    assert len(whole) == 3
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
