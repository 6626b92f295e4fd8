"""`list`: stores and runs as aligned tables, with what the next command needs."""

import json
import shlex

from cytosae_pipeline.workspace.inventory import take_inventory


def test_runs_have_their_numbers_and_the_path_that_the_next_command_needs(with_sae):
    with_sae.train("--run_name", "longer-name", "--arch", "topk", "--k", 5, "--held_out", 0.3)
    lines = with_sae.run("list").output.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("  run "))
    header, *rows = lines[start : start + 3]
    assert header.split() == ["run", "arch", "latents", "L0", "expl.", "var.", "data", "set", "date", "state", "path"]
    for title, cell in (("arch", "topk"), ("L0", "5.0"), ("data set", "toy"), ("state", "trained")):
        assert rows[0][header.index(title) :].startswith(cell)
    path = shlex.split(rows[0])[-1]
    assert path == str(with_sae.sae("longer-name"))
    assert "wrote in" in with_sae.run("features", "--dataset_name", "toy", "--sae_path", path).output


def test_numbers_of_held_out_images_are_preferred(with_sae):
    with_sae.train("--run_name", "h", "--held_out", 0.3)
    last = json.loads(with_sae.sae("h").with_name("metrics.jsonl").read_text().splitlines()[-1])
    first, second = json.loads(with_sae.run("list", "--json").stdout)["runs"]
    assert first["name"] == "h"
    assert (first["l0"], first["explained_variance"]) == (last["eval/l0"], last["eval/explained_variance"])
    last = json.loads(with_sae.sae().with_name("metrics.jsonl").read_text().splitlines()[-1])
    assert (second["l0"], second["explained_variance"]) == (last["metrics/l0"], last["metrics/explained_variance"])
    assert second["architecture"] == "relu"
    assert second["dataset"] == "toy"


def test_an_unfinished_run_names_the_command_that_finishes_it(with_sae):
    with_sae.sae().unlink()
    output = with_sae.run("list").output
    words = shlex.split(output.split("finish run 'r' with: cytosae-cache ")[1].splitlines()[0])
    with_sae.run_plain(*words)
    assert with_sae.sae().exists()


def test_unusable_stores_stand_below_the_table(with_store):
    whole = with_store.store
    broken = whole.with_name("broken.zarr")
    broken.mkdir()
    inventory = take_inventory(with_store.root)
    text = inventory.describe()
    assert f"  {broken}  unusable: " in text
    assert text.index(str(whole)) < text.index(str(broken))
