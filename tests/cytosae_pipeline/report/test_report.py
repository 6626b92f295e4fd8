"""`report`: records against plain computations, options, and that an older report is never lost."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cytosae.analysis.differential import compare_groups
from cytosae.analysis.specificity import POSITION_LIMIT, first_latents, label_lift
from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config.report import PageConfig, ReportConfig, parse_latents, parse_range
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.limits import MAX_UPLOAD, SIGNIFICANT_Q
from cytosae_pipeline.report.data.pseudonyms import ensure_key, pseudonymise
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.records import images
from cytosae_pipeline.report.records.choice import most_different
from cytosae_pipeline.report.records.encoding import pack, to_script
from cytosae_pipeline.report.records.page_files import read_page_files
from cytosae_pipeline.runtime.palette import palette_record
from cytosae_pipeline.statistics.groups import find_groups
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.notes import (
    MAX_NAME,
    MAX_NOTE,
    Subject,
    check_note,
    read_notes,
    save_note,
    write_notes,
)
from tests.support.pictures import HEARING_MAIN
from tests.support.reports import read_data, unpack


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def _report(place, *arguments, code=0):
    out = place.root / "page"
    result = place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", out, *arguments, code=code
    )
    return out, result.output


@pytest.fixture(scope="module")
def made(_pristine, tmp_path_factory):
    """A report, its workspace, and plain activations of all latents."""
    from tests.conftest import Workplace

    root = tmp_path_factory.mktemp("report") / "root"
    shutil.copytree(_pristine["sae"], root)
    place = Workplace(root)
    report, output = _report(place, "--top_k", 4, "--n_latents", 30)
    store = ActivationStore.open(place.store)
    sae = load_sae(place.sae()).sae
    with StoreReader(store) as reader:
        x = torch.from_numpy(np.nan_to_num(reader.read(np.arange(store.n_images)))).float()
    acts = sae.encode(x).numpy()
    acts[~store.valid] = 0
    return place, report, output, acts, store, sae


def test_the_report_is_complete(made):
    _place, report, output, *_ = made
    assert "30 latents and " in output
    assert f"open in a browser: {report / 'index.html'}" in output
    assert {path.name for path in report.iterdir()} == {"index.html", "page", "data", "thumbnails", "cytosae-report"}
    written = {path.relative_to(report).as_posix(): path.read_bytes() for path in _files(report / "page")}
    assert {"index.html": (report / "index.html").read_bytes(), **written} == read_page_files()
    overview = read_data(report, "overview")
    assert sorted(path.stem for path in (report / "data/latents").iterdir()) == sorted(map(str, overview["featured"]))
    assert sorted(path.stem for path in (report / "data/images").iterdir()) == sorted(
        map(str, overview["images"]["rows"])
    )
    assert sorted(path.stem for path in (report / "thumbnails").iterdir()) == sorted(
        map(str, overview["images"]["rows"])
    )


def test_the_page_loads_exactly_its_own_files(made):
    text = (made[1] / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', text))
    assert named == read_page_files().keys() - {"index.html"}


def test_the_scripts_build_no_markup_from_text_and_load_nothing_from_elsewhere(made):
    for path in _files(made[1] / "page"):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}, path


def test_no_line_and_no_file_of_the_page_is_too_long():
    for address, data in read_page_files().items():
        lines = data.decode().splitlines()
        assert len(lines) <= 400, address
        assert max(map(len, lines)) <= 120, address


def test_palette_and_limits_come_from_python_alone(made):
    overview = read_data(made[1], "overview")
    assert overview["palette"] == json.loads(json.dumps(palette_record()))
    assert overview["limits"] == {
        "significant_q": SIGNIFICANT_Q, "position": POSITION_LIMIT, "name_length": MAX_NAME, "note_length": MAX_NOTE,
        "upload_bytes": MAX_UPLOAD,
    }  # fmt: skip
    scripts = {name: data.decode() for name, data in read_page_files().items() if name.endswith(".js")}
    for name, text in scripts.items():
        assert not re.search(r"#[0-9a-f]{6}\b", text), f"{name} has a colour of its own"


def test_the_overview_contains_the_statistics(made):
    place, report, _output, _acts, store, _sae = made
    overview = read_data(report, "overview")
    sparsity = torch.load(place.features() / "sae_sparsity.pt", weights_only=True).numpy()
    assert np.array_equal(unpack(overview["latents"]["sparsity"]), sparsity)
    assert overview["store"]["images"] == 23
    assert overview["store"]["valid"] == 22
    assert overview["counts"] == {"active": int((sparsity > 0).sum()), "dead": int((sparsity == 0).sum())}
    assert [label["images"] for label in overview["labels"]] == [
        int(((np.array(store.images.label) == label["name"]) & store.valid).sum()) for label in overview["labels"]
    ]
    metrics = [json.loads(line) for line in (place.sae().parent / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (curve for curve in overview["training"]["curves"] if curve["name"] == "loss")
    assert loss["values"] == [line["losses/overall_loss"] for line in metrics]
    assert overview["explore"] is False


def test_specific_latents_come_first_and_columns_say_how_specific(made):
    _place, report, _output, acts, store, _sae = made
    overview = read_data(report, "overview")
    names = [label["name"] for label in overview["labels"]]
    active, labels = acts.mean(axis=1) > 0, np.array(store.images.label)
    counts = np.stack([active[(labels == name) & store.valid].sum(axis=0) for name in names], axis=1)
    lift = label_lift(counts, np.array([((labels == name) & store.valid).sum() for name in names]))
    np.testing.assert_allclose(unpack(overview["latents"]["lift"]), lift.max(axis=1), rtol=1e-6)
    best = unpack(overview["latents"]["best"])
    assert np.array_equal(best[lift.max(axis=1) > 0], lift.argmax(axis=1)[lift.max(axis=1) > 0])
    sparsity, mean, entropy, position = (
        unpack(overview["latents"][name]) for name in ("sparsity", "mean_acts", "entropy", "position")
    )
    expected = first_latents(sparsity, mean, entropy, lift=lift, position_share=position, n=30)
    assert overview["featured"] == expected.tolist()
    # With 22 images there is no evidence for any label.
    assert lift.max() <= 1
    assert "those with the lowest label entropy" in overview["featured_reason"]
    assert "specific to a label" not in overview["featured_reason"]
    scores = acts.mean(axis=1)
    for latent, label in zip(overview["featured"], overview["main_label"], strict=True):
        means = [scores[(labels == name) & store.valid, latent].mean() for name in names]
        if label >= 0:
            assert means[label] > 0.5 * sum(means)
        top = [item for item in read_data(report, f"latents/{latent}")["top"]]
        mass = sum(item["value"] for item in top if item["label"] == label)
        assert (label >= 0) <= (mass > 0.5 * sum(item["value"] for item in top))


def test_every_image_and_latent_is_described_in_files_of_limited_size(made):
    place, report, _output, acts, store, _sae = made
    overview = read_data(report, "overview")
    rows = read_data(report, "rows/0")
    assert rows["paths"] == list(store.images.path)
    assert unpack(rows["valid"]).tolist() == store.valid.astype(int).tolist()
    names = [label["name"] for label in overview["labels"]]
    assert [names[at] if at >= 0 else "" for at in unpack(rows["labels"])] == list(store.images.label)
    indices = torch.load(place.features() / "max_activating_image_indices.pt", weights_only=True).numpy()
    for row, tops in enumerate(rows["tops"]):
        latents, slots = np.nonzero(indices == row)
        assert [latent for latent, _ in tops] == latents[np.lexsort((latents, slots))][:8].tolist()
        for latent, value in tops:
            assert value == pytest.approx(acts[row, :, latent].mean(), rel=1e-3)
    for kind in ("label", "patient"):
        listing = {name: unpack(value) for name, value in read_data(report, f"listings/{kind}-0").items()}
        starts = overview["book"][f"{kind}_starts"]
        shown = listing["numbers"].tolist()
        assert sorted(shown) == np.flatnonzero(store.valid).tolist()
        known = names if kind == "label" else overview["patients"]
        for at, name in enumerate(known):
            part = shown[starts[at] : starts[at + 1]]
            column = np.array(getattr(store.images, kind))
            assert part == np.flatnonzero((column == name) & store.valid).tolist()
    cards = read_data(report, "cards/0")
    assert np.array_equal(unpack(cards["top_rows"]), indices[:, :6])
    scores, labels = acts.mean(axis=1), np.array(store.images.label)
    means = np.stack([scores[(labels == name) & store.valid].mean(axis=0) for name in names], axis=1)
    found = unpack(cards["means"]) / 255 * unpack(cards["largest"])[:, None]
    np.testing.assert_allclose(found, means, atol=means.max() / 500)
    rates = np.stack([(scores[(labels == name) & store.valid] > 0).mean(axis=0) for name in names], axis=1)
    np.testing.assert_allclose(unpack(cards["rates"]) / 255, rates, atol=1 / 254)


def test_files_of_images_are_cut_at_their_limits(made, monkeypatch):
    place, report, *_ = made
    monkeypatch.setattr(images, "ROWS_PER_FILE", 10)
    monkeypatch.setattr(images, "LISTED_PER_FILE", 8)
    config = PageConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae(), top_k=4)
    book = images.make_image_book(open_report_data(config))
    files = dict(images.book_files(book))
    assert sorted(files) == [
        *(f"listings/label-{n}" for n in range(3)), *(f"listings/patient-{n}" for n in range(3)),
        *(f"rows/{n}" for n in range(3)),
    ]  # fmt: skip
    paths = [path for n in range(3) for path in files[f"rows/{n}"]["paths"]]
    assert paths == read_data(report, "rows/0")["paths"]
    numbers = np.concatenate([unpack(files[f"listings/label-{n}"]["numbers"]) for n in range(3)])
    assert np.array_equal(numbers, unpack(read_data(report, "listings/label-0")["numbers"]))


def test_feature_data_of_older_versions_keep_the_old_order_and_say_so(with_sae):
    with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    path = with_sae.features() / "features.json"
    record = json.loads(path.read_text())
    del record["specificity"]
    path.write_text(json.dumps(record))
    report, output = _report(with_sae)
    assert "the feature data do not say how specific latents are to a label" in output
    assert f"cytosae-cache features --root_dir {with_sae.root}" in output
    overview = read_data(report, "overview")
    assert "those with the lowest label entropy" in overview["featured_reason"]
    assert set(overview["main_label"]) == {-1}
    assert read_data(report, "cards/0")["means"] is None


def test_a_latents_record_equals_plain_numpy(made):
    _place, report, _output, acts, store, sae = made
    scores, labels = acts.mean(axis=1), np.array(store.images.label)
    names = [label["name"] for label in read_data(report, "overview")["labels"]]
    patients = read_data(report, "patients")["names"]
    decoder = torch.nn.functional.normalize(sae.W_dec, dim=1)
    for latent in read_data(report, "overview")["featured"]:
        record = read_data(report, f"latents/{latent}")
        order = sorted(
            (row for row in range(23) if scores[row, latent] > 0), key=lambda row: (-scores[row, latent], row)
        )
        assert [item["row"] for item in record["top"]] == order[:4]
        for item in record["top"]:
            plain = acts[item["row"], 1:, latent]
            assert item["value"] == pytest.approx(scores[item["row"], latent], rel=1e-4)
            assert item["peak"] == pytest.approx(plain.max(), rel=1e-4, abs=1e-6)
            np.testing.assert_allclose(unpack(item["map"]) * item["peak"] / 255, plain, atol=item["peak"] / 254)
            assert names[item["label"]] == labels[item["row"]]
            assert patients[item["patient"]] == store.images.patient[item["row"]]
        histogram = record["histogram"]
        tokens = acts[store.valid][..., latent]
        assert histogram["n_zero"] == int((tokens == 0).sum())
        assert sum(histogram["counts"]) == int((tokens > 0).sum())
        for item in record["labels"]:
            of_label = scores[(labels == names[item["label"]]) & store.valid, latent]
            assert item["n_images"] == len(of_label)
            assert item["n_active"] == int((of_label > 0).sum())
            assert item["mean"] == pytest.approx(of_label.mean(), rel=1e-4, abs=1e-8)
        cosine = (decoder @ decoder[latent]).numpy()
        for other, value in record["neighbours"]:
            assert value == pytest.approx(cosine[other], abs=1e-4)
        assert latent not in [other for other, _ in record["neighbours"]]
        shown = [item["per_image"] for item in record["patients"]]
        assert shown == sorted(shown, reverse=True)


def test_an_images_record_equals_plain_numpy(made):
    _place, report, _output, acts, store, _sae = made
    for row in read_data(report, "overview")["images"]["rows"]:
        record = read_data(report, f"images/{row}")
        assert record["path"] == store.images.path[row]
        scores = acts[row].mean(axis=0)
        expected = sorted(np.flatnonzero(scores > 0).tolist(), key=lambda latent: (-scores[latent], latent))[:10]
        assert [item["latent"] for item in record["latents"]] == expected
        latents = unpack(record["token_latents"])
        values = unpack(record["token_values"]) * record["value_step"]
        for token in range(acts.shape[1]):
            for latent, value in zip(latents[token].tolist(), values[token].tolist(), strict=True):
                if latent != record["no_latent"]:
                    assert value == pytest.approx(acts[row, token, latent], abs=2 * record["value_step"])
            strongest = np.sort(acts[row, token])[::-1][: latents.shape[1]]
            np.testing.assert_allclose(values[token], strongest, atol=2 * record["value_step"])


def test_barcodes_and_correlation(made):
    place, report, *_ = made
    patients, featured = read_data(report, "patients"), read_data(report, "overview")["featured"]
    normalised = np.load(place.features() / "cls_sae_cnt.npy")
    assert patients["names"] == ["p0", "p1", "p2", "p3"]
    peaks = unpack(patients["barcodes"]["peaks"])
    values = unpack(patients["barcodes"]["values"])
    np.testing.assert_allclose(peaks, normalised[:, featured].max(axis=0), rtol=1e-6)
    np.testing.assert_allclose(values / 255 * peaks, normalised[:, featured], atol=peaks.max() / 500)
    expected = np.corrcoef(np.log1p(normalised))
    np.testing.assert_allclose(unpack(patients["correlation"]) / 127 - 1, expected, atol=0.005)
    assert patients["comparisons"] == []
    assert "patients have images of several labels" in patients["no_groups"]
    assert "--groups patients.csv" in patients["no_groups"]


def test_groups_of_a_file_are_compared_and_classified(with_sae):
    path = with_sae.root / "groups.csv"
    path.write_text("patient,group\np0,ill\np1,well\np2,ill\np3,well\nsomebody,else\n")
    report, output = _report(with_sae, "--groups", path, "--group_test", "permutation")
    assert "names patients that are not in the store (1), such as 'somebody'" in output
    patients = read_data(report, "patients")
    assert patients["names"] == ["p0", "p2", "p1", "p3"]
    assert patients["group_names"] == ["ill", "well"]
    assert patients["comparisons"] == [
        {"first": "ill", "second": "well", "n_first": 2, "n_second": 2, "groups": [0, 1]}
    ]
    assert np.sum(patients["classification"]["confusion"], axis=1).tolist() == [2, 2]
    record = read_data(report, "comparisons/0")
    assert record["method"].startswith("permutation")
    p = 10 ** -unpack(record["minus_log10_p"])
    assert p.min() >= 1 / 3 - 1e-6, "with 2 against 2 there are 6 assignments, and none is more extreme than 2 of them"


def test_patients_without_a_readable_image_are_left_out(with_images):
    ghost = with_images.images / "blast" / "ghost" / "x.png"
    ghost.parent.mkdir()
    ghost.write_bytes(b"no image")
    with_images.build()
    with_images.train("--run_name", "r")
    path = with_images.root / "groups.csv"
    path.write_text("patient,group\np0,ill\np1,well\np2,ill\np3,well\nghost,well\n")
    report, output = _report(with_images, "--groups", path)
    assert "1 of 5 patients has no readable image and is left out, such as 'ghost'" in output
    patients = read_data(report, "patients")
    assert patients["names"] == ["p0", "p2", "p1", "p3"]
    assert patients["comparisons"][0]["n_second"] == 2
    assert min(patients["n_images"]) > 0


def test_without_patients_and_with_few_labels(with_images):
    files = sorted(path for path in with_images.images.rglob("*.png") if "broken" not in path.name)[:20]
    manifest = with_images.root / "m.csv"
    rows = [f"{path.relative_to(with_images.root)},{'blast' if at < 3 else ''}" for at, path in enumerate(files)]
    manifest.write_text("path,label\n" + "\n".join(rows) + "\n")
    with_images.build("--images", manifest)
    with_images.train("--run_name", "r")
    report, output = _report(with_images, "--images", manifest)
    assert "the masking experiment is skipped: it needs images of at least two labels" in output
    featured = read_data(report, "overview")["featured"][0]
    record = read_data(report, f"latents/{featured}")
    assert record["n_images"] == 20, "all images were read, with a label or without"
    assert [label["n_images"] for label in record["labels"]] == [3]
    groups = with_images.root / "groups.csv"
    groups.write_text("patient,group\n")
    text = _report(with_images, "--images", manifest, "--groups", groups, code=1)[1]
    assert "cannot be used: the store has no patient column. Build it from a CSV" in text


def test_image_numbers_do_not_reveal_the_order_of_names(with_sae):
    plain = shutil.copytree(_report(with_sae)[0], with_sae.root / "plain")
    shuffled, _ = _report(with_sae, "--pseudonymize")
    one, other = read_data(plain, "overview"), read_data(shuffled, "overview")
    assert one["featured"] == other["featured"]
    pairs = {}
    for latent in one["featured"]:
        records = read_data(plain, f"latents/{latent}"), read_data(shuffled, f"latents/{latent}")
        for item, again in zip(records[0]["top"], records[1]["top"], strict=True):
            assert (item["value"], item["label"], item["map"]) == (again["value"], again["label"], again["map"])
            pairs[item["row"]] = again["row"]
    rows = sorted(pairs)
    assert len(rows) > 15
    assert one["images"]["rows"] == rows
    assert other["images"]["rows"] == sorted(pairs.values())
    order = np.argsort([pairs[row] for row in rows])
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.9
    for row, number in pairs.items():
        assert (plain / f"thumbnails/{row}.jpg").read_bytes() == (shuffled / f"thumbnails/{number}.jpg").read_bytes()
        record, again = read_data(plain, f"images/{row}"), read_data(shuffled, f"images/{number}")
        assert (again["row"], again["path"]) == (number, None)
        assert record["token_values"] == again["token_values"]
        assert one["patients"][record["patient"]] not in json.dumps(again)
    store = ActivationStore.open(with_sae.store)
    text = "".join(path.read_text() for path in _files(shuffled / "data"))
    for secret in {*store.images.path, *store.images.patient}:
        assert f'"{secret}"' not in text
    assert read_data(shuffled, "rows/0")["paths"] is None
    numbers = unpack(read_data(shuffled, "listings/patient-0")["numbers"])
    starts = other["book"]["patient_starts"]
    for first, end in itertools.pairwise(starts):
        assert (np.diff(numbers[first:end]) > 0).all(), "ordered by the shuffled numbers, not by path"
    again, _ = _report(with_sae, "--pseudonymize")
    assert read_data(again, "overview")["images"] == other["images"], "the same key gives the same numbers"


def test_dead_autoencoders_are_reported(with_images):
    with_images.build()
    with_images.train("--run_name", "r")
    sae, cfg = load_sae(with_images.sae())
    with torch.no_grad():
        sae.b_enc.fill_(-1000)
    save_sae(with_images.sae(), sae, cfg)
    text = _report(with_images, code=1)[1]
    assert "no latent of this autoencoder is active on any image of the store: there is nothing to show" in text


def test_patients_with_only_unreadable_images_count_as_none(with_images):
    files = sorted(path for path in with_images.images.rglob("*.png") if "broken" not in path.name)[:20]
    (with_images.root / "junk.png").write_bytes(b"no image")
    rows = [f"{path.relative_to(with_images.root)},blast," for path in files] + ["junk.png,blast,ghost"]
    manifest = with_images.root / "m.csv"
    manifest.write_text("path,label,patient\n" + "\n".join(rows) + "\n")
    with_images.build("--images", manifest)
    with_images.train("--run_name", "r")
    report, _ = _report(with_images, "--images", manifest, "--pseudonymize")
    assert read_data(report, "overview")["has_patients"] is False
    assert read_data(report, "overview")["patients"] == []


def test_latents_by_option(with_sae):
    report, output = _report(with_sae, "--latents", "5, 80-82,5")
    assert read_data(report, "overview")["featured"] == [5, 80, 81, 82]
    assert "4 latents and" in output
    assert "latents of --latents" in read_data(report, "overview")["featured_reason"]
    assert (
        "--latents names 96, but the autoencoder's latents are 0..95. Did you mean '9'?"
        in _report(with_sae, "--latents", "96", code=1)[1]
    )
    text = _report(with_sae, "--log10_mean", "9:", code=1)[1]
    assert "active latents passes" in text
    assert "--log10_mean 9:" in text


def test_latents_that_differ_between_groups_are_featured_in_turn():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, size=(60, 40)).astype(float)
    groups = np.repeat([0, 1, 2], 20)
    for group in range(3):
        counts[groups == group, 5 * group : 5 * group + 5] += 9 - np.arange(5)
    comparisons = [compare_groups(counts, groups == group) for group in range(3)]
    allowed = np.ones(40, dtype=bool)
    chosen = most_different(comparisons, allowed, 6).tolist()
    assert {latent // 5 for latent in chosen[:6]} == {0, 1, 2}
    assert set(most_different(comparisons, allowed, 40).tolist()) >= set(range(15))
    allowed[:10] = False
    assert set(most_different(comparisons, allowed, 40).tolist()) & set(range(15)) == set(range(10, 15))
    assert most_different([], allowed, 5).tolist() == []
    assert most_different(comparisons, allowed, 0).tolist() == []


def test_latents_of_a_cluster(with_sae):
    report, _ = _report(with_sae, "--clusters", 3, "--cluster", 2)
    overview = read_data(report, "overview")
    clusters, sparsity = (unpack(overview["latents"][name]) for name in ("cluster", "sparsity"))
    assert set(clusters[overview["featured"]].tolist()) == {2}
    assert len(overview["featured"]) == (clusters == 2).sum() < (sparsity > 0).sum()
    means = [sparsity[clusters == number].mean() for number in range(3)]
    assert means == sorted(means, reverse=True)
    assert "cluster must lie in 0..2, as clusters is 3, found 3" in _report(
        with_sae, "--clusters", 3, "--cluster", 3, code=2
    )[1].replace("\n", " ")


def test_only_missing_statistics_are_computed(with_sae):
    output = _report(with_sae)[1]
    assert "no results of `features`" in output
    assert "no results of `patients`" in output
    output = _report(with_sae)[1]
    assert "no results" not in output


def test_a_folder_that_is_not_a_report_is_never_replaced(with_sae):
    out = with_sae.root / "page"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "already exists and is not a report. Give another --out" in _report(with_sae, code=1)[1]
    assert (out / "thesis.tex").read_text() == "years of work"


def test_changed_and_missing_images_get_no_picture(with_sae):
    report, _ = _report(with_sae)
    rows = read_data(report, "overview")["images"]["rows"]
    store = ActivationStore.open(with_sae.store)
    first, second = (with_sae.images / store.images.path[row] for row in rows[:2])
    first.unlink()
    shutil.copy(with_sae.images / store.images.path[rows[2]], second)
    report, output = _report(with_sae)
    assert f"2 of {len(rows)} images have no picture" in output
    assert not (report / "thumbnails" / f"{rows[0]}.jpg").exists()
    assert not (report / "thumbnails" / f"{rows[1]}.jpg").exists()
    assert any("2 of" in text for text in read_data(report, "overview")["messages"])


def test_a_killed_report_keeps_the_older_one(with_sae):
    report, _ = _report(with_sae)
    (report / "data" / "of-the-older-one").touch()
    arguments = [
        "report", "--root_dir", with_sae.root, "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--out", report
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "cache", "pipeline")), "OMP_NUM_THREADS": "1"}
    killed = 0
    for later_s in (0.06, 0.03, 0.01, 0):
        child = subprocess.Popen([sys.executable, "-c", HEARING_MAIN, *map(str, arguments)], env=environment)
        while not any(report.parent.glob(f"page.{child.pid}.partial")) and child.poll() is None:
            time.sleep(0.002)
        time.sleep(later_s)
        child.kill()
        if child.wait() != -signal.SIGKILL:  # it had ended before
            (report / "data" / "of-the-older-one").touch()
            continue
        killed += 1
        assert (report / "data" / "of-the-older-one").exists()
        assert read_data(report, "overview")["store"]["valid"] == 22
    assert killed, "it was killed in the middle of writing"
    _report(with_sae)
    assert not (report / "data" / "of-the-older-one").exists()
    assert [path.name for path in report.parent.iterdir() if path.name.startswith("page.")] == []


def test_json(with_sae):
    out = with_sae.root / "page"
    result = with_sae.run("report", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--out", out, "--json")
    facts = json.loads(result.stdout)
    assert facts["index"] == str(out / "index.html")
    assert facts["n_without_picture"] == 0
    assert facts["key"] is None


def test_ranges_and_lists_of_latents():
    assert parse_range("entropy", None) is None
    assert parse_range("entropy", "-3:-1.5") == (-3, -1.5)
    assert parse_range("entropy", ":2") == (None, 2)
    for wrong in ("3", "a:b", "nan:1", ""):
        with pytest.raises(ValueError, match="entropy must be LO:HI, such as"):
            parse_range("entropy", wrong)
    with pytest.raises(ValueError, match="must rise from LO to HI"):
        parse_range("entropy", "2:1")
    assert parse_latents("7, 3-5 ,4") == [7, 3, 4, 5]
    for wrong in ("", "1,,2", "5-3", "-1", "x"):
        with pytest.raises(ValueError, match="latents must be numbers and ranges"):
            parse_latents(wrong)
    with pytest.raises(ValueError, match="more than 100,000 latents"):
        parse_latents("0-999999999")
    with pytest.raises(ValueError, match="clusters must be at most 100, found 101"):
        PageConfig(clusters=101)
    with pytest.raises(ValueError, match="n_latents must be at least 1, found 0"):
        PageConfig(n_latents=0)


def test_groups_from_files_and_labels(tmp_path, made):
    images = made[4].images
    path = tmp_path / "g.csv"

    def groups(text):
        path.write_text(text)
        return find_groups(["p0", "p1", "p3"], images, path)

    found = groups("patient,group,age\np3,b,4\np0,a,5\np1,,6\n")
    assert found.names == ("a", "b")
    assert found.of.tolist() == [0, -1, 1]
    assert found.gaps == f"'{path}' has no group for 1 of 3 patients, such as 'p1'"
    assert groups("patient,group\np3,b\np0,a\np1,a\nq9,a\nq10,b\n").gaps == (
        f"'{path}' names patients that are not in the store (2), such as 'q10'"
    )
    assert groups("patient,group\np3,b\np0,a\np1,a\n").gaps == ""
    assert groups("patient,group\n p3 ,b \np0,a\np1, b\n").names == ("a", "b"), "spaces at the ends are none's"
    assert (
        groups("patient,group\np0,a\np1,a\n").why_none
        == "All patients belong to one group, 'a': there is nothing to compare."
    )
    for text, message in (
        ("id,group\np0,a\n", "must have the columns patient and group, each once, found: 'id', 'group'"),
        ("patient,group\np0,a\np0,b\n", "gives patient 'p0' two groups, 'a' and 'b'"),
        ("patient,group\np0,\x1b[1m\np0,b\n", "gives patient 'p0' two groups, '\\x1b[1m' and 'b'"),
        ("id,\x1b[1m\n", "found: 'id', '\\x1b[1m'"),
        (
            "patient,group\nx,a\n",
            "names none of the 3 patients of the store, such as 'p0', 'p1', 'p3'",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            groups(text)
    with pytest.raises(UserError, match="each once, found: nothing"):
        groups("")
    with pytest.raises(UserError, match="is an Excel workbook or a ZIP archive: --groups takes a CSV"):
        groups("PK\x03\x04\0")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-16: .* Save it as UTF-8"):
        find_groups(["p0"], images, path)
    with pytest.raises(UserError, match="--groups takes a CSV"):
        find_groups(["p0"], images, tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\): --groups takes a CSV"):
        find_groups(["p0"], images, tmp_path)
    one_each = images._replace(label=[f"of-{patient}" if patient else "" for patient in images.patient])
    assert find_groups(["p0", "p1"], one_each, None).names == ("of-p0", "of-p1")
    assert "the images have no labels" in find_groups(["p0"], images._replace(label=[""] * 23), None).why_none


@pytest.mark.parametrize(
    "text",
    [
        "patient;group\np0;a\np1;b\n", "patient\tgroup\np0\ta\np1\tb\n", "\ufeffpatient,group\np0,a\np1,b\n",
        "\ufeffsep=;\npatient;group\np0;a\np1;b\n", "Patient ID,Cohort\np0,a\np1,b\np2,NA\nNA,b\np3\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_groups_as_spreadsheets_write_them(tmp_path, text, encoding):
    path = tmp_path / "groups.csv"
    path.write_bytes((text.removeprefix("\ufeff") if encoding == "utf-16" else text).encode(encoding))
    images = ImageTable(["x"] * 2, ["p0", "p1"], ["", ""])
    found = find_groups(["p0", "p1"], images, path)
    assert found.names == ("a", "b")
    assert found.of.tolist() == [0, 1]
    assert found.gaps == ""


def test_pseudonyms_are_keyed_and_stable(tmp_path):
    key = ensure_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert ensure_key(tmp_path / "key") == key
    names = ["p1", "p2"]
    assert pseudonymise(names, key) == pseudonymise(names, key)
    assert pseudonymise(names, key) != pseudonymise(names, b"x" * 32)
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(UserError, match="must contain a key of 32 bytes, found 5"):
        ensure_key(tmp_path / "key")


def test_notes_are_validated_and_never_overwritten(tmp_path):
    path = tmp_path / "notes.json"
    assert read_notes(path, 5) == {}
    notes = {3: {"name": "nucleoli", "note": "<b>\u2028"}}
    write_notes(path, notes)
    assert read_notes(path, 5) == notes
    with pytest.raises(UserError, match=r"is not a file of latent notes \(latents must lie in 0\.\.2\)"):
        read_notes(path, 3)
    for wrong in (b"{", b"[]", b'{"notes": {"x": {}}}', b'{"notes": {"1": {"name": 3}}}'):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="fix or move it"):
            read_notes(path, 5)
        assert path.read_bytes() == wrong
    with pytest.raises(ValueError, match="at most 200 and 10,000 characters"):
        check_note({"name": "x" * 201})


def test_notes_go_into_the_report(with_sae):
    _report(with_sae)
    write_notes(with_sae.features() / "latent_notes.json", {7: {"name": "rim", "note": ""}})
    report, _ = _report(with_sae)
    assert read_data(report, "overview")["notes"] == {"7": {"name": "rim", "note": ""}}


def test_notes_belong_to_an_autoencoder_and_to_images(with_sae):
    _report(with_sae)
    folder, about = with_sae.features(), Subject.of(open_inputs(_page_config(with_sae)))
    path, note = folder / "latent_notes.json", {7: {"name": "rim", "note": ""}}
    write_notes(path, note, subject=about)
    assert read_notes(path, 96, subject=about) == note
    for wrong, text in (
        (
            about._replace(sae_sha256="0"),
            "were written about another autoencoder. Move the file away to start a new one",
        ),
        (about._replace(store_contents="0"), "were written about other images: the store was made again since"),
    ):
        before = path.read_bytes()
        with pytest.raises(UserError, match=re.escape(text)):
            read_notes(path, 96, subject=wrong)
        with pytest.raises(UserError, match=re.escape(text)):
            save_note(path, 96, 3, note[7], subject=wrong)
        assert path.read_bytes() == before
        assert read_notes(path, 96, subject=wrong, keep=True) == note
    write_notes(path, note, subject=about._replace(sae_sha256="0"))
    options = ("--dataset_name", "toy", "--sae_path", with_sae.sae())
    for verb, *more in (("report", "--masking_images", 0), ("export", "--format", "csv")):
        output = with_sae.run(verb, *options, *more, code=1).output
        assert f"the names and notes of latents in '{path}' were written about another autoencoder" in output
        with_sae.run(verb, *options, *more, "--keep_notes")
    write_notes(path, note)  # of an older version, which does not say
    with_sae.run("report", *options, "--masking_images", 0)


def _page_config(place):
    return ReportConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae())


def test_data_files_cannot_be_broken_out_of():
    text = to_script("x", {"name": "</script><!-- \u2028 \u2029 & ');alert(1)//"}).decode()
    assert not re.search(r"[<>&\u2028\u2029]", text)
    assert json.loads(text[len('cytosae.receive("x",') : -3])["name"].startswith("</script>")
    with pytest.raises(ValueError, match="Out of range float values"):
        to_script("x", float("nan"))
    packed = pack(np.array([[1, 65535]], dtype=np.uint16))
    assert packed["shape"] == [1, 2]
    assert unpack(packed).tolist() == [[1, 65535]]


def test_images_without_patients_and_labels(with_images):
    with (with_images.root / "m.csv").open("w", newline="") as file:
        paths = sorted(with_images.images.rglob("0*.png"))
        csv.writer(file).writerows([["path"], *[[path.relative_to(with_images.root)] for path in paths]])
    with_images.run(
        "build",
        "--dataset_name",
        "bare",
        "--images",
        with_images.root / "m.csv",
        "--model_path",
        with_images.vit,
        "--workers",
        0,
    )
    with_images.run(
        "train", "--dataset_name", "bare", "--expansion_factor", 4, "--batch_size", 4, "--total_training_tokens", 60,
        "--run_name", "b", "--lr_warm_up_steps", 3,
    )  # fmt: skip
    out = with_images.root / "page"
    with_images.run("report", "--dataset_name", "bare", "--sae_path", with_images.sae("b"), "--out", out)
    overview = read_data(out, "overview")
    assert overview["has_patients"] is False
    assert overview["labels"] == []
    assert (unpack(overview["latents"]["entropy"]) == -1).all()
    assert not (out / "data" / "patients.js").exists()
    assert overview["featured"]
