"""`train --sweep --measure`: the last columns of the table are what `evaluate` measures of each run."""

import csv

import pytest

import cytosae_pipeline
from tests.cytosae_pipeline.training.test_sweep import write
from tests.support.sweep_pictures import read_panels


def table(place):
    with (place.root / "out/checkpoints/grid/sweep.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_every_run_is_measured_and_seeds_are_compared(with_store, tmp_path):
    grid = write(tmp_path, 'arch = "topk"\nk = [3, 6]\nseed = [1, 2]')
    text = with_store.train("--sweep", grid, "--measure").output
    rows = table(with_store)
    assert list(rows) == [f"grid-k_{k}-seed_{seed}" for k in (3, 6) for seed in (1, 2)]
    assert list(next(iter(rows.values())))[-6:] == [
        "sae", "stability_decoder", "stability_activation", "probe_5", "probe_mean_token", "monosemanticity",
    ]  # fmt: skip
    for name, row in rows.items():
        other = name[:-1] + ("2" if name[-1] == "1" else "1")
        found = cytosae_pipeline.evaluate_sae(
            with_store.sae(name), with_store.store, other_sae_path=[with_store.sae(other)], probe=True,
            monosemanticity=True,
        )  # fmt: skip
        for column, value in {
            "stability_decoder": found.stability[0].decoder_share,
            "stability_activation": found.stability[0].activation_share,
            "probe_5": found.probe.by_k[5].balanced_accuracy,
            "probe_mean_token": found.probe.mean_token.balanced_accuracy,
            "monosemanticity": found.monosemanticity.median,
        }.items():
            assert float(row[column]) == pytest.approx(value), (name, column)
    assert "stability_decoder" in text
    panels = read_panels((with_store.root / "out/checkpoints/grid/sweep.svg").read_text())
    assert [panel.titles[1].split(": ") for panel in panels] == [
        ["stability_decoder", "share of live latents"], ["stability_activation", "share of live latents"],
        ["probe_5", "balanced accuracy"], ["probe_mean_token", "balanced accuracy"],
        ["monosemanticity", "median over latents"],
    ]  # fmt: skip
    for panel in panels:
        column = panel.titles[1].split(":")[0]
        assert [mark.value for mark in panel.marks] == pytest.approx(
            [float(row[column]) for row in rows.values()], abs=0.002
        )
        assert [mark.l0 for mark in panel.marks] == pytest.approx([float(row["l0"]) for row in rows.values()], rel=0.01)


def test_what_does_not_apply_is_empty(with_images, tmp_path, messages):
    (with_images.root / "dataset/flat").mkdir()
    for number, path in enumerate(sorted(with_images.images.rglob("0*.png"))):
        path.rename(with_images.root / "dataset/flat" / f"{number}.png")
    arguments = ["--images", with_images.root / "dataset/flat", "--layout", "auto"]
    with_images.build(*arguments)
    with_images.train("--sweep", write(tmp_path, 'arch = "topk"\nk = [3, 6]'), "--measure")
    assert messages().count("no probes of the sweep's runs: a probe needs two labels") == 1
    for row in table(with_images).values():
        assert [row[name] for name in ("stability_decoder", "stability_activation", "probe_5")] == ["", "", ""]
        assert float(row["monosemanticity"])
    (panel,) = read_panels((with_images.root / "out/checkpoints/grid/sweep.svg").read_text())
    assert panel.label.startswith("monosemanticity: median over latents, against L0; 2 runs, ")


def test_measure_is_for_sweeps(with_store):
    assert "--measure is for --sweep; a single run is measured by `cytosae-cache evaluate`" in (
        with_store.train("--measure", code=2).output
    )


def test_a_sweep_without_it_has_no_further_columns(with_store, tmp_path):
    with_store.train("--sweep", write(tmp_path, 'arch = "topk"\nk = [3]\nseed = [1, 2]'))
    assert list(next(iter(table(with_store).values())))[-1] == "sae"
    assert read_panels((with_store.root / "out/checkpoints/grid/sweep.svg").read_text()) == []
