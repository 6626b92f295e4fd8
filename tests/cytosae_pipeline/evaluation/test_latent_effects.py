"""What a latent changes: the formula, exactly nothing where it is inactive, and where it refuses."""

import numpy as np
import pytest
import torch

import cytosae_pipeline
from cytosae.sae.registry import make_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.tail_file import open_tail
from cytosae_pipeline.evaluation import latent_effects as module
from cytosae_pipeline.statistics.inputs import Inputs

ROWS = (0, 3, 7)


@pytest.fixture
def with_tail(with_images):
    with_images.build("--keep_tail", "--store_dtype", "float32")
    return with_images


@pytest.mark.parametrize("arch", ["relu", "topk"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_it_equals_the_formula(with_tail, arch, factor):
    store, sae = ActivationStore(with_tail.store), make_sae(arch, 24, 48, **({"k": 5} if arch == "topk" else {}))
    x = torch.from_numpy(store[list(ROWS)])
    with torch.no_grad():
        acts = sae.encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
    latents = tuple(acts.sum(dim=(0, 1)).topk(3).indices.tolist())
    found = cytosae_pipeline.latent_effects(sae, store, latents=latents, rows=ROWS, factor=factor)
    tail, meter = open_tail(store), module.make_meter(Inputs(store, sae), None)
    assert (found.after.shape, found.cosine.shape) == ((3, 3, len(found.classes)), (3, 3))
    for at, latent in enumerate(latents):
        with torch.no_grad():
            before, after = tail(x), tail(x + (factor - 1) * acts[:, :, latent, None] * sae.W_dec[latent])
        np.testing.assert_allclose(found.before, meter._probe.logits(before).softmax(dim=1), atol=1e-5)
        np.testing.assert_allclose(found.after[at], meter._probe.logits(after).softmax(dim=1), atol=1e-4)
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1)
        np.testing.assert_allclose(found.cosine[at], cosine, atol=1e-5)
    np.testing.assert_allclose(found.change, (found.after - found.before).mean(axis=1))
    np.testing.assert_allclose(found.after.sum(axis=2), 1)


def test_a_factor_of_one_and_an_inactive_latent_change_nothing(with_tail):
    store, sae = ActivationStore(with_tail.store), make_sae("relu", 24, 48)
    found = cytosae_pipeline.latent_effects(sae, store, latents=0, rows=ROWS, factor=1)
    np.testing.assert_allclose(found.after[0], found.before, atol=1e-6)
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    found = cytosae_pipeline.latent_effects(sae, store, latents=5, rows=ROWS)
    assert np.array_equal(found.after[0], found.before)
    np.testing.assert_allclose(found.cosine, 1)


def test_the_probe_is_trained_on_half_of_the_images(with_tail, monkeypatch):
    store, sae = ActivationStore(with_tail.store), make_sae("relu", 24, 48)
    found = cytosae_pipeline.latent_effects(sae, store, latents=0, rows=ROWS)
    assert 2 * len(found.classes) <= found.n_train < len(store.valid_rows)
    assert found.classes == sorted(set(store.images.label))
    monkeypatch.setattr(module, "PROBE_IMAGES", 8)
    assert cytosae_pipeline.latent_effects(sae, store, latents=0, rows=ROWS).n_train <= 8


def test_what_does_not_exist_is_refused(with_tail, with_store):
    store, sae = ActivationStore(with_tail.store), make_sae("relu", 24, 48)
    for options, message in (
        ({"latents": 48, "rows": 0}, "latents and rows must exist: expected latents 0 to 47"),
        ({"latents": 1, "rows": 10_000}, "expected readable images among the rows 0 to 22"),
        ({"latents": 1, "rows": int(np.flatnonzero(~store.valid)[0])}, "expected readable images"),
        ({"latents": 1}, "name at least one latent and one image: latents=430"),
        ({"latents": 1, "rows": 0, "factor": -1}, "factor must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cytosae_pipeline.latent_effects(sae, store, **options)
    with pytest.raises(ValueError, match="has no tail"):
        cytosae_pipeline.latent_effects(sae, with_store.store, latents=1, rows=0)


def test_a_store_with_one_label_has_no_probe(with_images):
    only = with_images.root / "only" / "blast"
    only.mkdir(parents=True)
    for number, path in enumerate(sorted((with_images.images / "blast").rglob("*.png"))):
        (only / f"{number}.png").write_bytes(path.read_bytes())
    with_images.build("--images", only.parent, "--layout", "class", "--keep_tail")
    with pytest.raises(ValueError, match=r"needs two labels with 2 training images each: 1 label of store .* has"):
        cytosae_pipeline.latent_effects(make_sae("relu", 24, 48), with_images.store, latents=0, rows=0)
