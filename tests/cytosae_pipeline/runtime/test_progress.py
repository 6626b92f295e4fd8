"""Progress as plain lines, and numbers for people."""

import pytest

from cytosae_pipeline.runtime import progress
from cytosae_pipeline.runtime.progress import Progress, Reporter, format_bytes, format_seconds


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
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress("build", 100, "images", done=20) as bar:
        for _ in range(8):
            bar.advance(10, "loss 1")
    err = capsys.readouterr().err
    assert "of 100 images (" in err
    assert "images/s" in err
    assert " left, loss 1" in err
    assert [line.startswith("build: 100 of 100 images (100 %)") for line in err.splitlines()[-2:]] == [False, True]


def test_quiet_says_nothing(capsys):
    report = Reporter(quiet=True)
    report.say("hello")
    with report.progress("x", 1, "things") as bar:
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("train", 3, "images") as bar:
        bar.advance(3, "loss 0.5")
    err = capsys.readouterr().err
    assert "train" in err
    assert "3/3" in err
