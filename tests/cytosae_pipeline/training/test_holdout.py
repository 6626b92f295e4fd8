"""Images held out by a hash: the share, what stays together, and that nothing else decides."""

import dataclasses
import itertools

import numpy as np
import pytest

import cytosae_cache
from cytosae_cache.errors import StoreError
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.halves import split_in_halves
from cytosae_pipeline.training.holdout import held_out, is_trained_on, trained_unit
from tests.support.stores import PROVENANCE, make_activations, make_store, make_table


def named(dataset):
    return dataclasses.replace(PROVENANCE, dataset=dataset, list_digest=dataset[0] * 64)


def make(folder, n, **options):
    return make_store(folder, make_activations(n), **options)


def test_the_share_is_about_as_asked_and_grows_without_moving_anyone_back(tmp_path):
    store = make(tmp_path / "s.zarr", 256)
    masks = [held_out(store, share, "image") for share in (0.0, 0.05, 0.3, 0.9)]
    for mask, share in zip(masks, (0.0, 0.05, 0.3, 0.9), strict=True):
        assert mask.mean() == pytest.approx(share, abs=0.07)
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    assert not masks[0].any()


def test_equal_pictures_are_on_the_same_side_in_any_store(tmp_path):
    # The pictures of these stores repeat after 256 rows.
    first, second = make(tmp_path / "a.zarr", 600), make(tmp_path / "b.zarr", 300)
    mask = held_out(first, 0.5, "image")
    assert 0 < mask[:256].sum() < 256
    assert (mask[256:512] == mask[:256]).all()
    assert (held_out(second, 0.5, "image") == mask[:300]).all()


def test_patients_stay_whole(tmp_path):
    patients = [f"p{number % 30}" if number % 31 else "" for number in range(300)]
    store = make(tmp_path / "s.zarr", 300, table=make_table(300, patients=patients))
    mask = held_out(store, 0.4, "patient")
    sides = {}
    for patient, side in zip(patients, mask.tolist(), strict=True):
        sides.setdefault(patient, set()).add(side)
    assert all(len(found) == 1 for patient, found in sides.items() if patient)
    assert {side for patient, found in sides.items() if patient for side in found} == {True, False}


def test_a_store_without_patients_is_explained(tmp_path):
    store = make(tmp_path / "s.zarr", 4, table=make_table(4, patients=[""]))
    with pytest.raises(UserError, match="--held_out_by patient was given, but store .* has no patients"):
        held_out(store, 0.5, "patient")


def test_the_two_sides_are_all_valid_images(tmp_path):
    store = make(tmp_path / "s.zarr", 50, invalid=[3, 7])
    mask = held_out(store, 0.5, "image")
    with StoreReader(store) as reader:
        kept, apart = ConcatReader([reader], [~mask]), ConcatReader([reader], [mask])
    assert sorted([*kept.rows, *apart.rows]) == store.valid_rows.tolist()
    assert len(kept) == kept.layout.store_bounds[-1] == kept.layout.shard_bounds[-1]


def test_nothing_left_to_train_on_is_explained(tmp_path):
    store = make(tmp_path / "s.zarr", 3)
    with StoreReader(store) as reader, pytest.raises(StoreError, match="is left to serve: use a smaller --held_out"):
        ConcatReader([reader], [np.zeros(3, dtype=bool)])


def test_halves_keep_groups_whole_and_labels_balanced():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, size=500, p=[0.7, 0.2, 0.08, 0.02])
    groups = rng.integers(0, 60, size=500)
    training = split_in_halves(groups, labels, seed=0)
    for group in range(60):
        assert len(set(training[groups == group])) == 1
    for label in range(4):
        assert 0.4 <= training[labels == label].mean() <= 0.6
    assert (training == split_in_halves(groups, labels, seed=0)).all()
    assert (training != split_in_halves(groups, labels, seed=1)).any()


def test_images_of_no_group_are_split_exactly():
    labels = np.random.default_rng(0).choice(5, size=101)
    for seed in range(5):
        training = split_in_halves(np.arange(101), labels, seed=seed)
        for label in range(5):
            n = (labels == label).sum()
            assert training[labels == label].sum() == -(-n // 2)
    assert split_in_halves(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), seed=0).shape == (0,)


def test_two_patients_of_a_class_are_on_two_sides():
    groups = np.repeat([0, 1, 2, 3], [9, 5, 4, 8])
    labels = np.repeat([0, 0, 1, 1], [9, 5, 4, 8])
    for seed in range(5):
        training = split_in_halves(groups, labels, seed=seed)
        assert training[groups == 0][0] != training[groups == 1][0]
        assert training[groups == 2][0] != training[groups == 3][0]


def test_subjects_stay_whole_with_all_their_patients(with_images):
    files = sorted(path for path in with_images.images.rglob("*.png") if "broken" not in path.name)
    lines = ["path,label,patient,Subject"]
    persons = []
    for at, path in enumerate(files):
        patient = at % 6
        persons.append(f"person{patient // 2}" if patient < 4 else f"patient {patient}")
        lines.append(f"{path.relative_to(with_images.root)},x,p{patient},{persons[-1] if patient < 4 else 'NA'}")
    (with_images.root / "m.csv").write_text("\n".join(lines) + "\n")
    with_images.build("--images", with_images.root / "m.csv")
    store = cytosae_cache.open(with_images.store)
    seen = set()
    for share in (0.2, 0.5, 0.8):
        mask = held_out(store, share, "subject")
        sides = {person: set(mask[np.array(persons) == person].tolist()) for person in persons}
        assert all(len(side) == 1 for side in sides.values())
        seen |= {(person, *side) for person, side in sides.items()}
    assert len(seen) > len(set(persons)), "some are held out, some not"
    output = with_images.run(
        "train", "--dataset_name", "toy", "--held_out", 0.5, "--held_out_by", "subject", "--run_name", "s",
        "--total_training_tokens", 32, "--expansion_factor", 2,
    ).output  # fmt: skip
    assert "wrote" in output
    output = with_images.run("evaluate", "--dataset_name", "toy", "--sae_path", "s").output
    assert "held out (0.5 by subject)" in output


def test_a_store_without_subjects_is_explained(tmp_path):
    store = make(tmp_path / "s.zarr", 4)
    with pytest.raises(
        UserError, match="--held_out_by subject was given, .* has no subjects. Give --held_out_by patient"
    ):
        held_out(store, 0.5, "subject")
    nobody = make(tmp_path / "n.zarr", 4, table=make_table(4, patients=[""]))
    with pytest.raises(UserError, match="has no subjects. Give --held_out_by image"):
        held_out(nobody, 0.5, "subject")


def test_an_autoencoder_knows_the_stores_that_it_was_trained_on_alone_and_joined(tmp_path):
    north, south, west = (
        make(tmp_path / f"{name}.zarr", 3, table=make_table(3, patients=(name,)), provenance=named(name))
        for name in ("north", "south", "west")
    )
    cfg = {"list_digest": north.provenance.list_digest, "with_list_digest": [south.provenance.list_digest]}
    assert is_trained_on(cfg, north)
    assert is_trained_on(cfg, south)
    assert not is_trained_on(cfg, west)
    assert is_trained_on(cfg, cytosae_cache.join_stores([west, south]))
    assert is_trained_on({"list_digest": north.provenance.list_digest}, north)
    assert not is_trained_on({}, north)


@pytest.mark.parametrize(
    ("said", "unit"),
    [("image", "image"), ("patient", "patient"), ("subject", "subject"), (None, "image"), ([], "image")],
)
def test_what_training_held_out_is_read_from_the_file(said, unit):
    assert trained_unit({"held_out_by": said}) == unit
    assert trained_unit({}) == "image"


def test_images_of_a_joined_store_without_patients_count_by_themselves(tmp_path):
    north = make(tmp_path / "n.zarr", 40, table=make_table(40, patients=("p", "q", "r")), provenance=named("north"))
    south = make(tmp_path / "s.zarr", 30, table=make_table(30, patients=("",)), provenance=named("south"))
    found = held_out(cytosae_cache.join_stores([north, south]), 0.5, "patient")
    assert found.tolist() == [*held_out(north, 0.5, "patient"), *held_out(south, 0.5, "image")]
    west = make(tmp_path / "w.zarr", 3, table=make_table(3, patients=("",)), provenance=named("west"))
    with pytest.raises(
        UserError, match=r"but store '.*s\.zarr \+ .*w\.zarr' has no patients\. Give --held_out_by image"
    ):
        held_out(cytosae_cache.join_stores([south, west]), 0.5, "patient")
