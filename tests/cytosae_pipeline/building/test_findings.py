"""What a build says about its images, from their bytes to the message."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytosae_cache.format.layout import ImageTable
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.findings import Remarks, describe_duplicates, find_duplicates
from cytosae_pipeline.images.decoding import Decoded
from cytosae_pipeline.images.image_list import ImageList, ImageRow
from tests.conftest import Workplace
from tests.support.pictures import write_vit


@pytest.fixture
def place(tmp_path) -> Workplace:
    """A workplace without images."""
    write_vit(tmp_path / "vit.pth")
    return Workplace(tmp_path)


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _noise(seed: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (20, 20)).astype(np.uint8 if top == 256 else np.uint16)


# Duplicates


def test_duplicates_are_the_rows_with_equal_digests():
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (7, 32)).astype(np.uint8)[rng.integers(0, 7, 200)]
    digests[50] = 255
    valid = rng.random(200) > 0.1
    found = find_duplicates(digests, valid)
    groups: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(valid).tolist():
        groups.setdefault(digests[row].tobytes(), []).append(row)
    expected = [group for group in groups.values() if len(group) > 1]
    pairs = list(zip(found.rows, found.picture, strict=True))
    assert pairs == [(row, number) for number, group in enumerate(expected) for row in group]
    assert found.n_pictures == len(expected)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_different_pictures_are_no_duplicates(n):
    digests = np.arange(32 * n, dtype=np.uint8).reshape(n, 32)
    assert find_duplicates(digests, np.ones(n, bool)).rows == []
    assert find_duplicates(np.zeros((n, 32), np.uint8), np.zeros(n, bool)).rows == [], "unreadable images have zeros"


@pytest.mark.parametrize(
    ("labels", "patients", "expected"),
    [
        (["x", "x", "y"], ["", "", ""], "1 picture occurs more than once (2 images)"),
        (
            ["x", "y", "y"], ["", "", ""],
            "1 picture occurs more than once (2 images); 1 of them with several labels, for example 'a' (label 'x') "
            "and 'b' (label 'y')",
        ),
        (
            ["x", "y", "y"], ["p", "q", "q"],
            "1 picture occurs more than once (2 images); 1 of them with several labels, for example 'a' (label 'x') "
            "and 'b' (label 'y'); 1 of them with several patients, for example 'a' (patient 'p') and 'b' (patient 'q')",
        ),
        (["x", "", "y"], ["", "", ""], "1 picture occurs more than once (2 images)"),
    ],
)  # fmt: skip
def test_what_is_said_of_duplicates(labels, patients, expected):
    found = find_duplicates(np.array([[1] * 32, [1] * 32, [2] * 32], np.uint8), np.ones(3, bool))
    assert describe_duplicates(found, ImageTable(["a", "b", "c"], labels, patients)) == expected


def test_a_build_reports_duplicates_with_their_labels(place):
    for name in ("blast/a", "blast/b", "mono/c", "mono/d"):
        _save(place.images / f"{name}.png", _noise(name == "mono/d"))
    output = place.build().output
    assert (
        "1 picture occurs more than once (3 images); 1 of them with several labels, for example 'blast/a.png'" in output
    )
    path = place.store.with_name(f"{place.store.name}.duplicates.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["picture"], row["row"], row["path"], row["label"]) for row in rows] == [
        ("0", "0", "blast/a.png", "blast"), ("0", "1", "blast/b.png", "blast"), ("0", "2", "mono/c.png", "mono"),
    ]  # fmt: skip
    (note,) = json.loads(place.build("--json").stdout)["notes"]
    assert note.endswith(f"All are listed in {path}")
    for name in ("blast/b", "mono/c"):
        (place.images / f"{name}.png").unlink()
    assert "more than once" not in place.build("--overwrite").output
    assert not path.exists()


# Remarks


def test_remarks_are_counted_by_kind():
    images = ImageList(Path(), tuple(ImageRow(path, "", "") for path in "abc"), "flat")
    remarks = Remarks()
    rows = [
        Decoded(0, None, None, "", 0, ("odd: 1",)), Decoded(1, None, None, "", 0, ("odd: 2", "strange: 3")),
        Decoded(2, None, None, "broken"),
    ]  # fmt: skip
    assert list(remarks.watch(rows, images)) == rows
    expected = [
        "2 images with a remark, for example 'a' is odd: 1", "1 image with a remark, for example 'b' is strange: 3",
    ]  # fmt: skip
    assert (remarks.describe(), remarks.skipped) == (expected, {"broken": 1})
    merged = Remarks()
    for start, stop in ((1, 3), (0, 1)):  # of two processes, in any order
        others = Remarks()
        assert list(others.watch(rows[start:stop], images)) == rows[start:stop]
        merged.merge(others)
    assert (merged.describe(), merged.skipped) == (expected, {"broken": 1})


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_build_says_that_pictures_are_nearly_black(place, n_workers):
    for number in range(3):
        _save(place.images / f"AML/{number}.png", _noise(number, 4096))
    output = place.build("--workers", n_workers).output
    assert "3 images with a remark, for example 'AML/0.png' is nearly black: 16-bit values end at 4,0" in output


# Nothing could be read


def test_a_build_in_which_nothing_could_be_read_fails(place):
    (place.images / "AML").mkdir(parents=True)
    for number in range(3):
        (place.images / f"AML/{number}.png").write_bytes(b"" if number else b"<html>404</html>")
    for arguments in ([], ["--json"]):  # also if it is complete already
        output = place.build(*arguments, code=1).output
        assert (
            "no image could be read of 3 images: 2 the file is empty, 1 not a JPEG, PNG, BMP, TIFF, WebP or" in output
        )
        assert "skipped.csv. Repair them, then build again with --overwrite" in output
    _save(place.images / "AML/0.png", _noise(0))
    assert "set aside as unreadable: 2" in place.build("--overwrite").output


@pytest.mark.parametrize(("kind", "ending", "name"), [("WEBP", ".webp", "WebP"), ("JPEG2000", ".jp2", "JPEG 2000")])
def test_new_kinds_are_read_under_their_own_endings(place, kind, ending, name):
    _save(place.images / "AML/a.png", _noise(0))
    for number, path in enumerate([f"b{ending}", f"c{ending.upper()}", "d.jpg"]):
        with (place.images / "AML" / path).open("wb") as file:
            Image.fromarray(_noise(number + 1)).save(file, kind)
    place.build()
    store = ActivationStore.open(place.store)
    assert store.valid.tolist() == [True, True, True, False]
    assert store.column("images/reason")[3] == f"a {name} image under another ending: rename it to {ending}"


# Further columns


def test_columns_of_a_manifest_reach_the_store_and_info(place):
    for name in "abc":
        _save(place.images / f"{name}.png", _noise(ord(name)))
    text = "path,label,x,age,site,slide\na.png,AML,1,61,S1,001\nb.png,AML,2,,S2,002\nc.png,c,3,44.5,,\n"
    (place.images / "manifest.csv").write_text(text)
    place.build()
    columns = ActivationStore.open(place.store).image_columns
    assert {name: column.tolist() for name, column in columns.items() if name != "age"} == {
        "x": [1, 2, 3], "site": ["S1", "S2", ""], "slide": ["001", "002", ""],
    }  # fmt: skip
    np.testing.assert_array_equal(columns["age"], [61, np.nan, 44.5])
    facts = json.loads(place.run("info", "--dataset_name", "toy", "--json").stdout)
    assert facts["image_columns"] == {"x": "int64", "age": "float64", "site": "text", "slide": "text"}
    assert "image_columns: {'x': 'int64'" in place.run("info", "--dataset_name", "toy").output
    place.run("verify", "--dataset_name", "toy")
    (place.images / "manifest.csv").write_text(text.replace("S1", "S9"))
    assert "images, labels, patients or further columns changed" in place.build(code=1).output


def test_a_store_made_without_the_columns_stays_complete(place):
    _save(place.images / "a.png", _noise(0))
    (place.images / "manifest.csv").write_text("path,label\na.png,AML\n")
    place.build()
    (place.images / "manifest.csv").write_text("path,label,site\na.png,AML,S1\n")
    output = place.build().output
    assert "was made without the list's further columns: --overwrite adds them" in output
    assert "already complete" in output
    assert ActivationStore.open(place.store).image_columns == {}
    place.build("--overwrite")
    assert list(ActivationStore.open(place.store).image_columns) == ["site"]
