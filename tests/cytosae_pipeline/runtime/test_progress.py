"""Progress as plain lines, and numbers for people."""

import logging
import threading

import pytest

from cytosae_pipeline.runtime import progress
from cytosae_pipeline.runtime.progress import Progress, format_bytes, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (16.4e9, "16.4 GB"), (2e12, "2.0 TB")]
)
def test_sizes(n_bytes, text):
    assert format_bytes(n_bytes) == text


def test_plain_lines_have_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with Progress("build", 100, "images", done=20) as bar:
        for _ in range(8):
            bar.advance(10, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("build: 20 of 100 images (20 %), ")
    assert all("images/s" in line or "s/images" in line for line in lines[1:])
    assert all(line.endswith(" left, loss 1") for line in lines[1:])
    assert [line.startswith("build: 100 of 100 images (100 %)") for line in lines[-3:]] == [False, False, True] or len(
        lines
    ) > 8


def test_lines_come_now_and_then_and_at_the_end(capsys):
    with Progress("build", 1000, "images") as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_one_switch_hides_progress(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cytosae_pipeline"), "level", logging.WARNING)
    with Progress("x", 1, "things") as bar:
        bar.advance()
        assert bar.done == 1
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("train", 3, "images") as bar:
        bar.advance(3, "loss 0.5")
    err = capsys.readouterr().err
    assert "train" in err
    assert "3/3" in err
    assert "loss 0.5" in err


def test_a_long_first_batch_is_said_to_run(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_UNTIL_FIRST_LINE", 0.0)
    with Progress("build", 1000, "images", done=20) as bar:
        bar._waiting.join()
        assert capsys.readouterr().err == "build: 20 of 1,000 images, the first batch is running\n"
        bar.advance()
    assert "the first batch" not in capsys.readouterr().err


def test_no_thread_outlives_the_bar_and_short_work_is_not_delayed(capsys):
    before = threading.active_count()
    with Progress("build", 10, "images") as bar:
        pass
    assert threading.active_count() == before
    with Progress("build", 10, "images") as bar:
        bar.advance()
        bar._waiting.join()
    assert threading.active_count() == before
    assert "the first batch" not in capsys.readouterr().err


def test_time_left_is_said_after_every_batch_that_is_longer_than_the_lines_are_apart(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress("build", 320, "images") as bar:
        for _ in range(3):
            now[0] += 35
            bar.advance(32)
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("build: 32 of 320 images (10 %), ")
    assert lines[0].endswith("00:35 elapsed, 05:15 left")
    assert lines[2].endswith("01:45 elapsed, 04:05 left")
