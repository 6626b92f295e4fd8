"""Statistics of several data sets (--with_dataset) are those of their images together."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import cytosae_cache
import cytosae_pipeline
from cytosae.formats.checkpoint import load
from cytosae_cache import JoinedStore
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import EvaluateConfig, StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.collecting import Asked, collect
from cytosae_pipeline.statistics.encode import encode_store
from cytosae_pipeline.statistics.inputs import Inputs, open_inputs
from cytosae_pipeline.statistics.subjects import find_persons
from cytosae_pipeline.training.holdout import held_out
from tests.support import cluster as there
from tests.support.pictures import LAYOUT, change_pictures, write_pictures
from tests.support.reports import read_data

ALL = Asked(features=True, counts=("patient", "label"), profiles=True)


def build_more(place, *, same_pictures=False, rename=None, **columns):
    """A second data set of 17 images, two of whose patients are called as those of the first unless renamed."""
    folder = write_pictures(place.root / "dataset" / "more", 17, broken=False)
    if not same_pictures:
        change_pictures(folder)
    if rename or columns:
        rows = [
            {
                "path": path.relative_to(folder).as_posix(), "label": path.parts[-3],
                "patient": (rename or str)(path.parts[-2]),
                **{name: of(path.parts[-2]) for name, of in columns.items()},
            }
            for path in sorted(folder.rglob("*.png"))
        ]  # fmt: skip
        with (folder / "manifest.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            table.writerows(rows)
    layout = [] if (folder / "manifest.csv").exists() else ["--layout", LAYOUT]
    place.run(
        "build", "--dataset_name", "more", "--model_path", place.vit, "--workers", 0, "--shard_images", 4, *layout
    )
    return folder


@pytest.fixture
def both(with_sae):
    """A workspace with an autoencoder and two data sets, whose patients have names of their own."""
    build_more(with_sae, rename=lambda patient: f"m{patient}")
    return with_sae


def joined(place, *more):
    return ["--dataset_name", "toy", "--with_dataset", "more", "--sae_path", place.sae(), *more]


def results(place):
    return place.root / "out" / "feature_data" / "sae_r" / "custom" / "toy+more"


def stores(place):
    (more,) = (place.root / "out" / "activations" / "more").glob("*.zarr")
    return [ActivationStore.open(place.store), ActivationStore.open(more)]


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def scores_of(inputs, config):
    """Rows and scores of every readable image."""
    rows, scores = [], []
    encode_store(
        inputs, config, [lambda at, pooled: (rows.append(at), scores.append(pooled.scores.cpu()))], what="test"
    )  # fmt: skip
    return torch.cat(rows), torch.cat(scores)


@pytest.mark.parametrize("batch_size", [64, 3])
def test_every_image_scores_as_in_its_own_store(both, batch_size):
    sae, config = load(both.sae()), StatisticsConfig(batch_size=batch_size)
    parts = stores(both)
    rows, scores = scores_of(Inputs(JoinedStore(parts), sae), config)
    first, second = (scores_of(Inputs(part, sae), config) for part in parts)
    assert rows.tolist() == [*first[0].tolist(), *(second[0] + parts[0].n_images).tolist()]
    assert torch.equal(scores, torch.cat([first[1], second[1]]))


def test_the_files_are_those_of_all_images(both):
    output = both.run("features", *joined(both)).output
    assert "read as one: toy (23 images), more (17 images)" in output
    assert "39 images" in output
    assert "--with_dataset more" in output.split("look at it: ")[1]
    folder = results(both)
    config = StatisticsConfig()
    rows, scores = scores_of(Inputs(JoinedStore(stores(both)), load(both.sae())), config)
    k = 10
    for latent in range(scores.shape[1]):
        order = sorted(
            (-score, row) for score, row in zip(scores[:, latent].tolist(), rows.tolist(), strict=True) if score > 0
        )
        expected = [row for _, row in order[:k]] + [-1] * (k - len(order))
        found = torch.load(folder / "max_activating_image_indices.pt", weights_only=True)[latent]
        assert found.tolist() == expected
    active = (scores > 0).sum(dim=0)
    mean = scores.double().sum(dim=0) / active.clamp(min=1)
    np.testing.assert_allclose(torch.load(folder / "sae_mean_acts.pt", weights_only=True), mean, rtol=1e-6)
    with (folder / "images.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["path"].split("/")[0] for row in table] == ["toy"] * 23 + ["more"] * 17
    assert (folder / "labels.txt").read_text().split() == ["blast", "lymphocyte", "neutrophil"]


def test_counts_are_the_sums_of_the_parts(both):
    both.run("patients", *joined(both, "--normalize", "none"))
    both.run("classes", *joined(both, "--normalize", "none"))
    for verb in ("patients", "classes"):
        for name in ("toy", "more"):
            both.run(verb, "--dataset_name", name, "--sae_path", both.sae(), "--normalize", "none")
    whole = arrays(results(both) / "patient_counts.npz")
    first, second = (arrays(results(both).parent / name / "patient_counts.npz") for name in ("toy", "more"))
    at = {str(name): number for number, name in enumerate(whole["patients"])}
    assert [*at] == ["mp0", "mp1", "mp2", "mp3", "p0", "p1", "p2", "p3"]
    for part in (first, second):
        for number, name in enumerate(part["patients"]):
            assert np.array_equal(whole["counts"][:, at[str(name)]], part["counts"][:, number])
            assert whole["n_images"][at[str(name)]] == part["n_images"][number]
    classes = arrays(results(both) / "class_counts.npz")
    parts = [arrays(results(both).parent / name / "class_counts.npz")["counts"] for name in ("toy", "more")]
    assert np.array_equal(classes["counts"], parts[0] + parts[1])


def test_ranges_of_shards_on_a_cluster_are_equal_to_the_last_bit(both):
    options = {
        "root_dir": both.root, "dataset_name": "toy", "with_dataset": ("more",), "sae_path": both.sae(),
        "joined_patients": "separate", "batch_size": 7,
    }  # fmt: skip
    alone = StatisticsConfig(**options)
    expected = collect(open_inputs(alone), alone, ALL, what="test")
    with there.local_cluster() as address:
        shared = StatisticsConfig(**options, dask=address)
        found = collect(open_inputs(shared), shared, ALL, what="test")
    numbers = [
        [value for state in one.states for _, value in sorted(vars(state).items()) if isinstance(value, torch.Tensor)]
        for one in (found, expected)
    ]
    assert len(numbers[0]) > 8
    assert all(torch.equal(one, other) for one, other in zip(*numbers, strict=True))


def test_patients_of_the_same_name_need_a_decision(with_sae):
    build_more(with_sae)
    output = with_sae.run("patients", *joined(with_sae), code=1).output
    assert "4 names of patients stand in several of the data sets 'toy', 'more': 'p0', 'p1', 'p2' and 1 more" in output
    assert "--joined_patients same if such a patient is the same person" in output
    with_sae.run("patients", *joined(with_sae, "--joined_patients", "same"))
    assert [str(name) for name in arrays(results(with_sae) / "patient_counts.npz")["patients"]] == [
        "p0", "p1", "p2", "p3",
    ]  # fmt: skip
    output = with_sae.run("patients", *joined(with_sae, "--joined_patients", "separate")).output
    assert "--joined_patients separate" in output
    found = [str(name) for name in arrays(results(with_sae) / "patient_counts.npz")["patients"]]
    assert found == [f"{name}/p{number}" for name in ("more", "toy") for number in range(4)]


def test_what_patients_mean_needs_a_further_data_set():
    with pytest.raises(UserError, match=r"joined_patients is about several data sets: name the others with --with_"):
        EvaluateConfig(joined_patients="same")


def test_pictures_in_both_data_sets_are_counted_and_said(with_sae, messages):
    build_more(with_sae, same_pictures=True, rename=lambda patient: f"m{patient}")
    with_sae.run("features", *joined(with_sae))
    assert "17 pictures in both data sets, 'toy' and 'more': each counts twice" in messages()


def test_a_further_data_set_is_checked_like_the_first(both):
    output = both.run("features", *joined(both, "--with_dataset", "more"), code=1).output
    assert "was given twice: omit one --with_dataset" in output
    output = both.run("features", *joined(both, "--with_dataset", "mroe"), code=1).output
    assert "no activation store for block_layer -2" in output
    assert "--dataset_name mroe" in output


def test_a_further_data_set_that_has_no_store_is_built(with_sae):
    change_pictures(write_pictures(with_sae.root / "dataset" / "more", 17, own_patients=True, broken=False))
    output = with_sae.run("features", *joined(with_sae, "--model_path", with_sae.vit)).output
    assert "no activation store of data set 'more' yet: building it first" in output
    assert (results(with_sae) / "features.json").exists()


def test_results_belong_to_the_data_sets_in_this_order(both):
    both.run("features", *joined(both))
    assert json.loads(both.run("features", *joined(both), "--json").stdout)["reused"] is True
    reverse = ["--dataset_name", "more", "--with_dataset", "toy", "--sae_path", both.sae()]
    result = json.loads(both.run("features", *reverse, "--json").stdout)
    assert (result["reused"], result["folder"].endswith("more+toy")) == (False, True)
    record = json.loads((results(both) / "features.json").read_text())
    assert record["dataset"] == "toy+more"
    assert record["store_contents"] == JoinedStore(stores(both)).contents


def test_the_report_has_pictures_of_all_and_the_data_set_as_a_covariate(both):
    groups = both.root / "groups.csv"
    patients = [f"{kind}p{number}" for kind in ("", "m") for number in range(4)]
    groups.write_text("patient,group\n" + "".join(f"{name},{'AB'[int(name[-1]) % 2]}\n" for name in patients))
    options = joined(both, "--groups", groups, "--strata", "dataset", "--shuffles", 0, "--masking_images", 0)
    both.run("features", *joined(both))
    both.run("report", *options)
    page = results(both) / "report"
    assert read_data(page, "comparisons/0")["method"] == "van Elteren, within dataset"
    assert read_data(page, "audit")["strata"] == "dataset"
    shown = len(list((page / "thumbnails").glob("*.jpg")))
    assert shown > 30
    shutil.rmtree(page)
    (both.root / "dataset" / "more").rename(both.root / "elsewhere")
    output = both.run("report", *options).output
    expected = "the images of data set 'more' were not found: they are shown without pictures. Put them, or a link to"
    assert expected in output
    assert "pass --images" not in output
    assert 0 < len(list((page / "thumbnails").glob("*.jpg"))) < shown - 10
    (both.root / "dataset" / "more").symlink_to(both.root / "elsewhere")
    both.run("report", *options)
    assert len(list((page / "thumbnails").glob("*.jpg"))) == shown


def test_tables_name_the_data_set_of_every_image(both):
    both.run("export", *joined(both, "--format", "csv", "--out", both.root / "tables"))
    with (both.root / "tables" / "table_images.csv").open() as file:
        found = {(row["row"], row["path"].split("/")[0], row["dataset"]) for row in csv.DictReader(file)}
    assert {(name, dataset) for _, name, dataset in found} == {("toy", "toy"), ("more", "more")}


def test_an_autoencoder_is_evaluated_on_the_images_that_were_held_out_of_all(both):
    both.train("--run_name", "part", "--with_dataset", "more", "--held_out", 0.3)
    sae = ["--dataset_name", "toy", "--with_dataset", "more", "--sae_path", both.sae("part")]
    result = json.loads(both.run("evaluate", *sae, "--joined_patients", "separate", "--json").stdout)
    parts = stores(both)
    masks = [part.valid & held_out(part, 0.3, "image") for part in parts]
    assert 0 < sum(mask.sum() for mask in masks) < 39
    assert result["overall"]["n_images"] == sum(int(mask.sum()) for mask in masks)
    assert result["held_out"] == 0.3
    # The second data set alone was trained on, too.
    alone = ["--dataset_name", "more", "--sae_path", both.sae("part"), "--json"]
    assert json.loads(both.run("evaluate", *alone).stdout)["overall"]["n_images"] == int(masks[1].sum())
    # So does an atlas, which compares new images with those.
    output = both.run("export", *sae, "--format", "atlas", "--out", both.root / "of-both").output
    n_held_out = sum(int(mask.sum()) for mask in masks)
    assert f"training held out {n_held_out} images, too few to compare new images with" in output


def test_images_that_were_held_out_are_those_of_the_parts(both):
    parts = stores(both)
    for by in ("image", "patient"):
        found = held_out(JoinedStore(parts, joined_patients="separate"), 0.5, by)
        assert found.tolist() == [*held_out(parts[0], 0.5, by), *held_out(parts[1], 0.5, by)]


def test_the_embedding_of_images_of_all_comes_from_the_tail_of_one(with_sae):
    build_more(with_sae, rename=lambda patient: f"m{patient}")
    with_sae.run(
        "build", "--dataset_name", "more", "--model_path", with_sae.vit, "--workers", 0, "--shard_images", 4,
        "--keep_tail",
    )  # fmt: skip
    result = json.loads(with_sae.run("evaluate", *joined(with_sae, "--downstream", "--json")).stdout)
    assert result["downstream"]["overall"]["embedding"]["n_images"] == 39


SUBJECTS = {"subject": {"p0": "anna", "p1": "anna", "p2": "bert", "p3": "carl"}.get}


@pytest.mark.parametrize(("stated", "n_persons"), [("same", 3), ("separate", 6)])
def test_persons_of_the_same_name_are_told_apart_like_patients(with_sae, stated, n_persons):
    build_more(with_sae, rename=lambda patient: f"m{patient}", **SUBJECTS)
    third = with_sae.root / "dataset" / "third"
    shutil.copytree(with_sae.root / "dataset" / "more", third)
    change_pictures(third)
    text = (third / "manifest.csv").read_text()
    (third / "manifest.csv").write_text(text.replace(",mp", ",tp"))
    build = ["--model_path", with_sae.vit, "--workers", 0, "--shard_images", 4]
    with_sae.run("build", "--dataset_name", "third", *build)
    (place,) = (with_sae.root / "out" / "activations" / "third").glob("*.zarr")
    parts, sae = [stores(with_sae)[1], ActivationStore.open(place)], load(with_sae.sae())
    with pytest.raises(UserError, match=r"'anna' in the data sets 'more' and 'third'\. Say what that means"):
        find_persons(Inputs(JoinedStore(parts), sae), None, None)
    found = find_persons(Inputs(JoinedStore(parts, joined_patients=stated), sae), None, None)
    assert len(set(found.tolist())) == n_persons


def test_in_python_a_joined_store_is_given_like_any_other(both):
    parts = stores(both)
    store = cytosae_cache.join_stores(parts)
    found = cytosae_pipeline.feature_stats(both.sae(), store, top_k=3)
    both.run("features", *joined(both, "--top_k", 3))
    expected = torch.load(results(both) / "max_activating_image_indices.pt", weights_only=True)
    assert np.array_equal(np.asarray(found.top_rows), expected.numpy())
    evaluation = cytosae_pipeline.evaluate_sae(both.sae(), store)
    assert evaluation.overall.n_images == 39
    with pytest.raises(ValueError, match="found where the place of one is expected"):
        cytosae_pipeline.make_report(root_dir=both.root, sae_path=both.sae(), store=store)
    with pytest.raises(UserError, match="no images at '/nowhere'"):
        cytosae_pipeline.plot.latent(found, 0, images="/nowhere")
    with pytest.raises(ValueError, match="was given twice"):
        cytosae_cache.join_stores([parts[0], parts[0].path])
