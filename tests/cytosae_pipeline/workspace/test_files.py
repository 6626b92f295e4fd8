"""Files of tensors appear only once complete, also when the process is killed or the disk is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cytosae_pipeline.workspace.files import write_torch
from tests.support.patience import patience


def test_the_name_of_the_file_is_not_in_it(tmp_path):
    for name in ("a.pt", "another.pt"):
        write_torch(tmp_path / name, {"x": torch.arange(3)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, error):
    path = tmp_path / "sae.pt"
    write_torch(path, {"x": 0})
    before = path.read_bytes()

    def fail(value, file):
        file.write(before[:50])
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        write_torch(path, {"x": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    seen, sync = [], os.fsync
    path = tmp_path / "value.pt"

    def record(file):
        seen.append(path.exists())
        sync(file)

    monkeypatch.setattr(os, "fsync", record)
    write_torch(path, torch.arange(3))
    assert seen[0] is False
    assert torch.load(path, weights_only=True).tolist() == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    """Five processes that save without pause, each killed at some moment: a file is always there, and of one save."""
    script = """
import os, pathlib, random, signal, sys, time
import torch
from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.storage.atomic import replacing_path
torch.set_num_threads(1)
path, rng, sae = pathlib.Path(sys.argv[1]), random.Random(0), ReluSae(64, 512).requires_grad_(False)
for number in range(5):
    child = os.fork()
    if not child:
        for n in range(number * 1_000_000, (number + 1) * 1_000_000):
            for parameter in sae.parameters():
                parameter.fill_(n)
            with replacing_path(path) as temporary:
                save_sae(temporary, sae, {"n": n})
    deadline = time.monotonic() + float(sys.argv[2])
    while not path.exists() or (number and load_sae(path).cfg["n"] < number * 1_000_000):
        assert time.monotonic() < deadline, "the child saved nothing"
    time.sleep(rng.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "the child ended by itself"
    loaded = load_sae(path)
    print(loaded.cfg["n"], *sorted({x.item() for p in loaded.sae.parameters() for x in (p.min(), p.max())}))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "sae.pt"), str(patience())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=5 * patience(), check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    lines = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert all(len(line) == 2 and line[0] == line[1] for line in lines), "parts of two saves"
