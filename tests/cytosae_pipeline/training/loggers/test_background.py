"""A metric logger that fails, hangs or dies costs training neither its end nor its time."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from cytosae_pipeline.training.loggers.background import Background
from tests.support.patience import patience, wait_until


class Disturbed:
    """Writes the steps it is given to a file, and does something else at one point."""

    def __init__(self, path: Path, at: str, disturb) -> None:
        self._path, self._at, self._disturb = path, at, disturb
        self._reach("init")

    def log(self, step, metrics, histograms=None):
        self._reach("log")
        with self._path.open("a") as file:
            file.write(f"{step} {metrics['loss']}\n")

    def close(self):
        self._reach("close")
        self._path.open("a").write("closed\n")

    def _reach(self, place):
        if place == self._at:
            self._disturb()


def _make(path: Path, at: str, disturb) -> tuple[Disturbed, str]:
    return Disturbed(path, at, disturb), "a note" if at == "note" else ""


def _fail() -> None:
    raise ValueError("no\nroute.")


def _fail_without_words() -> None:
    raise ValueError


def _hang() -> None:
    time.sleep(patience(3600))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    raise SystemExit(3)


def _wait_for(path: Path) -> None:
    wait_until(path.exists)


def _run(path: Path, at: str, disturb=_fail, *, n_steps=50, before_close=None, **options) -> Background:
    options = {"close_s": patience(), **options}
    background = Background("it", functools.partial(_make, path, at, disturb), advice="Do this.", **options)
    started = time.monotonic()
    for step in range(1, n_steps + 1):
        background.log(step, {"loss": step / 2})
    assert time.monotonic() - started < patience(), "a record waited for the logger"
    if before_close is not None:
        before_close()
    background.close()
    return background


def test_records_arrive_in_order_and_notes_are_told(tmp_path, messages):
    background = _run(tmp_path / "steps", "note", n_steps=3)
    assert (tmp_path / "steps").read_text() == "1 0.5\n2 1.0\n3 1.5\nclosed\n"
    assert messages() == "a note"
    background.close()
    background.log(4, {"loss": 0.0})
    assert messages() == ""


@pytest.mark.parametrize("at", ["init", "log", "close"])
@pytest.mark.parametrize(
    ("disturb", "reason"),
    [
        (_fail, "no route"),
        (_fail_without_words, "ValueError"),
        (_die, "its process ended"),
        (_exit, "its process ended"),
    ],
)
def test_a_failure_is_one_line(tmp_path, messages, at, disturb, reason):
    _run(tmp_path / "steps", at, disturb)
    assert messages() == f"it stopped: {reason}. Training continues without it. Do this."


@pytest.mark.parametrize("at", ["init", "log", "close"])
def test_one_that_hangs_is_ended(tmp_path, messages, at):
    started = time.monotonic()
    background = _run(tmp_path / "steps", at, _hang, close_s=1.5)
    assert time.monotonic() - started < patience()
    assert messages() == "it did not finish within 1.5 s and was stopped. Do this."
    assert not background._process.is_alive()


def test_what_a_slow_one_cannot_take_is_dropped_and_counted(tmp_path, messages):
    go = tmp_path / "go"
    background = _run(tmp_path / "steps", "log", functools.partial(_wait_for, go), n_pending=5, before_close=go.touch)
    steps = (tmp_path / "steps").read_text().split("\n")[:-2]
    assert len(steps) + background.n_dropped == 50
    assert 5 <= len(steps) <= 7
    assert messages() == f"it was too slow: {background.n_dropped} records were dropped. Do this."
