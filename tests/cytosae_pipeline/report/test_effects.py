"""What a latent changes, on the page: live for the shown image, and as a small table of a report with a tail."""

import json

import numpy as np
import pytest

import cytosae_pipeline
from cytosae_cache.store import ActivationStore
from tests.cytosae_pipeline.report.explore.test_explore import Server, read_script
from tests.support.browser import Visit, browser_or_skip, file_url


@pytest.fixture
def place(with_sae):
    with_sae.build("--keep_tail")
    return with_sae


def strongest(server, row=0):
    return server.get(f"images/{row}")["latents"][0]["latent"]


def test_the_server_computes_what_python_computes(place):
    with Server(place) as server:
        assert server.get("overview")["effects"] is True
        latent, labels = strongest(server), [item["name"] for item in server.get("overview")["labels"]]
        for percent in (0, 50, 200):
            record = server.get(f"effects/{latent}/0/{percent}")
            found = cytosae_pipeline.latent_effects(
                place.sae(), place.store, latents=latent, rows=0, factor=percent / 100
            )
            assert [labels[number] for number, *_ in record["labels"]] == found.classes
            np.testing.assert_allclose(
                [row[1:] for row in record["labels"]], np.stack([found.before[0], found.after[0, 0]], 1)
            )
            assert record["cosine"] == pytest.approx(found.cosine[0, 0])
        top = server.get(f"latents/{latent}")
        rows = tuple(item["row"] for item in top["top"])[:5]
        found = cytosae_pipeline.latent_effects(place.sae(), place.store, latents=latent, rows=rows)
        changes = [after - before for _, before, after in top["effect"]["labels"]]
        np.testing.assert_allclose(changes, found.change[0], atol=1e-6)
        assert top["effect"]["n_images"] == len(rows)
        broken = int(np.flatnonzero(~ActivationStore(place.store).valid)[0])
        for name in (
            f"{latent}/{broken}/0",
            f"{latent}/999/0",
            "96/0/0",
            f"{latent}/0/1001",
            f"{latent}/0/-1",
            "0/0/x",
        ):
            assert server.ask(f"data/effects/{name}.js")[0] == 404


def test_without_a_tail_there_is_nothing_of_it(with_sae):
    with Server(with_sae) as server:
        assert server.get("overview")["effects"] is False
        assert server.get(f"latents/{strongest(server)}")["effect"] is None
        assert server.ask("data/effects/0/0/0.js")[0] == 404


def test_the_report_has_a_small_table_only_with_a_tail(place, tmp_path):
    def write(name):
        return place.run(
            "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--latents", "0-95", "--out", tmp_path / name
        )

    write("with")
    tail = place.store.with_name(f"{place.store.name}.tail.safetensors")
    tail.rename(tmp_path / "aside")
    write("without")
    effects = {}
    for name in ("with", "without"):
        files = sorted((tmp_path / name / "data" / "latents").glob("*.js"))
        effects[name] = [read_script(path.read_text(), f"latents/{path.stem}")["effect"] for path in files]
    assert any(effects["with"])
    assert not any(effects["without"])
    assert all(item["n_images"] <= 5 and len(item["labels"]) == 3 for item in effects["with"] if item)
    latent = next(path.stem for path, item in zip(files, effects["with"], strict=True) if item)
    with browser_or_skip() as browser:
        for name, n in (("with", 1), ("without", 0)):
            visit = Visit(browser, file_url(tmp_path / name))
            visit.go(f"latent/{latent}")
            assert visit.page.locator("h2", has_text="What the latent changes").count() == n
            if n:
                text = visit.page.locator("section", has_text="What the latent changes").first.inner_text()
                assert "without the latent. Probabilities of a linear probe" in text
                assert "Mean cosine similarity of the embeddings: " in text
            visit.go("image/0")
            assert visit.page.locator("section.effect").count() == 0
            visit.close()


def test_the_explorer_shows_which_labels_move(place):
    with browser_or_skip() as browser, Server(place) as server:
        latent = strongest(server)
        wanted = {percent: server.get(f"effects/{latent}/0/{percent}") for percent in (0, 200)}
        labels = [item["name"] for item in server.get("overview")["labels"]]
        visit = Visit(browser, server.url)
        visit.go("image/0")
        panel = visit.page.locator("section.effect")
        for percent, button in ((0, "without it"), (200, "doubled")):
            panel.get_by_role("button", name=button).click()
            visit.page.wait_for_function("() => !document.querySelector('[aria-busy]')")
            cells = [row.split("\t") for row in panel.locator("tbody").inner_text().split("\n")]
            shown = {name: [float(before), float(after)] for name, before, after, _ in cells}
            for number, before, after in wanted[percent]["labels"]:
                assert shown[labels[number]] == pytest.approx([before, after], abs=6e-4)
            changes = [abs(after - before) for before, after in shown.values()]
            assert changes == sorted(changes, reverse=True) or max(changes) < 2e-3
            assert panel.get_by_role("button", name=button).get_attribute("aria-pressed") == "true"
        other = visit.page.locator("button.map-button").nth(1)
        other.click()
        visit.page.wait_for_function("() => !document.querySelector('[aria-busy]')")
        href = panel.locator("p a").first.get_attribute("href")
        assert href == f"#/latent/{other.get_attribute('data-latent')}"
        visit.go(f"latent/{latent}")
        assert visit.page.locator("h2", has_text="What the latent changes").count() == 1
        visit.close()


def test_a_damaged_tail_is_a_message_and_one_label_leaves_it_out(place):
    path = place.store.with_name(f"{place.store.name}.tail.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    result = place.run("report", "--dataset_name", "toy", "--sae_path", place.sae(), code=1)
    assert "is not a sound tail of store" in result.output
    assert "--keep_tail" in result.output
    assert json.loads(place.run("info", "--dataset_name", "toy", "--json").stdout)["tail"] == str(path)
