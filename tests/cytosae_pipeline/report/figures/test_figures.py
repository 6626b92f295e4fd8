"""`report --figures`: figures show what was measured, in files that are small, safe and reproducible."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cytosae.analysis.differential import compare_groups
from cytosae.analysis.latents import correlate, group_means
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.figures.curves import draw_masking, draw_training
from cytosae_pipeline.report.figures.latents import draw_latents, draw_reference_images, overlay, read_pictures
from cytosae_pipeline.report.figures.patients import draw_barcodes, draw_comparison, draw_correlation, spread_out
from cytosae_pipeline.report.figures.style import (
    clean_text,
    color_map,
    figure_style,
    fit_text,
    make_figure,
    make_sheet,
    save_figure,
    widest_mm,
)
from cytosae_pipeline.report.figures.write import write_figures
from cytosae_pipeline.report.records.patients import GroupPair
from cytosae_pipeline.statistics.groups import PatientGroups

SVG = "{http://www.w3.org/2000/svg}"
EVERY = {"latents", "reference_images_0", "barcodes", "comparison_0", "correlation", "training", "masking"}
HOSTILE = ("$\\frac{", "<script>alert(1)</script>", "芽球 & Co")


def _figures(place, *arguments, out="page", code=0):
    folder = place.root / out
    result = place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", folder, "--figures", "--top_k", 3,
        "--latents", "0-9", "--masking_images", 100, "--json", *arguments, code=code,
    )  # fmt: skip
    return folder / "figures", result


def _write_groups(place, *groups):
    path = place.root / "groups.csv"
    path.write_text("patient,group\n" + "".join(f"p{at},{name}\n" for at, name in enumerate(groups)))
    return path


def _names(folder):
    assert {path.suffix for path in folder.iterdir()} == {".png", ".svg"}
    names = {path.stem for path in folder.iterdir()}
    assert len(list(folder.iterdir())) == 2 * len(names)
    return names


def _texts(path):
    return [node.text for node in ET.parse(path).iter(f"{SVG}text")]


def _size_mm(path):
    with Image.open(path) as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), rel=1e-3)
        return tuple(25.4 * side / 300 for side in picture.size)


def _pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory):
    from tests.conftest import Workplace

    root = tmp_path_factory.mktemp("figures") / "root"
    shutil.copytree(_pristine["sae"], root)
    return Workplace(root)


@pytest.fixture(scope="module")
def made(place):
    """The folder with the figures of two groups of two patients, and the output of `report`."""
    folder, result = _figures(place, "--groups", _write_groups(place, "sick", "well", "sick", "well"))
    return folder, json.loads(result.stdout)


@pytest.fixture
def report_data(place, made):
    return open_report_data(PageConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae(), top_k=3))


def make_cohort(groups=(0, 0, 0, 0, 0, 1, 1, 1, 1, 1), n_latents=12, names=("left", "right"), seed=0):
    of = np.array(groups)
    raw = np.random.default_rng(seed).integers(1, 100, size=(len(of), n_latents))
    return Cohort(
        names=[f"P{at}" for at in range(len(of))],
        counts=raw / 2.0,
        raw=raw,
        n_images=np.full(len(of), 2),
        threshold=0.0,
        groups=PatientGroups(tuple(names), of, ""),
    )


def test_every_figure_exists_in_both_formats_and_is_reported_at_its_final_path(made):
    folder, result = made
    assert _names(folder) == EVERY
    assert sorted(result["figures"]) == sorted(str(path) for path in folder.iterdir())
    assert not list(folder.parent.parent.glob("page*partial*"))


def test_pngs_have_the_sizes_of_journal_columns(made):
    folder, _result = made
    widths = {"latents": 89, "comparison_0": 89, "barcodes": 183, "training": 183, "masking": 122}
    for name in EVERY:
        width, height = _size_mm(folder / f"{name}.png")
        assert width == pytest.approx(widths.get(name, width), abs=0.2)
        assert width < 183.2
        assert 20 < height < 247
        pixels = _pixels(folder / f"{name}.png")
        ink = (pixels != 255).any(axis=2)
        assert 0.005 < ink.mean() < 0.98, name
        # Nothing is clipped: the edges are white.
        edges = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert edges.mean() < 0.01, name


def test_svgs_contain_text_as_text_and_pictures_as_pictures(made):
    folder, _result = made
    for name in EVERY:
        tree = ET.parse(folder / f"{name}.svg")
        assert len(list(tree.iter(f"{SVG}text"))) > 3
        assert not list(tree.iter(f"{SVG}script"))
        assert len(list(tree.iter())) < 2000
    assert "log10 mean activation" in _texts(folder / "latents.svg")
    assert {"group means", "sick (2)", "well (2)", "p0", "p1", "p2", "p3"} <= set(_texts(folder / "barcodes.svg"))
    assert [text for text in _texts(folder / "comparison_0.svg") if "more in" in text]
    assert {"explained variance", "loss", "L0", "dead share"} <= set(_texts(folder / "training.svg"))
    assert {"original activations", "chance", "1", "50"} <= set(_texts(folder / "masking.svg"))


def test_reference_grids_show_each_latents_top_images_with_value_and_label(made, report_data):
    folder, _result = made
    texts = _texts(folder / "reference_images_0.svg")
    filled = report_data.top_rows[:10] >= 0
    assert len(list(ET.parse(folder / "reference_images_0.svg").iter(f"{SVG}image"))) == filled.sum()
    assert [text for text in texts if text in map(str, range(10))] == [str(latent) for latent in range(10)]
    labels = [report_data.features.labels[report_data.labels[row]] for row in report_data.top_rows[:10][filled]]
    assert [text for text in texts if text in report_data.features.labels] == labels
    values = [text for text in texts if re.fullmatch(r"[\d.e+-]*\.[\d.e+-]*", text)]
    assert np.array(values, float) == pytest.approx(report_data.features.top_values[:10][filled], rel=5e-3)


def test_more_latents_take_more_figures_up_to_twenty(place, made, tmp_path, report_data):
    images = list_stored_images(report_data.store, report_data.config)
    for n, expected in ((1, [1]), (11, [10, 1]), (25, [10, 10])):
        folder = tmp_path / str(n)
        write_figures(folder, report_data, np.arange(n), images)
        shown = []
        for number in range(len(list(folder.glob("reference*.svg")))):
            texts = _texts(folder / f"reference_images_{number}.svg")
            shown.append(texts.count("latent"))
        assert shown == expected


def test_the_same_report_gives_the_same_bytes_under_any_matplotlib_settings(place, made):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "text.parse_math": True, "axes.grid": True}):
        again, _ = _figures(place, "--groups", place.root / "groups.csv", out="again")
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before
    for path in made[0].iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        assert b"dc:date" not in path.read_bytes()
        assert str(place.root).encode() not in path.read_bytes()


def test_only_top_images_are_read(with_sae):
    arguments = ("--latents", "1,2", "--top_k", 2, "--masking_images", 0, "--quantile_images", 0)
    before, _result = _figures(with_sae, *arguments)
    data = with_sae.root / "page" / "data" / "images"
    rows = {int(path.stem) for path in data.iterdir()}
    pictures = sorted(
        (path.relative_to(with_sae.images).as_posix() for path in with_sae.images.rglob("*.png")), key=str.encode
    )
    for row, path in enumerate(pictures):
        if row not in rows:
            (with_sae.images / path).unlink()
    assert len(rows) <= 4 < len(pictures)
    after, _ = _figures(with_sae, *arguments, out="after")
    assert (before / "reference_images_0.png").read_bytes() == (after / "reference_images_0.png").read_bytes()


def test_missing_and_changed_cells_are_grey(with_sae):
    config = PageConfig(root_dir=with_sae.root, dataset_name="toy", sae_path=with_sae.sae(), top_k=3)
    report_data = open_report_data(config)
    images = list_stored_images(report_data.store, config)
    rows = np.flatnonzero(report_data.store.valid)
    missing, changed, kept = rows[:3].tolist()
    (with_sae.images / report_data.store.images.path[missing]).unlink()
    shutil.copy(
        with_sae.images / report_data.store.images.path[kept], with_sae.images / report_data.store.images.path[changed]
    )
    assert set(read_pictures(report_data, images, rows)) == set(rows.tolist()) - {missing, changed}
    assert read_pictures(report_data, None, rows) == {}
    shutil.rmtree(with_sae.images)
    folder, _result = _figures(with_sae)
    assert "reference_images_0" in _names(folder)
    pixels = _pixels(folder / "reference_images_0.png")
    # Without cells there is only grey, the scale over it, and grey letters.
    assert len(list(ET.parse(folder / "reference_images_0.svg").iter(f"{SVG}image"))) > 0
    assert (pixels.astype(int).max(axis=2) - pixels.min(axis=2)).max() > 30


def test_an_overlay_is_the_pages_scale_over_the_cell():
    cell = np.random.default_rng(0).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    assert np.array_equal(overlay(cell, np.zeros((2, 2), np.uint8), 8), cell)
    assert (overlay(None, np.zeros((2, 2), np.uint8), 8) == 205).all()
    for level in (1, 128, 255):
        share = level / 255
        alpha = 0.6 * (0.15 + 0.85 * share)
        color = 255 * np.array(color_map()(0.15 + 0.85 * share)[:3])
        found = overlay(cell, np.full((2, 2), level, np.uint8), 8)
        np.testing.assert_allclose(found, alpha * color + (1 - alpha) * cell, atol=2)
    corner = overlay(None, np.array([[255, 0], [0, 0]], np.uint8), 64)
    assert (corner[50:, 50:] == 205).all()
    assert (corner[:10, :10] != 205).any(axis=2).all()


def test_all_latents_are_points_and_featured_ones_have_rings(made, report_data):
    with figure_style():
        figure = draw_latents(report_data, np.array([3, 1]))
    axes = figure.axes[0]
    points = np.concatenate([item.get_offsets() for item in axes.collections[:-1]])
    active = report_data.features.sparsity > 0
    expected = np.log10([report_data.features.sparsity[active], report_data.features.mean_acts[active]]).T
    in_order = points[np.lexsort(points.T)], expected[np.lexsort(expected.T)]
    np.testing.assert_allclose(*in_order, rtol=1e-6)
    rings = np.log10([report_data.features.sparsity[[3, 1]], report_data.features.mean_acts[[3, 1]]]).T
    np.testing.assert_allclose(axes.collections[-1].get_offsets(), rings)


def test_undefined_entropies_are_grey_and_never_on_the_scale(report_data):
    undefined = dataclasses.replace(report_data, entropy=np.full(report_data.n_latents, -1.0))
    with figure_style():
        figure = draw_latents(undefined, np.array([], int))
    assert len(figure.axes) == 1  # no colour bar
    n_active = int((report_data.features.sparsity > 0).sum())
    assert figure.legends[0].get_texts()[0].get_text() == f"entropy undefined ({n_active})"
    just_below = dataclasses.replace(report_data, entropy=np.full(report_data.n_latents, -1e-9))
    with figure_style():
        figure = draw_latents(just_below, np.array([], int))
    assert len(figure.axes) == 2
    assert (figure.axes[0].collections[0].get_array() == 0).all()


def test_figures_of_a_wide_autoencoder_stay_small(report_data, tmp_path):
    rng, n = np.random.default_rng(0), 49_152
    features = dataclasses.replace(
        report_data.features,
        sparsity=10 ** rng.uniform(-4, 0, n),
        mean_acts=10 ** rng.uniform(-3, 1, n),
        labels=("a", "b", "c"),
    )
    wide = dataclasses.replace(report_data, features=features, entropy=rng.uniform(0, math.log(3), n))
    with figure_style():
        _png, svg = save_figure(draw_latents(wide, np.arange(1000)), tmp_path, "latents")
    assert svg.stat().st_size < 2_000_000
    assert len(list(ET.parse(svg).iter())) < 1000


def test_a_comparison_numbers_the_planted_latents_and_colours_what_is_significant(tmp_path):
    cohort = make_cohort(n_latents=300)
    cohort.counts[:5, 77] = np.arange(1000, 1005)
    cohort.counts[5:, 123] = np.arange(2000, 2005)
    found = compare_groups(cohort.counts, cohort.groups.of == 0)
    found = found._replace(q_value=np.where(np.isin(np.arange(300), [77, 123]), 0.01, 0.9))
    with figure_style():
        figure = draw_comparison(cohort, GroupPair(0, 1), found)
        _png, svg = save_figure(figure, tmp_path, "comparison")
    texts = _texts(svg)
    assert {"77", "123", "more in left (1) →", "← more in right (1)"} <= set(texts)
    assert len([text for text in texts if re.fullmatch(r"\d+", text) and int(text) > 20]) <= 10
    _quiet, right_side, rings, left_side, _rings = figure.axes[0].collections
    for points, latent in ((right_side, 77), (left_side, 123)):
        expected = found.log2_fold_change[latent], -np.log10(found.p_value[latent])
        np.testing.assert_allclose(points.get_offsets(), [expected])
    assert len(rings.get_offsets()) <= 5
    assert right_side.get_facecolor().tolist() != left_side.get_facecolor().tolist()


def test_a_comparison_of_identical_patients_says_so(tmp_path):
    cohort = make_cohort()
    cohort.counts[:] = 1
    found = compare_groups(cohort.counts, cohort.groups.of == 0)
    with figure_style():
        _png, svg = save_figure(draw_comparison(cohort, GroupPair(0, None), found), tmp_path, "none")
    assert {"no latent varies among these patients", "← more in all others (0)"} <= set(_texts(svg))


@given(st.lists(st.floats(0, 1), max_size=12))
def test_numbers_never_overlap(wanted):
    wanted = np.array(sorted(wanted, reverse=True))
    found = spread_out(wanted, 0.08)
    assert (np.diff(found) <= -0.08 + 1e-9).all()
    assert ((found >= 0) & (found <= 1)).all()
    if (np.diff(wanted) <= -0.08).all():
        np.testing.assert_allclose(found, wanted)


def test_barcodes_show_shares_of_the_largest_count_by_group():
    cohort = make_cohort((0, 0, 1, 1, 1, -1))
    cohort.counts[:, 4] = 0
    latents = np.array([7, 4, 2])
    with figure_style():
        figure = draw_barcodes(cohort, latents)
    matrices = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    peaks = np.array([cohort.counts[:, 7].max(), 1, cohort.counts[:, 2].max()])
    shares = cohort.counts[:, latents] / peaks
    means, *blocks = matrices
    np.testing.assert_allclose(means, group_means(shares[:5], cohort.groups.of[:5], 2))
    for block, expected in zip(blocks, (shares[:2], shares[2:5], shares[5:]), strict=True):
        np.testing.assert_allclose(block, expected)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text for text in texts if text.endswith(")")] == ["left (2)", "right (3)", "no group (1)"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["7", "4", "2"]


@pytest.mark.parametrize(("n_patients", "n_groups", "n_latents"), [(1, 1, 1), (90, 30, 700), (3000, 2, 90)])
def test_barcodes_of_any_cohort_fit_on_a_page(n_patients, n_groups, n_latents, tmp_path):
    groups = np.sort(np.arange(n_patients) % n_groups)
    cohort = make_cohort(groups, n_latents, names=[f"group {at}" for at in range(n_groups)])
    with figure_style():
        png, svg = save_figure(draw_barcodes(cohort, np.arange(n_latents)), tmp_path, "barcodes")
    width, height = _size_mm(png)
    assert width == pytest.approx(183, abs=0.2)
    assert height < 300
    assert any(text.endswith("chosen latents, in the order of the page") for text in _texts(svg))
    assert svg.stat().st_size < 6_000_000


def test_the_correlation_is_ordered_by_group_with_bars():
    cohort = make_cohort()
    with figure_style():
        figure = draw_correlation(cohort)
    (matrix,) = (axes.images[0] for axes in figure.axes if axes.images)
    np.testing.assert_allclose(matrix.get_array(), correlate(cohort.counts))
    low, high = matrix.get_clim()
    assert low <= correlate(cohort.counts).min()
    assert high == 1
    assert len(figure.axes[0].patches) == 2 * 2 + 2
    with figure_style():
        none = draw_correlation(make_cohort((-1, -1, -1), names=()))
    assert not none.axes[0].patches


def test_training_curves_are_what_was_recorded_with_gaps():
    record = {
        "x": [0, 10, 20, 30],
        "curves": [
            {"name": "explained variance", "values": [-5.0, None, 0.5, 0.75], "low": 0.0, "high": 1.0},
            {"name": "loss", "values": [3.0, 2.0, 1.0, 0.5], "low": None, "high": None},
        ],
    }
    with figure_style():
        figure = draw_training(record)
    first, second = figure.axes
    assert first.lines[0].get_xdata().tolist() == record["x"]
    assert np.array_equal(first.lines[0].get_ydata(), [-5, np.nan, 0.5, 0.75], equal_nan=True)
    assert second.lines[0].get_ydata().tolist() == record["curves"][1]["values"]
    assert first.get_ylim() == pytest.approx((-0.02, 1.02))
    assert second.get_ylim()[1] >= 3


def test_the_masking_experiment_is_drawn_curve_by_curve():
    record = {
        "ks": [1, 10], "original": 0.9, "reconstruction": 0.8, "chance": 0.5,
        "curves": [
            {"name": "kept", "accuracy": [0.6, 0.7], "dashed": False},
            {"name": "random", "accuracy": [0.8, 0.75], "dashed": True},
        ],
    }  # fmt: skip
    with figure_style():
        figure = draw_masking(record)
    *levels, kept, random = figure.axes[0].lines
    assert [line.get_ydata()[0] for line in levels] == [0.9, 0.8, 0.5]
    assert kept.get_ydata().tolist() == [0.6, 0.7]
    assert (kept.get_linestyle(), random.get_linestyle()) == ("-", "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["kept", "random"]


def test_hostile_names_are_drawn_as_they_are(with_images):
    place = with_images
    for old, new in zip(sorted(path.name for path in place.images.iterdir()), ("$x^2$", "a & b", "芽球"), strict=True):
        (place.images / old).rename(place.images / new)
    place.build("--layout", "class/patient")
    place.train("--run_name", "r")
    groups = place.root / "groups.csv"
    groups.write_text(
        f"patient,group\np0,{HOSTILE[0]}\np1,{HOSTILE[1]}\np2,{HOSTILE[0]}\np3,{HOSTILE[1]}\n", encoding="utf-8"
    )
    place.features().mkdir(parents=True)
    notes = {"format": 1, "notes": {"0": {"name": "<b>$\\sum$", "note": ""}, "1": {"name": "\x00\n", "note": ""}}}
    (place.features() / "latent_notes.json").write_text(json.dumps(notes))
    folder, _result = _figures(place, "--groups", groups)
    texts = {path.stem: _texts(path) for path in folder.glob("*.svg")}
    assert {f"{HOSTILE[0]} (2)", f"{HOSTILE[1]} (2)"} <= set(texts["barcodes"])
    assert HOSTILE[0] in texts["correlation"]
    assert any(text.startswith(f"more in {HOSTILE[0]}") for text in texts["comparison_0"])
    assert {"$x^2$", "a & b", "芽球"} & set(texts["reference_images_0"])
    assert "<b>$\\sum$" in texts["reference_images_0"]
    assert "\ufffd\ufffd" in texts["reference_images_0"]
    for path in folder.glob("*.svg"):
        assert b"<script" not in path.read_bytes()


def test_figures_without_data_are_left_out(with_images):
    with_images.build("--layout", "class")
    with_images.train("--run_name", "r")
    folder, _ = _figures(with_images)
    assert _names(folder) >= {"latents", "reference_images_0", "training"}
    assert not _names(folder) & {"barcodes", "comparison_0", "correlation"}
    (with_images.sae().parent / "metrics.jsonl").unlink()
    folder, _ = _figures(with_images, "--masking_images", 0)
    assert _names(folder) == {"latents", "reference_images_0"}


def test_one_group_has_nothing_to_compare(place, made):
    for name, groups, heading in (
        ("one", ("--groups", _write_groups(place, "all", "all", "all", "all")), "all (4)"),
        ("none", (), "patients (4)"),
    ):
        folder, _ = _figures(place, *groups, out=name)
        assert _names(folder) == EVERY - {"comparison_0"}
        texts = _texts(folder / "barcodes.svg")
        assert heading in texts
        assert "group means" not in texts


def test_pseudonyms_hide_every_name_and_path(place, made):
    groups = _write_groups(place, "sick", "well", "sick", "well")
    folder, _ = _figures(place, "--groups", groups, "--pseudonymize", out="hidden")
    assert _names(folder) == EVERY
    names = [text for text in _texts(folder / "barcodes.svg") if text.startswith("patient-")]
    assert len(set(names)) == 4
    for path in folder.iterdir():
        data = path.read_bytes()
        assert str(place.root).encode() not in data
        if path.suffix == ".svg":
            assert not {"p0", "p1", "p2", "p3"} & set(_texts(path))
            assert b"000.png" not in data


def test_without_the_option_nothing_is_drawn_and_matplotlib_is_not_loaded(place, made):
    place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--out", place.root / "plain", "--top_k", 3,
        "--latents", "0", "--masking_images", 0,
    )  # fmt: skip
    assert not (place.root / "plain" / "figures").exists()
    code = "import sys, cytosae_pipeline.report.static; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_matplotlib_is_reported_before_anything_is_computed(with_sae, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder, result = _figures(with_sae, code=1)
    assert 'pip install ".[figures]"' in result.output
    assert not with_sae.features().exists()
    assert not folder.parent.exists()


def test_texts_are_cut_to_their_width():
    with figure_style():
        assert fit_text("short", 20, 5) == "short"
        assert fit_text("", 20, 5) == ""
        for text in ("W" * 10_000, "a rather long name of a group of patients", "i" * 60):
            cut = fit_text(text, 20, 5)
            assert cut.endswith("…")
            assert text.startswith(cut[:-1])
            assert widest_mm([cut], 5, 1000) <= 20
        assert widest_mm([], 5, 20) == 0
        assert 17 < widest_mm(["W" * 10_000, "i"], 5, 20) <= 20


def test_measured_and_drawn_text_widths_agree(tmp_path):
    with figure_style():
        figure = make_figure(60, 10, arranged=False)
        make_sheet(figure).text(5, 5, "MMMMMMMMMMMM", size=10)
        png, _svg = save_figure(figure, tmp_path, "text")
        measured = widest_mm(["MMMMMMMMMMMM"], 10, 1000)
    columns = np.flatnonzero((_pixels(png) < 128).any(axis=(0, 2)))
    drawn = 25.4 * (columns[-1] - columns[0] + 1) / 300
    assert drawn == pytest.approx(measured, rel=0.04)
    assert 25.4 * columns[0] / 300 == pytest.approx(5, abs=0.5)


def test_characters_that_no_file_may_contain_are_replaced():
    assert clean_text("a\x00b\nc\ud800d é芽") == "a\ufffdb\ufffdc\ufffdd é芽"


def test_a_dead_latent_has_no_reference_images(report_data):
    features = dataclasses.replace(report_data.features, top_rows=np.full_like(report_data.features.top_rows, -1))
    dead = dataclasses.replace(report_data, features=features)
    with figure_style():
        figure = draw_reference_images(dead, np.array([0]), None)
    assert not figure.axes[0].images
    assert "0" in [text.get_text() for text in figure.axes[0].texts]
