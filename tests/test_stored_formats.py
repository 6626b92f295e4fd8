"""What people have on disk stays readable, with the same values and hashes: `data/format1` and every verb on a copy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cytosae.sae.registry import ARCHITECTURES
from cytosae_pipeline.statistics.counts import read_counts
from cytosae_pipeline.statistics.features import read_features
from cytosae_pipeline.statistics.notes import read_notes
from tests.conftest import Workplace
from tests.data.make_format1 import STORES, describe_sae, describe_store, find_store, read_example
from tests.support.stores import read_files

FOLDER = Path(__file__).parent / "data" / "format1"
NUMBERS = json.loads((FOLDER / "numbers.json").read_text())
SAES = sorted(path.stem for path in (FOLDER / "saes").glob("*.pt"))


@pytest.fixture
def place(tmp_path) -> Workplace:
    shutil.copytree(FOLDER, tmp_path / "root")
    return Workplace(tmp_path / "root")


def _results(root: Path, vit_type: str = "custom") -> Path:
    return root / "out" / "feature_data" / "sae_run" / vit_type / "cells"


def _sae(root: Path) -> Path:
    (path,) = root.glob("out/checkpoints/run/final_*.pt")
    return path


@pytest.mark.parametrize("name", STORES)
def test_a_store_has_its_values_names_and_hashes(name):
    assert describe_store(find_store(FOLDER, name)) == NUMBERS["stores"][name]


def test_there_is_a_file_of_every_architecture():
    assert SAES == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", SAES)
def test_an_autoencoder_encodes_and_decodes_as_before(name):
    expected = NUMBERS["saes"][name]
    found = describe_sae(FOLDER / "saes" / f"{name}.pt", read_example(FOLDER))
    assert (found["arch"], found["spec_hash"]) == (expected["arch"], expected["spec_hash"])
    for key in ("l0", "acts", "reconstruction"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4)


def test_results_and_notes_are_read():
    folder = _results(FOLDER)
    features = read_features(folder)
    assert features.top_rows.shape == (24, 10)
    assert features.labels == ("blast", "lymphocyte", "neutrophil")
    assert [len(read_counts(folder, kind).names) for kind in ("patient", "label")] == [3, 3]
    assert read_notes(folder / "latent_notes.json", 24)[1]["name"] == "granules"


def test_stores_and_runs_are_listed_shown_and_verified(place):
    before = read_files(place.root / "out" / "activations")
    listed = json.loads(place.run("list", "--json").stdout)
    assert [(store["dataset"], store["complete"], store["n_images"]) for store in listed["stores"]] == [
        ("cells", True, 10),
        ("cells_int8", True, 10),
    ]
    assert [(run["name"], run["status"]) for run in listed["runs"]] == [("run", "trained")]
    for name in STORES:
        shown = json.loads(place.run("info", "--dataset_name", name, "--json").stdout)
        expected = NUMBERS["stores"][name]
        assert {key: shown[key] for key in ("spec_hash", "list_digest", "spec")} == {
            key: expected[key] for key in ("spec_hash", "list_digest", "spec")
        }
        assert "sound" in place.run("verify", "--dataset_name", name).output
    assert before.items() <= read_files(place.root / "out" / "activations").items()


def test_the_checkpoint_and_images_are_still_those_of_the_store(place):
    images = place.root / "dataset" / "cells"
    options = ("--images", images, "--model_path", place.root / "vit.pth")
    build = ("--workers", 0, "--shard_images", 4, "--precision", "fp32", "--device", "cpu")
    for name, dtype in (("cells", "float16"), ("cells_int8", "int8")):
        done = place.run("build", "--dataset_name", name, *options, *build, "--store-dtype", dtype, "--json")
        assert json.loads(done.stdout)["status"] == "already complete"
    place.run("verify", "--dataset_name", "cells", "--deep", *options)


def test_a_finished_run_is_still_finished(place):
    done = place.run("train", "--resume", "run", "--json")
    assert json.loads(done.stdout)["status"] == "already trained"


def test_features_and_counts_come_out_as_before(place):
    for verb in ("features", "patients", "classes"):
        place.run(verb, "--dataset_name", "cells", "--sae_path", _sae(place.root), "--vit_type", "again")
    before, after = (read_features(_results(place.root, name)) for name in ("custom", "again"))
    torch.testing.assert_close(torch.from_numpy(after.top_rows), torch.from_numpy(before.top_rows))
    np.testing.assert_allclose(after.top_values, before.top_values, rtol=1e-5)
    np.testing.assert_allclose(after.mean_acts, before.mean_acts, rtol=1e-5)
    np.testing.assert_array_equal(after.sparsity, before.sparsity)
    for kind in ("patient", "label"):
        ours, theirs = (read_counts(_results(place.root, name), kind) for name in ("custom", "again"))
        assert ours.names == theirs.names
        np.testing.assert_array_equal(ours.counts, theirs.counts)


def test_a_report_shows_the_notes_and_computes_results_that_do_not_name_their_store_once_more(place):
    before = read_files(_results(place.root))
    report = ("report", "--dataset_name", "cells", "--sae_path", _sae(place.root), "--masking_images", 0)
    output = place.run(*report).output
    assert "belong to an older version of cytosae-cache, which did not record the contents of the store" in output
    after = read_files(_results(place.root))
    records = ("features.json", "patients.json")
    assert {name: data for name, data in before.items() if name not in records}.items() <= after.items()
    assert b"granules" in after["report/data/overview.js"]
    assert "older version" not in place.run(*report).output
    assert read_files(_results(place.root))["features.json"] == after["features.json"]


@pytest.mark.parametrize("name", SAES)
def test_every_architecture_gives_features_of_a_store(place, name):
    for dataset in STORES:
        sae = place.root / "saes" / f"{name}.pt"
        place.run("features", "--dataset_name", dataset, "--sae_path", sae, "--json")
