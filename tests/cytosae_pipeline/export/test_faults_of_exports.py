"""Exports that are killed, fail, meet another process or a link: whole or as before; the same command works again."""

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from zarr.storage import LocalStore

from cytosae.formats.checkpoint import SaeCheckpointError, load, save_sae
from cytosae.sae.relu import ReluSae
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.export.hdf5_files import open_hdf5
from cytosae_pipeline.export.zarr_folders import open_folder

ROOT = Path(__file__).parents[3]

KILLED = """
import os, signal, sys

target, left = sys.argv[1], int(sys.argv[2])

def killing(real):
    def call(*names, **options):
        global left
        left -= any(str(name).endswith(target) for name in names)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*names, **options)
    return call

os.rename, os.replace = killing(os.rename), killing(os.replace)
sys.argv = ["cytosae-cache", *sys.argv[3:]]
from cytosae_pipeline.cli.app import main
main()
"""


def kill(target, number, *arguments):
    """Kill the command at the n-th renaming of a file whose name ends so."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "cache", "pipeline"))}
    command = [sys.executable, "-c", KILLED, target, str(number), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, check=False, cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def arguments_of(place, *more):
    return ["export", "--root_dir", place.root, "--sae_path", place.sae(), *more]


@pytest.fixture
def other(tmp_path):
    """Another autoencoder."""
    torch.manual_seed(1)
    save_sae(tmp_path / "other.pt", ReluSae(24, 96), {"run_name": "other"})
    return tmp_path / "other.pt"


def test_tables_that_were_killed_half_way_are_no_obstacle(with_sae, tmp_path):
    out = tmp_path / "t"
    arguments = arguments_of(with_sae, "--dataset_name", "toy", "--format", "csv", "--out", out)
    kill("table_patients.csv", 1, *arguments)
    assert "table_latents.csv" in names(out)
    assert "table_images.csv" not in names(out)
    with_sae.run_plain(*arguments)
    assert names(out) == ["table_about_csv.json", "table_images.csv", "table_latents.csv", "table_patients.csv"]
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "exists already. Give another --out, or --overwrite" in with_sae.run_plain(*arguments, code=1).output
    kill("table_images.csv", 2, *arguments, "--overwrite")
    assert "table_images.csv" not in names(out), "old and new are never mixed"
    assert "exists already" in with_sae.run_plain(*arguments, code=1).output
    assert {path: path.read_bytes() for path in out.iterdir()} == before, "the old ones are back"
    with_sae.run_plain(*arguments, "--overwrite")
    assert names(out) == ["table_about_csv.json", "table_images.csv", "table_latents.csv", "table_patients.csv"]


@pytest.mark.parametrize("with_file", [False, True])
def test_a_saelens_folder_never_has_config_and_weights_of_two(with_sae, other, tmp_path, with_file):
    """The whole folder is replaced in one step; with a file of the user in it, its two files one after the other."""
    out = tmp_path / "x"
    with_sae.run_plain(*arguments_of(with_sae, "--out", out))
    old, new = load(with_sae.sae()).W_enc, load(other).W_enc
    again = ["export", "--sae_path", other, "--out", out, "--overwrite"]
    if with_file:
        (out / "README.md").write_text("mine")
        kill("sae_weights.safetensors", 2, *again)
        with pytest.raises(SaeCheckpointError, match="sae_weights.safetensors cannot be read"):
            load(out)
    else:
        kill("x", 1, *["export", "--sae_path", other, "--out", tmp_path / "first" / "x"])
        assert [path.name for path in (tmp_path / "first").iterdir() if path.is_dir()] != ["x"]
        with_sae.run_plain("export", "--sae_path", other, "--out", tmp_path / "first" / "x")
        assert names(tmp_path / "first") == ["x"]
        assert torch.equal(load(out).W_enc, old)
    with_sae.run_plain(*again)
    assert torch.equal(load(out).W_enc, new)
    assert names(out) == [*(["README.md"] if with_file else []), "cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("kind", ["saelens", "safetensors", "reference"])
def test_an_autoencoder_goes_where_a_link_leads(with_sae, tmp_path, kind):
    ending = {"saelens": "", "safetensors": ".safetensors", "reference": ".pt"}[kind]
    link, target = tmp_path / f"link{ending}", tmp_path / "disk" / f"there{ending}"
    link.symlink_to(target)
    arguments = arguments_of(with_sae, "--format", kind, "--out", link)
    output = with_sae.run_plain(*arguments, code=1).output
    assert f"'{link}' is a link to '{target}', whose folder does not exist. Create or mount it, or remove the" in output
    assert not target.parent.exists()
    target.parent.mkdir()
    assert str(link) in with_sae.run_plain(*arguments).output
    assert "exists already" in with_sae.run_plain(*arguments, code=1).output
    with_sae.run_plain(*arguments, "--overwrite")
    assert link.is_symlink()
    assert torch.equal(load(target).W_enc, load(with_sae.sae()).W_enc)
    assert names(tmp_path / "disk") == [target.name]


def test_a_link_to_itself_is_one_message(with_sae, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    output = with_sae.run_plain(*arguments_of(with_sae, "--out", tmp_path / "loop"), code=1).output
    assert "loop' is a link to" in output


def test_tables_go_where_links_lead(with_sae, tmp_path):
    """A link to the folder, and in it one to a table."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    (disk / "table_images.csv").symlink_to(tmp_path / "large.csv")
    arguments = arguments_of(with_sae, "--dataset_name", "toy", "--format", "csv", "--out", link)
    with_sae.run_plain(*arguments)
    with_sae.run_plain(*arguments, "--overwrite")
    assert link.is_symlink()
    assert (disk / "table_images.csv").is_symlink()
    assert (tmp_path / "large.csv").read_text().startswith("row,path")
    assert names(disk) == ["table_about_csv.json", "table_images.csv", "table_latents.csv", "table_patients.csv"]


def test_one_export_at_a_time(with_sae, tmp_path):
    busy = r"another process \(process \d+ on .+, since .+\) is writing"
    tables = tmp_path / "t"
    with locked(tables / "export.lock", str(tables)):
        result = with_sae.run_plain(
            *arguments_of(with_sae, "--dataset_name", "toy", "--format", "csv", "--out", tables), code=1
        )
    assert f"is writing '{tables}'. Wait for it to finish, then run the command again" in result.output
    with locked(tmp_path / "x.lock", str(tmp_path / "x")):
        result = with_sae.run_plain(*arguments_of(with_sae, "--out", tmp_path / "x"), code=1)
    assert re.search(busy, result.output)
    with_sae.run_plain(*arguments_of(with_sae, "--out", tmp_path / "x"))
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("kind", ["saelens", "safetensors", "reference", "csv", "parquet", "anndata", "zarr"])
def test_a_limit_on_the_size_of_files_is_one_message_and_changes_nothing(with_sae, tmp_path, kind):
    """In a process of its own: HDF5 crashed it."""
    out = tmp_path / ("x.safetensors" if kind == "safetensors" else "x")
    more = [] if kind in ("saelens", "safetensors", "reference") else ["--dataset_name", "toy"]
    form = ["--format", "anndata", "--anndata_as", "zarr"] if kind == "zarr" else ["--format", kind]
    arguments = arguments_of(with_sae, *more, *form, "--out", out)
    if more:
        with_sae.run("features", "--dataset_name", "toy", "--sae_path", with_sae.sae())
        with_sae.run("patients", "--dataset_name", "toy", "--sae_path", with_sae.sae())
    limit = 200 if kind in ("csv", "parquet", "zarr") else 5000
    ended = subprocess.run(
        [sys.executable, "-m", "cytosae_pipeline", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((".", "cache", "pipeline"))},
        check=False, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    errors = [line for line in ended.stderr.splitlines() if not line.startswith(("export", "reading"))]
    assert ended.returncode == 1, ended.stderr
    assert f"Error: '{out}' cannot be written: File too large. Raise the limit" in errors[-1]
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert not out.exists() or names(out) == []


def test_hdf5_files_that_fail_say_so_early_and_at_the_end(tmp_path):
    def fill():
        with open_hdf5(tmp_path / "x.h5") as (group, check):
            group["x"] = list(range(10))
            group.flush()
            check()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
            group["y"] = list(range(100_000))
            with pytest.raises(OSError, match="File too large"):
                check()

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture
def underway(monkeypatch):
    """Files that zarr's threads are writing, slowly; chunk 0 fails."""
    underway, real = [], LocalStore.set

    async def write(self, key, value):
        if key == "x/0":
            raise OSError("the disk is full")
        underway.append(key)
        await asyncio.sleep(0.01)
        await real(self, key, value)
        underway.remove(key)

    monkeypatch.setattr(LocalStore, "set", write)
    return underway


def test_zarr_writes_nothing_once_its_error_is_out(tmp_path, underway):
    """zarr raises the first error of several chunks while the others are still being written."""

    def fill():
        with open_folder(tmp_path / "x.zarr") as (group, check):
            group.create_array("x", shape=(50,), chunks=(1,), dtype="f4")[:] = range(1, 51)
            with pytest.raises(OSError, match="full"):
                check()

    with pytest.raises(OSError, match="full"):
        fill()
    assert underway == []


def test_zarr_writes_nothing_once_it_was_interrupted(tmp_path, underway):
    """Ctrl-C reaches the thread that waits for zarr while zarr's own threads go on."""
    with open_folder(tmp_path / "x.zarr") as (group, _):
        array = group.create_array("x", shape=(50,), chunks=(1,), dtype="f4")
        thread = threading.Thread(target=array.__setitem__, args=(slice(1, 50), range(1, 50)))
        thread.start()
        while not underway and thread.is_alive():
            pass
    written = names(tmp_path / "x.zarr" / "x")
    assert underway == []
    thread.join()
    assert names(tmp_path / "x.zarr" / "x") == written
