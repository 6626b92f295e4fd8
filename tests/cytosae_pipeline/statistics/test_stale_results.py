"""Results belong to the exact bytes that they were made from: a store made again, an autoencoder trained again."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch

from cytosae_cache.format import metadata
from cytosae_cache.storage.lock import locked
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.statistics.records import read_result
from tests.support.pictures import change_pictures


@pytest.fixture
def filled(with_sae):
    for verb in ("features", "patients"):
        with_sae.run(verb, "--dataset_name", "toy", "--sae_path", with_sae.sae())
    return with_sae


def options(place):
    return ("--dataset_name", "toy", "--sae_path", place.sae())


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_same_command_again_reuses_what_is_there_and_says_so(filled):
    before = stamps(filled.features())
    for verb in ("features", "patients"):
        output = filled.run(verb, *options(filled)).output
        assert f"the results of `{verb}` in '{filled.features()}' are of this autoencoder, this store" in output
        assert f"there already in {filled.features()}: " in output
        assert json.loads(filled.run(verb, *options(filled), "--json").stdout)["reused"] is True
    assert stamps(filled.features()) == before


@pytest.mark.parametrize(
    ("verb", "other"),
    [("features", ("--top_k", 3)), ("patients", ("--threshold", 0.3)), ("patients", ("--normalize", "token"))],
)
def test_other_options_are_computed(filled, verb, other):
    before = stamps(filled.features())[f"{verb}.json"]
    output = filled.run(verb, *options(filled), *other).output
    assert "wrote in" in output
    assert stamps(filled.features())[f"{verb}.json"] != before


@pytest.mark.parametrize("damage", ["cut", "missing", "record"])
def test_damaged_results_are_computed_again_by_their_own_verb(filled, damage):
    path = filled.features() / {"record": "features.json"}.get(damage, "sae_mean_acts.pt")
    before = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(before[: len(before) // 2])
    assert "wrote in" in filled.run("features", *options(filled)).output
    assert path.read_bytes() == before


def test_results_of_a_store_that_was_made_again_from_other_pictures_are_not_used(filled):
    before = np.load(filled.features() / "cls_sae_cnt.npy")
    change_pictures(filled.images)
    filled.build("--overwrite")
    output = filled.run("export", *options(filled), "--format", "csv", "--out", filled.root / "tables").output
    for verb in ("features", "patients"):
        assert (
            f"the results of `{verb}` in '{filled.features()}' belong to a store with other contents, which was made "
            "again since: recomputing them" in output
        )
    assert not np.array_equal(np.load(filled.features() / "cls_sae_cnt.npy"), before)
    for verb in ("features", "patients"):
        record = json.loads((filled.features() / f"{verb}.json").read_text())
        assert record["store_contents"] == ActivationStore(filled.store).contents


def test_a_store_that_was_made_again_from_the_same_pictures_keeps_its_results(filled):
    before, contents = stamps(filled.features()), ActivationStore(filled.store).contents
    filled.build("--overwrite")
    assert ActivationStore(filled.store).contents == contents
    assert "there already in" in filled.run("features", *options(filled)).output
    assert stamps(filled.features()) == before


def test_results_of_a_version_that_did_not_record_the_contents_are_computed_again(filled):
    path = filled.features() / "features.json"
    record = json.loads(path.read_text())
    del record["store_contents"]
    path.write_text(json.dumps(record))
    output = filled.run("export", *options(filled), "--format", "csv", "--out", filled.root / "tables").output
    assert "belong to an older version of cytosae-cache, which did not record the contents of the store" in output


def test_the_identity_of_a_store_without_one_is_computed(filled):
    storage = ActivationStore(filled.store).storage
    attributes, contents = metadata.read_attributes(storage), ActivationStore(filled.store).contents
    store = ActivationStore(filled.store)
    metadata.write_attributes(storage, store.spec, store.provenance, complete=True, files=attributes["files"])
    assert "contents" not in metadata.read_attributes(storage)
    assert ActivationStore(filled.store).contents == contents
    assert "there already in" in filled.run("features", *options(filled)).output


def test_a_second_process_does_not_compute_the_same_results(with_sae):
    folder = with_sae.features()
    with locked(folder / "features.lock", "x"):
        output = with_sae.run("features", *options(with_sae), code=1).output
        assert f"is writing '{folder / 'features.json'}'. Wait for it to finish, then run the command again" in output
        output = with_sae.run("export", *options(with_sae), "--format", "csv", code=1).output
        assert f"is writing '{folder / 'features.json'}'" in output
        with_sae.run("patients", *options(with_sae))
    with_sae.run("features", *options(with_sae))
    assert not list(folder.glob("*.lock"))


def test_results_of_a_copy_of_the_autoencoder_under_another_name_stay_apart(filled):
    again = filled.root / "again.pt"
    shutil.copy(filled.sae(), again)
    filled.run("features", "--dataset_name", "toy", "--sae_path", again)
    here, there = (json.loads((filled.features(run) / "features.json").read_text()) for run in ("r", "again"))
    assert here == there


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("cls_sae_cnt.npy", "patients"), ("patient_counts.npz", "patients"), ("patients.csv", "patients"),
        ("max_activating_image_values.pt", "features"), ("images.csv", "features"), ("labels.txt", "features"),
    ],
)  # fmt: skip
def test_results_that_were_changed_after_they_were_written_are_refused(filled, name, verb):
    path = filled.features() / name
    if path.suffix in (".csv", ".txt"):
        path.write_text(path.read_text().replace("row,", "number,") + "\n" * (path.suffix == ".txt"))
    elif path.suffix == ".npy":
        np.save(path, np.load(path) + 1)
    elif path.suffix == ".npz":
        with np.load(path) as archive:
            np.savez(path, **{**archive, "counts": archive["counts"] + 1})
    else:
        torch.save(torch.load(path, weights_only=True) + 1, path)
    out = filled.root / "tables"
    output = filled.run("export", *options(filled), "--format", "csv", "--out", out, code=1).output
    assert (
        f"'{path}' was changed or damaged after it was written. Compute them again with: cytosae-cache {verb}" in output
    )
    assert "wrote in" in filled.run(verb, *options(filled)).output
    filled.run("export", *options(filled), "--format", "csv", "--out", out)


def test_records_without_digests_are_read(filled):
    for verb in ("features", "patients"):
        path = filled.features() / f"{verb}.json"
        record = json.loads(path.read_text())
        assert record.pop("sha256")
        path.write_text(json.dumps(record))
    out = filled.root / "tables"
    filled.run("export", *options(filled), "--format", "csv", "--out", out)


def test_digests_that_are_none_are_one_message(filled):
    path = filled.features() / "features.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": [1]}))
    out = filled.root / "tables"
    output = filled.run("export", *options(filled), "--format", "csv", "--out", out, code=1).output
    assert f"'{path}' must name files and their digests, found list" in output


def test_results_that_the_disk_does_not_give_are_not_called_damaged(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError) as caught:
        read_result(tmp_path / "x.pt", refuse, "features")
    assert caught.value.filename == str(tmp_path / "x.pt")
