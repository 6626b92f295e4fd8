"""Sweeps: grids, runs side by side that are those of their own, tables and the picture."""

import csv
import json
import math
from xml.etree import ElementTree as ET

import pytest
import torch

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.pareto import Point, draw_pareto, pareto_front
from cytosae_pipeline.training.sweep import read_grid
from tests.support.interruptions import interrupted_at_step


def write(folder, text: str):
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def _same(first, second) -> bool:
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


def _table(place, name="grid"):
    with (place.root / "out/checkpoints" / name / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


# --- grids


def test_lists_make_all_combinations_and_run_tables_single_ones(tmp_path):
    assert read_grid(write(tmp_path, 'k = [1, 2]\nseed = [3, 4]\narch = "topk"')) == [
        {"k": k, "seed": seed, "arch": "topk"} for k in (1, 2) for seed in (3, 4)
    ]
    text = 'seed = 1\n[[run]]\narch = "relu"\nl1_coefficient = [1e-4, 1]\n[[run]]\narch = "topk"\nseed = 2\n'
    assert read_grid(write(tmp_path, text)) == [
        {"seed": 1, "arch": "relu", "l1_coefficient": 1e-4},
        {"seed": 1, "arch": "relu", "l1_coefficient": 1.0},
        {"seed": 2, "arch": "topk"},
    ]
    assert read_grid(write(tmp_path, "seed = [1, 1, 2]")) == [{"seed": 1}, {"seed": 2}], "the same run once"
    assert read_grid(write(tmp_path, "standardise = [true, false]\nmax_gradient_norm = 1")) == [
        {"standardise": True, "max_gradient_norm": 1.0},
        {"standardise": False, "max_gradient_norm": 1.0},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = ", "cannot be read: "),
        (
            "kk = 3",
            "has 'kk', which cannot vary between runs. Allowed are: adam_beta1, adam_beta2, arch, aux_coefficient",
        ),
        ("root_dir = '/'", "has 'root_dir', which cannot vary between runs"),
        ("batch_size = [1, 2]", "'batch_size' in .* determines the batches, which all runs of a sweep share"),
        ("order_seed = 1", "'order_seed' in .* determines the batches"),
        ("arch = 'gru'", "arch must be relu, .* found 'gru'"),
        ("k = 1.5", "k must be a whole number, found 1.5"),
        ("k = true", "k must be a whole number, found True"),
        ("standardise = 1", "standardise must be true or false, found 1"),
        ("lr = 'much'", "lr must be a number, found 'much'"),
        ("lr = [[1]]", "lr must be a number, found"),
        ("k = []", "describes 0 runs; there must be 1 to 256"),
        (f"seed = {list(range(300))}", "describes 300 runs"),
        ("\n".join(f"{name} = {list(range(1, 200))}" for name in ("seed", "k", "lr")), "7,880,599"),
        ("run = 3", r"must be written as \[\[run\]\] tables"),
        ("[[run]]\nnothing = 1", "has 'nothing'"),
    ],
)
def test_grids_that_make_no_sense_are_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_grid(write(tmp_path, text))


def test_a_missing_grid_is_explained(tmp_path):
    with pytest.raises(UserError, match="--sweep .*no.toml' cannot be read: .*No such file"):
        read_grid(tmp_path / "no.toml")


# --- runs


GRID = 'seed = [42, 7]\n[[run]]\narch = "relu"\nuse_ghost_grads = true\n[[run]]\narch = "topk"\nk = 4\n'


def test_each_run_is_what_it_would_be_on_its_own(with_store, monkeypatch):
    from cytosae_cache.reading.reader import StoreReader

    n_read, original = [], StoreReader.read_rows

    def counting(self, rows, out):
        n_read.append(len(rows))
        return original(self, rows, out)

    monkeypatch.setattr(StoreReader, "read_rows", counting)
    output = with_store.train("--sweep", write(with_store.root, GRID)).output
    assert sum(n_read) == 60 + 22, "the batches once and the sample once, for four runs"
    rows = _table(with_store)
    assert [row["run"] for row in rows] == [
        "grid-arch_relu-use_ghost_grads_True-seed_42", "grid-arch_relu-use_ghost_grads_True-seed_7",
        "grid-arch_topk-k_4-seed_42", "grid-arch_topk-k_4-seed_7",
    ]  # fmt: skip
    for row, seed in zip(rows, (42, 7, 42, 7), strict=True):
        options = ["--use_ghost_grads"] if row["arch"] == "relu" else ["--arch", "topk", "--k", 4]
        with_store.train("--run_name", "own", "--seed", seed, "--order_seed", 42, *options)
        assert _same(row["sae"], with_store.sae("own"))
        lines = (with_store.root / "out/checkpoints/own/metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert float(row["explained_variance"]) == last["metrics/explained_variance"]
        assert float(row["l0"]) == last["metrics/l0"]
        assert row["status"] == "trained"
        assert float(row["step_s"]) > 0
        assert row["run"] in output
        (with_store.root / "out/checkpoints/own/config.json").unlink()
        with_store.sae("own").unlink()


def test_the_same_sweep_again_resumes_where_it_stopped(with_store):
    grid = write(with_store.root, GRID)
    with_store.train("--sweep", grid, "--run_name", "whole")
    with interrupted_at_step(30):
        with_store.train("--sweep", grid, "--run_name", "broken", code=130)
    output = with_store.train("--sweep", grid, "--run_name", "broken").output
    # The interrupt came in the middle of a batch: two runs are a step ahead of the others.
    assert "resuming run 'broken-arch_relu-use_ghost_grads_True-seed_42' after 32 images" in output
    assert "resuming run 'broken-arch_topk-k_4-seed_7' after 28 images" in output
    for whole, broken in zip(_table(with_store, "whole"), _table(with_store, "broken"), strict=True):
        assert _same(whole["sae"], broken["sae"])
        assert broken["status"] == "resumed"
    output = with_store.train("--sweep", grid, "--run_name", "broken").output
    assert output.count("already trained") == 4
    assert all(row["step_s"] == "" for row in _table(with_store, "broken"))


def test_a_run_that_fails_leaves_the_others_alone(with_store):
    grid = write(with_store.root, "lr = [0.0004, 1e30]")
    output = with_store.train("--sweep", grid, code=1).output
    good, bad = _table(with_store)
    assert (good["status"], bad["status"]) == ("trained", "failed")
    assert bad["explained_variance"] == ""
    assert "the loss became nan" in output or "the loss became inf" in output
    with_store.train("--run_name", "own")
    assert _same(good["sae"], with_store.sae("own"))


def test_the_result_is_a_table_and_json(with_store):
    result = with_store.train("--sweep", write(with_store.root, "seed = [1, 2]"), "--held_out", 0.3, "--json")
    value = json.loads(result.stdout)
    assert [row["options"] for row in value["rows"]] == [{"seed": 1}, {"seed": 2}]
    picture = ET.parse(value["picture"]).getroot()
    titles = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}title")]
    for row in value["rows"]:
        cfg = torch.load(row["sae"], weights_only=True)["cfg"]
        assert row["explained_variance"] == pytest.approx(cfg["evaluation"]["explained_variance"])
        assert row["l0"] == pytest.approx(cfg["evaluation"]["l0"])
        assert any(f"seed {row['options']['seed']}: explained variance" in title for title in titles)


def test_a_sweep_is_not_resumed_by_a_runs_name(with_store):
    output = with_store.train("--sweep", write(with_store.root, "k = 1"), "--resume", "x", code=2).output
    assert "to resume a sweep, run its command again" in output


def test_a_grid_of_several_architectures_gives_each_its_own_options(with_store):
    text = 'arch = ["relu", "topk"]\nk = [3, 4]\nl1_coefficient = 0.001'
    rows = json.loads(with_store.train("--sweep", write(with_store.root, text), "--json").stdout)["rows"]
    assert [row["options"] for row in rows] == [
        {"arch": "relu", "k": None}, {"arch": "topk", "k": 3}, {"arch": "topk", "k": 4},
    ]  # fmt: skip
    recipes = [
        json.loads((with_store.root / "out" / "checkpoints" / row["run"] / "config.json").read_text())["recipe"]
        for row in rows
    ]
    assert [recipe["l1_coefficient"] for recipe in recipes] == [0.001, 0.00008, 0.00008]
    output = with_store.train("--sweep", write(with_store.root, 'arch = "relu"\nk = [3, 4]'), code=1).output
    assert "k is an option of arch topk, batchtopk, jumprelu, matryoshka, found arch relu" in output


def test_options_of_the_command_line_apply_to_the_architectures_that_have_them(with_store):
    grid = write(with_store.root, 'arch = ["topk", "relu", "gated"]')
    for base in (("--arch", "topk", "--k", 5), ("--preset", "modern", "--batch_size", 4)):
        rows = json.loads(with_store.train("--run_name", base[1], "--sweep", grid, *base, "--json").stdout)["rows"]
        assert [row["status"] for row in rows] == ["trained"] * 3


def test_the_pre_activation_loss_of_a_grid_is_jumprelus(with_store):
    grid = with_store.root / "grid.toml"
    grid.write_text('arch = ["jumprelu", "topk"]\npre_act_coefficient = [0.0, 0.1]\nk = 4\n')
    with_store.train("--sweep", grid)
    recipes = [json.loads(path.read_text())["recipe"] for path in with_store.root.glob("out/checkpoints/*/config.json")]
    found = [(recipe["arch"], recipe.get("pre_act_coefficient", 0)) for recipe in recipes]
    assert sorted(found) == [("jumprelu", 0), ("jumprelu", 0.1), ("topk", 0)]


def test_each_run_derives_when_latents_are_revived_unless_the_grid_says(with_store):
    grid = write(with_store.root, "[[run]]\nk = [2, 8]\n[[run]]\nk = 2\ndead_feature_window = 3\n")
    arguments = ("--run_name", "g", "--sweep", grid, "--preset", "modern", "--batch_size", 4, "--json")
    rows = json.loads(with_store.train(*arguments).stdout)["rows"]
    folders = [with_store.root / "out" / "checkpoints" / row["run"] for row in rows]
    recipes = [json.loads((folder / "config.json").read_text())["recipe"] for folder in folders]
    rare, common, given = (recipe["dead_feature_window"] for recipe in recipes)
    assert [recipe["k"] for recipe in recipes] == [2, 8, 2]
    assert 64 >= rare > common >= 2
    assert given == 3


def test_options_that_contradict_are_named_with_their_run(with_store):
    output = with_store.train("--sweep", write(with_store.root, 'arch = "topk"\nuse_ghost_grads = true'), code=1).output
    assert "(grid) is not possible: use_ghost_grads is an option of arch relu, found arch topk" in output


# --- the picture


def test_the_front_holds_what_nothing_beats():
    points = [Point(l0, value, "a", "") for l0, value in ((10, 0.5), (20, 0.4), (30, 0.8), (30, 0.7), (5, 0.1))]
    assert [(point.l0, point.explained_variance) for point in pareto_front(points)] == [(5, 0.1), (10, 0.5), (30, 0.8)]
    assert pareto_front([]) == []


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_the_picture_is_well_formed_for_any_points(n):
    points = [Point(3.0 * number + 1, 0.9 - 0.1 / (number + 1), f"g{number}", "x") for number in range(n)]
    root = ET.fromstring(draw_pareto(points))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2 * n, "a point and its legend each"
    for circle in circles:
        assert 0 <= float(circle.get("cx")) <= 720
        assert 0 <= float(circle.get("cy")) <= 460


def test_the_picture_lies_where_the_numbers_are():
    points = [Point(10, 0.5, "a", ""), Point(100, 0.9, "a", "")]
    low, high = list(ET.fromstring(draw_pareto(points)).iter("{http://www.w3.org/2000/svg}circle"))[:2]
    assert float(low.get("cx")) < float(high.get("cx"))
    assert float(low.get("cy")) > float(high.get("cy"))


def test_names_in_the_picture_cannot_become_code():
    svg = draw_pareto([Point(1, 0.5, "<script>alert(1)</script>", '"><script>')])
    assert "<script" not in svg
    ET.fromstring(svg)


def test_points_without_a_place_are_left_out():
    svg = draw_pareto([Point(0, 0.5, "a", ""), Point(3, math.nan, "b", ""), Point(3, 0.5, "c", "")])
    assert svg.count("<circle") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = " + "[" * 5000 + "]" * 5000, "its values are nested too deeply"),
        ("k = 0x" + "f" * 5000, "k must be a number of at most 100 digits"),
        ("lr = 1" + "0" * 4000, "lr must be a number of at most 100 digits"),
    ],
)
def test_grids_that_no_one_means_are_one_message(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_grid(tmp_path / "grid.toml")
