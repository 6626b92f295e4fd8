"""What a latent's page says beside its top images, against plain computations from all activations."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, spearmanr
from sklearn.metrics import f1_score, roc_auc_score

from cytosae.analysis.quantile_images import images_at_quantiles
from cytosae.formats.checkpoint import load_sae, save_sae
from cytosae.sae.registry import make_sae
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.report.measures import value_correlations
from cytosae_pipeline.statistics.halves import split_in_halves
from tests.conftest import Workplace
from tests.support.pictures import write_pictures
from tests.support.reports import read_data, unpack

N_PATIENTS, THRESHOLD = 12, 0.02
LATENTS = list(range(12))


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    """A store of 60 images with patients, sites and a number for most images, and an autoencoder."""
    root = tmp_path_factory.mktemp("latents") / "root"
    shutil.copytree(_pristine["images"], root)
    place = Workplace(root)
    write_pictures(place.images, 60, broken=False)
    lines = []
    files = sorted(path for path in place.images.rglob("*.png") if "broken" not in path.name)
    for at, path in enumerate(files):
        site = ("", "north", "south", "<b>east</b>")[at % 4]
        area = "" if at % 9 == 0 else f"{(at * 37) % 60}.5"
        lines.append(f"{path.relative_to(root)},{'ab'[at % 2]},patient{at % N_PATIENTS:02d},{site},{area},note")
    (root / "m.csv").write_text("path,label,patient,site,area,text\n" + "\n".join(lines) + "\n")
    place.build("--images", root / "m.csv")
    place.train("--run_name", "r")
    return place


def report(place, out, *arguments, code=0):
    return place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--masking_images", 0, "--map_images", 0,
        "--latents", ",".join(map(str, LATENTS)), "--threshold", THRESHOLD, "--out", place.root / out, *arguments,
        code=code,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(place):
    """Its report, and the activations of the chosen latents on all images."""
    report(place, "page")
    store, sae = ActivationStore.open(place.store), load_sae(place.sae()).sae
    with StoreReader(store) as reader:
        acts = sae.encode(torch.from_numpy(reader.read(np.arange(store.n_images))).float())[..., LATENTS]
    records = [read_data(place.root / "page", f"latents/{latent}") for latent in LATENTS]
    return place.root / "page", store, acts.numpy(), records


def halves_of(store):
    patients = np.unique(store.images.patient, return_inverse=True)[1]
    labels = np.unique(store.images.label, return_inverse=True)[1]
    return split_in_halves(patients, labels, seed=0), labels, patients


def test_images_at_quantiles_are_those_of_all_scores_and_have_pages(made):
    page, _store, acts, records = made
    pages = {int(path.stem) for path in (page / "data" / "images").iterdir()}
    seen = 0
    for place, record in enumerate(records):
        scores = acts[..., place].mean(axis=1)
        assert record["n_active"] == (scores > 0).sum()
        expected = images_at_quantiles(scores, (0.9, 0.5, 0.0), 3)
        assert len(record["quantiles"]) == len(expected)
        for found, one in zip(record["quantiles"], expected, strict=True):
            assert found["value"] == pytest.approx(one.value, rel=1e-4)
            values = [image["value"] for image in found["images"]]
            np.testing.assert_allclose(values, one.scores, rtol=1e-4)
            np.testing.assert_allclose(values, scores[[image["row"] for image in found["images"]]], rtol=1e-4)
            assert {image["row"] for image in found["images"]} <= pages
            for image in found["images"]:
                levels = unpack(image["map"])
                peak = acts[image["row"], 1:, place].max()
                assert image["peak"] == pytest.approx(peak, rel=1e-4, abs=1e-7)
                assert levels.max(initial=0) == (255 if peak > 0 else 0)
                seen += 1
    assert seen > 50


def test_labels_are_told_as_scikit_learn_says(made):
    _page, store, acts, records = made
    choosing, labels, patients = halves_of(store)
    assert not set(patients[choosing]) & set(patients[~choosing])
    for place, record in enumerate(records):
        scores, rules = acts[..., place].mean(axis=1), record["rules"]
        assert rules["unit"] == "patient"
        assert rules["n_images"] == [choosing.sum(), (~choosing).sum()]
        by_label = {rule["label"]: rule for rule in rules["rules"]}
        for label, rule in by_label.items():
            for side, half in enumerate((choosing, ~choosing)):
                expected = roc_auc_score(labels[half] == label, scores[half])
                assert rule["auroc"][side] == pytest.approx(expected, abs=1e-6)
                assert rule["n_images"][side] == (labels[half] == label).sum()
            if rule["threshold"] is not None:
                said = scores[~choosing] >= rule["threshold"] * (1 - 1e-5)
                assert rule["f1"][1] == pytest.approx(f1_score(labels[~choosing] == label, said), abs=1e-6)
        best = max(by_label.values(), key=lambda rule: (rule["auroc"][0], -rule["label"]))
        assert rules["best"] == best["label"]


def test_shares_are_those_of_the_tokens_above_the_threshold(made):
    page, store, acts, records = made
    overview = read_data(page, "overview")
    names, sites = overview["sources"]["names"], store.image_columns["site"].tolist()
    above = (acts > THRESHOLD).sum(axis=1)
    assert overview["sources"]["unit"] == "patient"
    for place, record in enumerate(records):
        total = above[:, place].sum()
        assert record["sources"]["total"] == total
        for one in record["sources"]["largest"]:
            is_theirs = np.array(store.images.patient) == names[one["source"]]
            assert one["share"] == pytest.approx(above[is_theirs, place].sum() / total)
            assert one["of_images"] == pytest.approx(is_theirs.mean())
        known = np.array([bool(site) for site in sites])
        assert record["sites"]["column"] == "site"
        assert record["sites"]["total"] == above[known, place].sum()
        for one in record["sites"]["largest"]:
            is_here = np.array(sites) == one["name"]
            assert one["share"] == pytest.approx(above[is_here, place].sum() / above[known, place].sum())
            assert one["of_images"] == pytest.approx(is_here.sum() / known.sum())
    shares = unpack(overview["latents"]["source_share"])
    for place, record in enumerate(records):
        assert shares[LATENTS[place]] == pytest.approx(
            max((one["share"] for one in record["sources"]["largest"]), default=0), rel=1e-6
        )


def _values_csv(place, columns, name="cells.csv", skip=()):
    store = ActivationStore.open(place.store)
    path = place.root / name
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *columns])
        for row, image in enumerate(store.images.path):
            if row not in skip:
                writer.writerow([f"./{image}", *(column[row] for column in columns.values())])
    return path


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_correlations_with_image_values_are_scipys(place, made, monkeypatch, at_once):
    monkeypatch.setattr(value_correlations, "_RANKED_AT_ONCE", at_once)
    _page, store, acts, _records = made
    choosing, *_ = halves_of(store)
    scores = acts.mean(axis=1)
    planted = int(np.argmax((scores > 0).sum(axis=0)))
    rng = np.random.default_rng(0)
    columns = {
        "nucleus <i>area</i>": np.round(100 * scores[:, planted], 3),
        "noise": rng.normal(size=60),
        "kind": ["x"] * 60,
    }
    path = _values_csv(place, columns, skip=(3, 5))
    output = report(place, "with-values", "--image_values", path).output
    assert "2 of 60 images have no line in" in output
    assert "columns of" in output
    assert "that are not numbers are left out: 'kind'" in output
    with (place.root / "with-values" / "image_values.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(LATENTS) * 3
    expected = {}
    for name, column in (("area", store.image_columns["area"]), *list(columns.items())[:2]):
        values = np.array(column, dtype=np.float64)
        if name != "area":
            values[[3, 5]] = np.nan
        for at, latent in enumerate(LATENTS):
            for half, side in ((choosing, ""), (~choosing, "_held_out")):
                known = half & ~np.isnan(values)
                with np.errstate(all="ignore"):
                    found = spearmanr(scores[known, at], values[known])
                expected[latent, name, side] = known.sum(), found.statistic, found.pvalue
    tested = {key: one for key, one in expected.items() if key[2] == "" and one[1] == one[1]}
    q = dict(zip(tested, false_discovery_control([one[2] for one in tested.values()]), strict=True))
    for line in lines:
        for side in ("", "_held_out"):
            n, rho, p = expected[int(line["latent"]), line["column"], side]
            assert int(line["n" + side]) == n
            if rho != rho:
                assert line["rho" + side] == line["p" + side] == ""
                continue
            assert float(line["rho" + side]) == pytest.approx(rho, abs=2e-3)
            assert float(line["p" + side]) == pytest.approx(p, rel=0.05, abs=1e-9)
        key = (int(line["latent"]), line["column"], "")
        assert float(line["q"] or "nan") == pytest.approx(q.get(key, float("nan")), rel=0.05, abs=1e-9, nan_ok=True)
        assert line["selected"] == str(int(q.get(key, 1) < 0.05))
    record = read_data(place.root / "with-values", f"latents/{LATENTS[planted]}")["values"]
    assert record["columns"][0]["name"] == "nucleus <i>area</i>"
    assert record["columns"][0]["selected"]
    assert record["columns"][0]["rho"][1] > 0.99
    assert record["n_tested"] == len(tested)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,a\nnowhere.png,1\n",
            "none of the 1 path in '.*' is an image of store .*: found 'nowhere.png', expected",
        ),
        ("path,a\n", "none of the 0 paths in .*: found nothing, expected paths such as 'dataset/toy/"),
        ("name,a\nx,1\n", "must have the column path, once, found: 'name', 'a'"),
        ("path,a\nFIRST,x\n", "has no column of numbers beside the path: expected at least one"),
        ("path,a\nFIRST,1\n./FIRST,2\n", "line 3 has image 'dataset/.*' for the second time"),
        ("path,a,a\nFIRST,1,2\n", "has the column 'a' twice, expected once"),
        (f"path,{','.join(f'c{at}' for at in range(256))}\nFIRST{',1' * 256}\n", "found 257 columns of numbers"),
    ],
)
def test_what_cannot_be_read_as_image_values_is_said(place, text, message):
    first = ActivationStore.open(place.store).images.path[0]
    path = place.root / "wrong.csv"
    path.write_text(text.replace("FIRST", first))
    output = report(place, "wrong", "--image_values", path, code=1).output
    assert re.search(message, " ".join(output.split())), output
    assert not (place.root / "wrong").exists()


def test_image_values_that_are_missing_or_replace_a_column_are_said(place):
    assert "does not exist: --image_values takes a CSV" in report(place, "x", "--image_values", "no.csv", code=1).output
    path = _values_csv(place, {"area": range(60)}, "more.csv")
    path.write_text(path.read_text() + "other.png,1\n")
    output = " ".join(report(place, "more", "--image_values", path).output.split())
    assert "1 of 61 paths in" in output
    assert "is no image of the store and left out, such as 'other.png'" in output
    assert "1 column of" in output
    assert "replace those of the same name in the store's images: 'area'" in output


def test_partners_in_other_autoencoders_are_found(place):
    sae, cfg = load_sae(place.sae())
    order = torch.randperm(sae.W_dec.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter, dim in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
            parameter.copy_(parameter.index_select(dim, order))
    other = place.root / "other.pt"
    save_sae(other, sae, {**cfg, "run_name": "<b>seed 1</b>"})
    report(place, "seeds", "--other_sae_path", other)
    overview = read_data(place.root / "seeds", "overview")
    (found,) = overview["partners"]
    assert found["name"] == "<b>seed 1</b>"
    assert order[torch.from_numpy(unpack(found["latent"]).astype(np.int64))].tolist() == list(range(len(order)))
    np.testing.assert_allclose(unpack(found["cosine"]), 1, atol=1e-4)
    for latent in LATENTS:
        (partner,) = read_data(place.root / "seeds", f"latents/{latent}")["partners"]
        assert order[partner["partner"]] == latent
        assert partner["cosine"] == pytest.approx(1, abs=1e-3)


def test_other_autoencoders_that_say_nothing_are_refused(place, tmp_path):
    output = " ".join(report(place, "x", "--other_sae_path", place.sae(), code=1).output.split())
    assert "is the report's own autoencoder: every latent would find itself" in output
    assert "no autoencoder at" in report(place, "x", "--other_sae_path", place.root / "none.pt", code=1).output
    save_sae(tmp_path / "narrow.pt", make_sae("relu", 7, 12), {})
    output = " ".join(report(place, "x", "--other_sae_path", tmp_path / "narrow.pt", code=1).output.split())
    assert "has decoder rows of 7 numbers, the report's autoencoder of" in output


def test_sites_come_from_the_table_of_patients_or_any_column(place, made):
    table = place.root / "patients.csv"
    rows = [f"patient{at:02d},{'A' if at < 6 else 'B'}" for at in range(N_PATIENTS)]
    table.write_text("patient,Scanner\n" + "\n".join(rows) + "\n")
    report(place, "scanners", "--covariates", table, "--site_column", "scanner")
    _page, store, acts, _records = made
    above = (acts > THRESHOLD).sum(axis=1)
    is_a = np.array(store.images.patient) < "patient06"
    for place_of, latent in enumerate(LATENTS):
        sites = read_data(place.root / "scanners", f"latents/{latent}")["sites"]
        assert sites["column"] == "Scanner"
        for one in sites["largest"]:
            here = is_a if one["name"] == "A" else ~is_a
            assert one["share"] == pytest.approx(above[here, place_of].sum() / above[:, place_of].sum())
    output = " ".join(report(place, "x", "--site_column", "scaner", code=1).output.split())
    assert "--site_column 'scaner' names no column: beside path, label and patient, the images of store" in output
    output = " ".join(report(place, "x", "--site_column", "nope", "--covariates", table, code=1).output.split())
    assert "patients.csv' has 'Scanner', the images of store" in output
    assert "--covariates patients.csv (columns patient,site)" in output


def test_the_parts_of_a_store_do_not_change_a_page(place, made, tmp_path):
    page, *_ = made
    root = tmp_path / "root"
    shutil.copytree(place.root, root, ignore=shutil.ignore_patterns("page", "with-values", "activations"))
    other = Workplace(root)
    other.build("--images", root / "m.csv", "--shard_images", 17)
    report(other, "page", "--batch_size", 3)
    for latent in LATENTS:
        assert read_data(root / "page", f"latents/{latent}") == read_data(page, f"latents/{latent}")


def test_no_images_at_quantiles_are_shown_on_request(place):
    report(place, "none", "--quantile_images", 0)
    record = read_data(place.root / "none", f"latents/{LATENTS[0]}")
    assert record["quantiles"] == []
    assert record["rules"] is not None


def test_pseudonyms_hide_patients_and_keep_the_numbers(place, made):
    _page, _store, _acts, records = made
    report(place, "hidden", "--pseudonymize")
    for path in (place.root / "hidden").rglob("*"):
        if path.is_file():
            assert b"patient0" not in path.read_bytes(), path
    overview = read_data(place.root / "hidden", "overview")
    assert all(re.fullmatch(r"patient-[0-9a-f]{12}", name) for name in overview["sources"]["names"])
    for latent, record in zip(LATENTS, records, strict=True):
        hidden = read_data(place.root / "hidden", f"latents/{latent}")
        assert (
            sorted(one["share"] for one in hidden["sources"]["largest"])[-1:]
            == sorted(one["share"] for one in record["sources"]["largest"])[-1:]
        )
        assert [one["value"] for one in hidden["quantiles"]] == [one["value"] for one in record["quantiles"]]
        assert hidden["rules"] == record["rules"]


def test_results_of_other_programs_refuse_what_needs_a_store(tmp_path):
    """The options are refused together with those of test_published.py."""
    from cytosae_pipeline.config import ReportConfig
    from cytosae_pipeline.errors import UserError
    from cytosae_pipeline.report.static import _write_published

    for name, value in (("site_column", "s"), ("image_values", "v.csv"), ("other_sae_path", ("o.pt",))):
        config = ReportConfig(root_dir=tmp_path, dataset_name="toy", sae_path="x", **{name: value})
        with pytest.raises(UserError, match=f"--{name} needs a store, but"):
            _write_published(config, tmp_path)
