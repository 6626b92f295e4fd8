"""Benchmarks run and print what they promise; how fast anything is, no test says."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import memory, patches, shuffle, train_step
from cytosae.sae.registry import ARCHITECTURES
from cytosae.training.matmul import MatmulConfig
from tests.support.stores import make_activations, make_spec, make_store

ROOT = Path(__file__).parents[1]


def _run(module: str, *arguments: object) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_build_prints_both_comparisons_of_an_encoder():
    model = "pipeline/cytosae_pipeline/assets/cytosae_tiny14.pth"
    lines = _run("build", "--model-path", model, "--images", 3, "--batch", 2, "--rounds", 1, "--workers", 0)
    assert [line["name"] for line in lines] == ["build", "build_blocks"]
    assert all(line["ratio"] > 0 and line["encoder"] == "cytosae_tiny14" and line["images"] == 3 for line in lines)
    assert lines[1]["blocks"] == 3


def test_patches_cover_pictures_without_overlap(tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "street.png")
    Image.fromarray(pixels[:20]).save(tmp_path / "pictures" / "strip.png")
    out = tmp_path / "out"
    arguments = ["patches", "--pictures", str(tmp_path / "pictures"), "--out", str(out), "--side", "32"]
    monkeypatch.setattr(sys, "argv", arguments)
    patches.main()
    assert capsys.readouterr().out == f"6 patches of 2 pictures in '{out}'\n"
    found = [np.asarray(Image.open(path)) for path in sorted((out / "street").iterdir())]
    joined = np.concatenate([np.concatenate(found[:3], axis=1), np.concatenate(found[3:], axis=1)])
    assert np.array_equal(joined, pixels[:64, :96])
    with pytest.raises(FileExistsError):
        patches.main()


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
    assert all(line["ratio"] > 0 and line["ratio_cpu"] > 0 and line["images"] == 6 for line in lines)
    assert not list(tmp_path.iterdir())


def test_stream_measures_stores_of_several_numbers_of_shards(tmp_path):
    lines = _run(
        "stream", "--folder", tmp_path, "--shards", 2, 7, "--images", 12, "--d-model", 256, "--batch", 4,
        "--rounds", 1, "--epochs", 1, "--caches", "warm", "direct", "--codecs", "none", "lz4",
    )  # fmt: skip
    assert [(line["shards"], line["shard_images"], line["codec"], line["cache"]) for line in lines] == [
        (shards, shard_images, codec, cache)
        for shards, shard_images in ((2, 6), (7, 1))
        for codec, cache in [*[("none", "warm")] * 6, *[("none", "direct")] * 2, *[("lz4", "warm")] * 6]
    ]
    assert all(line["baseline_cpu_us"] > 0 and line["ours_cpu_us"] > 0 for line in lines)
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
    assert lines[4]["bytes_per_image"] == 5 * 20
    assert lines[5]["top10_overlap"] == 1
    assert lines[5]["ev_moved_percent"] == 0
    assert {"ev", "l0", "dead"} <= set(lines[-1])
    assert not (store.path / "channels").exists()


def test_peak_memory_does_not_hold_the_images(tmp_path):
    # 270 further images of 65,792 bytes are 18 MB; the noise of an allocator is a fraction of that.
    sizes = ["--images", 30, "--shard-images", 5, "--batch", 4]
    build, epoch = _run("memory", "--folder", tmp_path, *sizes, "--jobs", "build", "epoch")
    assert (build["name"], epoch["name"]) == ("memory_build", "memory_epoch")
    for line in (build, epoch):
        assert line["images"] == [30, 300]
        assert line["growth_bytes_per_image"] < 0.75 * line["activation_bytes_per_image"]


def test_memory_is_measured_of_verbs_that_read_one_store_or_two(tmp_path):
    jobs = ["features", "joined_features"]
    lines = _run("memory", "--folder", tmp_path, "--read-images", 24, "--shard-images", 5, "--jobs", *jobs)
    assert [line["name"] for line in lines] == [f"memory_{job}" for job in jobs]
    assert all(line["images"] == [24, 240] and min(line["peak_mb"]) > 50 for line in lines)
    # 17 tokens of 64 numbers, each of two bytes.
    assert all(line["activation_bytes_per_image"] == 17 * 64 * 2 for line in lines)
    assert not list(tmp_path.iterdir())


def test_every_verb_whose_memory_is_measured_runs_on_the_stores_made_for_it(tmp_path, capsys):
    memory.write_workspace(tmp_path, 192, 20)
    for job in memory.READERS:
        memory.run_verb(tmp_path, job, 96)
    printed = capsys.readouterr().out
    assert "probes of 4 labels on 96 images of " in printed
    assert "monosemanticity: median" in printed
    assert f"stability against {tmp_path / 'other.pt'}" in printed
    results = tmp_path / "out" / "feature_data" / "sae_sae" / "custom"
    for dataset in ("whole", "one+two"):
        page = results / dataset / "report" / "data"
        assert len(list((page / "latents").iterdir())) == 16
        (latent, *_) = (page / "latents").iterdir()
        assert all(f"site {number}" in latent.read_text() for number in range(3))


SMALL_STEP = ["--d-in", 16, "--latents", 64, "--tokens", 40, "--rounds", 1]


def test_train_step_prints_time_and_memory_for_every_density():
    lines = _run("train_step", *SMALL_STEP, "--density", 0.5, "--density", 0.05, "--precision", "fp32")
    assert [(line["name"], line["density"]) for line in lines] == [
        (name, density) for density in (0.5, 0.05) for name in ("train_step", "limit", "memory")
    ]
    for line in lines:
        assert line["ratio" if line["name"] != "limit" else "limit_share"] > 0
        assert (line["d_in"], line["latents"], line["tokens"], line["precision"]) == (16, 64, 40, "fp32")
    assert all(line["fp32_gflops"] >= 0 and line["limit_s"] >= 0 for line in lines[1::3])
    assert all(line["baseline_bytes"] > 0 and line["ours_bytes"] > 0 for line in lines[2::3])


def test_train_step_takes_every_architecture():
    lines = _run("train_step", *SMALL_STEP, "--arch", "ALL", "--density", 0.05, "--no-memory", "--k", 4)
    found = [(line["arch"], line["name"]) for line in lines]
    assert found == [(arch, name) for arch in ARCHITECTURES for name in ("train_step", "limit")]


def test_the_limit_counts_the_encoder_once_and_the_rest_by_density():
    options = argparse.Namespace(d_in=16, latents=64, tokens=40)
    encoder = 2 * 40 * 16 * 64
    assert train_step.operations(options, "relu", 0.5) == encoder * 5
    assert train_step.operations(options, "topk", 0.125) == encoder * 1.5
    assert train_step.operations(options, "gated", 0.125) == encoder * 1.75


def test_features_are_compared_with_products_and_a_plain_pass():
    lines = _run("features", "--arch", "relu", "topk", "--images", 4, "--d-in", 16, "--latents", 64, "--k", 4,
                 "--rounds", 1)  # fmt: skip
    kinds = [("product", "float32"), ("product", "bfloat16"), ("plain", None)]
    assert [(line["arch"], line["against"], line.get("dtype")) for line in lines] == [
        (arch, *kind) for arch in ("relu", "topk") for kind in kinds
    ]
    assert all(line["name"] == "features" and line["ratio"] > 0 for line in lines)


def test_null_tests_print_level_and_power():
    cases = ("repeated_samples", "unequal_cells", "three_groups", "confounded")
    lines = _run("null_tests", "--latents", 60, "--repeats", 2, "--only", *cases)
    assert {line["case"] for line in lines} == set(cases)
    assert {line["unit"] for line in lines} == {"samples", "persons", "persons, equal cells"}
    assert all(line["name"] == "null_tests" and 0 <= line["below_0.05"] <= 1 for line in lines)
    assert all(("power_q" in line) == (len(line["persons"]) == 2) for line in lines)
    confounded = [line for line in lines if line["case"] == "confounded"]
    assert {(line["test"], line["within"]) for line in confounded} == {
        ("mann-whitney", ""), ("mann-whitney", "sites"), ("linear model", ""), ("permutation", "sites"),
    }  # fmt: skip
    lines = _run("null_tests", "--latents", 20, "--repeats", 2, "--shuffles", 5, "--only", "classification")
    assert [line["persons"] for line in lines] == [[3, 3], [5, 5], [10, 10], [25, 25]]
    assert all(line["lowest"] <= line["highest"] for line in lines)


def test_train_step_compares_no_products_that_are_always_sparse():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--crossover", "--arch", "relu", "topk"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == "--crossover is for relu, jumprelu, gated: products of topk are always sparse"


def test_train_step_compares_dense_and_sparse_products():
    lines = _run("train_step", *SMALL_STEP, "--crossover", "--arch", "ALL", "--density", 0.3, "--density", 0.1)
    assert [(line["name"], line["arch"], line["density"]) for line in lines] == [
        ("crossover", arch, density) for arch in ("relu", "jumprelu", "gated") for density in (0.3, 0.1)
    ]


def test_the_benchmarks_densities_are_those_asked_for():
    options = argparse.Namespace(d_in=32, latents=256, tokens=200, ghost_share=0.25, k=8)
    cpu = torch.device("cpu")
    x = train_step.make_batch(options, cpu)
    for density in (0.5, 0.1, 0.01):
        for matmul in (None, MatmulConfig()):
            step = train_step.make_step(options, cpu, "relu", density, matmul)
            for _ in range(2):
                train_step.run_steps(step, x)
            acts = step.sae.encode(x)
            assert (acts > 0).float().mean().item() == pytest.approx(density, rel=0.25)
            if matmul is not None:
                assert step.step(x).terms.ghost > 0


@pytest.mark.slow
def test_end_to_end_takes_known_encoders_with_random_weights():
    (line,) = _run("end_to_end", "--images", 2, "--epochs", 1, "--expansion", 2, "--encoder", "dino_vitt16")
    assert (line["model"], line["images"]) == ("dino_vitt16", 2)


@pytest.mark.slow
def test_end_to_end_times_every_stage():
    (line,) = _run("end_to_end", "--images", 24, "--epochs", 1, "--expansion", 2)
    assert line["name"] == "end_to_end"
    assert line["ratio"] > 0
    assert set(line["stages_s"]) == {"build", "train", "features", "patients"}
    assert line["images"] == 24


@pytest.mark.slow
def test_sweep_times_both_ways():
    sizes = ["--runs", 2, "--images", 8, "--d-model", 8, "--epochs", 1, "--codecs", "zstd"]
    (line,) = _run("sweep", *sizes)
    assert (line["name"], line["runs"], line["codec"]) == ("sweep", 2, "zstd")
    assert line["ratio"] > 0


def test_report_measures_memory_and_size():
    lines = _run("report", "--images", 12, 40, "--latents", 64, "--d-model", 8, "--pages", 5)
    assert [line["images"] for line in lines] == [12, 40]
    assert lines[0]["ratio"] == 1
    assert all(line["peak_mb"] > 50 and line["page_mb"] > 0.05 for line in lines)
    assert lines[1]["image_pages"] <= 40


def test_scale_prints_the_cost_of_every_stage(tmp_path):
    stages = ["start", "list", "create", "fill", "open", "batch", "order", "epoch", "verify", "train", "features"]
    lines = _run("scale", "--folder", tmp_path, "--images", 1500, "--shard-images", 100, "--stages", *stages)
    assert [line["name"] for line in lines] == stages
    requests = {line.pop("name"): line for line in _run("scale", "--requests", "--images", 300, "--shard-images", 3)}
    assert requests["open"] == {"images": 300, "shards": 100, "HEAD": 1, "GET": 2}
    assert requests["read_again"]["GET"] == 256
    assert all(line["images"] == 1500 and line["shards"] == 15 for line in lines)
    assert all(line["cpu_s"] > 0 and line["peak_mb"] > 0 for line in lines)
    assert [
        line["name"]
        for line in _run("scale", "--folder", tmp_path, "--images", 9, "--most-files", 8, "--stages", "list")
    ] == []
