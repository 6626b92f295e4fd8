"""Several blocks from one pass, and images prepared as the encoder or the user says."""

import filecmp
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.images import decode_image, to_tensor
from cytosae.backbones.preprocessing import StatedTransform
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.build import build_and_open, build_stores
from cytosae_pipeline.building.originals import differ
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.errors import UserError
from tests.support.pictures import LAYOUT, write_vit
from tests.support.stores import make_spec

BLOCKS = ("--block_layer", -2, "--block_layer", 0)


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch):
    """Stores record when they were made; these are compared byte for byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def test_the_checkpoint_is_read_once_for_all_blocks(with_images, monkeypatch):
    from cytosae.backbones import backbone

    calls = []
    read = backbone.read_checkpoint
    monkeypatch.setattr(backbone, "read_checkpoint", lambda path: calls.append(path) or read(path))
    with_images.build(*BLOCKS, "--dry-run")
    assert calls == [with_images.vit]


def test_weights_that_are_not_finite_are_found_before_the_build(with_images):
    checkpoint = torch.load(with_images.vit, weights_only=True)
    checkpoint["teacher"]["backbone.blocks.0.norm1.bias"][0] = float("nan")
    torch.save(checkpoint, with_images.vit)
    output = with_images.build("--dry-run", code=1).output
    assert "contain NaN or infinity: blocks.0.norm1.bias" in output


def test_the_network_in_the_package_has_its_own_name(with_images):
    output = with_images.build("--model_path", "embedded", "--model_name", "dinov2_vitb14", "--dry-run", code=1).output
    assert "model_path embedded is the network cytosae_tiny14, found model_name dinov2_vitb14: leave out" in output
    with_images.build("--model_path", "embedded", "--model_name", "cytosae_tiny14", "--dry-run")


def _build_as_a_daemon(config):
    build_stores(config)


def test_a_daemonic_process_decodes_images_itself(with_images, messages):
    config = BuildConfig(
        root_dir=with_images.root, dataset_name="toy", model_path=with_images.vit, layout=LAYOUT, workers=2
    )
    process = multiprocessing.get_context("fork").Process(target=_build_as_a_daemon, args=(config,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert ActivationStore.open(with_images.store).complete


def stores_of(workplace):
    """Stores by block."""
    folders = (workplace.root / "out" / "activations" / "toy").glob("*.zarr")
    return {ActivationStore(folder).spec.block: folder for folder in folders}


def assert_same_files(one, other):
    """Two folders hold the same bytes."""
    names = sorted(item.relative_to(one).as_posix() for item in one.rglob("*") if item.is_file())
    assert names == sorted(item.relative_to(other).as_posix() for item in other.rglob("*") if item.is_file())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.fixture
def single(with_images):
    """Stores of two blocks, built one after the other, moved aside."""
    for block in (-2, 0):
        with_images.build("--block_layer", block)
    folder = with_images.root / "out" / "activations" / "toy"
    folder.rename(with_images.root / "single")
    return {block: with_images.root / "single" / path.name for block, path in _by_block(with_images.root / "single")}


def _by_block(folder):
    return [(ActivationStore(path).spec.block, path) for path in folder.glob("*.zarr")]


def test_stores_of_one_pass_equal_those_of_single_builds(with_images, single):
    output = with_images.build(*BLOCKS).output
    assert output.count("store (built): ") == 2
    found = stores_of(with_images)
    assert sorted(found) == [0, 2]
    for block, folder in found.items():
        assert_same_files(folder, single[block])
    assert with_images.build(*BLOCKS).output.count("already complete") >= 2
    result = json.loads(with_images.build(*BLOCKS, "--json").stdout)
    assert [item["status"] for item in result["stores"]] == ["already complete"] * 2


def test_a_block_is_added_to_a_store_that_is_there(with_images, single):
    with_images.build()
    result = json.loads(with_images.build(*BLOCKS, "--json").stdout)
    assert [item["status"] for item in result["stores"]] == ["already complete", "built"]
    for block, folder in stores_of(with_images).items():
        assert_same_files(folder, single[block])


def test_a_killed_build_of_two_blocks_ends_with_the_same_bytes(with_images, single):
    """Killed with one block's store ahead of the other's."""
    options = [
        "build", "--root_dir", with_images.root, "--dataset_name", "toy", "--model_path", with_images.vit,
        "--workers", 0, "--shard_images", 5, *BLOCKS, "--layout", LAYOUT,
    ]  # fmt: skip
    command = [sys.executable, "-c", "from cytosae_pipeline.cli.app import main; main()", *map(str, options)]
    child = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = with_images.root / "out" / "activations" / "toy"
    while child.poll() is None and not list(folder.glob("*.zarr/progress/*")):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    found = stores_of(with_images)
    if 2 in found:  # the store of the first block falls behind by a shard
        for mark in sorted((found[2] / "progress").glob("*"))[:1]:
            mark.unlink()
    with_images.build(*BLOCKS)
    for block, store in stores_of(with_images).items():
        assert_same_files(store, single[block])


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_other_types_of_numbers_have_several_blocks_too(with_images, dtype):
    with_images.build(*BLOCKS, "--store-dtype", dtype)
    assert {ActivationStore(folder).spec.store_dtype for folder in stores_of(with_images).values()} == {dtype}


def test_blocks_that_make_no_sense_are_refused(with_images):
    assert (
        "block_layer must be one or more different blocks"
        in with_images.build("--block_layer", 1, "--block_layer", 1, code=2).output
    )
    assert "names block 2 twice" in with_images.build("--block_layer", 2, "--block_layer", -2, code=1).output
    output = with_images.build(*BLOCKS, "--store", with_images.root / "s.zarr", code=2).output
    assert "store names one place, but block_layer asks for 2 stores" in output
    assert "has 4 blocks: -4 to 3" in with_images.build("--block_layer", 0, "--block_layer", 7, code=1).output
    assert not (with_images.root / "out").exists()


def test_python_builds_one_store_or_several(with_images):
    options = {"root_dir": with_images.root, "dataset_name": "toy", "model_path": with_images.vit, "workers": 0}
    options |= {"layout": "class/patient"}
    results = build_stores(BuildConfig(**options, block_layer=(1, 0)))
    assert [ActivationStore(item.store).spec.block for item in results] == [1, 0]
    with pytest.raises(UserError, match="asks for 2 stores: call build_stores"):
        build_and_open(BuildConfig(**options, block_layer=(1, 0)))
    assert build_and_open(BuildConfig(**options, block_layer=1))[1].status == "already complete"


# --- Preprocessing ----------------------------------------------------------------------------------------------------

PREPARED = ("--image-size", 448, "--image-mean", 0.1, 0.2, 0.3, "--image-std", 0.4, 0.5, 0.6)


def test_images_are_prepared_as_the_user_says(with_images):
    plan = with_images.build(*PREPARED, "--dry-run").output
    assert "network: 4 blocks of width 24, 2 heads, MLP of 96 (gelu), patches of 112 pixels, CLS token" in plan
    assert "images: 448 x 448 (bilinear), mean 0.1 0.2 0.3, std 0.4 0.5 0.6; 4 x 4 patches" in plan
    with_images.build(*PREPARED)
    store = ActivationStore.open(with_images.store)
    stated = store.spec.preprocessing
    assert (stated.image_size, stated.mean, stated.std) == (448, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert store.spec.tokens.grid == (4, 4)
    transform = StatedTransform(448, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    info = describe_backbone(with_images.vit, name=None, block=-2, preprocessing=transform)
    pixels = decode_image((with_images.images / store.images.path[0]).read_bytes(), size=448)
    with torch.inference_mode(), StoreReader(store) as reader:
        tokens = load_backbone(with_images.vit, info)(to_tensor(pixels[None], mean=transform.mean, std=transform.std))
        np.testing.assert_allclose(reader.read(np.array([0]))[0], tokens[0], rtol=2e-3, atol=2e-3)


def test_a_store_of_another_size_serves_every_verb(with_images):
    with_images.build(*PREPARED)
    with_images.train("--run_name", "r")
    source = ("--dataset_name", "toy", "--images", with_images.images, "--model_path", with_images.vit)
    assert "sound" in with_images.run("verify", *source, "--deep").output
    with_images.run("report", "--dataset_name", "toy", "--sae_path", with_images.sae())
    overview = (with_images.features() / "report" / "data" / "overview.js").read_text()
    assert '"grid":[4,4]' in overview.replace(" ", "")


def test_a_verb_that_builds_first_prepares_images_as_said(with_images):
    with_images.train(*PREPARED, "--layout", LAYOUT, "--images", with_images.images, "--model_path", with_images.vit)
    assert ActivationStore.open(with_images.store).spec.preprocessing.image_size == 448


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--image-size", 0), 2, "image_size must be at least 1, found 0"),
        (("--image-size", 5000), 1, "image_size must be at most 4096, found 5000"),
        (("--image-size", 300), 1, "patches of 112 pixels do not tile images of 300 pixels"),
        (("--image-mean", 0.5, 0.5), 2, "image-mean"),
        (("--image-mean", "nan", 0.5, 0.5), 2, "image_mean must be at least 0, found nan"),
        (("--image-std", 0, 0.5, 0.5), 2, "image_std must be above 0"),
        (("--image-mean", 127.5, 127.5, 127.5), 2, "image_mean must be at most 1"),
        (("--image-resample", "blurry"), 2, "bicubic"),
    ],
)
def test_impossible_preprocessing_is_refused(with_images, options, code, message):
    assert message in with_images.build(*options, code=code).output


def test_a_fixed_number_of_values_is_checked_in_python():
    with pytest.raises(UserError, match=r"image_mean must be 3 values, found \[0\.5\]"):
        BuildConfig(image_mean=[0.5])


def test_the_plan_names_what_was_left_out_of_a_checkpoint(with_images):
    value = torch.load(with_images.vit, weights_only=True)
    value["teacher"]["dino_head.last.weight"] = torch.ones(2)
    torch.save(value, with_images.vit)
    output = with_images.build("--dry-run").output
    assert "left out, not part of the encoder: teacher.dino_head" in output


def test_a_list_that_nothing_else_changes_keeps_its_hash(with_images):
    """The spec of the toy network as older versions computed it, from the same file."""
    write_vit(with_images.root / "again.pth")
    with_images.build()
    facts = json.loads(with_images.run("info", "--dataset_name", "toy", "--json").stdout)
    assert set(facts["spec"]["preprocessing"]) == {"image_size", "resample", "mean", "std"}


def test_a_store_of_other_images_is_never_taken_for_the_one_that_is_asked_for(with_images):
    with_images.build()
    output = with_images.train("--image-size", 448, code=1).output
    assert "no activation store for block_layer -2, image_size 448" in output
    assert "224 px 23 images" in output
    with_images.build(*PREPARED)
    assert "2 stores of data set 'toy' fit" in with_images.train(code=1).output
    with_images.train(*PREPARED[:2], "--run_name", "large")
    facts = json.loads(with_images.run("info", "--dataset_name", "toy", *PREPARED[2:], "--json").stdout)
    assert facts["spec"]["preprocessing"]["image_size"] == 448


def test_commands_in_messages_repeat_three_values_after_one_option():
    config = BuildConfig(dataset_name="d", image_mean=(0.1, 0.2, 0.3), block_layer=(1, 2))
    assert command("build", config) == (
        "cytosae-cache build --dataset_name d --block_layer 1 --block_layer 2 --image_mean 0.1 0.2 0.3"
    )


def test_statistics_that_build_a_store_prepare_images_as_the_autoencoder_saw_them(with_images):
    with_images.build(*PREPARED, "--image-resample", "box")
    with_images.train("--run_name", "r")
    store = with_images.store
    spec = ActivationStore(store).spec
    shutil.rmtree(store)
    source = ("--dataset_name", "toy", "--model_path", with_images.vit, "--layout", LAYOUT)
    with_images.run("features", *source, "--sae_path", with_images.sae())
    assert ActivationStore(with_images.store).spec == spec


def test_recomputed_values_may_be_rounded_to_the_next_of_the_stored_type():
    spec = make_spec()
    stored = np.full((5, 8), 0.5)
    stored[0, 0] = 4.0
    near, far = stored.copy(), stored.copy()
    near[0, 0] += np.spacing(np.float16(4.0))
    far[0, 0] += 3 * np.spacing(np.float16(4.0))
    assert not differ(near, stored, spec)
    assert differ(far, stored, spec)


def test_a_white_level_is_part_of_the_spec(with_images):
    grey = (np.arange(1024, dtype=np.uint16) * 4).reshape(32, 32)
    Image.fromarray(grey).save(with_images.images / "blast" / "p0" / "grey.tif")
    with_images.build("--white-level", 4095)
    store = ActivationStore(with_images.store)
    assert store.spec.preprocessing.white_level == 4095
    assert "from 0 to 4095" in with_images.build("--white-level", 4095, "--dry-run").output
    source = ("--dataset_name", "toy", "--images", with_images.images, "--model_path", with_images.vit)
    assert "sound" in with_images.run("verify", *source, "--deep").output
    assert "white_level 1023" in with_images.train("--white-level", 1023, code=1).output
