"""The whole job on real blood cells and the real pretrained network; skipped without CYTOSAE_TEST_DATA."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.cli.app import cli


def _run(*arguments) -> dict:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments] + ["--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["embedded", "real"])
def test_images_to_patients(test_data, tmp_path, network):
    model = "embedded" if network == "embedded" else test_data / "vit" / "dinov2_vits14.pth"
    where = ["--root_dir", tmp_path, "--dataset_name", "bccd"]
    source = ["--images", test_data / "bccd_cells" / "manifest.csv", "--model_path", model, "--limit", 48]
    built = _run("build", *where, *source, "--batch_size", 16)
    assert built["n_images"] == 48
    assert built["n_skipped"] == 0
    trained = _run(
        "train", *where, "--expansion_factor", 4, "--total_training_tokens", 640, "--batch_size", 16,
        "--lr_warm_up_steps", 5, "--lr", 0.002, "--use_ghost_grads",
    )  # fmt: skip
    assert trained["metrics"]["metrics/explained_variance"] > 0.5
    found = _run("features", *where, "--sae_path", trained["sae"])
    assert found["n_active"] > 100
    patients = _run("patients", *where, "--sae_path", trained["sae"])
    store = ActivationStore.open(next((tmp_path / "out/activations/bccd").glob("*.zarr")))
    assert patients["groups"] == sorted(set(store.images.patient))
    assert _run("verify", store.path)["sound"]


def test_real_positions_are_interpolated_and_activations_tell_cells_apart(test_data):
    checkpoint = test_data / "vit" / "dinov2_vits14.pth"
    backbone = load_backbone(checkpoint, describe_backbone(checkpoint, name="dinov2_vits14", block=-2))
    assert backbone.info.n_tokens == 257
    assert len(backbone.model.blocks) == 11
    positions = backbone.model.positions
    assert positions is not None
    assert tuple(positions.shape) == (256, 384)
    assert np.isfinite(positions.numpy()).all()


def test_reading_real_activations_back(test_data, tmp_path):
    where = ["--root_dir", tmp_path, "--dataset_name", "bccd"]
    source = ["--images", test_data / "bccd_cells", "--model_path", "embedded", "--limit", 12]
    _run("build", *where, *source, "--layout", "class")
    store = ActivationStore.open(next((tmp_path / "out/activations/bccd").glob("*.zarr")))
    assert set(store.images.label) == {"wbc", "rbc", "platelet"}
    with StoreReader(store) as reader:
        assert np.isfinite(reader.read(store.valid_rows)).all()
