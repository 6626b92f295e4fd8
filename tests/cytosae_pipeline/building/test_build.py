"""Stage one through the command line: the store holds what the network gives, whatever happens on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.images import decode_image, to_tensor
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from tests.support.patience import patience, wait_until
from tests.support.pictures import BROKEN, HEARING_MAIN, LAYOUT, write_pictures, write_vit


def test_the_store_holds_the_networks_activations(with_images):
    with_images.build()
    store = ActivationStore.open(with_images.store)
    paths = store.images.path
    assert paths == sorted(paths, key=str.encode)
    assert len(paths) == 23
    bad = paths.index(BROKEN)
    assert store.valid.tolist() == [row != bad for row in range(23)]
    backbone = load_backbone(with_images.vit, describe_backbone(with_images.vit, name=None, block=-2))
    with StoreReader(store) as reader:
        activations = reader.read(np.arange(23))
    assert np.isnan(activations[bad]).all()
    for row in store.valid_rows:
        pixels = decode_image((with_images.images / paths[row]).read_bytes())
        with torch.inference_mode():
            expected = backbone(to_tensor(pixels[None]))[0]
        torch.testing.assert_close(torch.from_numpy(activations[row]).float(), expected, rtol=2e-3, atol=2e-3)


def test_labels_patients_and_provenance(with_store):
    store = ActivationStore.open(with_store.store)
    for path, label, patient in zip(*store.images, strict=True):
        assert path.split("/")[:2] == [label, patient]
    facts = json.loads(with_store.run("info", "--dataset_name", "toy", "--json").stdout)
    assert facts["dataset"] == "toy"
    assert facts["complete"] is True
    assert facts["spec"]["model_name"] == "toy_vit"
    assert facts["spec"]["block"] == 2
    assert facts["n_skipped"] == 1
    assert "weights_sha256" in with_store.run("info", with_store.store).output


def test_unreadable_images_are_listed_with_reasons(with_store):
    path = with_store.store.with_name(f"{with_store.store.name}.skipped.csv")
    with path.open(newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert row["path"] == BROKEN
    assert row["reason"]
    assert "set aside as unreadable: 1 (1 " in with_store.build().output


def test_a_second_build_returns_at_once_and_says_so(with_store):
    before = {path: path.stat().st_mtime_ns for path in with_store.store.rglob("*")}
    result = with_store.build()
    assert "already complete" in result.output
    assert {path: path.stat().st_mtime_ns for path in with_store.store.rglob("*")} == before


def test_json_is_all_there_is_on_stdout(with_store):
    result = json.loads(with_store.build("--json").stdout)
    assert result["status"] == "already complete"
    assert result["n_images"] == 23


def _snapshot(path):
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


def test_workers_do_not_change_a_byte(with_images, with_store, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with_images.build("--workers", 2)
    with_store.build("--overwrite")
    assert _snapshot(with_images.store) == _snapshot(with_store.store)


def _marks(place) -> list[Path]:
    return list(place.root.glob("out/activations/toy/*.zarr/progress/*.json"))


@pytest.mark.slow
def test_killed_builds_resume_to_the_same_bytes(with_images, with_store, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with_store.build("--overwrite", "--shard_images", 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"]), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable, "-c", "from cytosae_pipeline.cli.app import main; main()", "build", "--dataset_name", "toy",
        "--root_dir", str(with_images.root), "--model_path", str(with_images.vit), "--workers", "1",
        "--shard_images", "2", "--layout", LAYOUT,
    ]  # fmt: skip
    progress = [2, 5, 9]
    for wanted in progress:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda child=child, wanted=wanted: len(_marks(with_images)) >= wanted or child.poll() is not None)
        child.send_signal(signal.SIGKILL)
        child.wait()
    result = with_images.build("--shard_images", 2)
    assert "store (resumed)" in result.output or "already complete" in result.output
    assert _snapshot(with_images.store) == _snapshot(with_store.store)


def test_ctrl_c_keeps_finished_work_and_says_how_to_resume(with_images):
    write_pictures(with_images.images, 400)  # enough work that the signal comes in the middle
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    command = [
        sys.executable, "-c", HEARING_MAIN, "build", "--dataset_name", "toy", "--root_dir", str(with_images.root),
        "--model_path", str(with_images.vit), "--workers", "1", "--shard_images", "1", "--layout", LAYOUT,
    ]  # fmt: skip
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: _marks(with_images) or child.poll() is not None)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=patience())
    assert child.returncode == 130, output
    assert "Traceback" not in output
    assert "interrupted" in output
    assert "cytosae-cache build --dataset_name toy" in output
    with_images.build("--shard_images", 1)


def test_dry_run_says_what_would_be_done_and_writes_nothing(with_images):
    output = with_images.build("--dry-run").output
    assert "23 images (3 labels, 4 patients; layout class/patient)" in output
    assert "for example 'blast/p0/000.png': label 'blast', patient 'p0'" in output
    assert "5 tokens x 24" in output
    assert "free)" in output
    assert not (with_images.root / "out").exists()
    facts = json.loads(with_images.build("--dry-run", "--json").stdout)
    assert facts["images"] == 23
    assert facts["bytes"] == 23 * 5 * 24 * 2


def test_strict_images_stops_at_the_first_broken_one(with_images):
    assert f"image '{BROKEN}' cannot be read" in with_images.build("--strict-images", code=1).output
    (with_images.images / BROKEN).unlink()
    assert "was made from 23 images" in with_images.build(code=1).output
    with_images.build("--overwrite", "--strict-images")


def test_a_changed_list_of_images_is_never_taken_for_the_same(with_store):
    (with_store.images / BROKEN).unlink()
    output = with_store.build(code=1).output
    assert "images, labels, patients or further columns changed" in output
    assert "--overwrite" in output


def test_other_weights_make_another_store(with_store):
    first = with_store.store
    write_vit(with_store.vit, seed=1)
    with_store.build()
    stores = list(first.parent.glob("*.zarr"))
    assert len(stores) == 2


def test_an_unfinished_store_resumes_only_with_the_same_options(with_images):
    with_images.build("--strict-images", code=1)
    output = with_images.build("--shard_images", 7, code=1).output
    assert "started with --shard_images 5" in output


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_and_float32_stores(with_images, compression):
    with_images.build("--compression", compression, "--store_dtype", "float32")
    assert "sound" in with_images.run("verify", "--dataset_name", "toy").output


def test_bf16_is_another_spec(with_store):
    with_store.build("--precision", "bf16")
    stores = [ActivationStore.open(path) for path in with_store.root.glob("out/activations/toy/*.zarr")]
    assert {store.spec.precision for store in stores} == {"fp32", "bf16"}
    both = []
    for store in stores:
        with StoreReader(store) as reader:
            both.append(reader.read(store.valid_rows).astype(np.float32))
    assert np.abs(both[0] - both[1]).max() < 0.02 * np.abs(both[0]).max()
    assert not np.array_equal(both[0], both[1])


def test_limit_spreads_over_the_list(with_images):
    with_images.build("--limit", 6)
    store = ActivationStore.open(with_images.store)
    assert store.n_images == 6
    assert set(store.images.label) == {"blast", "lymphocyte", "neutrophil"}


def test_a_csv_manifest(with_images):
    rows = "path,label,patient\nblast/p0/000.png,A,x\nlymphocyte/p1/001.png,B,\ngone.png,B,y\n"
    (with_images.images / "manifest.csv").write_text(rows)
    with_images.build()
    store = ActivationStore.open(with_images.store)
    assert store.images.label == ["A", "B", "B"]
    assert store.images.patient == ["x", "y", ""]
    assert store.column("images/reason").tolist() == ["", "file not found", ""]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--model_path", "nowhere.pth"], "no vision transformer at 'nowhere.pth'", 1),
        (["--images", "nowhere"], "no images at 'nowhere'", 1),
        (["--block_layer", "9"], "has 4 blocks: -4 to 3", 1),
        (["--dataset_name", "../up"], "cannot be the name of a folder", 1),
        (["--batch_size", "0"], "batch_size must be at least 1", 2),
        (["--device", "cuda"], "--device cuda was given", 1),
    ],
)
def test_every_mistake_is_one_message(with_images, arguments, message, code):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    output = with_images.build(*arguments, code=code).output
    assert message in output
    assert "Traceback" not in output


def test_missing_options_are_reported(with_images):
    assert (
        "build needs the vision transformer's checkpoint"
        in with_images.run("build", "--dataset_name", "toy", code=1).output
    )
    assert "name the data set" in with_images.run("build", "--model_path", with_images.vit, code=1).output


def test_too_little_disk_is_reported_before_anything_is_written(with_images, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    output = with_images.build(code=1).output
    assert "only 10 bytes are free" in output
    assert not list(with_images.root.glob("out/activations/toy/*.zarr"))


def test_a_half_size_store_serves_every_verb(with_images):
    place = with_images
    place.build("--store_dtype", "int8", "--compression", "zstd")
    store = ActivationStore.open(place.store)
    assert store.spec.store_dtype == "int8"
    assert "sound" in place.run("verify", place.store).output
    arguments = ("--deep", "--model_path", place.vit, "--images", place.images)
    assert "sound" in place.run("verify", place.store, *arguments).output
    place.train("--run_name", "r")
    place.run("features", "--dataset_name", "toy", "--sae_path", place.sae("r"))
    halves = store[store.valid_rows]
    place.build("--store", place.root / "whole.zarr")
    whole = ActivationStore.open(place.root / "whole.zarr")[store.valid_rows]
    np.testing.assert_allclose(halves, whole, atol=0.03 * float(np.abs(whole).max()))
    place.run("features", "--store", place.root / "whole.zarr", "--sae_path", place.sae("r"))


def test_shards_that_do_not_fit_into_memory_are_refused_before_anything_is_written(with_images, monkeypatch):
    from cytosae_pipeline.building import plan

    monkeypatch.setattr(plan, "available_ram", lambda: 100_000)
    output = with_images.build("--shard_images", 10**9, "--batch_size", 10**9, code=1).output
    assert "building shards of 23 images in batches of 23 needs at least" in output
    assert "Lower --shard_images or --batch_size" in output
    assert not list((with_images.root / "out" / "activations").rglob("*.zarr"))
    monkeypatch.setattr(plan, "available_ram", lambda: 30_000_000)
    with_images.build("--shard_images", 10**9, "--batch_size", 10**9)
