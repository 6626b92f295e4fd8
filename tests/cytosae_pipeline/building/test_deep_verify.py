"""`verify --deep` on a real cluster finds what one process finds, whatever happens to the workers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from cytosae_cache.creation import create_store
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.shard_data import ShardData
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building import deep_verify
from cytosae_pipeline.building.originals import Originals, SharedOriginals, describe_own_backbone
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.listing import list_images_of
from cytosae_pipeline.runtime.cluster import ClusterError, connect
from tests.support import cluster as there
from tests.support.pictures import write_vit

DEEP = ("verify", "--dataset_name", "toy", "--deep", "--json")


@pytest.fixture(scope="module")
def address():
    with there.local_cluster() as address:
        yield address


def spoil(place) -> None:
    """Numbers that the network does not give, an image that changed, and one that vanished; all checksums are right."""
    store = ActivationStore.open(place.store)
    with StoreReader(store) as reader:
        activations = reader.read(np.arange(store.n_images))
    activations[::3] *= np.float16(1.1)
    digests, reasons = store.column("images/sha256"), store.column("images/reason")
    table, provenance, spec = store.images, store.provenance, store.spec
    shutil.rmtree(store.path)
    faulty = create_store(store.path, spec, table, provenance, shard_images=5)
    with StoreWriter(faulty) as writer:
        for shard in range(faulty.n_shards):
            rows = [*faulty.shard_rows(shard)]
            sources = [bytes(digests[row]) for row in rows], [str(reasons[row]) for row in rows]
            writer.submit(ShardData(shard, activations[rows], *sources))
        writer.finish()
    (place.images / "blast/p0/000.png").write_bytes((place.images / "blast/p2/006.png").read_bytes())
    (place.images / "blast/p1/009.png").unlink()


def verify(place, *more, code=0):
    return json.loads(place.run(*DEEP, *more, code=code).stdout)


def test_a_cluster_finds_what_one_process_finds(with_store, address, monkeypatch):
    monkeypatch.chdir(with_store.root)  # workers run in another folder
    path = ("--model_path", "vit.pth", "--images", "dataset/toy")
    alone = verify(with_store, *path)
    assert alone["sound"] is True
    assert verify(with_store, *path, "--dask", address) == alone
    spoil(with_store)
    alone = verify(with_store, *path, code=1)
    assert sum("differ from recomputed" in text for text in alone["problems"]) > 3
    assert sum("changed since" in text for text in alone["problems"]) == 1
    assert sum("can no longer be read: file not found" in text for text in alone["problems"]) == 1
    assert verify(with_store, *path, "--dask", address, code=1) == alone


@pytest.mark.parametrize("moment", [1, 6])
def test_a_worker_killed_in_the_middle_changes_nothing(with_store, address, monkeypatch, moment):
    spoil(with_store)
    alone = verify(with_store, code=1)
    done, run = [], deep_verify.map_ranges

    def map_ranges(client, function, ranges, merge, on_done, **options):
        def and_kill(part):
            on_done(part)
            done.append(part)
            if len(done) == moment:
                there.kill_one_worker(address)

        return run(client, function, ranges, merge, and_kill, **options)

    monkeypatch.setattr(deep_verify, "map_ranges", map_ranges)
    assert verify(with_store, "--dask", address, code=1) == alone
    assert len(done) == 5 + 2, "the shards, and two batches of recomputed images"


def test_nothing_is_started_before_images_and_checkpoint_are_there(with_store, monkeypatch):
    monkeypatch.setattr(deep_verify, "verify_files", lambda store, dask: deep_verify.VerifyReport())
    monkeypatch.setattr(deep_verify, "connect", lambda where: pytest.fail("it was asked"))
    options = ("--dask", "local:2", "--images", with_store.root / "absent")
    assert "no images at" in with_store.run(*DEEP, *options, code=1).output


def test_what_a_worker_does_not_find_is_named(with_store):
    store = ActivationStore.open(with_store.store)
    info = describe_own_backbone(store, with_store.vit, None)
    originals = Originals(store, list_images_of(store, with_store.images), with_store.vit, info, "cpu")
    assert SharedOriginals.of(originals, with_store.images, None).open().info == info
    with pytest.raises(ClusterError, match=r"the worker on \S+ finds no images at '.*/elsewhere'\. Put it on a disk"):
        SharedOriginals.of(originals, with_store.root / "elsewhere", None).open()
    moved = with_store.vit.rename(with_store.root / "moved.pth")
    with pytest.raises(ClusterError, match=r"the worker on \S+ finds no checkpoint at '.*vit.pth'"):
        SharedOriginals.of(replace(originals, device="auto"), with_store.images, None).open()
    moved.unlink()
    write_vit(with_store.vit, seed=1)
    with pytest.raises(UserError, match="is not what store"):
        SharedOriginals.of(replace(originals, device="auto"), with_store.images, None).open()


@pytest.mark.slow
def test_images_that_end_every_worker_are_named(tmp_path):
    with connect("local:1") as client:
        with pytest.raises(ClusterError, match=r"4 workers died one after another in the same work: rows 2 to 4\."):
            deep_verify.map_ranges(client, there.kill_worker, [range(2, 5)], there.join, unit="rows")
