"""The page in a real browser, opened from disk: clicks and keys, without errors or requests to other places."""

import base64
import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from tests.support.browser import PAINTED, Visit, browser_or_skip, file_url
from tests.support.pictures import write_pictures
from tests.support.reports import read_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with browser_or_skip() as browser:
        yield browser


@pytest.fixture
def visit(browser, demo_run):
    visit = Visit(browser, file_url(demo_run.report))
    yield visit
    visit.close()


def _click_point(page, latent):
    """Click a latent's point in the scatter plot."""
    page.wait_for_function("() => state.scatter")
    x, y = page.evaluate("latent => state.scatter.toScreen(state.latents.x[latent], state.latents.y[latent])", latent)
    page.click(".scatter canvas", position={"x": x, "y": y})
    return page.evaluate("() => state.scatter.selected")


def test_the_overview_shows_what_was_measured(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    tiles = dict(reversed(text.split("\n")) for text in page.locator(".tile").all_inner_texts())
    assert tiles["images"] == "720"
    assert tiles["latents"] == "1,024"
    assert float(tiles["explained variance"]) > 0.8
    assert page.title().startswith("demo-0")
    assert page.locator(".bar-name").all_inner_texts() == [label["name"] for label in overview["labels"]]
    charts = page.locator("figure.chart figcaption").all_inner_texts()
    assert any(text.startswith("explained variance") for text in charts)
    assert "Balanced accuracy by k" in charts
    assert page.locator("canvas.mini").evaluate(PAINTED) > 0.002


def test_a_click_on_a_point_shows_the_latents_images_with_heat_maps(visit, demo_run):
    page = visit.page
    visit.go("latents")
    featured = read_data(demo_run.report, "overview")["featured"][0]
    latent = _click_point(page, featured)
    page.wait_for_selector(".side .top-image")
    record = read_data(demo_run.report, f"latents/{latent}")
    rows = [int(row) for row in page.locator(".side .top-image").evaluate_all("all => all.map(one => one.dataset.row)")]
    assert rows == [item["row"] for item in record["top"][:4]]
    assert all(share > 0 for share in page.locator(".side .cell canvas").evaluate_all(f"all => all.map({PAINTED})"))
    page.click(".side a.button")
    page.wait_for_selector("section .grid .top-image")
    assert page.inner_text("h1") == f"Latent {latent}"


def test_a_latents_page_shows_its_feature_data(visit, demo_run):
    page, folder = visit.page, demo_run.report.parent
    latent = read_data(demo_run.report, "overview")["featured"][3]
    visit.go(f"latent/{latent}")
    page.wait_for_selector(".grid .top-image img")
    indices = torch.load(folder / "max_activating_image_indices.pt", weights_only=True)[latent]
    rows = page.locator(".grid .top-image").evaluate_all("all => all.map(one => Number(one.dataset.row))")
    assert rows == [row for row in indices.tolist() if row >= 0]
    with (folder / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    for row, text in zip(rows, page.locator(".grid .top-image").all_inner_texts(), strict=True):
        assert images[row]["label"] in text
        assert images[row]["patient"] in text
    loaded = page.locator(".grid img").evaluate_all("all => all.map(one => one.complete && one.naturalWidth)")
    assert set(loaded[:6]) == {224}
    canvas = page.locator(".grid canvas").first
    heat = canvas.evaluate("canvas => canvas.toDataURL()")
    assert canvas.evaluate(PAINTED) > 0
    page.keyboard.press("c")
    assert canvas.evaluate(PAINTED) == 0
    page.click("text=Mask")
    assert canvas.evaluate(PAINTED) > 0.5
    assert canvas.evaluate("canvas => canvas.toDataURL()") != heat
    page.keyboard.press("h")
    assert canvas.evaluate("canvas => canvas.toDataURL()") == heat
    assert page.locator("figure.histogram rect").count() > 2
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('h1').textContent !== before", arg=f"Latent {latent}")
    assert page.inner_text("h1") == f"Latent {read_data(demo_run.report, 'overview')['featured'][4]}"


def test_a_click_on_a_patch_shows_its_latents_and_a_latent_its_map(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    row = overview["images"]["rows"][5]
    record = read_data(demo_run.report, f"images/{row}")
    visit.go(f"image/{row}")
    page.locator(".patch").nth(16 * 7 + 8).click()
    assert page.inner_text(".patch-list h3") == "Patch in row 8, column 9"
    width = record["token_latents"]["shape"][1]
    tokens = page.evaluate("array => Array.from(cytosae.decode(array))", record["token_latents"])
    expected = tokens[(1 + 16 * 7 + 8) * width :][:width]
    expected = [latent for latent in expected if latent != record["no_latent"]]
    names = page.locator(".patch-list .latent-row a").all_inner_texts()
    assert names == [f"Latent {latent}" for latent in expected]
    before = page.locator(".large-cell .cell canvas").evaluate("canvas => canvas.toDataURL()")
    page.locator(".patch-list .map-button").last.click()
    assert f"Latent {expected[-1]}" in page.inner_text("#view")
    assert page.locator(".large-cell .cell canvas").evaluate("canvas => canvas.toDataURL()") != before
    pressed = page.locator(".map-button[aria-pressed='true']").evaluate_all("all => all.map(one => one.dataset.latent)")
    assert set(pressed) == {str(expected[-1])}
    page.locator(".patch").nth(16 * 7 + 8).focus()
    page.keyboard.press("ArrowDown")
    assert page.inner_text(".patch-list h3") == "Patch in row 9, column 9"
    page.click("text=CLS token")
    assert page.inner_text(".patch-list h3") == "CLS token"


def test_a_map_has_an_opacity_an_outline_and_the_bare_cell_beside_it(visit, demo_run):
    page = visit.page
    latent = read_data(demo_run.report, "overview")["featured"][0]
    visit.go(f"latent/{latent}")
    cell = page.locator(".grid .cell").first
    canvas = cell.locator("canvas")
    strongest = """canvas => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let most = 0;
        for (let i = 3; i < data.length; i += 4) most = Math.max(most, data[i]);
        return most / 255;
    }"""
    before = canvas.evaluate(strongest)
    assert 0.3 < before <= 0.61, "neighbouring patches are blended"
    page.fill("input[type='range']", "30")
    assert canvas.evaluate(strongest) == pytest.approx(before / 2, abs=0.02)
    page.fill("input[type='range']", "80")
    page.keyboard.press("Escape")
    page.locator("h1").click()
    assert page.locator(".outline-legend").is_hidden()
    page.keyboard.press("e")
    assert page.locator(".opacity").is_hidden()
    assert "at least 50 % of the image's largest" in page.inner_text(".outline-legend").replace("\xa0", " ")
    colors = """canvas => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const found = new Set();
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) found.add([...data.slice(i, i + 3)].join());
        return [...found];
    }"""
    light = ",".join(map(str, page.evaluate("() => colors.scaled(1)")))
    assert set(canvas.evaluate(colors)) >= {light, "22,22,28"}, "a light line on a dark one, visible on any stain"
    assert canvas.evaluate(PAINTED) < 0.5
    page.keyboard.press("h")
    page.keyboard.press("b")
    assert page.locator(".beside-button").get_attribute("aria-pressed") == "true"
    box, map_box = cell.bounding_box(), canvas.bounding_box()
    bare = cell.locator(".bare").bounding_box()
    assert box["width"] == pytest.approx(2 * box["height"], abs=2)
    assert bare["x"] + bare["width"] == pytest.approx(map_box["x"], abs=1)
    assert cell.locator(".bare img").evaluate("image => image.naturalWidth") == 224
    # The net of patches of an image's page stays over the map.
    page.click(".grid .top-image >> nth=0")
    page.wait_for_selector(".large-cell .net")
    net, over = page.locator(".net").bounding_box(), page.locator(".large-cell canvas").bounding_box()
    assert (net["x"], net["width"]) == (pytest.approx(over["x"], abs=1), pytest.approx(over["width"], abs=1))
    page.keyboard.press("b")
    assert page.locator(".bare").count() == 0


def test_a_top_image_opens_with_the_map_of_its_latent(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    for latent in overview["featured"]:
        items = read_data(demo_run.report, f"latents/{latent}")["top"]
        weak = next(
            (one for one in items if latent not in
             [shown["latent"] for shown in read_data(demo_run.report, f"images/{one['row']}")["latents"]]), None,
        )  # fmt: skip
        if weak is not None:
            break
    assert weak is not None, "some top image has ten stronger latents"
    visit.go(f"latent/{latent}")
    page.click(f".grid .top-image[data-row='{weak['row']}']")
    page.wait_for_selector(".large-cell")
    assert page.evaluate("() => location.hash") == f"#/image/{weak['row']}/{latent}"
    about = page.locator(".image-page [aria-live]").first.inner_text()
    assert about.startswith(f"Map of Latent {latent}: largest activation ")
    visit.go(f"image/{weak['row']}")
    first = read_data(demo_run.report, f"images/{weak['row']}")["latents"][0]["latent"]
    assert page.locator(".image-page [aria-live]").first.inner_text().startswith(f"Map of Latent {first}:")


def test_filters_and_search(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    visit.go("latents")
    all_cards = page.locator(".card").count()
    assert all_cards == 60
    entropy = page.evaluate("() => Array.from(state.latents.entropy)")
    sparsity = page.evaluate("() => Array.from(state.latents.sparsity)")
    page.fill("input[aria-label='entropy, to']", "0.05")
    page.fill("input[aria-label='log10 sparsity, to']", "-0.1")
    chosen = [i for i, (e, s) in enumerate(zip(entropy, sparsity, strict=True)) if 0 <= e <= 0.05 and 0 < s <= 10**-0.1]
    assert page.locator("main > div > p.quiet").first.inner_text().startswith(f"{len(chosen):,} of ")
    cards = page.locator(".card").evaluate_all("all => all.map(one => Number(one.dataset.latent))")
    assert cards == [latent for latent in overview["featured"] if latent in chosen]
    assert 0 < len(cards) < 60
    page.click("text=Reset")
    page.wait_for_function("() => document.querySelectorAll('.card').length === 60")
    page.check("text=with a page only")
    assert page.locator("main > div > p.quiet").first.inner_text().startswith("60 of ")
    assert "label entropy: 0 (one label)" in page.inner_text(".plot-and-side .legend")
    page.select_option("select >> nth=1", "cluster")
    clusters = sorted({cluster for cluster in page.evaluate("() => [...state.latents.cluster]") if cluster >= 0})
    legend = page.locator(".plot-and-side .legend > span").all_inner_texts()
    assert legend == [*(f"cluster {number}" for number in clusters), "has a page"]
    # Legend and points agree: a latent has the colour of its cluster.
    assert page.evaluate(
        "() => state.scatter.palette()[state.latents.cluster[0]] === colors.kind(state.latents.cluster[0])"
    )
    page.keyboard.press("Escape")
    page.fill("#search", "17")
    page.press("#search", "Enter")
    page.wait_for_function("() => document.querySelector('h1').textContent === 'Latent 17'")
    page.press("#search", "Enter")
    assert "Enter a latent's number" in page.locator("#search").evaluate("input => input.validationMessage")


def _other_latent(report):
    """An active latent without a page."""
    overview = read_data(report, "overview")
    sparsity = np.frombuffer(base64.b64decode(overview["latents"]["sparsity"]["data"]), "<f4")
    return next(n for n in np.flatnonzero(sparsity > 0.02).tolist() if n not in overview["featured"])


def test_a_latent_without_a_page_has_a_short_card(visit, demo_run):
    page, folder = visit.page, demo_run.report.parent
    latent = _other_latent(demo_run.report)
    visit.go(f"latent/{latent}")
    text = page.inner_text("#view")
    assert f"cytosae-cache report --latents {latent}" in text
    indices = torch.load(folder / "max_activating_image_indices.pt", weights_only=True)[latent]
    links = page.locator("table a").evaluate_all("all => all.map(one => one.hash)")
    assert links == [f"#/image/{row}/{latent}" for row in indices.tolist()[:6] if row >= 0]
    found = torch.load(folder / "sae_specificity.pt", weights_only=True)["label_means"][latent]
    names = [label["name"] for label in read_data(demo_run.report, "overview")["labels"]]
    order = [names[at] for at in np.argsort(-found.numpy(), kind="stable")]
    assert page.locator(".bar-name").all_inner_texts()[:1] == order[:1]
    page.click(".bar-name a >> nth=0")
    page.wait_for_function("name => document.querySelector('h1').textContent === name", arg=order[0])


def test_an_image_without_a_page_has_a_short_card(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    row = next(n for n in range(720) if n not in overview["images"]["rows"])
    visit.go(f"image/{row}")
    with (demo_run.report.parent / "images.csv").open(newline="") as file:
        image = list(csv.DictReader(file))[row]
    text = page.inner_text("#view")
    for word in (image["path"], image["label"], image["patient"], "short card"):
        assert word in text
    rows = read_data(demo_run.report, "rows/0")
    assert page.locator("table a").all_inner_texts() == [f"Latent {latent}" for latent, _ in rows["tops"][row]]


def test_images_are_browsed_by_label_and_patient(visit, demo_run):
    page = visit.page
    with (demo_run.report.parent / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    overview = read_data(demo_run.report, "overview")

    def shown():
        return page.locator(".top-image").evaluate_all("all => all.map(one => Number(one.dataset.row))")

    page.keyboard.press("i")
    page.wait_for_selector(".top-image")
    assert shown() == list(range(60))
    assert "720 images in the store, page 1 of 12" in page.inner_text("#view")
    page.click("text=next →")
    page.wait_for_function("() => document.querySelector('.top-image')?.dataset.row === '60'")
    page.select_option("#browse-label", "1")
    page.wait_for_function("() => location.hash === '#/images/1/all/0' && !document.querySelector('[aria-busy]')")
    name = overview["labels"][1]["name"]
    of_label = [row for row, image in enumerate(images) if image["label"] == name]
    assert shown() == of_label[:60]
    page.select_option("#browse-patient", "4")
    page.wait_for_function("() => location.hash === '#/images/1/4/0' && !document.querySelector('[aria-busy]')")
    patient = overview["patients"][4]
    assert shown() == [row for row in of_label if images[row]["patient"] == patient]
    page.select_option("#browse-label", "all")
    page.wait_for_function("() => location.hash === '#/images/all/4/0' && !document.querySelector('[aria-busy]')")
    assert shown() == [row for row, image in enumerate(images) if image["patient"] == patient]
    assert "20 readable images, page 1 of 1" in page.inner_text("#view")


def test_labels_patients_and_groups_have_pages_that_lead_on(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    page.click(".bar-name a >> nth=0")
    page.wait_for_function(
        "name => document.querySelector('h1').textContent === name", arg=overview["labels"][0]["name"]
    )
    page.wait_for_selector(".top-image")
    lift, best = (page.evaluate(f"() => [...state.latents.{name}]") for name in ("lift", "best"))
    expected = [n for n in range(1024) if best[n] == 0 and lift[n] > 1]
    expected = sorted(expected, key=lambda n: -lift[n])[:24]
    assert page.locator("table a").all_inner_texts() == [f"Latent {n}" for n in expected]
    page.click(".top-image a[href^='#/patient/'] >> nth=0")
    page.wait_for_selector("a[href^='#/group/']")
    assert page.inner_text("h1").startswith("Patient ")
    assert page.locator("table a").count() > 3
    page.click("a[href^='#/group/']")
    page.wait_for_selector("h1:has-text('Group ')")
    data = read_data(demo_run.report, "patients")
    group = data["group_names"].index(page.inner_text("h1").removeprefix("Group "))
    members = [name for name, of in zip(data["names"], data["groups"], strict=True) if of == group]
    assert page.locator("a[href^='#/patient/']").all_inner_texts() == members
    page.click("a[href^='#/patients/compare/'] >> nth=0")
    page.wait_for_selector(".volcano canvas")
    visit.go("patients")
    page.click(".row-names a >> nth=0")
    page.wait_for_selector("h1:has-text('Group ')")


def test_the_map_is_coloured_and_a_lasso_compares_with_the_rest(visit, demo_run):
    page = visit.page
    page.keyboard.press("a")
    page.wait_for_selector(".cell-map canvas")
    page.wait_for_function("() => !document.querySelector('[aria-busy]')")
    assert page.inner_text("#view p.quiet >> nth=0").startswith(
        "Principal components, exact: 720 of 720 readable images"
    )
    labels = [label["name"] for label in read_data(demo_run.report, "overview")["labels"]]
    assert [text for text in page.locator(".plot-and-side .legend a").all_inner_texts()] == labels
    page.select_option("#map-color", "patient")
    assert "Colours repeat after 8" in page.inner_text(".plot-and-side .legend")
    record = read_data(demo_run.report, "map")
    latent = int(np.frombuffer(base64.b64decode(record["latents"]["data"]), "<i4")[5])
    page.fill("#map-latent", str(latent))
    page.press("#map-latent", "Enter")
    page.wait_for_selector(f".plot-and-side .legend a >> text=Latent {latent}")
    box = page.locator(".cell-map canvas").bounding_box()
    view = page.evaluate("() => document.querySelector('.cell-map').clientWidth")
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + 60, box["y"] + 12)
    page.mouse.down()
    for x, y in ((view / 2, 12), (view / 2, box["height"] - 45), (60, box["height"] - 45)):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.wait_for_selector("h2:has-text('of 720 cells selected')")
    page.wait_for_selector(".side table")
    assert page.locator(".side .top-image").count() == 6
    page.select_option("#map-label", "0")
    labels_of = np.frombuffer(base64.b64decode(record["labels"]["data"]), "<i4")
    page.wait_for_selector(f"h2:has-text('{(labels_of == 0).sum()} of 720 cells selected')")
    page.wait_for_selector(".side table a")
    first = page.locator(".side table >> nth=0").locator("tbody tr >> nth=0").locator("td").all_inner_texts()
    latents = np.frombuffer(base64.b64decode(record["latents"]["data"]), "<i4").tolist()
    at = latents.index(int(first[0].split()[1]))
    part = read_data(demo_run.report, f"mapped/{at // 64}")
    levels = np.frombuffer(base64.b64decode(part["levels"]["data"]), "u1").reshape(part["levels"]["shape"])[at % 64]
    here, rest = levels[labels_of == 0].astype(int), levels[labels_of != 0].astype(int)
    auc = ((here[:, None] > rest).mean() + 0.5 * (here[:, None] == rest).mean()).round(2)
    assert float(first[3]) == pytest.approx(auc, abs=0.011)


def test_many_patients_are_found_ordered_and_readable(visit, demo_run):
    page, data = visit.page, read_data(demo_run.report, "patients")
    visit.go("patients")
    names = page.locator(".matrix-box.scrolls .row-names")
    assert names.locator("a").all_inner_texts() == data["names"]
    assert names.locator("a").first.bounding_box()["height"] >= 12
    page.fill("#find-patient", data["group_names"][1].upper())
    members = [name for name, of in zip(data["names"], data["groups"], strict=True) if of == 1]
    assert page.locator(".matrix-box.scrolls .row-names a").all_inner_texts() == members
    page.fill("#find-patient", data["names"][30])
    assert page.locator(".matrix-box.scrolls .row-names a").all_inner_texts() == [data["names"][30]]
    page.fill("#find-patient", "")
    latent = data["barcodes"]["latents"][2]
    page.select_option("#order-patients", "latent")
    page.fill("#order-latent", str(latent))
    page.press("#order-latent", "Enter")
    values = np.frombuffer(base64.b64decode(data["barcodes"]["values"]["data"]), "u1").reshape(36, -1)[:, 2]
    order = [data["names"][at] for at in np.lexsort((np.arange(36), -values.astype(int)))]
    assert page.locator(".matrix-box.scrolls .row-names a").all_inner_texts() == order
    page.fill("#find-patient", "nobody")
    assert "No patient or group has that in its name." in page.inner_text("#view")


def test_search_finds_labels_patients_groups_and_paths(visit, demo_run):
    page, overview = visit.page, read_data(demo_run.report, "overview")
    with (demo_run.report.parent / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))

    def search(text):
        page.fill("#search", text)
        page.press("#search", "Enter")
        page.wait_for_function("text => document.querySelector('h1').textContent === `Search: ${text}`", arg=text)
        page.wait_for_function("() => !document.querySelector('[aria-busy]')")
        return page.locator(".found a").all_inner_texts()

    assert overview["labels"][2]["name"] in search(overview["labels"][2]["name"].upper()[:5])
    assert search(overview["patients"][7]).count(overview["patients"][7]) == 1
    assert read_data(demo_run.report, "patients")["group_names"][1] in search("patient") + search(
        read_data(demo_run.report, "patients")["group_names"][1]
    )
    path = images[701]["path"]
    assert search(path) == [path]
    page.click(f".found a >> text={path}")
    page.wait_for_selector("h1:has-text('Image 701')")
    assert search("nothing like it") == []
    assert search("100% <b>/x") == []


def test_every_link_of_the_page_opens(visit, demo_run):
    """Follow each kind of link once: nothing a page mentions is a dead end."""
    page, overview = visit.page, read_data(demo_run.report, "overview")
    seen, waiting = set(), ["", "latents", "images", "patients", "patients/compare", "patients/classification"]
    waiting += [f"latent/{overview['featured'][0]}", f"latent/{_other_latent(demo_run.report)}"]
    while waiting:
        route = waiting.pop()
        visit.go(route)
        text = page.inner_text("#view")
        assert not re.search(r"No such|is missing|There is no|not found", text), (route, text[:200])
        seen.add(route)
        for link in page.locator("#view a").evaluate_all("all => all.map(one => one.hash.slice(2))"):
            known = {*seen, *waiting}
            kind = link.split("/")[0]
            if link not in known and sum(other.split("/")[0] == kind for other in known) < 4:
                waiting.append(link)
    assert {route.split("/")[0] for route in seen} >= {"latent", "image", "label", "patient", "group", "images"}


def test_latents_that_do_not_exist_are_explained(visit, demo_run):
    visit.go("latent/5000")
    assert "There is no latent 5000: they are numbered 0 to 1023" in visit.page.inner_text("#view")


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("latent/1.5", "There is no latent 1.5: they are numbered 0 to 1023."),
        ("latent/-1", "There is no latent -1"),
        ("latent/<b>x", "There is no latent %3Cb%3Ex"),
        ("latent", "There is no latent without a number: they are numbered 0 to 1023"),
        ("image/720", "There is no image 720: they are numbered 0 to 719."),
        ("image/x", "There is no image x"),
        ("label/99", "There is no label 99: they are numbered 0 to"),
        ("patient/x", "There is no patient x: they are numbered 0 to 35."),
        ("group/7", "There is no group 7: they are numbered 0 to"),
        ("images/99/all/0", "There is no such label, patient or page of images."),
        ("constructor", "There is no view “constructor”. Choose one above."),
        ("patients/constructor", "There is no view “constructor” of patients. Choose one above."),
        ("patients/__proto__", "There is no view “__proto__” of patients."),
        ("patients/compare/-1", "There is no comparison -1"),
        ("patients/compare/99", "There is no comparison 99: they are numbered 0 to 5."),
    ],
)
def test_unknown_addresses_are_explained(visit, route, words):
    visit.go(route)
    assert words in visit.page.inner_text("#view")


def test_plots_work_with_the_keyboard_alone(visit, demo_run):
    page = visit.page
    visit.go("latents")
    page.wait_for_function("() => state.scatter")
    page.locator(".scatter canvas").focus()
    view = page.evaluate("() => state.scatter.view")
    for key in ("+", "+", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate("() => state.scatter.view") != view
    page.keyboard.press("Enter")
    chosen = page.evaluate("() => state.scatter.selected")
    middle = page.evaluate(
        """() => {
            const { xs, ys, host } = state.scatter;
            const far = (i) => {
                const [x, y] = state.scatter.toScreen(xs[i], ys[i]);
                return Math.hypot(x - host.clientWidth / 2, y - host.clientHeight / 2);
            };
            return [far(state.scatter.selected), Math.min(...Array.from(xs, (_, i) => far(i)).filter(Number.isFinite))];
        }"""
    )
    assert middle[0] <= middle[1] + 4  # points with a page are slightly preferred
    page.wait_for_selector(".side h2")
    assert page.inner_text(".side h2") == f"Latent {chosen}"
    page.keyboard.press("0")
    assert page.evaluate("() => state.scatter.view") == view

    visit.go("patients")
    featured = read_data(demo_run.report, "patients")["barcodes"]["latents"]
    page.locator("canvas.matrix").last.focus()
    assert f"latent {featured[0]}:" in page.locator(".readout").last.inner_text()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert f"latent {featured[1]}:" in page.locator(".readout").last.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function("latent => location.hash === `#/latent/${latent}`", arg=featured[1])


def test_the_theme_switches_and_is_remembered(visit):
    page = visit.page

    def ground():
        return page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.keyboard.press("t")
    dark = ground()
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < sum(map(int, re.findall(r"\d+", light)))
    page.reload()
    page.wait_for_selector("h1")
    assert ground() == dark
    page.click("#theme")
    assert ground() == light


def test_switching_the_theme_keeps_the_view(visit):
    page = visit.page
    visit.go("latents")
    page.wait_for_function("() => state.scatter")
    page.locator(".scatter canvas").focus()
    for key in ("+", "Enter"):
        page.keyboard.press(key)
    kept = "() => [state.scatter.view, state.scatter.selected, document.querySelector('.side h2').textContent]"
    before = page.evaluate(kept)
    pixels = "canvas => canvas.toDataURL()"
    light = page.locator(".scatter canvas").evaluate(pixels)
    page.keyboard.press("t")
    page.wait_for_function("before => document.querySelector('.scatter canvas').toDataURL() !== before", arg=light)
    assert page.evaluate(kept) == before
    dark = page.locator(".scatter canvas").evaluate(pixels)
    # Without a choice of the user, the page follows the system's theme.
    page.keyboard.press("t")
    same = "before => document.querySelector('.scatter canvas').toDataURL() === before"
    page.wait_for_function(same, arg=light)
    page.evaluate("() => { delete document.documentElement.dataset.theme; }")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(same, arg=dark)
    assert page.evaluate(kept) == before


def test_keys_reach_every_view(visit):
    page = visit.page
    for key, heading in (("l", "Latents"), ("i", "Images"), ("p", "Patients"), ("o", "demo-0")):
        page.keyboard.press(key)
        page.wait_for_function("text => document.querySelector('h1').textContent === text", arg=heading)
    page.keyboard.press("?")
    assert "heat map, outline (edges), mask, plain cell" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.id") == "search"


def test_contrast_is_sufficient_in_both_themes(visit):
    """Contrast (WCAG 2.2) of the ends of the entropy scale, of texts and of fields against their background."""
    script = """() => {
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const light = (color) => {
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (one, other) => {
            const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        };
        const of = (name) => colors.inTheme(name);
        const end = (share) => contrast(colors.css(colors.point(share)), of("--surface"));
        return { low: end(0), high: end(1),
            quiet: contrast(of("--quiet"), of("--paper")), edge: contrast(of("--edge"), of("--surface")),
            accent: contrast(of("--accent-ink"), of("--accent")) };
    }"""
    for _ in range(2):
        found = visit.page.evaluate(script)
        assert found["low"] > 2.5, found
        assert found["high"] > 1.7, found
        assert min(found["quiet"], found["accent"]) > 4.5, found
        assert found["edge"] > 3, found
        visit.page.keyboard.press("t")


def test_zoom_is_limited(visit):
    page = visit.page
    visit.go("latents")
    page.wait_for_function("() => state.scatter")
    width = "() => state.scatter.view.x1 - state.scatter.view.x0"
    whole = page.evaluate(width)
    page.evaluate("() => { for (let i = 0; i < 400; i++) state.scatter.zoom(0.8, 300, 200); }")
    assert page.evaluate(width) == pytest.approx(whole * 1e-5)
    assert page.evaluate("() => axisTicks(state.scatter.view.x0, state.scatter.view.x1).length") < 10
    assert page.evaluate("() => axisTicks(1, 1 + 1e-16)") == [1]
    assert page.evaluate("() => axisTicks(-1, 1)") == [-1, -0.5, 0, 0.5, 1]
    page.evaluate("() => { for (let i = 0; i < 400; i++) state.scatter.zoom(1.25, 300, 200); }")
    assert page.evaluate(width) == pytest.approx(whole * 10)
    page.evaluate("() => state.scatter.showAll()")
    # A touchpad's small steps zoom a little, a notch of a wheel zooms more.
    page.mouse.move(400, 500)
    page.mouse.wheel(0, -2)
    page.wait_for_function(f"whole => ({width})() < whole", arg=whole)
    assert page.evaluate(width) > 0.99 * whole
    page.mouse.wheel(0, -100)
    page.wait_for_function(f"whole => ({width})() < 0.9 * whole", arg=whole)


def test_the_focus_follows_navigation(visit, demo_run):
    page, featured = visit.page, read_data(demo_run.report, "overview")["featured"]
    visit.go("latents")
    page.wait_for_function("() => document.activeElement.id === 'view'")
    page.evaluate("() => document.querySelector('.skip').focus()")
    page.keyboard.press("Enter")
    assert page.evaluate("() => [document.activeElement.id, location.hash]") == ["view", "#/latents"]
    visit.go(f"latent/{featured[0]}")
    page.wait_for_selector(".scroll")
    page.get_by_role("region", name="Similar latents").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => location.hash") == f"#/latent/{featured[0]}"
    # The choice of groups keeps the focus, so that arrow keys continue through it.
    visit.go("patients/compare")
    page.locator("#compared").focus()
    page.select_option("#compared", "2")
    page.wait_for_function("() => location.hash.endsWith('/2') && document.activeElement.id === 'compared'")
    page.fill("#search", str(featured[1]))
    page.press("#search", "Enter")
    page.wait_for_function("() => document.activeElement.id === 'view'")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("latent => location.hash === `#/latent/${latent}`", arg=featured[2])
    row = read_data(demo_run.report, "overview")["images"]["rows"][0]
    visit.go(f"image/{row}")
    page.locator(".patch").nth(20).click()
    assert page.locator(".patch[tabindex='0']").evaluate_all("all => all.map(one => Number(one.dataset.token))") == [21]
    name = page.locator(".patch-list .map-button").first.get_attribute("aria-label")
    assert re.fullmatch(r"Latent \d+: .*\. Show its map\.", name)


def test_the_scatter_plot_keeps_its_view_and_selection(visit, demo_run):
    page, featured = visit.page, read_data(demo_run.report, "overview")["featured"]
    visit.go("latents")
    latent = _click_point(page, featured[0])
    page.evaluate("() => state.scatter.zoom(0.5, 300, 200)")
    view = page.evaluate("() => state.scatter.view")
    page.click(".side a.button")
    page.wait_for_selector("section .grid .top-image")
    page.go_back()
    page.wait_for_function("() => state.scatter && state.scatter.selected >= 0")
    assert page.evaluate("() => [state.scatter.view, state.scatter.selected]") == [view, latent]
    assert page.inner_text(".side h2") == f"Latent {latent}"


def test_equal_lengths_mean_equal_values(visit, demo_run):
    page, featured = visit.page, read_data(demo_run.report, "overview")["featured"]
    visit.go(f"latent/{featured[0]}")
    page.wait_for_selector(".bars")
    widths = "all => all.map(one => one.getBoundingClientRect().width)"
    for number in range(page.locator(".bars").count()):
        tracks = page.locator(".bars").nth(number).locator(".bar-track").evaluate_all(widths)
        assert max(tracks) - min(tracks) < 0.5
    visit.go(f"image/{read_data(demo_run.report, 'overview')['images']['rows'][0]}")
    tracks = page.locator(".map-button .bar-track").evaluate_all(widths)
    assert max(tracks) - min(tracks) < 0.5


def test_legends_match_what_is_shown(visit, demo_run):
    page, featured = visit.page, read_data(demo_run.report, "overview")["featured"]
    visit.go(f"latent/{featured[0]}")
    page.wait_for_selector(".heat-legend")
    steps = page.locator(".heat-legend .ramp i").evaluate_all("all => all.map(one => one.style.background)")
    assert re.fullmatch(r"rgba\(.*, 0\)", steps[0]), "nothing is drawn where nothing is active"
    assert steps[-1] == page.evaluate("() => `rgba(${colors.heat(1).join(', ')})`")
    page.keyboard.press("m")
    assert page.locator(".heat-legend").is_hidden()
    page.keyboard.press("h")
    assert page.locator(".heat-legend").is_visible()
    visit.go("patients/compare")
    page.wait_for_selector(".volcano canvas")
    names = read_data(demo_run.report, "patients")["group_names"]
    grounds = "all => all.map(one => one.style.background)"
    kinds = page.evaluate(
        "() => [0, 1, 2].map((group) => h('i', { style: { background: colors.kind(group) } }).style.background)"
    )
    legend = page.locator(".plot-and-side .legend i").evaluate_all(grounds)
    assert legend[:2] == [kinds[names.index("AML-like")], "var(--ink)"]
    page.select_option("#compared", "3")
    page.wait_for_function(
        "kind => (document.querySelectorAll('.plot-and-side .legend i')[1] || h('i')).style.background === kind",
        arg=kinds[1],
    )


def _rewrite(report, name, change):
    value = read_data(report, name)
    change(value)
    text = f"cytosae.receive({json.dumps(name)},{json.dumps(value)});\n"
    (report / "data" / f"{name}.js").write_text(text)


def test_missing_data_are_explained(browser, demo_run, tmp_path):
    report = tmp_path / "copy"
    shutil.copytree(demo_run.report, report)
    latent = read_data(report, "overview")["featured"][0]
    comparison = read_data(report, "comparisons/0")
    _rewrite(report, "overview", lambda overview: overview.update(counts={"active": 1000, "dead": 24}))
    _rewrite(report, f"latents/{latent}", lambda record: record.update(patients=[]))
    zeros = {
        **comparison["minus_log10_q"],
        "data": base64.b64encode(bytes(4 * comparison["latents"]["shape"][0])).decode(),
    }
    _rewrite(report, "comparisons/0", lambda record: record.update(minus_log10_q=zeros))
    visit = Visit(browser, file_url(report))
    page = visit.page
    visit.go("latents")
    assert "Dead latents (24), which are active on no image, have no point." in page.inner_text("#view")
    page.press("#search", "Enter")
    message = page.locator("#search").evaluate("input => input.validationMessage")
    assert message == "Enter a latent's number, or part of a name or path."
    visit.go(f"latent/{latent}")
    assert "No patient has a token above 0.2." in page.inner_text("#view")
    visit.go("patients/compare")
    page.wait_for_function("() => document.activeElement.id === 'view'")
    text = page.inner_text("#view")
    assert "0 differ at a false discovery rate" in text
    assert "As none does, the tables show the largest differences regardless." in text
    page.keyboard.press("?")
    assert "label entropy" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.evaluate("() => { state.overview.labels = []; state.overview.main_label.fill(-1); }")
    visit.go("latents")
    assert "no labels, so label entropy is not defined" in page.inner_text(".plot-and-side .legend")
    visit.close()


def test_a_missing_picture_leaves_its_map(browser, demo_run, tmp_path):
    report = tmp_path / "copy"
    shutil.copytree(demo_run.report, report)
    overview = read_data(report, "overview")
    row = read_data(report, f"latents/{overview['featured'][0]}")["top"][0]["row"]
    (report / f"thumbnails/{row}.jpg").unlink()
    visit = Visit(browser, file_url(report))
    visit.go(f"image/{row}")
    visit.page.wait_for_selector(".large-cell .no-picture")
    assert visit.page.locator(".large-cell canvas").evaluate(PAINTED) > 0
    assert visit.page.title().startswith(f"Image {row}: ")
    visit.complaints = [text for text in visit.complaints if "ERR_FILE_NOT_FOUND" not in text]
    visit.close()


def test_patients_are_compared(visit, demo_run):
    page, patients = visit.page, read_data(demo_run.report, "patients")
    visit.go("patients")
    assert page.locator("canvas.matrix").count() == 2
    page.locator("canvas.matrix").last.hover()
    assert re.search(
        r"P\d{3} \((AML-like|CML-like|healthy)\), latent \d+: .* tokens per image", page.inner_text("#view")
    )
    visit.go("patients/compare")
    options = page.locator("main select option").all_inner_texts()
    assert options[0] == "AML-like (12) against all others (24)"
    assert len(options) == 6
    head = page.locator("main table").first.locator("tbody tr").first.inner_text().split("\t")
    first = read_data(demo_run.report, "comparisons/0")
    latents = page.evaluate("array => Array.from(cytosae.decode(array))", first["latents"])
    assert head[0] == f"Latent {latents[first['more_in_first'][0]]}"
    # Latents that differ are likely to be clicked next: the report has pages for them.
    page.locator("main table").first.locator("tbody a").first.click()
    page.wait_for_selector(".grid .top-image img")
    assert page.inner_text("h1") == head[0]
    assert "that differ most between groups of patients" in read_data(demo_run.report, "overview")["featured_reason"]
    visit.go("patients/compare")
    page.select_option("main select", "4")
    page.wait_for_function("() => location.hash.endsWith('compare/4')")
    visit.go("patients/correlation")
    page.locator("canvas.matrix").hover(position={"x": 3, "y": 3})
    assert re.search(r"P\d{3} \(AML-like\) and P\d{3} \(AML-like\): 1.00", page.inner_text("#view"))
    visit.go("patients/classification")
    cells = page.locator(".confusion td").all_inner_texts()
    assert sum(int(text) for text in cells if text.strip()) == 36
    balanced, p, plain = page.locator(".tile b").all_inner_texts()
    assert float(p) == pytest.approx(patients["classification"]["shuffled"]["p"], abs=0.005)
    assert "Calibration" in page.inner_text("#view")
    assert balanced == f"{100 * patients['classification']['balanced_accuracy']:.1f}\u00a0%"
    assert plain == f"{100 * patients['classification']['accuracy']:.1f}\u00a0%"
    assert "chance: 33.3\u00a0%" in page.inner_text(".tiles")
    assert patients["classification"]["accuracy"] > 0.6


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1024, 768), (420, 800)])
def test_nothing_overflows_sideways(browser, demo_run, width, height):
    visit = Visit(browser, file_url(demo_run.report), width=width, height=height, scheme="dark")
    featured = read_data(demo_run.report, "overview")["featured"][0]
    row = read_data(demo_run.report, "overview")["images"]["rows"][0]
    for route in (
        "",
        "latents",
        f"latent/{featured}",
        f"image/{row}",
        "patients",
        "patients/compare",
        "patients/classification",
    ):
        visit.go(route)
        widths = visit.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], route
    visit.close()


def _hostile_workplace(with_images):
    """A workspace whose labels, patients and files have names that must never be parsed as markup."""
    root = with_images.root / "hostile"
    write_pictures(root, n=24, broken=False)
    names = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(2)>',
        "</script><script>alert(3)//",
        "a'b\"c & $\\frac{",
    ]
    patients = ["<b>p1</b>", "'); alert(4); ('", "\u2028p3", "`${alert(5)}`"]
    with (root / "m.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient"])
        for number, path in enumerate(sorted(root.rglob("*.png"))):
            writer.writerow([path.relative_to(root), names[number % 4], patients[number % 4]])
    place = ["--root_dir", with_images.root, "--dataset_name", "hostile"]
    source = ["--images", root / "m.csv", "--model_path", with_images.vit]
    with_images.run_plain("build", *place, *source, "--workers", 0)
    with_images.run_plain(
        "train", *place, "--expansion_factor", 4, "--batch_size", 4, "--total_training_tokens", 200, "--run_name", "h",
        "--lr", 0.002, "--lr_warm_up_steps", 3,
    )  # fmt: skip
    (sae,) = (with_images.root / "out/checkpoints/h").glob("final_*.pt")
    return [*place, "--images", root / "m.csv", "--sae_path", sae, "--top_k", 3], names, patients


def test_hostile_names_stay_text(browser, with_images):
    options, names, patients = _hostile_workplace(with_images)
    output = with_images.run_plain("report", *options, "--out", with_images.root / "page").output
    assert "open in a browser" in output
    report = with_images.root / "page"
    for path in report.rglob("*.js"):
        assert "</script" not in path.read_text(), path
    visit = Visit(browser, file_url(report))
    overview = read_data(report, "overview")
    assert sorted(label["name"] for label in overview["labels"]) == sorted(names)
    routes = [
        "",
        "latents",
        "patients",
        "patients/compare",
        "patients/correlation",
        f"latent/{overview['featured'][0]}",
    ]
    shown = ""
    for route in [*routes, f"image/{overview['images']['rows'][0]}"]:
        visit.go(route)
        visit.page.mouse.move(400, 400)
        shown += visit.page.inner_text("body")
    assert all(name in shown for name in names)
    assert patients[0] in shown
    assert visit.page.locator("main script, main b >> text=p1, main img[src='x']").count() == 0
    visit.close()


def test_pseudonymous_reports_contain_no_name_and_no_path(browser, with_images):
    options, _, patients = _hostile_workplace(with_images)
    report, again = with_images.root / "page", with_images.root / "again"
    output = with_images.run_plain("report", *options, "--pseudonymize", "--out", report).output
    key = with_images.root / "out/feature_data/sae_h/custom/hostile/pseudonym.key"
    assert f"keep it secret): {key}" in output
    assert key.stat().st_mode & 0o777 == 0o600
    assert not list(report.rglob("*.key"))
    everything = b"\n".join(path.read_bytes() for path in report.rglob("*") if path.is_file())
    for name in [*patients, "p1</b>", str(with_images.root), ".png", "p2/", "blast/"]:
        assert json.dumps(name)[1:-1].replace("<", "\\u003c").replace(">", "\\u003e").encode() not in everything
        assert name.encode() not in everything
    with_images.run_plain("report", *options, "--pseudonymize", "--out", again)
    assert read_data(again, "patients")["names"] == read_data(report, "patients")["names"]
    visit = Visit(browser, file_url(report))
    visit.go("patients")
    assert all(
        re.fullmatch(r"patient-[0-9a-f]{12}", name) for name in visit.page.evaluate("() => state.overview.patients")
    )
    visit.go(f"image/{read_data(report, 'overview')['images']['rows'][0]}")
    assert "File " not in visit.page.inner_text("#view")
    visit.close()


def test_without_images_maps_are_shown_alone(browser, demo_run, tmp_path):
    (sae,) = demo_run.root.glob("out/checkpoints/*/final_*.pt")
    where = [
        "--root_dir",
        demo_run.root,
        "--dataset_name",
        "demo-0",
        "--images",
        tmp_path / "nowhere",
        "--sae_path",
        sae,
    ]
    result = CliRunner().invoke(
        cli, [str(item) for item in ["report", *where, "--n_latents", 3, "--out", tmp_path / "r"]]
    )
    assert result.exit_code == 0, result.output
    assert "pass their location with --images PATH" in result.output
    visit = Visit(browser, file_url(tmp_path / "r"))
    assert "The images were not found" in visit.page.inner_text("#view")
    visit.go(f"latent/{read_data(tmp_path / 'r', 'overview')['featured'][0]}")
    assert visit.page.locator(".grid .no-picture").count() == 10
    assert visit.page.locator(".grid canvas").first.evaluate(PAINTED) > 0
    visit.close()


def test_all_cards_can_be_shown_and_patients_need_no_groups(browser, with_sae):
    out = with_sae.root / "page"
    output = with_sae.run(
        "report", "--dataset_name", "toy", "--sae_path", with_sae.sae(), "--n_latents", 200, "--out", out
    ).output
    assert "There are no groups of patients: patients have images of several labels. Pass them" in output
    assert "compare groups" not in output
    featured = read_data(out, "overview")["featured"]
    assert len(featured) > 60, "too few latents to hide any"
    visit = Visit(browser, file_url(out))
    page = visit.page
    visit.go("latents")
    cards = "all => all.map(one => Number(one.dataset.latent))"
    assert page.locator(".card").evaluate_all(cards) == featured[:60]
    page.click(f"text=Show {len(featured) - 60} more")
    assert page.locator(".card").evaluate_all(cards) == featured
    assert page.evaluate("() => Number(document.activeElement.dataset.latent)") == featured[60]
    visit.go("patients")
    page.locator("canvas.matrix").hover()
    assert re.match(r"p\d, latent \d+: ", page.inner_text(".readout"))
    assert "group" not in page.inner_text("main section")
    visit.go("patients/compare")
    assert "--groups patients.csv" in page.inner_text("#view")
    visit.close()


def test_the_report_of_real_cells(browser, test_data, tmp_path):
    where = ["--root_dir", tmp_path, "--dataset_name", "bccd"]
    source = ["--images", test_data / "bccd_cells" / "manifest.csv", "--model_path", "embedded"]
    groups = tmp_path / "groups.csv"
    with (test_data / "bccd_cells" / "manifest.csv").open(newline="") as file:
        patients = sorted({row["patient"] for row in csv.DictReader(file)})
    groups.write_text("patient,group\n" + "".join(f"{name},{'ab'[at % 2]}\n" for at, name in enumerate(patients)))

    def run(*arguments):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    run("build", *where, *source)
    run(
        "train",
        *where,
        "--preset",
        "modern",
        "--expansion_factor",
        8,
        "--total_training_tokens",
        2000,
        "--run_name",
        "r",
    )
    (sae,) = (tmp_path / "out/checkpoints/r").glob("final_*.pt")
    output = run(
        "report", *where, *source, "--sae_path", sae, "--groups", groups, "--n_latents", 40, "--log10_sparsity", ":-0.3"
    )
    report = tmp_path / "out/feature_data/sae_r/custom/bccd/report"
    assert output.strip().endswith(str(report / "index.html"))
    visit = Visit(browser, file_url(report))
    visit.go("latents")
    overview = read_data(report, "overview")
    assert 0 < len(overview["featured"]) <= 40
    latent = _click_point(visit.page, overview["featured"][0])
    visit.page.wait_for_selector(".side .top-image")
    visit.go(f"latent/{latent}")
    visit.page.locator(".grid .top-image").first.click()
    visit.page.wait_for_selector(".patch")
    visit.page.locator(".patch").nth(100).click()
    assert visit.page.locator(".patch-list .latent-row").count() > 0
    visit.go("patients/classification")
    accuracy = read_data(report, "patients")["classification"]["accuracy"]
    assert abs(accuracy - 0.5) < 0.2, "groups at random must not be told apart"
    visit.close()
    sparsity = torch.load(report.parent / "sae_sparsity.pt", weights_only=True).numpy()
    assert (np.log10(sparsity[overview["featured"]]) <= -0.3).all()
