"""The demo's planted truth on the pages of latents, in a real browser; names from files stay text."""

import csv

import numpy as np
import pytest
import torch

from cytosae.formats.checkpoint import load_sae, save_sae
from tests.conftest import Workplace
from tests.support.browser import Visit, browser_or_skip, file_url
from tests.support.reports import read_data, unpack

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    with browser_or_skip() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(demo_run, tmp_path_factory):
    """The demo's report again, with values of images, sites, a second autoencoder, and a high threshold."""
    root, extra = demo_run.root, tmp_path_factory.mktemp("extra")
    with (root / "dataset" / "demo-0" / "manifest.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    rng = np.random.default_rng(0)
    with (extra / "cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "is_eosinophil", HOSTILE])
        writer.writerows([cell["path"], int(cell["label"] == "eosinophil"), rng.normal()] for cell in cells)
    patients = sorted({cell["patient"] for cell in cells})
    with (extra / "patients.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "site"])
        writer.writerows([patient, (HOSTILE, "north")[at % 2]] for at, patient in enumerate(patients))
    (path,) = root.glob("out/checkpoints/*/final_*.pt")
    sae, cfg = load_sae(path)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.flip(0))
    save_sae(extra / "other.pt", sae, {**cfg, "run_name": HOSTILE})
    Workplace(root).run(
        "report", "--dataset_name", "demo-0", "--images", root / "dataset" / "demo-0" / "manifest.csv",
        "--model_path", "embedded", "--sae_path", path, "--groups", root / "dataset" / "demo-0" / "patients.csv",
        "--image_values", extra / "cells.csv", "--covariates", extra / "patients.csv",
        "--other_sae_path", extra / "other.pt", "--masking_images", 0, "--map_images", 0, "--n_latents", 60,
        "--out", extra / "page",
    )  # fmt: skip
    return extra / "page"


def _records(page):
    overview = read_data(page, "overview")
    return overview, [read_data(page, f"latents/{latent}") for latent in overview["featured"]]


def test_planted_classes_are_told_on_patients_that_were_held_out(page):
    overview, records = _records(page)
    names = [label["name"] for label in overview["labels"]]
    told = {}
    for record in records:
        rules = record["rules"]
        assert rules["unit"] == "patient"
        best = next(rule for rule in rules["rules"] if rule["label"] == rules["best"])
        told[names[rules["best"]]] = max(told.get(names[rules["best"]], 0), best["auroc"][1])
    assert sum(auroc > 0.9 for auroc in told.values()) >= 4, told


def test_an_image_value_of_a_planted_class_is_recovered_and_noise_is_not(page):
    overview, records = _records(page)
    eosinophil = [label["name"] for label in overview["labels"]].index("eosinophil")
    columns = [{one["name"]: one for one in record["values"]["columns"]} for record in records]
    strongest = max(range(len(records)), key=lambda at: columns[at]["is_eosinophil"]["rho"][0] or 0)
    found = columns[strongest]["is_eosinophil"]
    assert found["selected"]
    assert found["rho"][1] > 0.3
    assert records[strongest]["rules"]["best"] == eosinophil
    n_false, n_true = (sum(one[name]["selected"] for one in columns) for name in (HOSTILE, "is_eosinophil"))
    assert n_true > 10
    assert n_false <= 0.2 * (n_true + n_false)
    assert np.mean([abs(one[HOSTILE]["rho"][1] or 0) for one in columns]) < 0.1


def test_images_at_quantiles_stand_beside_the_largest(browser, page):
    _overview, records = _records(page)
    record = max(records, key=lambda record: record["n_active"])
    visit = Visit(browser, file_url(page))
    try:
        visit.go(f"latent/{record['latent']}")
        visit.page.wait_for_selector(".band .top-image img")
        bands = visit.page.locator(".band")
        assert bands.count() == 3
        for at, band in enumerate(record["quantiles"]):
            rows = bands.nth(at).locator(".top-image").evaluate_all("all => all.map(one => Number(one.dataset.row))")
            assert rows == [image["row"] for image in band["images"]]
        titles = visit.page.locator(".band h3").all_inner_texts()
        assert titles[0].startswith("90\xa0% quantile: ")
        assert titles[1].startswith("50\xa0% quantile: ")
        assert titles[2] == "Just above 0"
        text = visit.page.inner_text("#view")
        assert f"among the {record['n_active']:,} images in which the latent is active" in text
        # The image of a band opens with the map of the same latent.
        visit.page.locator(".band a").first.click()
        visit.page.wait_for_selector(".large-cell")
        assert f"Latent {record['latent']}" in visit.page.inner_text("#view")
    finally:
        visit.close()


def test_every_number_of_a_latent_is_shown_and_names_stay_text(browser, page):
    overview, records = _records(page)
    record = next(record for record in records if record["rules"]["best"] >= 0 and record["sites"]["largest"])
    visit = Visit(browser, file_url(page))
    try:
        visit.go(f"latent/{record['latent']}")
        visit.page.wait_for_selector(".band")
        text = visit.page.inner_text("#view")
        best = overview["labels"][record["rules"]["best"]]["name"]
        assert f"Chosen label: {best}, held-out AUROC" in text
        assert "is shown on the other half" in text
        assert "Share by patient" in text
        assert "Share by site" in text
        assert "Image values" in text
        assert "In other autoencoders" in text
        assert text.count(HOSTILE) == 3, "a site, a value and an autoencoder"
        rules = visit.page.get_by_role("region", name="Labels told from its activation").locator("tbody tr")
        assert rules.count() == len(record["rules"]["rules"])
        (partner,) = record["partners"]
        assert visit.page.locator("text=In other autoencoders").count() == 1
        assert f"Latent {partner['partner']}" in text
        assert overview["latents"]["sparsity"]["shape"][0] - 1 - record["latent"] == partner["partner"]
    finally:
        visit.close()


def test_latents_of_one_patient_are_named_and_can_be_filtered(browser, page):
    overview, _records_of = _records(page)
    one = np.flatnonzero(unpack(overview["latents"]["one_source"]))
    active = unpack(overview["latents"]["sparsity"]) > 0
    assert 0 < len(one) < active.sum(), "rare latents of the demo are of one patient"
    latent = int(one[0])
    name = overview["sources"]["names"][unpack(overview["latents"]["source"])[latent]]
    visit = Visit(browser, file_url(page))
    try:
        visit.go(f"latent/{latent}")
        assert "This latent is of one patient: " in visit.page.inner_text("#view")
        assert f"of its active tokens are of {name}, who has far fewer" in visit.page.inner_text("#view")
        visit.go("latents")
        visit.page.wait_for_function("() => state.scatter")
        visit.page.get_by_label("of one patient only").check()
        assert f"{len(one)} of {active.sum():,} active latents shown" in visit.page.inner_text("#view")
        assert "of one patient" in visit.page.evaluate(f"() => describeLatent({latent})")
        assert "partner cosine 1" in visit.page.evaluate(f"() => describeLatent({latent})")
        visit.page.get_by_label("of one patient only").uncheck()
        visit.page.get_by_label("partner cosine, to").fill("0.5")
        assert f"0 of {active.sum():,} active latents shown" in visit.page.inner_text("#view")
        visit.page.get_by_role("button", name="Reset").click()
        visit.page.wait_for_function("() => state.filters.partner[1] === null")
    finally:
        visit.close()
