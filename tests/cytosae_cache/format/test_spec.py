"""The spec identifies a store, and a damaged spec is refused."""

import dataclasses
import json

import pytest

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.spec import Preprocessing, StoreSpec, TokenLayout, canonical_json
from tests.support.stores import make_spec


def test_json_round_trip():
    spec = make_spec()
    assert StoreSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "cd" * 32},
        {"block": 1},
        {"d_model": 16},
        {"tokens": TokenLayout(1, 4, (2, 2))},
        {"preprocessing": Preprocessing(image_size=196)},
        {"preprocessing": Preprocessing(scale=1.0)},
        {"preprocessing": Preprocessing(white_level=4095)},
        {"store_dtype": "float32"},
        {"precision": "bf16"},
        {"model_name": "other"},
    ],
)
def test_every_field_changes_the_hash(change):
    spec = make_spec()
    other = dataclasses.replace(spec, **change)
    assert spec.hash != other.hash
    (difference,) = spec.differences(other)
    assert difference.startswith(next(iter(change)) + ":")


def test_the_hash_is_frozen():
    # Golden: a change here would make every store on users' disks look like another one.
    assert make_spec().hash == "b715f6e1d521"
    assert canonical_json({"b": 1, "a": [1.5, "ä"]}) == '{"a":[1.5,"ä"],"b":1}'.encode()


def test_fields_added_later_are_left_out_while_they_have_the_meaning_of_then():
    old = make_spec().to_json()
    assert "scale" not in old["preprocessing"]
    assert StoreSpec.from_json(old).preprocessing.scale == 1 / 255
    new = dataclasses.replace(make_spec(), preprocessing=Preprocessing(scale=1.0))
    assert new.to_json()["preprocessing"]["scale"] == 1.0
    assert StoreSpec.from_json(new.to_json()) == new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 4}, "block must lie in"),
        ({"d_model": 0}, "must be positive"),
        ({"weights_sha256": "xyz"}, "64 hex digits"),
        ({"store_dtype": "int4"}, "store_dtype must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_fields_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: None,
        lambda spec: [],
        lambda spec: {**spec, "extra": 1},
        lambda spec: {key: value for key, value in spec.items() if key != "block"},
        lambda spec: {**spec, "block": "2"},
        lambda spec: {**spec, "block": True},
        lambda spec: {**spec, "d_model": 1.5},
        lambda spec: {**spec, "tokens": {**spec["tokens"], "grid": [1]}},
        lambda spec: {**spec, "tokens": {**spec["tokens"], "grid": [10**9, 10**9]}},
        lambda spec: {**spec, "tokens": {**spec["tokens"], "n_cls": -1}},
        lambda spec: {**spec, "preprocessing": {**spec["preprocessing"], "mean": ["a", 1, 2]}},
        lambda spec: {**spec, "model_name": 3},
    ],
)
def test_damaged_json_is_refused(damage):
    with pytest.raises(StoreCorruptError, match="spec cannot be read"):
        StoreSpec.from_json(damage(make_spec().to_json()))
