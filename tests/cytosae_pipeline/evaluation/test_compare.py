"""`compare`: planted latents of two seeds and of two encoders, tables, names, and image sets that differ."""

import csv
import json

import numpy as np
import pytest
import torch

import cytosae_pipeline
from cytosae.formats.checkpoint import load, save_sae
from cytosae.sae.registry import make_sae
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import CompareConfig, CompareOptions
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation.common_images import find_common
from cytosae_pipeline.evaluation.compare import FILES, HEADER, run_compare
from cytosae_pipeline.evaluation.comparison import compare_pair
from cytosae_pipeline.statistics.inputs import Inputs
from tests.support.stores import make_activations, make_spec, make_store, make_table


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def two(with_store):
    """A store and two seeds."""
    for run, seed in (("one", 1), ("two", 2)):
        with_store.train("--run_name", run, "--seed", seed, "--arch", "topk", "--k", 6)
    return with_store


def other_encoder(folder, n=40, width=12, rows=None, invalid=(), spec=None):
    """A store of the images of `make_activations(n)` by an encoder whose channels are a rotation of the first's."""
    spec = spec or make_spec(width, model_name="other_vit", weights_sha256="cd" * 32)
    random = np.random.default_rng(8)
    turn = np.linalg.qr(random.normal(size=(width, width)))[0][:8]
    values = make_activations(n).astype(np.float32) @ turn.astype(np.float32)
    table, rows = make_table(n), np.arange(n) if rows is None else np.asarray(rows)
    store = make_store(
        folder / "other.zarr", values[rows].astype(np.float16), spec=spec, table=table.take(rows), invalid=invalid
    )
    return store, torch.from_numpy(turn.astype(np.float32))


def rotated(sae, turn, order):
    """The same latents for the other encoder, in another order, and two that are its own."""
    other = make_sae("relu", turn.shape[1], len(order) + 2, seed=9)
    with torch.no_grad():
        other.W_enc[:, :-2], other.b_enc[:-2] = (turn.T @ sae.W_enc)[:, order], sae.b_enc[order]
        other.W_dec[:-2], other.b_dec[:] = (sae.W_dec @ turn)[order], sae.b_dec @ turn
    return other


def test_it_writes_tables_and_equals_python(two):
    arguments = ["--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "two", "--match_above", 0.2]
    found = json.loads(two.run("compare", *arguments, "--json").stdout)
    made = cytosae_pipeline.compare(two.sae("one"), two.store, two.sae("two"), match_above=0.2)
    assert found["comparison"] == json.loads(json.dumps(made.to_json()))
    folder = two.features("one") / "compare_two"
    assert found["folder"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "compare.json"])
    tables = {name: read(folder / name) for name in FILES}
    assert all(list(table[0]) == list(HEADER) for table in tables.values() if table)
    assert [int(row["latent"]) for row in tables["latents.csv"]] == [one.latent for one in made.latents]
    assert tables["only_first.csv"] == [row for row in tables["latents.csv"] if not row["partner"]]
    assert [int(row["latent"]) for row in tables["only_second.csv"]] == [one.latent for one in made.only_second]
    assert 0 < made.n_matched == made.n_live - len(made.only_first) == made.n_live_other - len(made.only_second)
    text = two.run("compare", *arguments).output
    assert f"{made.n_matched} pairs of latents, one to one, with a correlation above 0.2 over 22 images" in text
    assert f"by decoder cosine above 0.2: {made.n_decoder_matched} pairs" in text
    assert f"only in A: {len(made.only_first)}; only in B: {len(made.only_second)}" in text


def test_correlations_and_cosines_are_those_of_numpy(two):
    made = cytosae_pipeline.compare(two.sae("one"), two.store, two.sae("two"), match_above=0.3)
    store, saes = ActivationStore(two.store), [load(two.sae(run)) for run in ("one", "two")]
    with torch.no_grad():
        x = torch.from_numpy(store[store.valid_rows]).float()
        first, second = (sae.encode(x).double().mean(dim=1).numpy() for sae in saes)
    with np.errstate(invalid="ignore"):
        n = first.shape[1]
        whole = np.nan_to_num(np.corrcoef(first, second, rowvar=False)[:n, n:])
    decoders = [sae.W_dec.detach().double().numpy() for sae in saes]
    cosine = decoders[0] @ decoders[1].T
    assert [one.latent for one in made.latents] == np.flatnonzero((first > 0).any(axis=0)).tolist()
    for one in made.latents:
        assert one.best_correlation == pytest.approx(whole[one.latent].max(), abs=1e-5)
        assert one.sparsity == pytest.approx((first[:, one.latent] > 0).mean())
        if one.partner is not None:
            assert one.correlation == pytest.approx(whole[one.latent, one.partner], abs=1e-5)
            assert one.correlation > 0.3
        nearest = one.best if one.partner is None else one.partner
        assert one.decoder_cosine == pytest.approx(cosine[one.latent, nearest], abs=1e-5)
    for one in made.other_latents:
        assert one.best_correlation == pytest.approx(whole[:, one.latent].max(), abs=1e-5)


def test_two_encoders_with_the_same_latents(tmp_path):
    store, sae = make_store(tmp_path / "s.zarr", make_activations(40), spec=make_spec(8)), make_sae("relu", 8, 16)
    other, turn = other_encoder(tmp_path)
    order = np.random.default_rng(3).permutation(16)
    theirs = rotated(sae, turn, order)
    found = compare_pair(Inputs(store, sae), Inputs(other, theirs), CompareOptions())
    assert not found.same_encoder
    assert found.n_decoder_matched is None
    assert [int(order[one.partner]) for one in found.latents if one.partner is not None] == [
        one.latent for one in found.latents
    ]
    assert min(one.correlation for one in found.latents) > 0.99
    assert {one.decoder_cosine for one in found.latents} == {None}
    assert {one.latent for one in found.only_second} == {16, 17}
    assert "by decoder cosine" not in found.describe()


def test_two_stores_on_the_command_line(tmp_path):
    store, sae = make_store(tmp_path / "s.zarr", make_activations(40), spec=make_spec(8)), make_sae("relu", 8, 16)
    other, turn = other_encoder(tmp_path, rows=range(30))
    save_sae(tmp_path / "a.pt", sae, {})
    save_sae(tmp_path / "b.pt", rotated(sae, turn, np.arange(16)), {})
    config = {
        "root_dir": tmp_path, "store": str(store.path), "sae_path": tmp_path / "a.pt",
        "other_store": str(other.path), "other_sae_path": tmp_path / "b.pt", "out": tmp_path / "tables",
    }  # fmt: skip
    with pytest.raises(UserError, match="has 40 readable images and .* 30: 30 in common, by path. Give --common_im"):
        run_compare(CompareConfig(**config))
    found = run_compare(CompareConfig(**config, common_images=True))
    assert found.comparison.n_images == 30
    assert found.folder == tmp_path / "tables"
    made = cytosae_pipeline.compare(
        sae, store, tmp_path / "b.pt", other.path, common_images=True, limit=5, tokens="patches"
    )
    assert made.n_images == 5
    with pytest.raises(UserError, match=r"takes activations of width 12, store .* has width 8: name the store of its "):
        run_compare(CompareConfig(**{**config, "other_store": None}))


def test_nothing_of_a_patient_or_a_path_of_an_image_is_written(two):
    result = two.run("compare", "--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "two", "--json")
    folder = two.features("one") / "compare_two"
    store = ActivationStore(two.store)
    text = result.stdout.replace(str(two.root), "") + "".join(path.read_text() for path in folder.iterdir())
    for path in store.images.path:
        assert path not in text
    assert not any(f'"{patient}"' in text or f",{patient}," in text for patient in set(store.images.patient))


def test_names_of_latents_are_shown(two):
    two.run("features", "--dataset_name", "toy", "--sae_path", "one")
    made = cytosae_pipeline.compare(two.sae("one"), two.store, two.sae("two"), match_above=0.2)
    chosen = max((one for one in made.latents if one.correlation), key=lambda one: one.correlation)
    note = {"format": 1, "notes": {str(chosen.latent): {"name": "nu\x1bclei", "note": ""}}}
    (two.features("one") / "latent_notes.json").write_text(json.dumps(note))
    other = two.features("two")
    other.mkdir(parents=True)
    (other / "latent_notes.json").write_text(
        json.dumps({"format": 1, "notes": {str(chosen.partner): {"name": "rims", "note": ""}}})
    )
    arguments = ["--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "two", "--match_above", 0.2]
    text = two.run("compare", *arguments).output
    assert f"{chosen.latent} nu\\x1bclei" in text
    assert f"{chosen.partner} rims" in text
    rows = {row["latent"]: row for row in read(two.features("one") / "compare_two" / "latents.csv")}
    assert rows[str(chosen.latent)]["name"] == "nu\x1bclei"
    assert rows[str(chosen.latent)]["partner_name"] == "rims"
    note["about"] = {"sae_sha256": "0" * 64}
    (two.features("one") / "latent_notes.json").write_text(json.dumps(note))
    assert "were written about another autoencoder" in two.run("compare", *arguments, code=1).output
    two.run("compare", *arguments, "--keep_notes")


def test_tables_of_another_program_are_not_replaced(two):
    folder = two.features("one") / "compare_two"
    folder.mkdir(parents=True)
    (folder / FILES[0]).write_text("mine")
    arguments = ["--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "two"]
    two.run("compare", *arguments, code=1)
    assert (folder / FILES[0]).read_text() == "mine"
    two.run("compare", *arguments, "--replace_foreign")
    assert len(read(folder / FILES[0])) > 1
    two.run("compare", *arguments)


def test_what_makes_no_sense_is_refused(two, tmp_path):
    result = two.run("compare", "--dataset_name", "toy", "--sae_path", "one", code=2)
    assert "compare takes two autoencoders: name the other one with --other_sae_path" in result.output
    result = two.run("compare", "--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "one", code=1)
    assert "both are the same autoencoder" in result.output
    store = make_store(tmp_path / "s.zarr", np.ascontiguousarray(make_activations(4)[:, :1]))
    pair = Inputs(store, make_sae("relu", 8, 16))
    with pytest.raises(UserError, match="have no patches tokens: give another value of tokens"):
        compare_pair(pair, Inputs(store, make_sae("relu", 8, 8)), CompareOptions(tokens="patches"))


def test_a_pair_of_dead_autoencoders(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    saes = [make_sae("relu", 8, 16, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        saes[1].b_enc.fill_(-100)
    found = compare_pair(*(Inputs(store, sae) for sae in saes), CompareOptions())
    assert (found.n_live_other, found.n_matched) == (0, 0)
    assert {(one.best, one.best_correlation, one.decoder_cosine) for one in found.latents} == {(-1, None, None)}
    assert "none of 0 of B" in found.describe()


# --- images in common


def test_images_are_matched_by_path_and_picture(tmp_path):
    first = make_store(tmp_path / "a.zarr", make_activations(12), invalid=(2,))
    other, _ = other_encoder(tmp_path, n=12, rows=[0, 1, 2, 4, 5], invalid=())
    # The picture of a row is its number in these stores, so rows 3 and 4 of the other are other pictures.
    with pytest.raises(
        UserError, match=r"11 readable images and '.*' 5: 2 in common, by path \(2 more have the same path but are"
    ):
        find_common(first, other, common_only=False)
    found = find_common(first, other, common_only=True)
    assert (found.first.tolist(), found.second.tolist()) == ([0, 1], [0, 1])
    assert find_common(first, first, common_only=False).second.tolist() == first.valid_rows.tolist()


def test_stores_without_a_common_image_are_refused(tmp_path):
    table = make_table(6)._replace(path=[f"x{row}.png" for row in range(6)])
    first = make_store(tmp_path / "a.zarr", make_activations(6), table=table)
    other, _ = other_encoder(tmp_path, n=6)
    for common_only in (False, True):
        with pytest.raises(UserError, match="0 in common, by path. Two encoders are compared on the same images"):
            find_common(first, other, common_only=common_only)


@pytest.mark.slow
def test_another_seed_finds_the_planted_cells_of_the_demo(demo_run, tmp_path):
    """Latents that stand for one drawn kind of cell have partners more often than the others."""
    (store,) = demo_run.root.glob("out/activations/*/*.zarr")
    (first,) = demo_run.root.glob("out/checkpoints/*/final_*.pt")
    second = cytosae_pipeline.train_sae(
        root_dir=tmp_path, store=str(store), expansion_factor=8, total_training_tokens=8 * 720, batch_size=16,
        l1_coefficient=0.0005, lr=0.001, lr_warm_up_steps=50, use_ghost_grads=True, n_checkpoints=0, precision="fp32",
        seed=7,
    ).sae  # fmt: skip
    found = cytosae_pipeline.compare(first, store, second)
    stats = cytosae_pipeline.feature_stats(first, store)
    entropy = stats.label_entropy
    kinds = {int(latent) for latent in np.flatnonzero((entropy >= 0) & (entropy < 0.1))}
    planted = [one for one in found.latents if one.latent in kinds]
    others = [one for one in found.latents if one.latent not in kinds]
    share, share_of_others = (np.mean([one.partner is not None for one in ones]) for ones in (planted, others))
    assert len(planted) > 20
    assert share > 0.5 > share_of_others
