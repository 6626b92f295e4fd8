"""Damage in one place of a workspace costs that place only: the rest is listed and used, and a message names it."""

import json
import os
import shutil

import pytest

from cytosae_pipeline.workspace.inventory import take_inventory


def _config(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["recipe"] |= changes
    path.write_text(json.dumps(record))


def _instead(name, make):
    def damage(folder):
        path = next(folder.glob(name))
        path.unlink()
        make(path)

    return damage


def _write(name, data):
    return lambda folder: next(folder.glob(name)).write_bytes(data)


def _cut(name, share=0.5):
    def damage(folder):
        path = next(folder.glob(name))
        os.truncate(path, int(path.stat().st_size * share))

    return damage


CONFIGS = {
    "empty": _write("config.json", b""),
    "cut": _cut("config.json"),
    "no JSON": _write("config.json", b"{"),
    "list": _write("config.json", b"[]"),
    "no recipe": _write("config.json", b"{}"),
    "recipe of a number": _write("config.json", b'{"recipe": 3}'),
    "empty recipe": _write("config.json", b'{"recipe": {}}'),
    "not UTF-8": _write("config.json", b'{"recipe": "\xff"}'),
    "nested": _write("config.json", b"[" * 100_000),
    "long": _write("config.json", b" " * 100_000_000),
    "zeros": _write("config.json", bytes(4096)),
    "folder": _instead("config.json", lambda path: path.mkdir()),
    "pipe": _instead("config.json", os.mkfifo),
    "dangling link": _instead("config.json", lambda path: path.symlink_to("nowhere")),
    "link to itself": _instead("config.json", lambda path: path.symlink_to(path.name)),
    "latents of a dict": lambda folder: _config(folder, n_latents={}),
    "latents of NaN": lambda folder: _config(folder, n_latents=float("nan")),
    "huge latents": lambda folder: _config(folder, n_latents=10**4000),
    "true latents": lambda folder: _config(folder, n_latents=True),
    "model of a list": lambda folder: _config(folder, model_name=["a"]),
    "long model": lambda folder: _config(folder, model_name="a" * 5000),
    "block of text": lambda folder: _config(folder, block_layer="x"),
    "NUL": lambda folder: _config(folder, module_name="a\0b"),
    "arch of a number": lambda folder: _config(folder, arch=3),
}
"""What makes a run's config unusable."""

OTHERS = {
    "module leads away": lambda folder: _config(folder, module_name="x/../../y"),
    "terminal": lambda folder: _config(folder, dataset_name="\x1b[31m"),
    "metrics cut": _cut("metrics.jsonl", 0.9),
    "metrics empty": _write("metrics.jsonl", b""),
    "metrics of zeros": _write("metrics.jsonl", bytes(4096)),
    "metrics nested": _write("metrics.jsonl", b"[" * 100_000),
    "metrics huge": _write("metrics.jsonl", b'{"step": 1, "metrics/l0": 1' + b"0" * 4000 + b', "eval/l0": NaN}\n'),
    "metrics of text": _write("metrics.jsonl", b'{"step": 1, "metrics/l0": "x"}\n'),
    "metrics a folder": _instead("metrics.jsonl", lambda path: path.mkdir()),
    "metrics a pipe": _instead("metrics.jsonl", os.mkfifo),
}
"""What leaves a run usable."""

FINALS = {
    "final empty": _write("final_*.pt", b""),
    "final cut": _cut("final_*.pt"),
    "final of text": _write("final_*.pt", b"no"),
}
"""What makes its autoencoder unusable."""


def _damaged(place, damage):
    """A copy of the run `r` called `bad`, damaged, and newer than it."""
    folder = place.sae().parent.with_name("bad")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.sae().parent, folder)
    damage(folder)
    for path in folder.glob("final_*"):
        os.utime(path, (place.sae().stat().st_mtime + 60,) * 2)
    return folder


def _one_message(result):
    """A message of at most ten lines and no traceback."""
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) <= 10
    return result.output


def test_a_run_without_a_usable_config_is_named_and_the_others_are_used(with_sae):
    features = ("features", "--dataset_name", "toy", "--sae_path")
    for kind, damage in CONFIGS.items():
        folder = _damaged(with_sae, damage)
        output = with_sae.run("list").output
        assert f"{folder}  unusable: '{folder / 'config.json'}' is not the config of a run: " in output, kind
        assert str(with_sae.sae()) in output, kind
        output = with_sae.run(*features, "latest").output
        assert "left out: " in output, kind
        assert "latest: run 'r'" in output, kind
        output = _one_message(with_sae.run(*features, "bad", code=1))
        assert "is not the config of a run" in output, kind
        assert f"Its newest autoencoder is '{with_sae.sae('bad')}': give that path" in output, kind
        assert "--run_name bad" in _one_message(with_sae.run("train", "--resume", "bad", code=1)), kind
        with_sae.sae("bad").unlink()
        output = _one_message(with_sae.train("--run_name", "bad", code=1))
        assert "Restore a copy, or move it away and run the command again with all its options" in output, kind


def test_a_run_whose_other_files_are_damaged_stays_usable(with_sae):
    for kind, damage in OTHERS.items():
        folder = _damaged(with_sae, damage)
        output = with_sae.run("list").output
        assert "unusable" not in output, kind
        assert str(folder) in output, kind
        assert "\x1b" not in output, kind


def test_a_damaged_autoencoder_is_named_by_every_verb(with_sae):
    for kind, damage in FINALS.items():
        folder = _damaged(with_sae, damage)
        text = f"'{with_sae.sae('bad')}' is no whole autoencoder"
        assert f"{folder}  unusable: {text}" in with_sae.run("list").output, kind
        output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", "latest").output
        assert text in output, kind
        assert "latest: run 'r'" in output, kind
        for command in (
            ("features", "--dataset_name", "toy", "--sae_path", "bad"),
            ("train", "--resume", "bad"),
        ):
            assert text in _one_message(with_sae.run(*command, code=1)), kind


def test_a_lost_config_is_written_again_if_the_options_are_those_of_the_other_files(with_sae):
    config = with_sae.sae().with_name("config.json")
    before = json.loads(config.read_bytes())["recipe"]
    config.unlink()
    output = _one_message(with_sae.train("--run_name", "r", "--lr", 0.1, code=1))
    assert "exists with other options (lr: 0.0004 there, 0.1 now)" in output
    assert not config.exists()
    with_sae.train("--run_name", "r")
    assert json.loads(config.read_bytes())["recipe"] == before


def test_damaged_stores_cost_themselves(with_store):
    whole = with_store.store
    folder = whole.parent
    (folder / "link.zarr").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.zarr")
    (folder / "file.zarr").write_bytes(b"")
    for name, content in (("empty", b""), ("cut", b"{"), ("nested", b"[" * 100_000), ("binary", b"\xff\0")):
        shutil.copytree(whole, folder / f"{name}.zarr")
        (folder / f"{name}.zarr" / "zarr.json").write_bytes(content)
    (folder / "config.zarr").mkdir()
    (folder / "config.zarr" / "zarr.json").mkdir()
    inventory = take_inventory(with_store.root)
    assert len(inventory.stores) == 9
    bad = [store["path"] for store in inventory.stores if "error" in store]
    assert len(bad) == 8
    assert str(whole) not in bad
    assert inventory.describe().count("unusable: ") == 8


@pytest.mark.parametrize("name", ["training_state.pt", "config.json"])
def test_a_folder_without_a_config_is_a_run_if_it_has_a_state(with_sae, name):
    folder = with_sae.sae().parent.with_name("half")
    folder.mkdir()
    (folder / name).write_bytes(b"")
    assert f"{folder}  unusable: " in with_sae.run("list").output


def test_a_damaged_store_beside_the_one_that_fits_is_left_out_and_said(with_store):
    whole = with_store.store
    other = whole.with_name("other.zarr")
    shutil.copytree(whole, other)
    (other / "zarr.json").write_bytes(b"{")
    output = with_store.train("--run_name", "r").output
    assert f"left out: {other}" in output.replace("'", "")
    assert "autoencoder (trained" in output
    (whole / "zarr.json").write_bytes(b"{")
    assert str(whole) in _one_message(with_store.train("--run_name", "s", code=1))
