"""The reference's task guide: its three commands, word for word, with only the script replaced."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from tests.support.pictures import write_pictures, write_vit

TRAIN = r"""
PYTHONPATH=./ python -u tasks/train_sae_vit.py \
--model_name dinov2_vitb14 \
--model_path ./DinoBloom-B.pth \
--seed 42 \
--expansion_factor 64 \
--b_dec_init_method geometric_median \
--batch_size 64 \
--n_checkpoints 20 \
--l1_coefficient 0.00008 \
--lr 0.0004 \
--block_layer -2 \
--dataset mll23 \
--use_ghost_grads \
--total_training_tokens 1000000 \
--log_to_wandb --wandb_project cytosae --wandb_entity m-f-dasdelen-helmholtz-munich
"""

FEATURES = r"""
PYTHONPATH=./ python -u tasks/compute_sae_feature_data.py \
    --root_dir ./ \
    --dataset_name {dataset_name} \
    --sae_path {PATH/TO/SAE_CKPT}.pt \
    --vit_type custom \
    --model_path ./DinoBloom-B.pth
"""

PATIENTS = r"""
PYTHONPATH=./ python tasks/compute_patient_wise_sae_activation.py \
    --root_dir ./ \
    --dataset_name hehr \
    --threshold 0.2 \
    --sae_path ${PATH/TO/SAE_CKPT}.pt \
    --vit_type custom
"""


def _run(command: str, verb: str, sae: str = "") -> str:
    """Replace the script by the verb and the guide's placeholders by values, and nothing else."""
    command = command.replace("${PATH/TO/SAE_CKPT}.pt", sae).replace("{PATH/TO/SAE_CKPT}.pt", sae)
    words = shlex.split(command.replace("{dataset_name}", "hehr").replace("\\\n", " "))
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    result = CliRunner().invoke(cli, [verb, *words[script + 1 :]])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_three_commands(tmp_path, monkeypatch):
    # A network of 4 tokens and 4 channels: the commands' million images pass in a minute.
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    write_pictures(tmp_path / "dataset" / "mll23", 12, broken=False, own_patients=True)
    write_pictures(tmp_path / "dataset" / "hehr", 12, broken=False, own_patients=True)
    write_vit(tmp_path / "DinoBloom-B.pth", width=4, patch_size=224, depth=3, name="dinov2_vitb14")
    output = _run(TRAIN, "train")
    assert "building it first" in output
    assert "no login found" in output
    assert "15,625 steps" in output
    (sae,) = (tmp_path / "out" / "checkpoints").glob("*/final_sparse_autoencoder_dinov2_vitb14_-2_resid_256.pt")
    assert len(list(sae.parent.glob("*_sparse_autoencoder_*.pt"))) == 21
    output = _run(FEATURES, "features", str(sae))
    assert "building it first" in output
    folder = tmp_path / "out" / "feature_data" / f"sae_{sae.parent.name}" / "custom" / "hehr"
    for name in (
        "max_activating_image_indices", "max_activating_image_label_indices", "max_activating_image_values",
        "sae_mean_acts", "sae_sparsity",
    ):  # fmt: skip
        assert len(torch.load(folder / f"{name}.pt", weights_only=True)) == 256
    _run(PATIENTS, "patients", str(sae))
    assert np.load(folder / "cls_sae_cnt.npy").shape == (12, 256)
    lines = (sae.parent / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["details/n_training_tokens"] == 1_000_000
    shutil.rmtree(tmp_path / "dataset")
    _run(PATIENTS, "patients", str(sae))
