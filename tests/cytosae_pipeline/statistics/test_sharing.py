"""Statistics on real clusters are those of one process, to the last bit, whatever happens to the workers."""

import dataclasses
import multiprocessing
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import cytosae_cache
import cytosae_pipeline
from cytosae.formats.checkpoint import save_sae
from cytosae.sae.registry import make_sae
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.cluster import ClusterError
from cytosae_pipeline.statistics import collecting, masking
from cytosae_pipeline.statistics.collecting import Asked, collect
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.masking import run_masking
from cytosae_pipeline.statistics.sharing import share
from cytosae_pipeline.statistics.some_rows import count_rows
from tests.support import cluster as there
from tests.support.stores import make_activations, make_spec, make_store, read_files

ALL = Asked(features=True, counts=("patient", "label"), profiles=True)


@pytest.fixture(scope="module")
def address():
    with there.local_cluster() as address:
        yield address


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store of 61 images in shards of 5, and autoencoders of its width."""
    folder = tmp_path_factory.mktemp("place")
    spec = make_spec(grid=(4, 4))
    make_store(folder / "s.zarr", make_activations(61, spec), spec=spec, shard_images=5, invalid=[9, 30])
    for arch in ("relu", "batchtopk"):
        save_sae(folder / f"{arch}.pt", make_sae(arch, spec.d_model, 48, **({"k": 3} if arch != "relu" else {})), {})
    return folder


def config_of(place, arch="relu", **more):
    return StatisticsConfig(
        root_dir=place, store=str(place / "s.zarr"), sae_path=place / f"{arch}.pt", threshold=(0.1, 0.5), top_k=4,
        **more,
    )  # fmt: skip


def tensors(states):
    """All numbers in the states of a pass."""
    for state in states:
        for name, value in sorted(vars(state).items()):
            if isinstance(value, torch.Tensor):
                yield name, value
            elif hasattr(value, "__dict__"):
                yield from tensors([value])
            else:
                yield name, torch.tensor(value)


def assert_same(found, expected):
    found, expected = list(tensors(found.states)), list(tensors(expected.states))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert len(found) > 15
    for (name, one), (_, other) in zip(found, expected, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("arch", "batch_size"), [("relu", 64), ("relu", 3), ("batchtopk", 16)])
def test_everything_is_equal_to_one_pass_to_the_last_bit(place, address, arch, batch_size):
    alone = config_of(place, arch)
    expected = collect(open_inputs(alone), alone, ALL, what="test")
    shared = config_of(place, arch, batch_size=batch_size, dask=address)
    assert_same(collect(open_inputs(shared), shared, ALL, what="test"), expected)


def sabotage(monkeypatch, address):
    """Kill a worker as soon as the first range is finished; tells how many ranges were finished."""
    done, run = [], collecting.map_ranges

    def map_ranges(client, function, ranges, merge, on_done):
        def and_kill(part):
            on_done(part)
            done.append(part)
            if len(done) == 1:
                there.kill_one_worker(address)

        return run(client, function, ranges, merge, and_kill)

    monkeypatch.setattr(collecting, "map_ranges", map_ranges)
    return done


def test_a_worker_killed_in_the_middle_changes_nothing(place, address, monkeypatch):
    alone = config_of(place)
    expected = collect(open_inputs(alone), alone, ALL, what="test")
    shared = config_of(place, dask=address)
    done = sabotage(monkeypatch, address)
    assert_same(collect(open_inputs(shared), shared, ALL, what="test"), expected)
    assert len(done) == 13


def test_the_verbs_write_the_same_files(with_sae, address):
    found = []
    for more in ([], ["--dask", address]):
        for verb, kind in (("features", []), ("classes", []), ("patients", ["--threshold", 0.1, "--threshold", 0.4])):
            with_sae.run(verb, "--dataset_name", "toy", "--sae_path", with_sae.sae(), *kind, *more)
        found.append(read_files(with_sae.features()))
        shutil.rmtree(with_sae.features())
    assert found[0] == found[1]


def test_an_export_has_the_same_lines(with_sae, address):
    written = []
    for name, more in (("alone", []), ("shared", ["--dask", address])):
        out = with_sae.root / name
        options = ["--dataset_name", "toy", "--sae_path", with_sae.sae(), "--format", "csv", "--out", out]
        with_sae.run("export", *options, "--vit_type", name, *more)
        written.append(read_files(out))
    assert written[0] == written[1]
    assert len(written[0]["table_images.csv"].splitlines()) > 100


def test_counts_of_a_sample_are_the_same(place, address):
    rows, threshold = np.arange(3, 60, 2), 0.1
    groups, found = rows % 3, []
    for more in ({}, {"dask": address}):
        config = config_of(place, batch_size=4, **more)
        found.append(count_rows(open_inputs(config), config, rows, groups, 3, threshold))
    np.testing.assert_array_equal(*found)
    assert found[0].any(axis=1).all()


@pytest.mark.parametrize("computed", [True, False])
def test_a_report_has_the_same_pages(with_sae, address, computed):
    pages = []
    for name, more in (("alone", []), ("shared", ["--dask", address])):
        options = ["--dataset_name", "toy", "--sae_path", with_sae.sae(), "--vit_type", name]
        if computed:  # otherwise their pass collects what the pages of latents need
            with_sae.run("features", *options)
        with_sae.run("report", *options, "--out", with_sae.root / name, *more)
        found = read_files(with_sae.root / name / "data")
        pages.append({name: data for name, data in found.items() if name != "overview.js"})
        overview = found["overview.js"].decode()
        pages[-1]["masking"] = overview[overview.index('"masking"') :][:3000].encode()
    kinds = Counter(name.partition("/")[0] for name in pages[0])
    assert min(kinds[kind] for kind in ("latents", "images", "mapped", "map.js", "masking")) > 0
    assert sum(kinds.values()) > 20
    assert pages[0] == pages[1]


@pytest.mark.parametrize("arch", ["relu", "batchtopk"])
def test_parts_of_an_experiment_are_taken_in_order_also_after_a_worker_died(place, address, monkeypatch, arch):
    alone, shared = (config_of(place, arch, batch_size=8, **more) for more in ({}, {"dask": address}))
    expected = run_masking(open_inputs(alone, encoder_only=False), alone)
    encoded, real = [], masking.ClassScores.update

    def update(self, scores, labels):
        if not encoded:
            there.kill_one_worker(address)
        encoded.append(scores)
        real(self, scores, labels)

    monkeypatch.setattr(masking.ClassScores, "update", update)
    found = run_masking(open_inputs(shared, encoder_only=False), shared)
    assert len(encoded) > 2
    assert found.to_json() == expected.to_json()


def test_local_workers_are_started_and_end(with_sae):
    files, before = [], set(multiprocessing.active_children())
    for more in ([], ["--dask", "local:2"]):
        with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), *more)
        files.append(read_files(with_sae.features()))
        shutil.rmtree(with_sae.features())
    assert files[0] == files[1]
    assert set(multiprocessing.active_children()) <= before


def test_an_error_on_a_worker_is_one_message(with_sae, address):
    shard = with_sae.store / "activations/c/1/0/0"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    output = with_sae.run(
        "features", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--dask", address, code=1
    ).output
    assert "fails its checksum: its bytes changed on disk" in output
    assert "Traceback" not in output
    assert not with_sae.features().exists() or not list(with_sae.features().glob("*.pt"))


def test_an_autoencoder_in_memory_is_refused(place):
    store = cytosae_cache.open(place / "s.zarr")
    sae = make_sae("relu", store.d_model, 16)
    with pytest.raises(UserError, match="--dask needs an autoencoder in a file, which workers read, found one in mem"):
        cytosae_pipeline.feature_stats(sae, store, dask="local:2")


def test_another_store_or_autoencoder_at_the_same_place_is_refused(place, tmp_path):
    options = config_of(place)
    inputs = open_inputs(options)
    shared = share(inputs, "cpu")
    assert torch.equal(shared.open().sae.W_enc, inputs.sae.W_enc)
    with torch.no_grad():
        inputs.sae.b_enc[0] += 1
    with pytest.raises(ClusterError, match=r"the autoencoder that the worker on .* is another one than here, or was"):
        share(inputs, "cpu").open()
    with pytest.raises(ClusterError, match=r"the store that the worker on .* finds at .*s.zarr' is another one"):
        dataclasses.replace(shared.store, contents="0" * 64).open()


def test_what_a_worker_does_not_find_is_named(place, tmp_path):
    shared = share(open_inputs(config_of(place)), "cpu")
    with pytest.raises(
        ClusterError, match=r"the worker on \S+ finds no store at '/nowhere.zarr'. Put it on a disk that"
    ):
        dataclasses.replace(shared.store, locations=("/nowhere.zarr",)).open()
    with pytest.raises(ClusterError, match=r"the worker on \S+ finds no store at '/other.zarr'"):
        dataclasses.replace(shared.store, locations=(*shared.store.locations, "/other.zarr")).open()
    with pytest.raises(ClusterError, match=r"the worker on \S+ finds no autoencoder at '/nowhere.pt'"):
        dataclasses.replace(shared, sae_path="/nowhere.pt").open()
