"""An autoencoder is named by its run, the run's folder or `latest`, and a doubtful name stops."""

import json
import os
import shutil

import pytest

from cytosae_pipeline.config import SaeChoice
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.workspace.paths import Workspace
from cytosae_pipeline.workspace.runs import iter_runs, open_run, resolve_sae


def _copy_run(place, name: str, *, age_s: int = 0):
    """A copy of the run `r`, finished `age_s` seconds before it."""
    folder = place.root / "out" / "checkpoints" / name
    shutil.copytree(place.sae().parent, folder)
    written = place.sae().stat().st_mtime - age_s
    os.utime(place.sae(name), (written, written))
    return folder


def _resolve(place, sae_path):
    return resolve_sae(SaeChoice(root_dir=place.root, sae_path=sae_path)).sae_path


def test_a_name_and_a_folder_mean_the_finished_autoencoder(with_sae):
    assert _resolve(with_sae, "r") == _resolve(with_sae, with_sae.sae().parent) == with_sae.sae()
    assert _resolve(with_sae, with_sae.sae()) == with_sae.sae()
    assert _resolve(with_sae, None) is None
    assert "wrote in" in with_sae.run("features", "--dataset_name", "toy", "--sae_path", "r").output


def test_exports_beside_it_are_not_mistaken_for_it(with_sae):
    for kind in ("reference", "saelens"):
        with_sae.run("export", "--sae_path", "r", "--format", kind)
    assert _resolve(with_sae, "r").name.endswith("_96.pt")


def test_latest_is_the_newest_finished_run_and_is_said(with_sae, messages):
    _copy_run(with_sae, "a-older", age_s=3600)
    newest = _copy_run(with_sae, "b-newer", age_s=-3600)
    unfinished = _copy_run(with_sae, "c-unfinished", age_s=-7200)
    next(unfinished.glob("final_*.pt")).unlink()
    path = _resolve(with_sae, "latest")
    assert path.parent == newest
    text = messages()
    assert text.startswith("latest: run 'b-newer', finished 20")
    assert text.endswith(f", the newest of 3: '{path}'")


def test_latest_without_a_finished_run_stops(with_store):
    output = with_store.run("features", "--dataset_name", "toy", "--sae_path", "latest", code=1).output
    assert "there is no finished run in" in output
    assert f"cytosae-cache list --root_dir {with_store.root}" in output


def test_an_unfinished_run_names_its_newest_checkpoint_and_the_command_that_finishes_it(with_sae):
    with_sae.sae().unlink()
    with pytest.raises(
        UserError, match="run 'r' is unfinished; its newest checkpoint is '.*_sparse_autoencoder_"
    ) as info:
        _resolve(with_sae, with_sae.root / "out" / "checkpoints" / "r")
    assert str(info.value).endswith(f"Finish it with: cytosae-cache train --root_dir {with_sae.root} --resume r")


def test_an_unfinished_run_outside_of_any_workspace_says_where_it_belongs(with_sae, tmp_path):
    folder = _copy_run(with_sae, "s").rename(tmp_path / "s")
    next(folder.glob("final_*.pt")).unlink()
    with pytest.raises(UserError, match="To finish it, move its folder to out/checkpoints below the --root_dir of its"):
        _resolve(with_sae, folder)


def test_in_the_working_folder_no_root_is_named(with_sae, monkeypatch):
    with_sae.sae().unlink()
    monkeypatch.chdir(with_sae.root)
    with pytest.raises(UserError, match="with: cytosae-cache train --resume r$"):
        resolve_sae(SaeChoice(sae_path="r"))


def test_a_name_that_is_also_a_path_stops(with_sae, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for word in ("r", "latest"):
        (tmp_path / word).write_text("")
        with pytest.raises(UserError, match=f"sae_path {word} means a run, but '{word}' exists as well: give '/"):
            _resolve(with_sae, word)
        assert _resolve(with_sae, tmp_path / word) == tmp_path / word


def test_a_run_called_latest_is_that_run(with_sae):
    _copy_run(with_sae, "latest", age_s=3600)
    assert _resolve(with_sae, "latest") == with_sae.sae("latest")


def test_folders_of_other_programs_stay_what_they_are(tmp_path):
    (tmp_path / "config.json").write_text('{"trainer": {}}')
    config = SaeChoice(sae_path=tmp_path)
    assert resolve_sae(config) == config


def test_a_misspelt_run_is_suggested(with_sae):
    _copy_run(with_sae, "cells-modern")
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", "cels-modern", code=1).output
    assert "no autoencoder at 'cels-modern'. Did you mean 'cells-modern'? List existing ones with: " in output
    output = with_sae.run("features", "--dataset_name", "toy", "--sae_path", "lates", code=1).output
    assert "Did you mean 'latest'?" in output


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"recipe": 3}', b" " * (1 << 21), b"\xff", b"[" * 60_000])
def test_what_is_no_config_of_a_run_is_refused_and_listed(with_sae, content):
    path = with_sae.sae().with_name("config.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not the config of a run"):
        open_run(path.parent)
    assert list(iter_runs(Workspace(with_sae.root))) == []
    assert f"{path.parent}  unusable: '{path}' is not the config of a run" in with_sae.run("list").output


def test_the_last_whole_line_of_metrics_counts(with_sae):
    path = with_sae.sae().with_name("metrics.jsonl")
    run = open_run(path.parent)
    whole = json.loads(path.read_text().splitlines()[-1])
    assert run.last_metrics()["metrics/l0"] == whole["metrics/l0"]
    with path.open("a") as file:
        file.write('{"metrics/l0": 7.5, "metrics/explained_variance": NaN}\n{"metrics/l0": 9')
    assert run.last_metrics() == {"metrics/l0": 7.5}
    path.unlink()
    assert run.last_metrics() == {}
