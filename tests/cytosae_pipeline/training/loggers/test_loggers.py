"""Metrics go to JSON lines always, to real wandb and TensorBoard files when asked, and no name of a person anywhere."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.loggers.base import MetricLoggers, make_histogram
from cytosae_pipeline.training.loggers.jsonl import JsonlLogger
from cytosae_pipeline.training.loggers.tensorboard import TensorboardLogger
from cytosae_pipeline.training.loggers.weights_and_biases import WandbLogger
from tests.support.nursery import SOURCES
from tests.support.patience import patience
from tests.support.wandb_files import read_config, read_history, read_records

VALUES = np.log10(np.array([0.5, 0.25, 0.0, 0.0, 0.001]) + 1e-10)
HISTOGRAMS = {"plots/feature_density_line_chart": make_histogram(VALUES)}


def test_json_lines_survive_a_half_written_line_and_drop_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricLoggers(JsonlLogger(path)) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"loss": step / 2, "bad": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricLoggers(JsonlLogger(path, after_step=2)) as logger:
        logger.log(3, {"loss": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "bad": None},
        {"step": 2, "loss": 1.0, "bad": None},
        {"step": 3, "loss": 9.0},
    ]


def test_lines_are_cut_off_the_end_and_damaged_ones_in_between_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\0\0\n{"step": 2}\n[3]\n{"step": "x"}\n{"step": 3}\n{"step": 4}\n' + b"x" * 3_000_000
    )
    inode = path.stat().st_ino
    JsonlLogger(path, after_step=3).close()
    assert path.read_bytes() == b'{"step": 1}\n\0\0\n{"step": 2}\n[3]\n{"step": "x"}\n{"step": 3}\n'
    JsonlLogger(path, after_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n\0\0\n{"step": 2}\n'
    assert path.stat().st_ino == inode
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    logger = JsonlLogger(path, after_step=2)
    logger.log(3, {})
    logger.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_line_without_room_leaves_the_lines_before_it(tmp_path):
    code = f"""
import resource
from pathlib import Path
from cytosae_pipeline.training.loggers.jsonl import JsonlLogger
resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
logger = JsonlLogger(Path({str(tmp_path / "m.jsonl")!r}), after_step=2)
try:
    for step in range(3, 100):
        logger.log(step, {{"a": 1.5}})
except OSError as error:
    print(step, error.filename)
logger.close()
"""
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n')
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == f"6 {tmp_path / 'm.jsonl'}\n"
    steps = [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_metrics_are_written_into_files_only(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "elsewhere").write_text("mine")
    path.symlink_to("elsewhere") if kind == "link" else os.mkfifo(path)
    with pytest.raises(OSError, match="metrics.jsonl"):
        JsonlLogger(path)
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_histograms_are_those_of_numpy_and_survive_what_is_not_finite():
    counts, edges = make_histogram(np.array([0.0, 1.0, np.nan, 4.0, -np.inf]), n_bins=2)
    assert counts.tolist() == [2, 1]
    assert edges.tolist() == [0.0, 2.0, 4.0]
    assert make_histogram(np.array([np.nan])).counts.sum() == 0


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def online(monkeypatch):
    """A login, and a server that takes connections and never answers; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def _wandb(folder: Path, **options) -> WandbLogger:
    config = {"lr": 0.5, "use_ghost_grads": True}
    return WandbLogger(project="p", entity=None, run_id="abc", folder=folder, config=config, **options)


def _offline_run(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


def test_wandb_runs_offline_without_a_login_and_says_so(with_store, no_login):
    result = with_store.train("--run_name", "r", "--log_to_wandb", "--wandb_project", "p", "--wandb_entity", "e")
    assert "wandb: no login found" in result.output
    assert "wandb sync" in result.output
    assert "wandb stopped" not in result.output
    folder = with_store.root / "out" / "checkpoints" / "r"
    # The real file on its way to the server: metrics under the reference's names, and nothing that tells who or where.
    path = _offline_run(folder)
    records = read_records(path)
    history = read_history(records)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == len(lines) == 4
    for line in lines:
        sent = history[line.pop("step")]
        assert {name: sent[name] for name in line} == pytest.approx(line, nan_ok=True)
        assert {"losses/overall_loss", "metrics/explained_variance", "sparsity/dead_features"} <= set(line)
    config = read_config(records)
    assert config["expansion_factor"] == 4
    assert all(isinstance(value, int | float) for value in config.values())
    assert {record.run.host for record in records} == {""}
    everything = b"".join(file.read_bytes() for file in [path, *path.parent.glob("files/**/*")] if file.is_file())
    private = ["neutrophil", "blast", "p0/", ".png", str(with_store.root), "toy", "vit.pth", str(Path.home())]
    for word in [*private, *([socket.gethostname()] if len(socket.gethostname()) > 4 else [])]:
        assert word.encode() not in everything, word
    assert not list(path.parent.glob("files/*"))


def test_wandb_gets_metrics_histograms_and_config(tmp_path, no_login):
    with MetricLoggers(_wandb(tmp_path)) as logger:
        logger.log(20, {"losses/overall_loss": 1.5, "bad": float("nan")}, HISTOGRAMS)
        logger.log(40, {"losses/overall_loss": 0.25})
    records = read_records(_offline_run(tmp_path))
    history = read_history(records)
    assert list(history) == [20, 40]
    assert history[20]["losses/overall_loss"] == 1.5
    assert np.isnan(history[20]["bad"])
    name = "plots/feature_density_line_chart"
    counts, edges = HISTOGRAMS[name]
    assert history[20][f"{name}:_type"] == "histogram"
    assert history[20][f"{name}:values"] == counts.tolist()
    assert history[20][f"{name}:bins"] == pytest.approx(edges.tolist())
    assert history[40]["losses/overall_loss"] == 0.25
    assert read_config(records) == {"lr": 0.5, "use_ghost_grads": True}


def test_wandb_can_be_switched_off_from_outside(tmp_path, monkeypatch, messages):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = _wandb(tmp_path)
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert not list(tmp_path.glob("wandb/*/*.wandb"))
    assert messages() == ""


@pytest.mark.parametrize("server", ["closed", "mute"])
def test_wandb_continues_offline_if_the_server_does_not_answer(tmp_path, online, monkeypatch, messages, server):
    if server == "closed":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logger = _wandb(tmp_path, init_timeout_s=2, close_s=patience())
    for step in range(1, 101):
        logger.log(step, {"loss": 1 / step}, HISTOGRAMS)
    logger.close()
    (line,) = messages().splitlines()
    assert line.startswith("wandb: the server cannot be used (")
    assert line.endswith(
        f"so the run is written offline under '{tmp_path}/wandb'. "
        f"Upload it later with: wandb sync '{tmp_path}/wandb/latest-run'"
    )
    assert list(read_history(read_records(_offline_run(tmp_path)))) == list(range(1, 101))


def test_a_server_that_never_answers_is_waited_for_only_so_long(tmp_path, online, messages):
    logger = _wandb(tmp_path, init_timeout_s=patience(3600), close_s=2)
    logger.log(1, {"loss": 1.0})
    started = time.monotonic()
    logger.close()
    assert time.monotonic() - started < patience()
    assert messages() == (
        "wandb did not finish within 2 s and was stopped. Every metric is in metrics.jsonl; "
        f"upload what wandb has on disk with: wandb sync '{tmp_path}/wandb/latest-run'"
    )


def test_a_logger_left_open_does_not_keep_the_program_from_ending(tmp_path, online):
    code = (
        "import pathlib, time\nfrom cytosae_pipeline.training.loggers.weights_and_biases import WandbLogger\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "logger = WandbLogger(project='p', entity=None, run_id='a', folder=folder, config={}, "
        "init_timeout_s=36000, close_s=36000)\n"
        "logger.log(1, {'loss': 1.0})\ntime.sleep(3)\nprint('end', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=patience()
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_they_are_imported_only_when_asked_for():
    code = (
        "import sys, cytosae_pipeline.training.loop, cytosae_pipeline.api.autoencoders\n"
        "found = {'wandb', 'tensorboard'} & set(sys.modules)\nassert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SOURCES}, check=True)


def test_loggers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--log_to_wandb needs wandb: pip install wandb, or leave the option out"):
        _wandb(tmp_path)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs tensorboard: pip install tensorboard, or leave the"):
        TensorboardLogger(tmp_path)


def test_tensorboard_files_hold_metrics_and_histograms_and_a_resumed_run_replaces_steps(tmp_path, messages):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for after_step, factor in ((0, 1.0), (20, 10.0)):
        with MetricLoggers(TensorboardLogger(tmp_path, after_step=after_step)) as logger:
            for step in range(after_step + 10, after_step + 31, 10):
                logger.log(step, {"losses/overall_loss": factor * step, "details/n": step}, HISTOGRAMS)
        time.sleep(1.1)  # a file's name tells its second, and files are read in the order of their names
    assert messages() == ""
    found = event_accumulator.EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    assert found.Tags()["scalars"] == ["losses/overall_loss", "details/n"]
    losses = {event.step: event.value for event in found.Scalars("losses/overall_loss")}
    assert losses == {10: 10.0, 20: 20.0, 30: 300.0, 40: 400.0, 50: 500.0}
    histograms = found.Histograms("plots/feature_density_line_chart")
    assert [event.step for event in histograms] == [10, 20, 30, 40, 50]
    value = histograms[0].histogram_value
    counts, edges = HISTOGRAMS["plots/feature_density_line_chart"]
    assert (value.min, value.max, value.num) == (edges[0], edges[-1], 5)
    assert sum(value.bucket) == counts.sum()
    assert value.sum == pytest.approx(VALUES.sum(), rel=0.02)


def test_a_tensorboard_that_fails_is_reported_once_and_training_continues(tmp_path, messages):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with MetricLoggers(TensorboardLogger(tmp_path / "file" / "folder")) as logger:
        logger.log(1, {"loss": 1.0})
        logger.log(2, {"loss": 0.5})
    (line,) = messages().splitlines()
    assert line.startswith("tensorboard stopped: ")
    assert line.endswith(". Training continues without it. Every metric is in metrics.jsonl")


def test_a_tensorboard_without_room_is_reported_once_without_a_traceback(tmp_path):
    code = f"""
import logging, resource, time
from pathlib import Path
from cytosae_pipeline.training.loggers.tensorboard import TensorboardLogger
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))
logger = TensorboardLogger(Path({str(tmp_path)!r}))
for step in range(200):
    logger.log(step, {{"a": 1.5}})
    time.sleep(0.005)
logger.close()
print("trained")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "trained\n"
    assert ended.stderr.count("tensorboard stopped: ") == 1
    assert "Traceback" not in ended.stderr
