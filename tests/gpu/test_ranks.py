"""Two GPUs train one autoencoder with the code that two processes on a CPU use."""

import json

import pytest
import torch

from tests.support.torchrun import Torchrun


@pytest.mark.gpu
@pytest.mark.parametrize("split", ["data", "latents"])
@pytest.mark.parametrize("arch", ["relu", "batchtopk"])
def test_two_gpus_give_the_run_of_one_process(with_store, arch, split):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    k = ["--k", 5] if arch == "batchtopk" else []
    options = (
        "train", "--root_dir", with_store.root, "--dataset_name", "toy", "--arch", arch, *k, "--expansion_factor", 4,
        "--batch_size", 4, "--total_training_tokens", 58, "--lr_warm_up_steps", 3, "--wandb_log_frequency", 5,
        "--precision", "fp32", "--held_out", 0.3,
    )  # fmt: skip
    with_store.run_plain(*options, "--run_name", "one", "--device", "cpu")
    code, output = Torchrun(*options, "--run_name", "two", "--device", "cuda", "--split", split).finish()
    assert code == 0, output
    losses = {}
    for run in ("one", "two"):
        path = with_store.root / "out" / "checkpoints" / run / "metrics.jsonl"
        losses[run] = [json.loads(line)["losses/overall_loss"] for line in path.read_text().splitlines()]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-3)
