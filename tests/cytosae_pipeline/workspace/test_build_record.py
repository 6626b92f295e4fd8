"""A workspace remembers from what its stores were built; nothing else does."""

import json
import shlex
import shutil

import pytest

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import BuildConfig, StoreChoice
from cytosae_pipeline.workspace.build_record import find_build, find_images, find_model, record_build
from cytosae_pipeline.workspace.find import build_again_command
from tests.support.pictures import LAYOUT


@pytest.fixture
def elsewhere(with_images):
    """A workspace with a store of images that lie outside it, and an autoencoder."""
    images, vit = with_images.root.parent / "my cells", with_images.root.parent / "vit.pth"
    shutil.move(with_images.images, images)
    shutil.move(with_images.vit, vit)
    with_images.build("--images", images, "--model_path", vit, "--layout", LAYOUT)
    with_images.train("--run_name", "r")
    return with_images, images, vit


def _record(place):
    (path,) = (place.root / "out" / "builds").iterdir()
    return path


def test_a_report_shows_cells_wherever_they_lie(elsewhere):
    place, images, _ = elsewhere
    output = place.run("report", "--dataset_name", "toy", "--sae_path", place.sae()).output
    assert f"images: '{images}', as when the store was built" in output
    report = place.features() / "report"
    assert list((report / "thumbnails").glob("*.jpg"))
    texts = b"".join(path.read_bytes() for path in (*report.rglob("*.js"), *place.store.rglob("*")) if path.is_file())
    assert str(images).encode() not in texts


def test_a_deep_check_needs_no_paths(elsewhere):
    place, _, vit = elsewhere
    output = place.run("verify", "--dataset_name", "toy", "--deep").output
    assert f"checkpoint: '{vit}', as when the store was built" in output
    assert "sound" in output


def test_what_the_user_names_comes_first(elsewhere):
    place, images, vit = elsewhere
    store = ActivationStore(place.store)
    assert find_images(store, place.root, None) == images
    assert find_images(store, place.root, place.root) == place.root
    assert find_model(store, place.root, None) == vit
    assert find_model(store, place.root, place.root) == place.root


def test_paths_are_absolute_and_the_embedded_network_stays_a_word(with_store, monkeypatch):
    monkeypatch.chdir(with_store.root)
    store = ActivationStore(with_store.store)
    record_build(store, BuildConfig(images="dataset/toy", model_path="embedded", shard_images=5, overwrite=True))
    found = find_build(store, with_store.root)
    assert found == BuildConfig(
        root_dir=with_store.root, images=with_store.images, model_path="embedded", shard_images=5
    )


def test_a_workspace_that_is_moved_as_a_whole_keeps_its_paths(with_store):
    moved = with_store.root.with_name("moved")
    with_store.root.rename(moved)
    (store,) = (moved / "out" / "activations" / "toy").glob("*.zarr")
    assert find_model(ActivationStore(store), moved, None) == moved / "vit.pth"


def test_another_workspace_knows_nothing(with_store, tmp_path, messages):
    assert find_build(ActivationStore(with_store.store), tmp_path / "other") is None
    assert messages() == ""


def test_places_that_are_gone_are_said_and_the_usual_one_is_tried(elsewhere, messages):
    place, images, vit = elsewhere
    store = ActivationStore(place.store)
    shutil.move(images, place.images)
    vit.unlink()
    messages()
    assert find_images(store, place.root, None) == place.images
    assert find_model(store, place.root, None) is None
    assert messages().splitlines() == [
        f"the store was built with the images '{images}', which is not there any more: pass --images PATH",
        f"the store was built with the checkpoint '{vit}', which is not there any more: pass --model_path PATH",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"), (b"[]", "it is no JSON object"), (b'{"images": 3}', "images must be a path"),
        (b" " * 70_000, "it has more than 65,536 bytes"), (b"\xff", "utf-8"), (b"[" * 60_000, ""),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_ignored(with_store, messages, content, reason):
    path = _record(with_store)
    path.write_bytes(content)
    assert find_build(ActivationStore(with_store.store), with_store.root) is None
    text = messages()
    assert text.startswith(f"ignoring '{path}', which does not say how the store was built: ")
    assert reason in text


def test_options_of_later_versions_are_ignored(with_store):
    path = _record(with_store)
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    assert find_build(ActivationStore(with_store.store), with_store.root).layout == LAYOUT


def test_a_workspace_that_cannot_be_written_stops_nothing(with_store, messages):
    path = _record(with_store)
    shutil.rmtree(path.parent)
    path.parent.write_text("")
    record_build(ActivationStore(with_store.store), BuildConfig(root_dir=with_store.root))
    assert f"where the images lie is not remembered, because '{path}' cannot be written" in messages()


def test_an_unfinished_store_names_the_whole_command_that_finishes_it(with_images, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cytosae_cache.writer.StoreWriter.finish", fail)
        with_images.build(code=130)
    output = with_images.run("train", "--dataset_name", "toy", code=1).output
    assert "is unfinished" in output
    words = shlex.split(output.split("its build was given: cytosae-cache ")[1].splitlines()[0])
    assert {"--shard_images", "--layout", "--model_path"} <= set(words)
    assert "resumed" in with_images.run_plain(*words).output


def test_a_damaged_store_names_the_whole_command_that_builds_it_again(elsewhere):
    place, _, _ = elsewhere
    shard = next(path for path in sorted(place.store.glob("activations/c/**/*")) if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])
    output = place.run("verify", "--dataset_name", "toy", code=1).output
    words = shlex.split(output.split("Build it again with: cytosae-cache ")[1].splitlines()[0])
    place.run_plain(*words)
    place.run("verify", "--dataset_name", "toy")


def test_how_an_older_store_was_replaced_is_not_recorded(elsewhere):
    place, _, _ = elsewhere
    words = shlex.split(build_again_command(ActivationStore(place.store), StoreChoice(root_dir=place.root)))[1:]
    place.run_plain(*words, "--overwrite", "--delete_first")
    store = ActivationStore(place.store)
    assert find_build(store, place.root) is not None
    assert "delete" not in build_again_command(store, StoreChoice(root_dir=place.root))
