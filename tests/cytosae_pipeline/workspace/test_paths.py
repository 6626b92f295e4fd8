"""The layout of the outputs, and names that cannot leave it."""

from pathlib import Path

import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.workspace.paths import Workspace, checkpoint_name, final_name, run_of_sae, safe_name, short_name


def test_the_layout_is_that_of_the_contract(tmp_path):
    workspace = Workspace(tmp_path)
    out = tmp_path / "out"
    assert workspace.store_path("mll23", "0123456789ab") == out / "activations/mll23/0123456789ab.zarr"
    assert workspace.run_dir("r1") == out / "checkpoints/r1"
    sae = out / "checkpoints/r1/final.pt"
    assert workspace.feature_dir(sae, "custom", "hehr") == out / "feature_data/sae_r1/custom/hehr"
    assert (
        final_name("dinov2_vitb14", "-2", "resid", 49152) == "final_sparse_autoencoder_dinov2_vitb14_-2_resid_49152.pt"
    )
    assert checkpoint_name(64, "openai/clip", "-2", "resid", 8) == "64_sparse_autoencoder_openai-clip_-2_resid_8.pt"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/a", "a\0", ".hidden", "a b", "-x", "ä"])
def test_names_that_are_no_plain_folder_are_refused(name):
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        safe_name(name, "data set")


def test_folders_of_many_data_sets_are_named_by_their_beginning_and_a_digest(tmp_path):
    assert short_name("a+b" * 66) == "a+b" * 66
    long = "+".join(f"hospital-{number:02d}" for number in range(30))
    folders = [Workspace(tmp_path).feature_dir(tmp_path / "s.pt", "custom", name) for name in (long, f"{long}x")]
    assert len({folder.name for folder in folders}) == 2
    for folder in folders:
        assert len(folder.name) == 200
        assert folder.name.startswith("hospital-00+hospital-01+")
        folder.mkdir(parents=True)


def test_a_file_outside_a_run_is_its_own_run(tmp_path):
    assert run_of_sae(tmp_path / "8jsxk3co.pt") == "8jsxk3co"
    assert run_of_sae(Path("out/checkpoints/r7/x.pt")) == "r7"
