"""The panels of a sweep's picture: each measure against L0, where the numbers are."""

import hashlib
import math

import pytest

from cytosae_pipeline.training.pareto import Point, draw_pareto
from cytosae_pipeline.training.sweep import SweepResult, SweepRow, write_sweep
from tests.support.sweep_pictures import read_circles, read_panels

UNITS = {"stability": "share of latents", "probe": "balanced accuracy"}


def _points(values, name="stability", groups=("topk",)) -> list[Point]:
    """Points at L0 5, 10, 20, ... with these values of a measure."""
    return [
        Point(5.0 * 2**number, 0.4 + 0.05 * number, groups[number % len(groups)], f"k {number}", {name: value})
        for number, value in enumerate(values)
    ]


def test_each_value_lies_at_its_place():
    stability, probe = (0.31, 0.74, 0.12, 0.55, 0.9), (-0.2, 0.4, 0.1, 0.35, 0.05)
    points = [
        point._replace(measures={"stability": one, "probe": two})
        for point, one, two in zip(_points(stability, groups=("topk", "relu")), stability, probe, strict=True)
    ]
    svg = draw_pareto(points, UNITS)
    panels = read_panels(svg)
    assert [panel.titles for panel in panels] == [
        ["L0: active latents per token", "stability: share of latents"],
        ["L0: active latents per token", "probe: balanced accuracy"],
    ]
    for panel, values in zip(panels, (stability, probe), strict=True):
        assert [mark.l0 for mark in panel.marks] == pytest.approx([5, 10, 20, 40, 80], rel=0.005)
        assert [mark.value for mark in panel.marks] == pytest.approx(values, abs=0.001)
        assert [mark.colour for mark in panel.marks] == [circle["fill"] for circle in read_circles(svg)[:5]]
    assert panels[0].marks[1].title == "k 1: stability 0.7400, L0 10.0"
    assert panels[1].label == "probe: balanced accuracy, against L0; 5 runs, -0.2000 to 0.4000"


def test_nothing_measured_is_the_plot_alone():
    points = [Point(3.0 * n + 1, 0.9 - 0.1 / (n + 1), f"g{n % 3} & <co>", f"k {n}") for n in range(9)]
    plot = draw_pareto(points)
    # Digests of what was drawn before there were panels.
    assert hashlib.sha256(plot.encode()).hexdigest() == (
        "54260873f0ce1d18cc85df4a60a80c1d4a058ff8da479cc1f00b809cc699a39e"
    )
    assert hashlib.sha256(draw_pareto([]).encode()).hexdigest() == (
        "ce00952b28b366090300ac87cfee03ff7fcf41131ea4f5432de5c8e4b75546f9"
    )
    for nothing in ({}, {"probe": None}, {"probe": math.nan, "stability": math.inf}):
        assert draw_pareto([point._replace(measures=nothing) for point in points], UNITS) == plot


def test_panels_leave_the_plot_where_it_was():
    points = _points([0.2, 0.5, 0.8])
    plot = read_circles(draw_pareto([point._replace(measures={}) for point in points]))
    measured = read_circles(draw_pareto(points))
    assert [circle | {"title": None} for circle in measured] == [circle | {"title": None} for circle in plot]
    assert [circle["title"] for circle in measured[:3]] == [
        f"{circle['title']}, stability {value}"
        for circle, value in zip(plot, ("0.200", "0.500", "0.800"), strict=False)
    ]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_runs_without_a_value_are_left_out_of_its_panel_alone(missing):
    (panel,) = read_panels(draw_pareto(_points([0.2, missing, 0.6]), UNITS))
    assert [mark.title for mark in panel.marks] == ["k 0: stability 0.2000, L0 5.0", "k 2: stability 0.6000, L0 20.0"]
    assert "; 2 runs, 0.2000 to 0.6000" in panel.label
    points = [point._replace(measures={**point.measures, "probe": 0.5}) for point in _points([0.2, missing, 0.6])]
    assert [len(panel.marks) for panel in read_panels(draw_pareto(points, UNITS))] == [2, 3]


def test_a_run_without_explained_variance_is_in_the_panels():
    points = _points([0.2, 0.4, 0.6])
    points[2] = points[2]._replace(explained_variance=math.nan)
    svg = draw_pareto(points)
    (panel,) = read_panels(svg)
    assert [mark.l0 for mark in panel.marks] == pytest.approx([5, 10, 20], rel=0.005)
    assert len(read_circles(svg)) == 2 + 1, "two points, and the legend"


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0, 1.0])
def test_one_run_lies_in_the_middle(value):
    (panel,) = read_panels(draw_pareto(_points([value]), UNITS))
    left, top, right, bottom = panel.frame
    assert panel.marks[0].place == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=0.06)
    assert panel.marks[0].value == pytest.approx(value, abs=0.001)
    assert panel.label == f"stability: share of latents, against L0; 1 run, {value:.4f} to {value:.4f}"


@pytest.mark.parametrize("values", [[0.8, 0.8, 0.8], [0.8, 0.8 + 1e-16, 0.8 - 1e-16], [0.797, 0.8, 0.803]])
def test_equal_values_lie_on_one_line_and_rounding_is_not_magnified(values):
    (panel,) = read_panels(draw_pareto(_points(values), UNITS))
    assert [mark.value for mark in panel.marks] == pytest.approx(values, abs=0.001)
    height = panel.frame[3] - panel.frame[1]
    assert all(abs(mark.place[1] - (panel.frame[1] + panel.frame[3]) / 2) < 0.06 * height for mark in panel.marks)


def test_equal_l0_lie_above_each_other():
    points = [point._replace(l0=10.0) for point in _points([0.2, 0.4])]
    (panel,) = read_panels(draw_pareto(points))
    assert {mark.place[0] for mark in panel.marks} == {(panel.frame[0] + panel.frame[2]) / 2}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_panels_lie_inside_the_picture_and_apart(n):
    names = [f"measure{number}" for number in range(n)]
    svg = draw_pareto([point._replace(measures=dict.fromkeys(names, 0.5)) for point in _points([0.1, 0.2])])
    panels = read_panels(svg)
    assert [panel.titles[1] for panel in panels] == names
    height = 460 + 250 * ((n + 1) // 2)
    assert f'viewBox="0 0 720 {height}"' in svg
    assert f"<title>Explained variance, {', '.join(names)} against L0</title>" in svg
    for number, panel in enumerate(panels):
        left, top, right, bottom = panel.frame
        assert 360 * (number % 2) < left < right <= 360 * (number % 2) + 340
        assert 460 + 250 * (number // 2) < top < bottom < 460 + 250 * (number // 2) + 250 <= height
        for mark in panel.marks:
            assert left <= mark.place[0] <= right
            assert top <= mark.place[1] <= bottom


@pytest.mark.parametrize("span", [(11, 99), (110, 990), (1100, 9900), (0.002, 90000)])
def test_labels_of_a_panel_do_not_overlap(span):
    points = [Point(l0, 0.5, "topk", "", {"probe": 0.5}) for l0 in span]
    (panel,) = read_panels(draw_pareto(points))
    assert len(panel.labels) >= 2
    assert all(later - earlier >= 36 for earlier, later in zip(panel.labels, panel.labels[1:], strict=False))


def test_names_and_units_cannot_become_code():
    hostile = "\"><script>alert('1')</script>&"
    points = [Point(10.0, 0.5, hostile, hostile, {hostile: 0.25}), Point(20.0, 0.6, "topk", "", {hostile: 0.75})]
    svg = draw_pareto(points, {hostile: hostile})
    assert "<script" not in svg
    (panel,) = read_panels(svg)
    assert panel.titles[1] == f"{hostile}: {hostile}"
    assert panel.label == f"{hostile}: {hostile}, against L0; 2 runs, 0.2500 to 0.7500"
    assert [mark.title for mark in panel.marks] == [
        f"{hostile}: {hostile} 0.2500, L0 10.0", f"topk: {hostile} 0.7500, L0 20.0",
    ]  # fmt: skip


def test_a_sweeps_picture_has_the_measures_of_its_rows(tmp_path):
    def make_row(k: int, variance: float | None, l0: float | None, probe: float | None) -> SweepRow:
        return SweepRow(
            f"grid-k_{k}", {"k": k}, "trained", variance, l0, 0.0, 1.0, None, tmp_path / "sae.pt", "topk", 1,
            {"probe": probe, "stability": None},
        )  # fmt: skip

    rows = [make_row(4, 0.5, 4.0, 0.6), make_row(8, 0.6, 8.0, None), make_row(16, None, 16.0, 0.9)]
    result = SweepResult([*rows, make_row(32, None, None, 0.7)], tmp_path / "sweep.csv", tmp_path / "sweep.svg")
    write_sweep(result, UNITS)
    (panel,) = read_panels(result.picture.read_text())
    assert [mark.title for mark in panel.marks] == ["k 4: probe 0.6000, L0 4.0", "k 16: probe 0.9000, L0 16.0"]
    assert [mark.value for mark in panel.marks] == pytest.approx([0.6, 0.9], abs=0.001)
