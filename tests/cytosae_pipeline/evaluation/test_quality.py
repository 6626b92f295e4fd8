"""What `evaluate` measures beside the reconstruction: stability, probes and monosemanticity, against plain formulas."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import cytosae_pipeline
from cytosae.formats.checkpoint import load, save_sae
from cytosae.sae.registry import make_sae
from cytosae.statistics.monosemanticity import monosemanticity_by_pairs
from cytosae_cache.creation import create_store
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import EvaluateConfig, EvaluateOptions
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.evaluation import pairing, probing
from cytosae_pipeline.evaluation.evaluate import evaluate_pair, run_evaluate
from cytosae_pipeline.evaluation.image_scores import ImageScores
from cytosae_pipeline.evaluation.pairing import pair_by_activation
from cytosae_pipeline.statistics.inputs import Inputs
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_spec, make_store, make_table


def planted(folder, n=60, patients=("p", "q", "r", "s", "t"), labels=("a", "b", "c")):
    """Images whose label is a direction, and an autoencoder whose first latents are these directions."""
    random = np.random.default_rng(0)
    activations = 0.05 * random.normal(size=(n, 5, 16))
    for row in range(n):
        activations[row, :, row % len(labels)] += 2
    store = make_store(
        folder / "planted.zarr", activations.astype(np.float16), spec=make_spec(16), invalid=(3,),
        table=make_table(n, labels, patients),
    )  # fmt: skip
    return store, planted_sae()


def planted_sae(seed=0, order=None):
    sae = make_sae("relu", 16, 24, seed=seed)
    order = np.arange(24) if order is None else order
    generator = torch.Generator().manual_seed(5)
    rows = torch.cat([torch.eye(16), torch.randn(8, 16, generator=generator)])
    rows = torch.nn.functional.normalize(rows, dim=1)[torch.from_numpy(order)]
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.fill_(-0.02)
        sae.b_dec.zero_()
    return sae


def scores_of(sae, store, rows, tokens=slice(None)):
    with torch.no_grad():
        acts = sae.encode(torch.from_numpy(store[rows]).float()[:, tokens])
    return acts.double().mean(dim=1).numpy()


def evaluate(sae, store, **options):
    return evaluate_pair(Inputs(store, sae), EvaluateOptions(**options))


def dense_share(similarity, above, n_live):
    kept = np.where(similarity > above, similarity, 0)
    rows, columns = linear_sum_assignment(kept, maximize=True)
    return (kept[rows, columns] > 0).sum() / n_live


# --- stability


@pytest.mark.parametrize("bytes_at_once", [2 << 30, 1])
@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_stability_is_the_hungarian_method_on_dense_matrices(tmp_path, monkeypatch, bytes_at_once, tokens):
    monkeypatch.setattr(pairing, "_MOST_BYTES", bytes_at_once)
    store = make_store(tmp_path / "s.zarr", make_activations(40, make_spec(8)), spec=make_spec(8), invalid=(3,))
    sae, other = make_sae("topk", 8, 32, k=3, seed=1), make_sae("topk", 8, 24, k=3, seed=2)
    with torch.no_grad():
        other.W_dec[:10], other.W_enc[:, :10] = sae.W_dec[5:15], sae.W_enc[:, 5:15]
    save_sae(tmp_path / "o.pt", other, {})
    options = {"tokens": tokens, "match_above": 0.5, "other_sae_path": tmp_path / "o.pt"}
    (found,) = evaluate(sae, store, **options).stability
    kept = slice(1, None) if tokens == "patches" else slice(None)
    one, two = (scores_of(each, store, store.valid_rows, kept) for each in (sae, other))
    live, live_other = (one > 0).any(axis=0), (two > 0).any(axis=0)
    assert (found.n_live, found.n_live_other, found.n_images) == (live.sum(), live_other.sum(), 39)
    correlation = np.nan_to_num(np.corrcoef(one[:, live], two[:, live_other], rowvar=False))
    correlation = correlation[: live.sum(), live.sum() :]
    assert found.activation_share == pytest.approx(dense_share(correlation, 0.5, live.sum()))
    first, second = (each.W_dec.detach().double().numpy() for each in (sae, other))
    first, second = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second))
    assert found.decoder_share == pytest.approx(dense_share((first @ second.T)[live][:, live_other], 0.5, live.sum()))
    assert found.activation_share > 0
    text = evaluate(sae, store, **options).describe()
    assert f"of {live.sum():,} live latents ({live_other.sum():,} in the other), one to one" in text
    assert "with a decoder cosine above 0.5" in text


def test_planted_latents_in_another_order_are_all_found(tmp_path):
    store, sae = planted(tmp_path)
    order = np.random.default_rng(1).permutation(24)
    save_sae(tmp_path / "o.pt", planted_sae(order=order), {})
    other = Inputs(store, load(tmp_path / "o.pt"))
    pairs = pair_by_activation(
        *(ImageScores(one, store.valid_rows, "all") for one in (Inputs(store, sae), other)), above=0.7, what="test"
    )
    np.testing.assert_array_equal(order[pairs.partner], np.arange(24))
    np.testing.assert_allclose(pairs.correlation, 1, atol=1e-6)
    np.testing.assert_array_equal(pairs.first_best.latent, pairs.partner)
    np.testing.assert_array_equal(pairs.second_best.latent, order)
    (found,) = evaluate(sae, store, other_sae_path=[tmp_path / "o.pt"]).stability
    assert (found.decoder_share, found.activation_share) == (1, 1)


def test_latents_that_are_dead_here_do_not_count(tmp_path):
    store, sae = planted(tmp_path)
    with torch.no_grad():
        sae.b_enc[4:] = -100
    save_sae(tmp_path / "o.pt", planted_sae(), {})
    (found,) = evaluate(sae, store, other_sae_path=tmp_path / "o.pt").stability
    assert (found.n_live, found.n_live_other, found.decoder_share) == (4, 24, 1)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    found = evaluate(sae, store, other_sae_path=tmp_path / "o.pt")
    assert (found.stability[0].decoder_share, found.stability[0].activation_share) == (None, None)
    assert "no latent is active on these images" in found.describe()


def test_the_same_autoencoder_and_another_width_are_refused(tmp_path):
    store, sae = planted(tmp_path)
    save_sae(tmp_path / "o.pt", sae, {})
    with pytest.raises(UserError, match=r"o.pt' is the same autoencoder as .*: give one of another seed"):
        evaluate(sae, store, other_sae_path=tmp_path / "o.pt")
    save_sae(tmp_path / "w.pt", make_sae("relu", 3, 6), {})
    with pytest.raises(ValueError, match="takes activations of width 3"):
        evaluate(sae, store, other_sae_path=tmp_path / "w.pt")


@pytest.mark.parametrize("where", ["activations", "decoder"])
def test_more_pairs_than_fit_into_memory_are_refused(tmp_path, monkeypatch, where):
    store, sae = planted(tmp_path)
    other = planted_sae()
    with torch.no_grad():
        (sae.W_enc if where == "activations" else sae.W_dec).fill_(0.25)
        (other.W_enc if where == "activations" else other.W_dec).fill_(0.25)
    save_sae(tmp_path / "o.pt", other, {})
    with torch.no_grad():
        sae.b_dec += 0.001  # another one by its tensors
    monkeypatch.setattr("cytosae.analysis.matching.MOST_PAIRS", 100)
    with pytest.raises(UserError, match="pairs of latents are above 0.7: .* Give a --match_above nearer to 1"):
        evaluate(sae, store, other_sae_path=tmp_path / "o.pt")


def test_names_of_runs_are_resolved_and_python_gives_the_same(with_store):
    for run, seed in (("one", 1), ("two", 2)):
        with_store.train("--run_name", run, "--seed", seed, "--arch", "topk", "--k", 4)
    arguments = ["--dataset_name", "toy", "--sae_path", "one", "--other_sae_path", "two", "--monosemanticity"]
    arguments += ["--probe", "--probe_images", 20, "--match_above", 0.3]
    found = json.loads(with_store.run("evaluate", *arguments, "--json").stdout)
    made = cytosae_pipeline.evaluate_sae(
        with_store.sae("one"), with_store.store, other_sae_path=[with_store.sae("two")], monosemanticity=True,
        probe=True, probe_images=20, match_above=0.3,
    )  # fmt: skip
    assert found == json.loads(json.dumps(made.to_json(), default=str))
    assert found["stability"][0]["other"] == str(with_store.sae("two"))
    assert len(found["monosemanticity"]["scores"]) == found["n_latents"]
    text = with_store.run("evaluate", *arguments).output
    assert "mean token" in text
    assert "monosemanticity: median" in text
    two = run_evaluate(
        EvaluateConfig(root_dir=with_store.root, dataset_name="toy", sae_path="one", other_sae_path=["two", "two"])
    )
    assert len(two.stability) == 2
    assert two.probe is None


def test_rare_latents_are_said(tmp_path, messages):
    store, sae = planted(tmp_path)
    save_sae(tmp_path / "o.pt", planted_sae(order=np.arange(24)[::-1].copy()), {})
    (found,) = evaluate(sae, store, other_sae_path=tmp_path / "o.pt", limit=4).stability
    assert found.n_rare == found.n_live
    assert (
        f"{found.n_rare} of {found.n_live} live latents are active on fewer than 5 of 4 images: many of their "
        "correlations are high by chance. Use more images, such as with --held_out 0"
    ) in messages()
    evaluate(sae, store, other_sae_path=tmp_path / "o.pt")
    assert "by chance" not in messages()


# --- monosemanticity


@pytest.mark.parametrize("n_cls", [1, 0])
def test_monosemanticity_is_the_loop_over_pairs(tmp_path, n_cls):
    spec = make_spec(8)
    if not n_cls:
        from cytosae_cache.format.spec import TokenLayout

        spec = make_spec(8, tokens=TokenLayout(0, 0, (2, 2)))
    store = make_store(tmp_path / "s.zarr", make_activations(14, spec), spec=spec, invalid=(3,))
    sae = make_sae("topk", 8, 16, k=2)
    found = evaluate(sae, store, monosemanticity=True, limit=9).monosemanticity
    rows = store.valid_rows[[0, 2, 3, 5, 6, 7, 9, 10, 12]]
    tokens = torch.from_numpy(store[rows]).double()
    vectors = tokens[:, 0] if n_cls else tokens.mean(dim=1)
    scores = torch.from_numpy(scores_of(sae, store, rows))
    expected = monosemanticity_by_pairs(vectors, scores)
    several = ((scores > scores.amin(dim=0)).sum(dim=0) > 1).numpy()
    assert [value is not None for value in found.scores] == several.tolist()
    values = np.array([value for value in found.scores if value is not None])
    np.testing.assert_allclose(values, expected.scores[several], rtol=1e-5)
    assert found.median == pytest.approx(np.median(values))
    assert found.any_pair == pytest.approx(expected.any_pair, rel=1e-6)
    assert (found.n_latents, found.embedding) == (several.sum(), "cls" if n_cls else "mean")


def test_planted_latents_are_monosemantic(tmp_path):
    store, sae = planted(tmp_path)
    found = evaluate(sae, store, monosemanticity=True)
    scores = found.monosemanticity.scores
    assert min(scores[:3]) > 0.95
    assert found.monosemanticity.any_pair < 0.5
    assert "monosemanticity: median" in found.describe()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    dead = evaluate(sae, store, monosemanticity=True)
    assert dead.monosemanticity.median is None
    assert "no latent is active on two of these images" in dead.describe()
    assert evaluate(sae, store, monosemanticity=True, limit=1).monosemanticity.any_pair is None


# --- probes


def test_planted_labels_are_predicted_from_planted_latents(tmp_path):
    store, sae = planted(tmp_path)
    found = evaluate(sae, store, probe=True, limit=2).probe
    assert list(found.by_k) == [1, 2, 5, 20]
    assert found.by_k[2].balanced_accuracy == found.by_k[5].accuracy == found.mean_token.balanced_accuracy == 1
    assert found.by_k[1].mean_one_vs_rest == 1
    assert found.by_k[1].one_vs_rest == {"a": 1, "b": 1, "c": 1}
    assert found.by_k[1].balanced_accuracy < 1
    assert (found.n_images, found.n_persons, found.unit, found.n_folds) == (59, 5, "patient", 5)
    assert found.chance == pytest.approx(1 / 3)
    text = found.describe()
    assert "probes of 3 labels on 59 images of 5 patients, 5 folds (guessing: 0.333)" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["1", "2", "5", "20", "mean"]
    small = evaluate(sae, store, probe=True, probe_images=30).probe
    assert small.n_images == 30


def test_no_person_is_on_both_sides(tmp_path, monkeypatch):
    store, sae = planted(tmp_path)
    seen = []
    real = probing.probe_folds

    def record(features, labels, folds, columns=None):
        seen.append(folds)
        return real(features, labels, folds, columns)

    monkeypatch.setattr(probing, "probe_folds", record)
    (tmp_path / "c.csv").write_text("patient,person\np,x\nq,x\nr,y\ns,z\nt,z\n")
    for options, column in (
        ({}, dict.fromkeys("pqrst")),
        ({"covariates": tmp_path / "c.csv", "subject_column": "person"}, dict(zip("pqrst", "xxyzz", strict=True))),
    ):
        found = evaluate(sae, store, probe=True, **options).probe
        persons = [column[patient] or patient for patient in np.array(store.images.patient)[store.valid]]
        folds = {person: set() for person in persons}
        for person, fold in zip(persons, seen[-1].tolist(), strict=True):
            folds[person].add(fold)
        assert all(len(one) == 1 for one in folds.values())
        assert found.n_persons == len(folds)
    assert found.unit == "subject"


def test_a_label_of_one_person_is_left_out_and_said(tmp_path, messages):
    table = make_table(60)._replace(
        label=["rare" if row == 7 else "ab"[row % 2] for row in range(60)],
        patient=["solo" if row == 7 else "pqrs"[row % 4] for row in range(60)],
    )
    store = create_store(tmp_path / "s.zarr", make_spec(8), table, PROVENANCE, shard_images=8)
    fill_store(store, make_activations(60, make_spec(8)))
    store = ActivationStore.open(tmp_path / "s.zarr")
    found = evaluate(make_sae("relu", 8, 16), store, probe=True)
    assert found.probe.left_out == ["rare"]
    assert "1 label has images of fewer than two persons and cannot be tested: 'rare'" in messages()
    assert list(found.probe.by_k) == [1, 2, 5], "no more latents than there are"


@pytest.mark.parametrize(
    ("labels", "patients", "message"),
    [
        (("",), ("p", "q"), "have: no label. Build it from a CSV with columns label and patient"),
        (("a",), ("p", "q"), "two labels with images of two persons each, but 12 images .* have: 'a' of 2 persons"),
        (("a", "b"), ("p",), "have: 'a' of 1 person, 'b' of 1 person"),
        (("a", "b", "a", "c"), ("p", "q", "p", "r"), "have: 'a' of 1 person, 'b' of 1 person, 'c' of 1 person"),
    ],
)
def test_labels_that_cannot_be_tested_are_refused(tmp_path, labels, patients, message):
    store = make_store(tmp_path / "s.zarr", make_activations(12), table=make_table(12, labels, patients))
    with pytest.raises(UserError, match=message):
        evaluate(make_sae("relu", 8, 16), store, probe=True)


def test_persons_that_cannot_be_split_are_refused(tmp_path, monkeypatch):
    store, sae = planted(tmp_path)
    monkeypatch.setattr(probing, "_TRIES", 0)
    with pytest.raises(UserError, match="cannot be split so that every training part has all labels"):
        evaluate(sae, store, probe=True)


def test_images_without_patients_are_units_and_copies_stay_together(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(20), table=make_table(20, patients=("",)))
    found = evaluate(make_sae("relu", 8, 16), store, probe=True).probe
    assert (found.unit, found.n_persons) == ("image", 20)


@pytest.mark.parametrize("name", ["covariates", "subject_column"])
def test_what_is_said_about_persons_needs_the_probe(name):
    with pytest.raises(UserError, match=f"{name} says which images the probe must not learn from: give it with"):
        EvaluateOptions(**{name: "x"})


def test_scores_do_not_depend_on_the_batch_and_can_be_asked_for_again(tmp_path, monkeypatch):
    store, sae = planted(tmp_path)
    scores = ImageScores(Inputs(store, sae), store.valid_rows, "patches")
    first, again = (torch.cat([images.scores for images in scores]) for _ in range(2))
    assert torch.equal(first, again)
    monkeypatch.setattr("cytosae_pipeline.evaluation.image_scores.rows_at_once", lambda config, n: 8)
    small = ImageScores(Inputs(store, sae), store.valid_rows, "patches")
    parts = [images.scores for images in small]
    assert len(parts) == 8
    assert torch.equal(torch.cat(parts), first)
    expected = scores_of(sae, store, store.valid_rows, slice(1, None))
    np.testing.assert_allclose(first, expected, atol=1e-5)


@pytest.mark.parametrize("what", ["stability", "monosemanticity", "probe"])
def test_no_array_has_images_and_latents_as_axes(tmp_path, monkeypatch, what):
    """Every float array that is made is smaller than images x latents, whatever function of torch or numpy makes it."""
    n, n_latents = 600, 2000
    table = make_table(n, patients=[f"p{number}" for number in range(12)])
    store = make_store(tmp_path / "s.zarr", make_activations(n), table=table, shard_images=64)
    sae, other = (make_sae("relu", 8, n_latents, seed=seed) for seed in (1, 2))
    save_sae(tmp_path / "o.pt", other, {})
    with torch.no_grad():
        for one in (sae, other):
            one.b_enc[50:] = -100  # few live latents: correlations have latents x latents entries
    save_sae(tmp_path / "o.pt", other, {})
    largest = [0]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and n in made.shape and n_latents in made.shape:
                largest[0] = max(largest[0], made.numel())
            return made

    real = np.empty

    def empty(shape, *args, **kwargs):
        made = real(shape, *args, **kwargs)
        if n in made.shape and n_latents in made.shape:
            largest[0] = max(largest[0], made.size)
        return made

    monkeypatch.setattr(np, "empty", empty)
    with Watch():
        options = {"stability": {"other_sae_path": tmp_path / "o.pt"}}.get(what, {what: True})
        evaluate(sae, store, **options)
    assert largest[0] == 0
