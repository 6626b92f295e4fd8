"""What torchrun tells a process, what is refused, and who speaks."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime import ranks
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.runtime.interrupts import HeldInterrupts

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}, {"RANK": 3}, {"WORLD_SIZE": ""}])
def test_a_plain_run_is_alone(monkeypatch, values):
    _set(monkeypatch, **values)
    assert ranks.launched() is None
    assert ranks.is_first()
    assert ranks.speaks()
    assert ranks.n_processes_here() == 1
    ranks.require_one_process("features")
    with ranks.joined(on_gpus=False) as world:
        assert (world.rank, world.size) == (0, 1)


def test_torchrun_says_who_a_process_is(monkeypatch):
    _set(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    assert ranks.launched() == ranks.Launched(5, 8, 1, 4)
    assert not ranks.is_first()
    assert not ranks.speaks(), "before the ranks have met, rank 0 speaks"
    assert ranks.n_processes_here() == 4
    with pytest.raises(
        UserError, match="report runs in one process, but torchrun started 8, which would all do the same"
    ):
        ranks.require_one_process("report")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"RANK": 0},
        {"LOCAL_RANK": 0},
        {"RANK": 2, "LOCAL_RANK": 0},
        {"RANK": "one", "LOCAL_RANK": 0},
        {"RANK": -1},
        {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0},
    ],
)
def test_half_an_environment_is_refused(monkeypatch, values):
    _set(monkeypatch, WORLD_SIZE=2, **values)
    with pytest.raises(UserError, match=r"WORLD_SIZE is set as for several processes.*Start with: torchrun .*or unset"):
        ranks.launched()
    assert ranks.speaks()


def test_every_process_takes_its_gpu(monkeypatch):
    _set(monkeypatch, RANK=2, WORLD_SIZE=4, LOCAL_RANK=2, LOCAL_WORLD_SIZE=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto") == torch.device("cuda", 2)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"started 4 processes on this machine, which has 2 GPUs.*--nproc-per-node 2"):
        choose_device("cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_that_several_processes_cannot_share_are_refused(monkeypatch, device):
    _set(monkeypatch, RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=f"--device {device} was given to 2 processes.*Try --device cpu"):
        choose_device(device)


def test_signals_that_come_twice_are_one_interrupt():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with HeldInterrupts(repeated=True) as interrupts:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.pending
            assert not interrupts.torn
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_that_cannot_meet_say_where():
    path = os.pathsep.join((".", "cache", "pipeline"))
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"}
    found = subprocess.run(
        [sys.executable, "-m", "cytosae_pipeline", "train", "--dataset_name", "x", "--device", "cpu"],
        env={**os.environ, **values, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert "the processes of this training cannot meet at 127.0.0.1:no" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_plain_run_does_not_import_the_package_for_several():
    code = "import sys; from cytosae_pipeline.cli.output import messages; assert 'torch' not in sys.modules"
    path = os.pathsep.join((".", "cache", "pipeline"))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
