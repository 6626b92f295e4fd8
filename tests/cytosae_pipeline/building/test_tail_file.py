"""The file with the rest of the network: written on request, whole or not at all, and refused where it does not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cytosae_pipeline
from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.images import decode_image, to_tensor
from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.tail_file import METADATA_KEY, TailNotFoundError, open_tail, tail_location
from tests.support.pictures import LAYOUT, write_vit
from tests.support.s3 import serve_s3
from tests.support.stores import make_activations, make_spec, make_store, read_files

ROOT = Path(__file__).parents[3]

KILLED = """
import os, signal, sys
from cytosae_cache.storage import atomic

left, real = int(sys.argv[1]), {name: getattr(os, name) for name in ("rename", "replace", "fsync", "open")}

def killing(name):
    def call(path, *arguments, **options):
        global left
        if name == "fsync" or ".tail.safetensors" in str(path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real[name](path, *arguments, **options)
    return call

from cytosae_pipeline.cli.app import main
for name in real:
    setattr(os, name, killing(name))
sys.argv[1:] = sys.argv[2:]
main()
"""


def tail_of(place) -> Path:
    return place.store.with_name(f"{place.store.name}.tail.safetensors")


@pytest.fixture
def with_tail(with_store):
    with_store.build("--keep_tail")
    return with_store


def rewrite(path, *, header=None, entry=None, facts=None, data=None):
    """Change a tail as a program that knows the format would; each argument takes a part and returns another."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    head, body = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    if entry or facts:
        inner = json.loads(head["__metadata__"][METADATA_KEY])
        if facts:
            values = json.loads(inner["facts"])
            inner["facts"] = json.dumps(facts(values) or values)
        inner = entry(inner) if entry else inner
        head["__metadata__"][METADATA_KEY] = json.dumps(inner)
    head = header(head) if header else head
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (data(body) if data else body))


def test_it_is_written_only_on_request_and_added_to_a_finished_store(with_store):
    before = read_files(with_store.store)
    assert not tail_of(with_store).exists()
    assert "tail" not in with_store.run("info", "--dataset_name", "toy").output
    result = json.loads(with_store.build("--keep_tail", "--json").stdout)
    assert (result["status"], result["tail"]) == ("already complete", str(tail_of(with_store)))
    assert read_files(with_store.store) == before, "nothing is computed again, and nothing is added to the folder"
    assert f"tail: {tail_of(with_store)}" in with_store.build("--keep_tail").output
    info = json.loads(with_store.run("info", "--dataset_name", "toy", "--json").stdout)
    assert (info["tail"], info["tail_bytes"]) == (str(tail_of(with_store)), tail_of(with_store).stat().st_size)
    assert "tail_bytes: " in with_store.run("info", "--dataset_name", "toy").output


def test_it_has_the_blocks_after_the_stored_one_and_the_norm(with_tail):
    names = set(load_file(tail_of(with_tail)))
    assert {name.split(".")[0] for name in names} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"0"}
    saved = torch.load(with_tail.vit, weights_only=True)["teacher"]
    found = load_file(tail_of(with_tail))
    assert torch.equal(found["blocks.0.mlp.fc1.weight"], saved["backbone.blocks.3.mlp.fc1.weight"])


def test_a_sound_one_is_left_alone_and_a_damaged_one_written_again(with_tail):
    path, before = tail_of(with_tail), tail_of(with_tail).read_bytes()
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    with_tail.build("--keep_tail")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp
    path.write_bytes(before[:-1] + b"\x00")
    with_tail.build("--keep_tail")
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_embedding_of_a_cached_image_is_that_of_the_whole_network(with_images, dtype):
    with_images.build("--keep_tail", "--store_dtype", dtype, "--precision", "fp32")
    store = ActivationStore(with_images.store)
    info = describe_backbone(with_images.vit, name=None, block=-1)
    whole, norm = load_backbone(with_images.vit, info), torch.load(with_images.vit, weights_only=True)["teacher"]
    rows = store.valid_rows
    pixels = np.stack(
        [decode_image((with_images.images / store.images.path[row]).read_bytes(), size=224) for row in rows]
    )
    x = whole(to_tensor(pixels))
    weights = (norm[f"backbone.norm.{kind}"] for kind in ("weight", "bias"))
    expected = torch.nn.functional.layer_norm(x, x.shape[-1:], *weights, 1e-6)[:, 0]
    found = open_tail(store)(torch.from_numpy(store[rows]))
    limit = {"float32": 1e-5, "float16": 2e-3, "int8": 5e-2}[dtype]
    assert float((found - expected).abs().max()) < limit * float(expected.abs().max())


def test_several_blocks_have_a_tail_each(with_images):
    result = json.loads(with_images.build("--block_layer", -2, "--block_layer", 0, "--keep_tail", "--json").stdout)
    assert [Path(item["tail"]).name for item in result["stores"]] == [
        f"{Path(item['store']).name}.tail.safetensors" for item in result["stores"]
    ]
    values = [ActivationStore(item["store"]) for item in result["stores"]]
    one, other = (open_tail(store)(torch.from_numpy(store[store.valid_rows])) for store in values)
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_the_last_part_of_a_build_writes_it(with_images):
    options = ("--keep_tail", "--json", "--shards")
    first = json.loads(with_images.build(*options, "1/2").stdout)
    assert (first["status"], first["tail"]) == ("in part", None)
    assert not tail_of(with_images).exists()
    assert json.loads(with_images.build(*options, "2/2").stdout)["tail"] == str(tail_of(with_images))


def test_python_and_the_command_line_write_the_same(with_tail):
    options = {"root_dir": with_tail.root, "dataset_name": "toy", "model_path": with_tail.vit, "layout": LAYOUT}
    before = tail_of(with_tail).read_bytes()
    tail_of(with_tail).unlink()
    cytosae_pipeline.build_store(**options, workers=0, keep_tail=True)
    assert tail_of(with_tail).read_bytes() == before


def test_a_copy_of_the_folder_does_not_take_it_along(with_tail, tmp_path):
    shutil.copytree(with_tail.store, tmp_path / "copy.zarr")
    assert not [name for name in read_files(tmp_path / "copy.zarr") if "tail" in name]
    with pytest.raises(TailNotFoundError):
        open_tail(ActivationStore(tmp_path / "copy.zarr"))
    link = tmp_path / "link.zarr"
    link.symlink_to(with_tail.store)
    open_tail(ActivationStore(link))


def test_the_message_of_a_missing_one_is_a_command_that_writes_it(with_store):
    """What it says is typed, word for word."""
    import shlex

    with pytest.raises(
        TailNotFoundError, match="has no tail, the blocks of the network after the stored one"
    ) as caught:
        open_tail(ActivationStore(with_store.store))
    assert "--keep_tail" in str(caught.value)
    from cytosae_pipeline.config import StoreChoice

    choice = StoreChoice(root_dir=with_store.root, dataset_name="toy")
    with pytest.raises(TailNotFoundError) as caught:
        open_tail(ActivationStore(with_store.store), choice)
    words = shlex.split(str(caught.value).partition("computed again: ")[2])
    with_store.run_plain(*words[1:])
    open_tail(ActivationStore(with_store.store), choice)


def test_imported_embeddings_have_none(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(4), spec=make_spec(imported=True))
    with pytest.raises(TailNotFoundError, match="was imported \\('toy_vit'\\): there is no network whose tail"):
        open_tail(store)


def test_that_of_another_encoder_is_refused_and_replaced(with_tail, tmp_path):
    write_vit(tmp_path / "other.pth", seed=1)
    other = tmp_path / "other.zarr"
    with_tail.build("--model_path", tmp_path / "other.pth", "--store", other, "--keep_tail")
    theirs = other.with_name("other.zarr.tail.safetensors")
    shutil.copy(tail_of(with_tail), theirs)
    with pytest.raises(
        StoreMismatchError, match=r"is the tail of another store \(store, tail\): weights_sha256: .*--keep_tail"
    ):
        open_tail(ActivationStore(other))
    output = with_tail.run("verify", str(other), code=1).output
    assert "the store itself is sound" in output
    assert "is the tail of another store" in output
    with_tail.build("--model_path", tmp_path / "other.pth", "--store", other, "--keep_tail")
    open_tail(ActivationStore(other))


def test_verify_checks_it(with_tail):
    report = json.loads(with_tail.run("verify", "--dataset_name", "toy", "--json").stdout)
    assert (report["tail"], report["tail_problem"], report["sound"]) == (str(tail_of(with_tail)), "", True)
    assert "its tail is sound: " in with_tail.run("verify", "--dataset_name", "toy").output
    rewrite(tail_of(with_tail), data=lambda body: body[:-4] + b"\x00\x00\x00\x00")
    output = with_tail.run("verify", "--dataset_name", "toy", code=1).output
    assert "is not a sound tail of store" in output
    assert "its tensors have another digest than the one in its metadata. Write it again: cytosae-cache build" in output
    report = cytosae_pipeline.verify_store(root_dir=with_tail.root, dataset_name="toy")
    assert not report.sound
    assert "another digest" in report.tail_problem


def _change_network(**changes):
    return {"facts": lambda facts: facts["network"].update(changes)}


HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "header longer than the file": (
        lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:]),
        "its header would have 1,099",
    ),
    "header of several megabytes": (
        lambda path: path.write_bytes((2 << 20).to_bytes(8, "little") + b" " * (3 << 20)),
        "its header would have 2,097,152",
    ),
    "no JSON": (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "is not a sound tail"),
    "deep JSON": (
        lambda path: path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
        "is not a sound tail",
    ),
    "another file": (
        lambda path: rewrite(path, header=lambda head: {**head, "__metadata__": {}}),
        "it is no file that `build --keep_tail` wrote",
    ),
    "another version": (
        lambda path: rewrite(path, facts=lambda facts: {**facts, "format_version": 2}),
        "its format is version 2, expected 1",
    ),
    "huge layer": (
        lambda path: rewrite(path, **_change_network(mlp_hidden=1 << 40)),
        "describes an impossible network",
    ),
    "heads of another type": (lambda path: rewrite(path, **_change_network(heads=True)), "an impossible network"),
    "heads that do not divide": (lambda path: rewrite(path, **_change_network(heads=7)), "an impossible network"),
    "unknown activation": (lambda path: rewrite(path, **_change_network(activation="exec")), "an impossible network"),
    "no number": (lambda path: rewrite(path, **_change_network(eps=float("nan"))), "an impossible network"),
    "unknown pooling": (
        lambda path: rewrite(path, facts=lambda facts: {**facts, "pooling": "max"}),
        "an impossible network",
    ),
    "unknown fact": (lambda path: rewrite(path, **_change_network(code="x")), "an impossible network"),
    "wider layer": (lambda path: rewrite(path, **_change_network(mlp_hidden=97)), "mlp.fc1.weight is F32"),
    "missing tensor": (
        lambda path: rewrite(path, header=lambda head: {k: v for k, v in head.items() if k != "norm.bias"}),
        r"missing tensors \['norm.bias'\], unknown \[\]",
    ),
    "unknown tensor": (
        lambda path: rewrite(path, header=lambda head: {**head, "x": head["norm.bias"]}),
        r"unknown \['x'\]",
    ),
    "other shape": (
        lambda path: rewrite(
            path, header=lambda head: {**head, "norm.bias": {**head["norm.bias"], "shape": [1 << 40]}}
        ),
        "norm.bias is F32",
    ),
    "other type": (
        lambda path: rewrite(path, header=lambda head: {**head, "norm.bias": {**head["norm.bias"], "dtype": "F16"}}),
        "norm.bias has 96 bytes, expected 48",
    ),
    "unknown type": (
        lambda path: rewrite(path, header=lambda head: {**head, "norm.bias": {**head["norm.bias"], "dtype": "I8"}}),
        "norm.bias is I8",
    ),
    "one place for two": (
        lambda path: rewrite(
            path,
            header=lambda head: {
                **head,
                "norm.bias": {**head["norm.bias"], "data_offsets": head["norm.weight"]["data_offsets"]},
            },
        ),
        "its tensors overlap, or leave a gap",
    ),
    "cut": (lambda path: rewrite(path, data=lambda body: body[:-4]), "its tensors have .* bytes, found"),
    "longer": (lambda path: rewrite(path, data=lambda body: body + b"1234"), "its tensors have .* bytes, found"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_and_damaged_files_are_refused(with_tail, kind):
    change, message = HOSTILE[kind]
    change(tail_of(with_tail))
    with pytest.raises(StoreCorruptError, match=message) as caught:
        open_tail(ActivationStore(with_tail.store))
    assert "Write it again: cytosae-cache build" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_store_that_states_too_many_blocks_takes_no_time(with_tail):
    from cytosae_pipeline.building import tail_file

    store = ActivationStore(with_tail.store)
    spec = make_spec(**{**vars(store.spec), "n_blocks": 1 << 40, "block": 2})
    rewrite(tail_of(with_tail), facts=lambda facts: {**facts, "spec": spec.to_json()})
    store.spec = spec
    with pytest.raises(StoreCorruptError, match="tensors for 1,099,511,627,773 blocks"):
        tail_file.open_tail(store)


def test_a_tail_that_does_not_fit_into_memory_is_refused_before(with_tail, monkeypatch):
    from cytosae_pipeline.building import tail_file

    monkeypatch.setattr(tail_file, "available_ram", lambda: 1000)
    with pytest.raises(MemoryError, match="reading the tail .* needs at least .* of memory, but 1"):
        open_tail(ActivationStore(with_tail.store))


def test_a_link_that_leads_elsewhere_is_not_followed(with_tail, tmp_path):
    tail_of(with_tail).rename(tmp_path / "elsewhere")
    tail_of(with_tail).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link that leads out of"):
        open_tail(ActivationStore(with_tail.store))


def test_killed_while_it_is_written_it_is_whole_or_not_there(with_store):
    options = ["build", "--root_dir", with_store.root, "--dataset_name", "toy", "--model_path", with_store.vit]
    options += ["--workers", 0, "--layout", LAYOUT, "--shard_images", 5, "--keep_tail"]
    path, folder = tail_of(with_store), with_store.store.parent
    for number in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", KILLED, str(number), *map(str, options)]
        ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, env=os.environ)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        if path.exists():
            open_tail(ActivationStore(with_store.store))
    assert number > 1
    with_store.build("--keep_tail")
    assert sorted(item.name for item in folder.iterdir() if "tail" in item.name) == [path.name]
    open_tail(ActivationStore(with_store.store))


def test_it_lies_beside_a_store_in_a_bucket_too(with_images, monkeypatch):
    pytest.importorskip("moto")
    with serve_s3(monkeypatch):
        url = "s3://cells/a/toy.zarr"
        result = json.loads(with_images.build("--store", url, "--keep_tail", "--json").stdout)
        assert result["tail"] == tail_location(url) == f"{url}.tail.safetensors"
        store = ActivationStore(url)
        assert not [name for name in store.storage.names() if "tail" in name]
        here = with_images.root / "here.zarr"
        with_images.build("--store", here, "--keep_tail")
        local = ActivationStore(here)
        x = torch.from_numpy(store[store.valid_rows])
        assert torch.equal(open_tail(store)(x), open_tail(local)(x))
        report = json.loads(with_images.run("verify", url, "--json").stdout)
        assert (report["tail"], report["sound"]) == (result["tail"], True)
