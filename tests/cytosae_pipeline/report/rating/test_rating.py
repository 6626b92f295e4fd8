"""`explore --rate`: a real server and a real browser; two raters rate latents of the demo."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from PIL import Image
from scipy.stats import false_discovery_control
from sklearn.metrics import cohen_kappa_score

import cytosae_pipeline
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import ExploreConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.rating.answers import CONCEPTS
from cytosae_pipeline.rating.items import DECOY, Item, Plan, plan_items
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.rating.candidates import find_candidates
from cytosae_pipeline.report.rating.server import _require_items
from cytosae_pipeline.report.records.choice import choose_latents
from cytosae_pipeline.report.records.page_files import read_policy
from cytosae_pipeline.workspace.runs import resolve_sae
from tests.conftest import Workplace
from tests.support.browser import Visit, browser_or_skip
from tests.support.nursery import ROOT, SOURCES
from tests.support.patience import patience
from tests.support.pictures import HEARING_MAIN
from tests.support.reports import read_data, unpack

OPTIONS = {"n_latents": 5, "decoy_every": 3}
NAMES = {"dataset_name": "demo-0", "sae_path": "latest"}


def _words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Server:
    """`cytosae-cache explore --rate` in a child process; ends with the context."""

    def __init__(self, root: Path, rater: str) -> None:
        command = ["explore", "--root_dir", str(root), *_words(NAMES | OPTIONS), "--rate", rater]
        self.child = subprocess.Popen(
            [sys.executable, "-c", HEARING_MAIN, *command],
            env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self.child.stdout is not None
        self.said = "".join(self.child.stdout.readline() for _ in range(3))
        found = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/index\.html", self.said)
        if found is None:
            raise AssertionError(self.child.communicate(timeout=patience()))
        self.url, self.port, self.token = found[0], int(found[1]), found[2]

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, *, origin: str | None = "own"):
        """Status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience())
        headers = {} if origin is None else {"Origin": f"http://127.0.0.1:{self.port}" if origin == "own" else origin}
        connection.request(method, f"/{self.token}/{path}", body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, response.headers, data

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Exit code, and the rest of stdout and stderr."""
        self.child.send_signal(number)
        out, error = self.child.communicate(timeout=patience())
        return self.child.returncode, out, error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self.child:
            self.child.kill()  # a failed test has not ended it


@pytest.fixture(scope="module")
def root(demo_run, tmp_path_factory) -> Path:
    """A copy of the demo's workspace, whose ratings no other test sees."""
    copy = tmp_path_factory.mktemp("rating") / "root"
    shutil.copytree(demo_run.root, copy)
    return copy


@pytest.fixture(scope="module")
def browser():
    with browser_or_skip() as browser:
        yield browser


def plan_of(root: Path, rater: str) -> tuple[Item, ...]:
    """What the rater is shown, with the answers."""
    config = resolve_sae(ExploreConfig(root_dir=root, rate=rater, **NAMES, **OPTIONS))
    data = open_report_data(config, profiles=False)
    latents, _ = choose_latents(data, explore=True)
    with StoreReader(data.store) as reader:
        found = find_candidates(data, reader, latents)
    return plan_items(found, len(latents), rater=rater, seed=0, decoy_every=OPTIONS["decoy_every"]).items


def file_of(root: Path, rater: str) -> dict:
    (path,) = root.glob(f"out/feature_data/*/custom/demo-0/latent_ratings/{rater}.json")
    return json.loads(path.read_text())


def rated(visit: Visit) -> str:
    return visit.page.inner_text("#rated")


def by_keys(visit: Visit, item: Item, concept: str) -> None:
    """Answer an item without the mouse."""
    press = visit.page.keyboard.press
    for key in ("abcde"[max(item.intruder, 0)], concept, "4", "/"):
        press(key)
    visit.page.keyboard.type("purple dots <b>")
    before = rated(visit)
    press("Enter")
    visit.page.wait_for_function("before => document.getElementById('rated').textContent !== before", arg=before)


def by_mouse(visit: Visit, item: Item, concept: str, *, clicked: int) -> None:
    """Answer an item without the keyboard, apart from the name."""
    page, before = visit.page, rated(visit)
    page.click(f".rate-row button[data-place='{clicked}']")
    page.click(f".choice[aria-label='Is it one concept?'] button[data-value='{concept}']")
    page.click(".choice[aria-label='Confidence'] button[data-value='2']")
    page.fill("#name", "dots")
    page.click("#save")
    page.wait_for_function("before => document.getElementById('rated').textContent !== before", arg=before)


@pytest.fixture(scope="module")
def two_raters(root, browser):
    """Anna rates by the keyboard, stops and goes on after her server was killed; Bert rates with the mouse."""
    items = plan_of(root, "anna")
    n = len(items)
    assert [item.latent == DECOY for item in items].count(True) == 2
    for part in (items[:3], items[3:]):
        with Server(root, "anna") as server:
            start = items.index(part[0])
            assert f"anna has rated {start} of {n} items" in server.said
            visit = Visit(browser, server.url)
            assert visit.page.inner_text("h1") == f"{start + 1} of {n}"
            assert rated(visit) == f"{start} of {n} rated by anna"
            for item in part:
                by_keys(visit, item, "n" if item.latent == DECOY else "y")
            if start:
                assert visit.page.inner_text("h1") == "All rated"
                visit.close()
                code, out, error = server.end()
                assert (code, f"{n} of {n} items are rated" in out, "Traceback" in error) == (0, True, False)
            else:
                visit.close()
                server.end(signal.SIGKILL)
    items = plan_of(root, "bert")
    latents = [item.latent for item in items if item.latent != DECOY]
    with Server(root, "bert") as server:
        visit = Visit(browser, server.url)
        for item in items:
            wrong = item.latent == latents[0]
            clicked = max(item.intruder, 0) if not wrong else (item.intruder + 1) % len(item.row)
            concept = {latents[0]: "yes", latents[1]: "partly", DECOY: "partly"}.get(item.latent, "yes")
            by_mouse(visit, item, concept, clicked=clicked)
        visit.close()
        assert server.end()[0] == 0
    return latents


def test_answers_are_kept_and_agreement_is_printed(root, two_raters):
    anna, bert = file_of(root, "anna"), file_of(root, "bert")
    assert [len(anna[name]) for name in ("latents", "decoys")] == [5, 2]
    assert {answer["concept"] for answer in anna["latents"].values()} == {"yes"}
    assert all(answer["found"] and answer["confidence"] == 4 for answer in anna["latents"].values())
    assert {answer["name"] for answer in anna["latents"].values()} == {"purple dots <b>"}
    assert not bert["latents"][str(two_raters[0])]["found"]
    place = Workplace(root)
    found = json.loads(place.run("ratings", *_words(NAMES), "--json").stdout)
    assert found["raters"][0] == {
        "rater": "anna", "n_rated": 5, "n_yes": 5, "n_partly": 0, "n_no": 0, "n_found": 5, "chance": 0.2,
        "n_decoys": 2, "n_rejected": 2,
    }  # fmt: skip
    assert (found["raters"][1]["n_found"], found["raters"][1]["n_rejected"]) == (4, 0)
    both = sorted(anna["latents"])
    one, other = ([CONCEPTS.index(each["latents"][at]["concept"]) for at in both] for each in (anna, bert))
    assert found["pairs"][0]["kappa"] == pytest.approx(cohen_kappa_score(one, other))
    assert found["all_raters"] is None
    assert found["passed"] == sorted(set(map(int, both)) - set(two_raters[:2]))
    text = place.run("ratings", *_words(NAMES)).output
    assert "anna: 5 latents rated (5 yes, 0 partly, 0 no); intruder found 5 of 5 (100%, by chance 20%)" in text
    assert "anna and bert, 5 latents rated by both: Cohen's kappa 0.000" in text
    again = cytosae_pipeline.ratings(root_dir=root, yes_of="majority", raters_needed=1, **NAMES)
    assert again.passed == found["passed"], "half of two raters is no majority"


def test_raters_see_another_order_and_no_item_twice(root, two_raters):
    anna, bert = plan_of(root, "anna"), plan_of(root, "bert")
    assert [item.latent for item in anna] != [item.latent for item in bert]
    assert {item.latent for item in anna} == {item.latent for item in bert}


def _hidden(value):
    """JSON without maps."""
    if isinstance(value, dict):
        return "map" if "dtype" in value else {name: _hidden(part) for name, part in value.items()}
    return [_hidden(part) for part in value] if isinstance(value, list) else value


def test_nothing_that_the_page_gets_tells_what_is_rated(root, browser, two_raters):
    store = ActivationStore.open(next(root.glob("out/activations/demo-0/*.zarr")))
    images = store.images
    secrets = {*images.label, *images.patient, *images.path, "demo-0", str(root), "sae_"}
    secrets |= {Path(path).stem for path in images.path}
    with Server(root, "carl") as server:
        visit = Visit(browser, server.url)
        answers: list = []
        visit.page.on("response", lambda answer: answers.append(answer))
        visit.page.reload()
        items = plan_of(root, "carl")
        for at in range(len(items)):
            visit.page.wait_for_function("text => document.querySelector('h1')?.textContent === text",
                                         arg=f"{at + 1} of {len(items)}")  # fmt: skip
            for image in visit.page.query_selector_all("img"):
                image.scroll_into_view_if_needed()
            html = visit.page.content()
            for secret in secrets:
                assert secret not in html, secret
            visit.page.keyboard.press("ArrowRight")
        kinds = set()
        for answer in answers:
            address = answer.url.removeprefix(f"http://127.0.0.1:{server.port}/{server.token}/")
            kinds.add(address.split("/")[0])
            if address.startswith("data/"):
                value = json.loads(server.ask(address)[2])
                told = json.dumps(_hidden(value))
                assert not [secret for secret in secrets if secret in told]
                if "items" in address:
                    assert value.keys() == {"groups", "n_row", "answer"}
                    assert all(group.keys() == {"title", "maps"} for group in value["groups"])
                    assert (value["n_row"], value["answer"]) == (5, None)
                    assert value["groups"][0]["title"] == "strongest"
                    # A latent may be active on the CLS token alone, which no map shows.
                    assert max(unpack(packed).max() for packed in value["groups"][0]["maps"]) in (0, 255)
                else:
                    keys = {"rater", "done", "grid", "palette", "limits", "concepts"}
                    assert value.keys() == keys
            elif address.startswith("pictures/"):
                assert re.fullmatch(r"pictures/\d/\d/\d\.jpg", address)
                picture = Image.open(io.BytesIO(server.ask(address)[2]))
                assert not picture.getexif()
                assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert not {"content-disposition", "etag", "last-modified"} & answer.headers.keys()
        assert kinds >= {"index.html", "page", "data", "pictures"}
        # Nothing of the explorer is served: it would tell everything.
        for path in ("data/overview.js", "data/latents/1.js", "data/images/1.js", "thumbnails/1.jpg", "data/rows/0.js",
                     "notes/1", "data/patients.js", "page/app.js", "latent_ratings/anna.json"):  # fmt: skip
            assert server.ask(path)[0] == 404, path
        visit.close()
        server.end()


def test_what_the_server_refuses(root):
    with Server(root, "dora") as server:
        good = {"name": "x", "concept": "yes", "confidence": 3, "clicked": 0}

        def put(value, at="0", **options):
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            status, _, text = server.ask(f"answers/{at}", "PUT", body, **options)
            return status, text.decode()

        for origin in (None, "https://evil.example", "null"):
            assert put(good, origin=origin)[0] == 403
        for at in ("99", "-1", "01", "x", "0.json", "9" * 400):
            assert put(good, at)[0] == 404
            assert server.ask(f"data/items/{at}.json")[0] == 404
        for path in ("pictures/0/9/0.jpg", "pictures/0/0/9.jpg", "pictures/0/0/0", "pictures/0/0/00.jpg", "page/../x"):
            assert server.ask(path)[0] == 404
        for value, message in (
            (b"{", "An answer must be JSON"),
            (b"[" * 50_000, "An answer must be JSON"),
            ([], "name must be text"),
            ({**good, "confidence": 0}, "confidence must be a whole number from 1 to 5"),
            ({**good, "clicked": 5}, "clicked must be a whole number from 0 to 4"),
            ({**good, "name": ""}, "a concept needs a name"),
        ):
            status, text = put(value)
            assert (status, message in text) == (400, True), text
        assert put({**good, "name": "x" * 70_000}) == (413, "The answer is too long")
        assert list(root.glob("**/dora.json")) == []
        assert put({**good, "found": True, "item": "zz", "n_row": 99}) == (200, "saved")
        (answer,) = [*file_of(root, "dora")["latents"].values(), *file_of(root, "dora")["decoys"].values()]
        assert (answer["n_row"], len(answer["item"])) == (5, 32), "what the server knows is not taken from the page"
        _, headers, body = server.ask("index.html")
        assert headers["Content-Security-Policy"] == read_policy()
        assert read_policy() in " ".join(body.decode().split())
        path = next(root.glob("**/dora.json"))
        path.write_text("garbage")
        assert put(good)[0] == 500
        assert path.read_text() == "garbage"
        path.unlink()
        server.end()


def test_the_page_asks_for_what_is_missing_and_shows_earlier_answers(root, browser):
    items = plan_of(root, "emil")
    with Server(root, "emil") as server:
        visit = Visit(browser, server.url)
        page = visit.page
        for key, message in (("Enter", "Click the image that does not belong"), ("a", ""), ("Enter", "one concept"),
                             ("p", ""), ("Enter", "how sure"), ("5", ""), ("Enter", "Name the concept")):  # fmt: skip
            page.keyboard.press(key)
            assert message in page.inner_text("#message")
        assert page.get_attribute(".rate-row button[data-place='0']", "aria-pressed") == "true"
        page.keyboard.press("/")
        page.keyboard.type("a name, y n 1")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('h1').textContent.startsWith('2 of')")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("() => document.querySelector('h1').textContent.startsWith('1 of')")
        assert page.input_value("#name") == "a name, y n 1"
        assert [one.inner_text() for one in page.query_selector_all("[aria-pressed='true']")][-2:] == ["Partly", "5"]
        assert page.query_selector_all(".rate-row [aria-pressed='true']")[0].get_attribute("data-place") == "0"
        # Heat maps are off until they are asked for, and never over the intruder test.
        painted = "() => [...document.querySelectorAll('canvas')].map(c => c.getContext('2d').getImageData(0, 0, "\
                  "c.width, c.height).data.some(v => v > 0))"  # fmt: skip
        assert not any(page.evaluate(painted))
        page.keyboard.press("h")
        shown = page.evaluate(painted)
        assert shown == [True] * (len(shown) - 5) + [False] * 5
        page.keyboard.press("h")
        assert not any(page.evaluate(painted))
        page.keyboard.press("n")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('h1').textContent.startsWith('2 of')")
        visit.close()
        server.end()
    stored = file_of(root, "emil")
    (answer,) = [*stored["latents"].values(), *stored["decoys"].values()]
    assert (answer["concept"], answer["item"]) == ("no", items[0].key)
    next(root.glob("**/emil.json")).unlink()


def test_a_page_of_passed_latents_compares_groups_over_these_alone(root, demo_run, two_raters, messages):
    place = Workplace(root)
    out, groups = root / "passed", root / "dataset/demo-0/patients.csv"
    few = ("--passed", "--groups", groups, "--masking_images", 0, "--shuffles", 0, "--out", out)
    place.run("report", *_words(NAMES), *few)
    overview = read_data(out, "overview")
    passed = json.loads(place.run("ratings", *_words(NAMES), "--json").stdout)["passed"]
    assert sorted(overview["featured"]) == passed
    assert len(passed) == 3
    assert any("Only the 3 of 5 rated latents that passed have a page" in text for text in overview["messages"])
    found, every = read_data(out, "comparisons/0"), read_data(demo_run.report, "comparisons/0")
    latents, before = unpack(found["latents"]).tolist(), unpack(every["latents"]).tolist()
    assert set(latents) <= set(passed)
    assert latents
    p = unpack(found["minus_log10_p"])
    np.testing.assert_allclose(p, unpack(every["minus_log10_p"])[[before.index(at) for at in latents]], rtol=1e-5)
    q = -np.log10(false_discovery_control(10.0 ** -p.astype(float)))
    np.testing.assert_allclose(unpack(found["minus_log10_q"]), q, rtol=1e-4, atol=1e-6)
    assert "Only latents that passed their rating are compared (3), and q is adjusted over them." in found["left_out"]
    assert every["left_out"] == ""
    wanted = [str(at) for at in (*passed[:1], *two_raters[:1])]
    place.run("report", *_words(NAMES), *few, "--latents", ",".join(wanted))
    assert read_data(out, "overview")["featured"] == passed[:1]


def test_pages_without_passed_latents_are_refused(root, demo_run, two_raters):
    place = Workplace(root)
    result = place.run("report", *_words(NAMES), "--passed", "--raters_needed", 3, code=1)
    assert "none of 5 rated latents passed. A latent passes if 3 raters or more rated it" in result.output
    result = place.run("explore", *_words(NAMES), "--passed", "--latents", two_raters[0], code=1)
    assert "none of the latents of --latents passed its rating" in result.output
    other = Workplace(demo_run.root)
    for verb in ("report", "explore"):
        result = other.run(verb, *_words(NAMES), "--passed", code=1)
        assert "--passed needs ratings, but there are none in" in result.output
    result = other.run("ratings", *_words(NAMES), code=1)
    assert "there are no ratings in" in result.output
    with pytest.raises(UserError, match="there are no ratings in"):
        cytosae_pipeline.ratings(root_dir=demo_run.root, **NAMES)


def test_what_cannot_be_rated_is_said(root, messages):
    place = Workplace(root)
    result = place.run("explore", *_words(NAMES), "--rate", "x/y", code=2)
    assert "rate must be a rater's short name" in result.output
    config = resolve_sae(ExploreConfig(root_dir=root, rate="anna", **NAMES))
    data = open_report_data(config, profiles=False)
    always = np.flatnonzero(data.features.sparsity == 1)[:2].tolist()
    assert len(always) == 2
    result = place.run("explore", *_words(NAMES), "--rate", "x", "--latents", ",".join(map(str, always)), code=1)
    said = "no latent can be rated: 2 latents are active on the top images of all others, so that there is no intruder"
    assert f"{said}. Name others with --latents" in result.output
    with pytest.raises(UserError, match="no latent can be rated: 1 latent is active on fewer than 4 images"):
        _require_items(Plan((), 1, 0))
    _require_items(Plan(plan_of(root, "anna"), 2, 1))
    said = "left out of the rating: 2 latents are active on fewer than 4 images; 1 latent is active on the top images"
    assert said in messages()
    with StoreReader(data.store) as reader, pytest.raises(UserError, match="at most 1,000 latents, found 1,001"):
        find_candidates(data, reader, np.arange(1001))
