"""One store built in parts by several processes: the bytes are those of one build, in whatever order, killed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cytosae_pipeline
from cytosae_cache.format.quantize import Channels
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_pipeline.config.build import BuildConfig, Part
from tests.support.pictures import BROKEN, LAYOUT
from tests.support.s3 import serve_s3

ROOT = Path(__file__).parents[3]
URL = "s3://cells/toy.zarr"
KILLED = """
import os, signal
from cytosae_cache import writer

real = writer.write_mark

def killing(storage, shard, *arguments, **options):
    if str(shard) == os.environ.get("KILLED_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(storage, shard, *arguments, **options)

writer.write_mark = killing
from cytosae_pipeline.cli.app import main
main()
"""


@pytest.fixture(autouse=True)
def _same_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def place(with_images, tmp_path):
    """Images, and the files of the store that one process builds of them, by the type of its numbers."""
    other = tmp_path / "other"
    shutil.copytree(with_images.root, other)

    def expected(*options: object) -> dict[str, bytes]:
        with_images.build(*options, "--store", other / "whole.zarr")
        return _files(other / "whole.zarr")

    return with_images, expected


def _files(location: Path | str) -> dict[str, bytes]:
    storage = open_storage(location)
    return {name: storage.read(name) for name in storage.names(with_litter=True)}


def test_parts_in_any_order_make_the_store_of_one_build(place):
    with_images, expected = place
    first = json.loads(with_images.build("--shards", "3/3", "--json").stdout)
    assert first["status"] == "in part"
    assert (first["n_missing_shards"], first["n_images"], first["next"]) == (3, 23, "")
    assert not ActivationStore(with_images.store).complete
    text = with_images.build("--shards", "1/3").output
    assert "store (in part)" in text
    assert "2 shards are missing: the other parts write them, and the last one completes the store" in text
    last = json.loads(with_images.build("--shards", "2/3", "--json").stdout)
    assert (last["status"], last["n_missing_shards"]) == ("resumed", 0)
    assert "cytosae-cache train" in last["next"]
    assert sum(json.loads(with_images.build("--json").stdout)["skipped_reasons"].values()) == last["n_skipped"] == 1
    assert _files(with_images.store) == expected()
    assert "already complete" in with_images.build("--shards", "2/3").output


def test_every_part_names_the_images_that_it_set_aside(place):
    with_images, _ = place
    of_parts = [json.loads(with_images.build("--shards", f"{n}/5", "--json").stdout) for n in (5, 4, 3, 2)]
    broken = ActivationStore(with_images.store).images.path.index(BROKEN) // 5
    assert [part["n_skipped"] for part in of_parts] == [int(shard == broken) for shard in (4, 3, 2, 1)]
    assert all(part["skipped_csv"] is None for part in of_parts)
    (kinds,) = [part["skipped_reasons"] for part in of_parts if part["n_skipped"]]
    assert "set aside as unreadable: 1 (1 " in with_images.build("--shards", "1/5").output
    assert list(kinds.values()) == [1]


def test_a_later_part_takes_the_list_from_the_store(place):
    with_images, expected = place
    files = expected()
    with_images.build("--shards", "1/2")
    shutil.copy(with_images.images / ActivationStore(with_images.store).images.path[0], with_images.images / "new.png")
    text = with_images.build("--shards", "2/2", "--dry-run").output
    assert "23 images" in text
    assert "layout store" in text
    with_images.build("--shards", "2/2")
    assert _files(with_images.store) == files


def test_an_image_that_came_back_is_read_again_by_the_part_that_is_repeated(place):
    with_images, expected = place
    with_images.build("--shards", "1/3")
    image = with_images.images / ActivationStore(with_images.store).images.path[16]
    aside = image.rename(with_images.root / "aside.png")
    assert json.loads(with_images.build("--shards", "3/3", "--json").stdout)["n_skipped"] == 2
    aside.rename(image)
    assert json.loads(with_images.build("--shards", "3/3", "--json").stdout)["n_skipped"] == 0
    with_images.build("--shards", "2/3")
    assert _files(with_images.store) == expected()


def test_more_parts_than_shards_leave_some_without_work(place):
    with_images, expected = place
    parts = [json.loads(with_images.build("--shards", f"{n}/7", "--json").stdout) for n in range(7, 0, -1)]
    assert [part["n_missing_shards"] for part in parts] == sorted([part["n_missing_shards"] for part in parts])[::-1]
    assert [part["status"] for part in parts].count("in part") == 5
    assert _files(with_images.store) == expected()


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("n_shards", [0, 1, 5, 12, 999])
def test_parts_cover_all_shards_once(n_shards, n_parts):
    parts = [Part(number, n_parts).of(n_shards) for number in range(1, n_parts + 1)]
    assert [shard for part in parts for shard in part] == list(range(n_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("shards", ["0/4", "5/4", "4", "1/0", "a/b", "1/4/2", "-1/4", "", "1 / 4", "٣/٤"])
def test_a_part_that_is_none_is_refused(with_images, shards):
    output = with_images.build("--shards", shards, code=2).output
    assert f"shards must be I/N with I from 1 to N, such as 3/16, found {shards!r}" in output


def test_options_that_parts_cannot_share_are_refused(place):
    with_images, _ = place
    output = with_images.build("--shards", "1/2", "--overwrite", code=2).output
    assert "delete the old store first, or omit one of the two" in output
    with_images.build("--shards", "1/2")
    for option, found in (("--batch_size", "5, none, cpu and 4"), ("--shard_images", "4, none, cpu and 32")):
        output = with_images.build("--shards", "2/2", option, 4, code=1).output
        assert (
            "was started with --shard_images 5 --compression none --device cpu --batch_size 32, now these are" in output
        )
        assert f"{found}: its numbers would differ from shard to shard. Give the same values" in output
    output = with_images.build("--shards", "2/2", "--limit", 9, code=1).output
    assert "has 23 images, --limit asks for 9: give every part of a build the same options" in output


def test_python_builds_parts_too(place):
    with_images, expected = place
    options = {
        "root_dir": with_images.root, "dataset_name": "toy", "model_path": with_images.vit, "layout": LAYOUT,
        "workers": 0, "shard_images": 5,
    }  # fmt: skip
    assert not cytosae_pipeline.build_store(**options, shards="2/2").complete
    assert cytosae_pipeline.build_store(**options, shards="1/2").complete
    assert _files(with_images.store) == expected()
    assert BuildConfig(dataset_name="toy", shards="2/7").part == Part(2, 7)


def test_two_blocks_are_built_in_parts(place):
    with_images, _ = place
    blocks = ["--block_layer", -2, "--block_layer", 0]
    for part in ("2/2", "1/2"):
        result = json.loads(with_images.build(*blocks, "--shards", part, "--json").stdout)
    assert [item["n_missing_shards"] for item in result["stores"]] == [0, 0]
    for item in result["stores"]:
        assert verify_store(ActivationStore.open(item["store"])).sound


@pytest.mark.parametrize(("location", "dtype"), [("disk", "float16"), (URL, "int8")])
def test_parts_at_once_one_of_them_killed_make_the_store_of_one_build(place, location, dtype, monkeypatch):
    with_images, expected = place
    files = expected("--store_dtype", dtype)
    store = with_images.root / "parts.zarr" if location == "disk" else location
    command = [
        sys.executable, "-c", KILLED, "build", "--root_dir", with_images.root, "--dataset_name", "toy", "--model_path",
        with_images.vit, "--layout", LAYOUT, "--workers", 0, "--shard_images", 5, "--store", store, "--store_dtype",
        dtype,
    ]  # fmt: skip

    def start(part: int, killed_at: str = "") -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((".", "cache", "pipeline")), "KILLED_AT": killed_at}
        words = [*map(str, command), "--shards", f"{part}/3"]
        return subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen, code: int) -> None:
        _, errors = process.communicate()
        assert process.returncode == code, errors

    with serve_s3(monkeypatch):
        processes = [start(1), start(2, killed_at="2"), start(3)]
        for process, code in zip(processes, (0, -signal.SIGKILL, 0), strict=True):
            end(process, code)
        assert not ActivationStore(store).complete
        end(start(2), 0)
        assert _files(store) == files
        if dtype == "int8":
            assert isinstance(ActivationStore.open(store).channels, Channels)
