"""Benchmarks run and print what they promise; how fast anything is, no test says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import shuffle
from tests.stores import make_activations, make_spec, make_store

ROOT = Path(__file__).parents[1]


def _run(module: str, *arguments: object) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_stream_prints_a_line_a_kind(tmp_path):
    lines = _run(
        "stream", "--folder", tmp_path, "--shards", 3, "--shard-images", 2, "--d-model", 16, "--batch", 4,
        "--rounds", 1, "--epochs", 2, "--codecs", "none", "zstd",
    )  # fmt: skip
    assert [line["name"] for line in lines] == [*["stream"] * 3, *["tokens"] * 3] * 2
    assert [(line["shuffle"], line["memory"]) for line in lines[:3]] == [
        ("global", False), ("windowed", False), ("global", True)
    ]  # fmt: skip
    assert [line["codec"] for line in lines] == ["none"] * 6 + ["zstd"] * 6
    assert all(line["ratio"] > 0 and line["images"] == 6 for line in lines)
    assert not list(tmp_path.iterdir())


def test_shuffle_compares_orders_with_the_true_one():
    sizes = ["--images", 400, "--classes", 4, "--shard-images", 10, "--batch", 20, "--tokens", 3, "--epochs", 2]
    lines = _run("shuffle", *sizes, "--windows", 1, 8, 40)
    assert [(line["batch_of"], line["shuffle"], line["window_shards"]) for line in lines] == [
        (batch_of, *order)
        for batch_of in ("images", "tokens")
        for order in (("global", None), ("windowed", 1), ("windowed", 8), ("windowed", 40))
    ]
    true, one, eight, whole = lines[:4]
    assert true["ratio"] == 1
    # A batch from two shards of ten, each of one class.
    assert one["classes_per_batch"] <= 2
    assert one["class_distance"] >= 0.5
    # A window that holds everything is a true shuffle.
    assert one["ratio"] < eight["ratio"] < 0.95 < whole["ratio"] < 1.05


def test_measures_of_mixing_are_those_of_their_definition():
    rng = np.random.default_rng(0)
    rows = rng.permutation(50)
    n = len(rows)
    # Spearman's formula without ties.
    expected = 1 - 6 * ((rows - np.arange(n)) ** 2).sum() / (n * (n * n - 1))
    assert shuffle.rank_correlation(rows) == pytest.approx(expected)
    assert shuffle.class_distance(np.array([0, 0, 1, 1]), 3, np.array([0.25, 0.25, 0.5])) == pytest.approx(0.5)


def test_storage_prints_a_line_a_measurement(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.storage", "--folder", str(tmp_path), "--shards", "2", "--shard-images", "4",
        "--d-model", "16", "--batch", "3", "--rounds", "1", "--codecs", "none", "zstd",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["write", "write", *["read", "stream", "tokens", "random"] * 6]
    found = [(line["codec"], line["verify"], line["cache"]) for line in lines[2::4]]
    raw = [("none", True, "warm"), ("none", False, "warm"), ("none", True, "direct"), ("none", True, "cold")]
    assert found == [*raw, ("zstd", True, "warm"), ("zstd", True, "cold")]
    for line in lines:
        assert line["images"] == 8
        assert line["ratio"] > 0
        assert {"baseline_s", "ours_s", "ratio_best", "ratio_min", "ratio_max", "rounds"} <= set(line)
    assert not list(tmp_path.iterdir())


def test_half_size_compares_ways_and_autoencoders(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(40, make_spec(d_model=16)))
    lines = _run("half_size", "--store", store.path, "--images", 40, "--expansion", 2, "--epochs", 1)
    assert [line["name"] for line in lines] == [*["error"] * 4, "speed", *["same_sae"] * 2, *["own_sae"] * 3]
    assert lines[4]["bytes_an_image"] == 5 * 20
    assert lines[5]["top10_overlap"] == 1
    assert lines[5]["ev_moved_percent"] == 0
    assert {"ev", "l0", "dead"} <= set(lines[-1])
    assert not (store.path / "channels").exists()


def test_peak_memory_does_not_hold_the_images(tmp_path):
    # 270 further images of 65,792 bytes are 18 MB; the noise of an allocator is a fraction of that.
    build, epoch = _run("memory", "--folder", tmp_path, "--images", 30, "--shard-images", 5, "--batch", 4)
    assert (build["name"], epoch["name"]) == ("memory_build", "memory_epoch")
    for line in (build, epoch):
        assert line["images"] == [30, 300]
        assert line["growth_bytes_an_image"] < 0.75 * line["activation_bytes_an_image"]
