"""A store that a verb needs is built on the cluster that the verb uses."""

import shutil

import pytest

from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building import build
from tests.support import cluster as there
from tests.support.pictures import LAYOUT
from tests.support.stores import read_files


@pytest.fixture(scope="module")
def address():
    with there.local_cluster() as address:
        yield address


@pytest.fixture
def options(with_sae, monkeypatch):
    """Options of a verb that builds the store first; the store was removed."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    source = ["--images", with_sae.images, "--layout", LAYOUT, "--model_path", with_sae.vit]
    shutil.rmtree(with_sae.store)
    return ["--dataset_name", "toy", "--sae_path", with_sae.sae(), *source]


def test_the_workers_build_the_store_and_compute(with_sae, address, options, monkeypatch):
    with_sae.run("features", *options)
    alone = read_files(with_sae.store), read_files(with_sae.features())
    shutil.rmtree(with_sae.store)
    shutil.rmtree(with_sae.features())
    monkeypatch.setattr(build, "fill_range", lambda *arguments: pytest.fail("this process computed"))
    output = with_sae.run("features", *options, "--dask", address).output
    assert "building it first" in output
    assert (read_files(with_sae.store), read_files(with_sae.features())) == alone


def test_a_shard_that_was_damaged_meanwhile_is_an_error(with_sae, address, options, monkeypatch):
    fill = build.fill_on_cluster

    def fill_and_damage(client, stores, *arguments):
        fill(client, stores, *arguments)
        path = stores[0].path / shard_name(0)
        path.write_bytes(path.read_bytes()[:-1])

    monkeypatch.setattr(build, "fill_on_cluster", fill_and_damage)
    output = with_sae.run("features", *options, "--dask", address, code=1).output
    assert f"store '{with_sae.store}' is unfinished" in output
    assert "Finish it with the options that its build was given: cytosae-cache build" in output
    monkeypatch.undo()
    assert "finishing it first" in with_sae.run("features", *options, "--dask", address).output
    assert ActivationStore(with_sae.store).complete
