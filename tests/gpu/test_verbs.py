"""Batches, `build`, `train` and `features` on each device, through both doors."""

import numpy as np
import pytest
import torch

import cytosae
import cytosae_pipeline
from cytosae.formats.checkpoint import load_sae
from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.training.batches import open_batches
from tests.support.interruptions import interrupted_at_step
from tests.support.pictures import LAYOUT
from tests.support.stores import make_activations, make_spec, make_store

CPU = torch.device("cpu")
CHOICES = {"all": lambda x: x, "patches": lambda x: x[:, 1:], "cls": lambda x: x[:, :1]}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """A store whose batches of 32 images take 8 MB."""
    values = make_activations(160, make_spec(d_model=256, grid=(16, 32)))
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", values, shard_images=32)


@pytest.mark.parametrize("place", ["none", "ram", "gpu"])
@pytest.mark.parametrize("choice", CHOICES)
def test_no_buffer_is_filled_before_its_copy_ended(device, store, place, choice):
    config = TrainConfig(batch_size=32, total_training_tokens=480, seed=3)
    found = []
    with StoreReader(store) as reader:
        images = ConcatReader([reader])
        plain = open_batches(images, config, CHOICES[choice], samples_seen=0, device=CPU, place="none")
        expected = [(batch.activations.clone(), batch.samples_seen) for batch in plain]
        for batch in open_batches(images, config, CHOICES[choice], samples_seen=0, device=device, place=place):
            found.append((batch.activations.clone(), batch.samples_seen))
            if device.type == "cuda":
                torch.cuda._sleep(50_000_000)  # the step, tens of milliseconds, behind which the next copy waits
    assert len(found) == len(expected) == 15
    for (values, position), (wanted, expected_position) in zip(found, expected, strict=True):
        assert values.device.type == device.type
        assert torch.equal(values.cpu(), wanted)
        assert position == expected_position


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_runs_repeat_and_resume_to_the_last_bit(device, with_store, arch, precision):
    options = ["--arch", arch, "--held_out", 0.2, "--standardise", "--max_gradient_norm", 1, "--device", device.type]
    options += ["--precision", precision, *([] if arch in ("relu", "gated") else ["--k", 5])]
    for name in ("r", "again"):
        with_store.train("--run_name", name, *options)
    with interrupted_at_step(9):
        with_store.train("--run_name", "broken", *options, code=130)
    assert "(resumed, 15 steps" in with_store.run("train", "--resume", "broken").output
    unbroken = load_sae(with_store.sae()).sae.state_dict()
    for name in ("again", "broken"):
        for key, value in load_sae(with_store.sae(name)).sae.state_dict().items():
            assert torch.equal(value, unbroken[key]), (name, key)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("auto", 0.02)])
def test_stores_are_those_of_the_cpu(device, with_images, precision, limit):
    stores = [
        cytosae_pipeline.build_store(
            root_dir=with_images.root / name, dataset_name="toy", images=with_images.images, layout=LAYOUT,
            model_path=with_images.vit, device=where, precision=chosen, workers=0,
        )
        for name, where, chosen in (("cpu", "cpu", "fp32"), ("device", device.type, precision))
    ]  # fmt: skip
    expected, found = (np.asarray(store[store.valid_rows], dtype=np.float64) for store in stores)
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


def test_features_and_counts_are_those_of_the_cpu(device, with_sae):
    results = []
    for where in ("cpu", device.type):
        pair = cytosae.load(with_sae.sae(), device=where), with_sae.store
        results.append(
            (
                cytosae_pipeline.feature_stats(*pair, top_k=3),
                cytosae_pipeline.patient_counts(*pair),
                cytosae_pipeline.evaluate_sae(*pair),
            )
        )
    (stats, counts, quality), (found, found_counts, found_quality) = results
    for name in ("mean_acts", "top_values", "sparsity"):
        np.testing.assert_allclose(getattr(found, name), getattr(stats, name), rtol=1e-3, atol=1e-5)
    assert np.abs(found_counts.counts - counts.counts).max() <= 1
    assert found_quality.overall.l0 == pytest.approx(quality.overall.l0, rel=1e-3)
    assert found_quality.overall.explained_variance == pytest.approx(quality.overall.explained_variance, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_second_device_need_not_be_the_current_one(arch):
    where = torch.device("cuda:1")
    sae = make_sae(arch, 32, 256, k=8, device=where)
    step = TrainStep(
        sae, lr=1e-3, weights=LossWeights(l1_coefficient=1e-3), use_ghost_grads=False, dead_feature_window=1,
        max_gradient=1.0, matmul=MatmulConfig(torch.bfloat16, sparse_below=0.0),
    )  # fmt: skip
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0)).to(where)
    assert step.step(x).reconstruction.device == where
    assert {part.device for part in sae.state_dict().values()} == {where}
    assert sae.encode(x.cpu()).device == where
