"""What a run needs is known before it begins: compared with the files that it writes, and refused in time."""

import resource
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.building import store_place
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.runtime.shortage import NotEnoughMemoryError
from cytosae_pipeline.training.placement import FreeMemory
from cytosae_pipeline.training.requirements import (
    find_disk_needs,
    require_training_memory,
    sae_file_bytes,
    state_file_bytes,
)
from cytosae_pipeline.training.runs import prepare_run
from cytosae_pipeline.training.trainer import Trainer
from tests.cytosae_pipeline.training.test_claims import ENVIRONMENT
from tests.support.pictures import HEARING_MAIN


def _run(place, **options):
    return prepare_run(TrainConfig(root_dir=place.root, dataset_name="toy", device="cpu", precision="fp32", **options))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_are_those_of_the_files(with_store, monkeypatch, arch):
    sizes = {}
    original = Trainer.save_state

    def measured(self):
        original(self)
        sizes["state"] = self.run.state_paths[0].stat().st_size

    monkeypatch.setattr(Trainer, "save_state", measured)
    options = {"arch": arch, "expansion_factor": 256, "run_name": "r", "total_training_tokens": 8}
    with_store.train(*(word for name, value in options.items() for word in (f"--{name}", value)))
    run = _run(with_store, **options, batch_size=4)
    assert sae_file_bytes(run) == pytest.approx(run.final_path.stat().st_size, rel=0.02)
    assert state_file_bytes(run) == pytest.approx(sizes["state"], rel=0.02)
    needs = find_disk_needs([run])
    assert needs.n_checkpoints == 2, "of 20, since there are only two steps"
    assert needs.total_bytes == 3 * sae_file_bytes(run) + 2 * state_file_bytes(run)
    assert needs.there_bytes == sum(path.stat().st_size for path in run.folder.glob("*.pt"))


def test_needs_are_said_and_summed_over_a_sweep(with_store):
    assert "2 checkpoints, final autoencoders and states take up to " in with_store.train("--run_name", "r").output
    grid = with_store.root / "grid.toml"
    grid.write_text("seed = [1, 2, 3]\n")
    output = with_store.train("--sweep", grid).output
    assert "6 checkpoints, final autoencoders and states of 3 runs take up to " in output


def test_too_little_disk_is_refused_before_anything_is_written(with_store, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(store_place.shutil, "disk_usage", lambda path: usage(100_000))
    output = with_store.train("--run_name", "r", code=1).output
    assert "but only 100.0 kB are free at" in output
    assert "lower --n_checkpoints or --expansion_factor" in output
    assert not (with_store.root / "out" / "checkpoints").exists()
    with_store.train("--run_name", "r", "--expansion_factor", 1, "--n_checkpoints", 0)


def test_too_little_memory_is_refused_with_what_makes_it_smaller(with_store):
    run = _run(with_store, expansion_factor=1000)
    n_bytes = 4 * (2 * 24 * 24_000 + 24_000 + 24) * 5
    require_training_memory([run], FreeMemory(2 * n_bytes, None))
    with pytest.raises(NotEnoughMemoryError, match=r"of 24,000 latents on batches of 16 .* Lower --expansion_factor"):
        require_training_memory([run], FreeMemory(n_bytes // 2, None))
    with pytest.raises(NotEnoughMemoryError, match=r"training 3 autoencoders .* or train fewer runs at once"):
        require_training_memory([run] * 3, FreeMemory(2 * n_bytes, None))
    require_training_memory([run], FreeMemory(None, None))


def _limited(place, *arguments):
    """The command line under `ulimit -v`, and its peak memory in bytes."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    exec({HEARING_MAIN!r})
finally:
    # Not getrusage: that counts what the test run had before it started this program.
    print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")) + "000")
"""
    command = [sys.executable, "-c", code, arguments[0], "--root_dir", place.root, "--dataset_name", "toy"]
    ended = subprocess.run(
        [*map(str, command), *map(str, arguments[1:])], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    assert int(ended.stdout.split("peak ")[1]) < 1.5e9
    return ended


@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.slow
def test_verbs_under_a_limit_refuse_or_need_no_more_than_there_is(with_sae):
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    for factor in (1_000_000, 100_000_000, 10**18):
        ended = _limited(with_sae, "train", "--run_name", "big", "--expansion_factor", factor)
        assert ended.returncode == 1
        assert "--expansion_factor" in ended.stderr
    assert not (with_sae.root / "out" / "checkpoints" / "big").exists()
    ended = _limited(with_sae, "features", "--sae_path", "r", "--batch_size", 10**9)
    assert ended.returncode == 0, ended.stderr
    giant = with_sae.root / "giant.safetensors"
    with giant.open("wb") as file:
        file.truncate(40 << 30)
    ended = _limited(with_sae, "features", "--sae_path", giant)
    assert ended.returncode == 1
    assert f"reading the autoencoder '{giant}' needs at least 42.9 GB of memory" in ended.stderr
    giant.unlink()


def test_a_batch_larger_than_the_training_is_the_training(with_sae):
    with_sae.train("--run_name", "one", "--batch_size", 10**9)
    with_sae.train("--run_name", "other", "--batch_size", 60)
    one, other = with_sae.sae("one"), with_sae.sae("other")
    first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
