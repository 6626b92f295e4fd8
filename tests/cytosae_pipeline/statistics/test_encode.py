"""When the pass over a store computes only latents that can be active, and that its results are the same."""

import dataclasses

import pytest
import torch

from cytosae.formats.checkpoint import save_sae
from cytosae.sae.int8_weights import has_int8_products
from cytosae.sae.registry import make_sae
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.screened_images import ScreenedImageEncoder
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.runtime.product_rates import ProductRates
from cytosae_pipeline.statistics import encode
from cytosae_pipeline.statistics.encode import make_encoder
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.results import compute_statistics

K = 3
FAST = ProductRates(fp32=1e9, bf16=1e9, sparse=1e8, int8=8e9)

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this processor has no exact 8-bit products")


@pytest.fixture
def rates(monkeypatch) -> list[ProductRates]:
    """The rates of a machine that is fast at products of 8 bits; much work, even for the little there is."""
    found = [FAST]
    monkeypatch.setattr(encode, "find_rates", lambda d_in: found[-1])
    monkeypatch.setattr(encode, "_WORTHWHILE", 1.0)
    return found


def save_sparse_sae(place, name="batchtopk"):
    """An autoencoder of which about K of 4,000 latents are active on the store's tokens."""
    store = ActivationStore.open(next((place.root / "out" / "activations").rglob("*.zarr")))
    tokens = torch.from_numpy(store[store.valid_rows]).float().flatten(0, 1)
    sae = make_sae(name, tokens.shape[1], 4000, k=K)
    with torch.no_grad():
        sae.b_dec.copy_(tokens.mean(dim=0))
    sae.tie_()
    sae.calibrate_(tokens)
    if name == "batchtopk":
        sae.threshold.mul_(1.001)  # it was one of these tokens' activations, which rounding puts on either side
    path = place.root / "sparse.pt"
    save_sae(path, sae, {})
    return path


def config(place, path, **more):
    return StatisticsConfig(root_dir=place.root, dataset_name="toy", sae_path=path, **more)


def encoder_of(place, path, **more):
    options = config(place, path, **more)
    return make_encoder(open_inputs(options), options)


@needs_int8
def test_statistics_are_those_of_the_dense_encoder(with_store, rates, messages):
    path = save_sparse_sae(with_store)
    found = {}
    for precision in ("auto", "fp32"):
        options = config(with_store, path, precision=precision, threshold=(0.1, 0.0))
        inputs = open_inputs(options)
        found[precision] = compute_statistics(inputs, options, features=True, counts=["patient"], what="test")
    assert "products of 8 bits show that 9" in messages()
    screened, dense = found["auto"], found["fp32"]
    for field in ("top_rows", "top_labels", "sparsity"):
        assert (getattr(screened.features, field) == getattr(dense.features, field)).all()
    torch.testing.assert_close(
        torch.from_numpy(screened.features.mean_acts), torch.from_numpy(dense.features.mean_acts), rtol=1e-5, atol=0
    )
    assert (screened.counts["patient"].counts == dense.counts["patient"].counts).all()
    specificity = [one.features.specificity for one in (screened, dense)]
    assert (specificity[0].label_active == specificity[1].label_active).all()
    torch.testing.assert_close(*(torch.from_numpy(one.position_share) for one in specificity), rtol=1e-3, atol=1e-3)


@needs_int8
@pytest.mark.parametrize("name", ["batchtopk", "topk"])
def test_few_active_latents_are_screened(with_store, rates, name):
    path = save_sparse_sae(with_store, name)
    assert isinstance(encoder_of(with_store, path), ScreenedImageEncoder)
    assert isinstance(encoder_of(with_store, path, precision="fp32"), BlockEncoder)
    assert isinstance(encoder_of(with_store, path, precision="bf16"), BlockEncoder)


@needs_int8
def test_many_active_latents_are_not(with_sae, rates):
    assert isinstance(encoder_of(with_sae, with_sae.sae()), BlockEncoder)


def test_a_machine_without_fast_products_of_8_bits_computes_all(with_store, rates):
    path = save_sparse_sae(with_store)
    for int8 in (0.0, 1e6, 1.5e9):
        rates.append(dataclasses.replace(FAST, int8=int8))
        assert isinstance(encoder_of(with_store, path), BlockEncoder)


def test_nothing_is_measured_for_little_work(with_store, monkeypatch):
    monkeypatch.setattr(encode, "find_rates", lambda d_in: pytest.fail("measured"))
    assert isinstance(encoder_of(with_store, save_sparse_sae(with_store)), BlockEncoder)
