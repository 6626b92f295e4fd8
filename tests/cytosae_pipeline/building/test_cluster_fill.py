"""A store built by the workers of a cluster: the bytes are those of one process, also if a worker is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from cytosae_cache.format.shard import shard_name
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.cluster_fill import fill_on_cluster
from tests.support import cluster as there
from tests.support.pictures import BROKEN, LAYOUT

KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from cytosae_cache import writer

real = writer.write_mark

def killing(storage, shard, *arguments, **options):
    if shard == 3:
        try:
            Path(os.environ["KILLED"]).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    real(storage, shard, *arguments, **options)

writer.write_mark = killing
from distributed.cli.dask_worker import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _same_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def _files(location) -> dict[str, bytes]:
    storage = open_storage(location)
    return {name: storage.read(name) for name in storage.names(with_litter=True)}


def test_local_workers_build_the_store_of_one_process(with_images, tmp_path, monkeypatch):
    monkeypatch.chdir(with_images.root)
    result = json.loads(with_images.build("--dask", "local:2", "--batch_size", 2, "--json").stdout)
    assert (result["status"], result["n_skipped"], result["n_missing_shards"]) == ("built", 1, 0)
    assert BROKEN in (with_images.store.parent / f"{with_images.store.name}.skipped.csv").read_text()
    with_images.build("--store", tmp_path / "whole.zarr", "--batch_size", 2)
    assert _files(with_images.store) == _files(tmp_path / "whole.zarr")
    assert "already complete" in with_images.build("--dask", "local:1").output


def test_workers_elsewhere_one_of_them_killed_build_the_store_of_one_process(with_images, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(with_images.root)
    options = ["--store_dtype", "int8", "--shard_images", 3, "--block_layer", -2, "--block_layer", 0]
    with there.scheduler(tmp_path) as (_, file):
        words = ["--scheduler-file", file, "--no-nanny", "--nthreads", 1, "--no-dashboard", "--death-timeout", 20]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", KILLED_ONCE, *map(str, words), "--name", str(number)], env=environment,
                cwd=tmp_path / "elsewhere", stderr=subprocess.DEVNULL,
            )
            for number in range(2)
        ]  # fmt: skip
        try:
            output = with_images.run_plain(
                "build", "--root_dir", ".", "--dataset_name", "toy", "--model_path", "vit.pth", "--layout", LAYOUT,
                "--workers", 0, *options, "--dask", file, "--json",
            )  # fmt: skip
            codes = sorted(worker.poll() or 0 for worker in workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert codes == [-signal.SIGKILL, 0]
    stores = [item["store"] for item in json.loads(output.stdout)["stores"]]
    shutil.move(with_images.root / "out", tmp_path / "by_workers")
    with_images.build(*options)
    for store in stores:
        name = ActivationStore(store).path.relative_to("out")
        assert _files(tmp_path / "by_workers" / name) == _files(with_images.root / "out" / name)


def test_an_image_that_stops_the_build_stops_it_on_a_cluster(with_images):
    output = with_images.build("--dask", "local:1", "--strict-images", code=1).output
    assert f"Error: image '{BROKEN}' cannot be read" in output
    assert not ActivationStore(with_images.store).complete
    with_images.build("--dask", "local:1")
    assert ActivationStore(with_images.store).complete


def test_what_is_on_disk_is_told_and_kept(with_images, capfd):
    with_images.build("--shards", "1/2", "--batch_size", 2)
    before = {path: path.stat().st_mtime_ns for path in with_images.store.glob("activations/c/*/0/0")}
    assert len(before) == 2
    capfd.readouterr()
    output = with_images.build("--dask", "local:1", "--batch_size", 2).output
    assert "resuming after 10 images on disk (2 of 5 shards), which the workers verify" in output
    assert "build: 23 of 23 images" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "resuming" not in with_images.build("--dask", "local:1", "--batch_size", 2).output


def test_a_cluster_does_not_overwrite(with_images):
    output = with_images.build("--dask", "local:2", "--overwrite", code=2).output
    assert "dask has several processes fill the same store, which overwrite would delete" in output


def test_a_plan_needs_no_cluster(with_images):
    assert "nothing was written" in with_images.build("--dask", "tcp://127.0.0.1:1", "--dry-run").output


@pytest.mark.parametrize("option", ["--images", "--model_path"])
def test_a_mistyped_name_is_reported_before_a_cluster_is_asked(with_images, monkeypatch, option):
    monkeypatch.setattr("cytosae_pipeline.building.build.connect", lambda where: pytest.fail("it was asked"))
    path = with_images.root / "absent.pth"
    arguments = {"--images": with_images.images, "--model_path": with_images.vit, option: path}
    output = with_images.run(
        "build", "--dataset_name", "toy", *[part for pair in arguments.items() for part in pair], "--dask", "local:1",
        "--layout", LAYOUT, code=1,
    ).output  # fmt: skip
    assert str(path) in output


def test_a_shard_that_was_damaged_meanwhile_is_left_to_another_build(with_images, monkeypatch):
    def fill_and_damage(client, stores, *arguments):
        fill_on_cluster(client, stores, *arguments)
        path = stores[0].path / shard_name(1)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr("cytosae_pipeline.building.build.fill_on_cluster", fill_and_damage)
    output = with_images.build("--dask", "local:1", "--shard_images", 3).output
    assert f"wrote its shards of store '{with_images.store}'" in output
    assert "1 shard is missing: files were damaged or removed meanwhile. Run the same command again" in output
    monkeypatch.undo()
    with_images.build("--dask", "local:1", "--shard_images", 3)
    assert ActivationStore(with_images.store).complete
