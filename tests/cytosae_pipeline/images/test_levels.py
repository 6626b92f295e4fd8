"""Trees of folders as published data sets have them: read in the one way that makes sense, or with a layout."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.config.layout import parse_layout
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.image_list import DatasetError
from cytosae_pipeline.images.levels import AmbiguousFoldersError, find_ranges, read_levels
from cytosae_pipeline.images.listing import open_dataset
from cytosae_pipeline.images.summary import describe_images


def _make(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "a.png").touch()
    return root


def _read(root: Path, layout: str = "auto") -> dict[str, tuple[str, str]]:
    return {row.path.rpartition("/")[0]: (row.label, row.patient) for row in open_dataset(root, layout).rows}


def _stop(root: Path, layout: str = "auto") -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(root, layout)
    text = str(caught.value)
    assert text.count("\n") < 8
    assert all(line.isprintable() for line in text.split("\n"))
    return text


def _choices(root: Path) -> list[str]:
    """The layouts that a message lists; each of them reads the tree."""
    layouts = [shlex.split(line)[1].rstrip(":") for line in _stop(root).split("\n") if line.startswith("  --layout ")]
    for layout in layouts:
        assert len(open_dataset(root, layout)) > 0
    return layouts


# The language


@pytest.mark.parametrize(
    ("text", "folders", "expected"),
    [
        ("class", ("x", "AML"), ("AML", "")),
        ("patient", ("x", "p"), ("", "p")),
        ("class/patient", ("x", "AML", "p"), ("AML", "p")),
        ("patient/class", ("p", "AML"), ("AML", "p")),
        ("class/patient-in-class", ("AML", "1"), ("AML", "AML/1")),
        ("*/class", ("x", "AML"), ("AML", "")),
        ("class/*", ("AML", "x", "y"), ("AML", "")),
        ("class/*", ("AML",), ("AML", "")),
        ("*/class/patient-in-class/*", ("x", "AML", "1", "s"), ("AML", "AML/1")),
        ("class/*/patient", ("AML", "x", "p"), ("AML", "p")),
        ("*", (), ("", "")),
        ("*", ("x", "y"), ("", "")),
    ],
)
def test_layouts_read_folders(text, folders, expected):
    layout = parse_layout(text)
    assert layout is not None
    assert layout.fits(folders)
    assert layout.read(folders) == expected


@pytest.mark.parametrize(
    ("text", "folders"),
    [("class", ()), ("class/patient", ("AML",)), ("*/class", ("x",)), ("*/class", ("x", "AML", "y")), ("class/*", ())],
)
def test_layouts_that_do_not_fit(text, folders):
    layout = parse_layout(text)
    assert layout is not None
    assert not layout.fits(folders)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("klass", r"layout must be auto, or levels .* found 'klass'. Did you mean 'class'\?"),
        ("class/patients", r"found 'class/patients'. Did you mean 'patient'\?"),
        ("", "layout must be auto"),
        ("class//patient", "layout must be auto"),
        ("/class", "layout must be auto"),
        ("auto/class", "layout must be auto"),
        ("class/class", "may name class once"),
        ("class/patient/patient-in-class", "may name class once, patient once"),
        ("*/" * 8 + "class", "at most 8 levels"),
        ("patient-in-class", "has patients in a class but no level class"),
    ],
)
def test_misspelt_layouts_are_refused_in_python_and_on_the_command_line(text, message):
    with pytest.raises(UserError, match=message):
        BuildConfig(layout=text)


def test_auto_is_no_layout():
    assert parse_layout("auto") is None
    assert BuildConfig().layout == "auto"


# Read without being told


@pytest.mark.parametrize(
    ("folders", "layout", "first"),
    [
        (["AML", "control"], "class", ("AML", "")),
        (["only"], "class", ("only", "")),
        *(([name], "*", ("", "")) for name in ("im", "images", "Dataset", "data", "JPEGImages", "Main Dataset")),
        (["train/images", "test/images"], "*", ("", "")),
        (["bone_marrow_cell_dataset/ABE", "bone_marrow_cell_dataset/BLA"], "*/class", ("ABE", "")),
        (["C-NMC_training_data/fold_0/all", "C-NMC_training_data/fold_1/hem"], "*/*/class", ("all", "")),
        (["human liver/tissue images", "mouse liver/tissue images"], "class/*", ("human liver", "")),
        (["0/patient_1", "1/patient_2"], "class/patient", ("0", "patient_1")),
        (["NPM1/AEC", "control/BXY"], "class/patient", ("NPM1", "AEC")),
        (["AML/sample_1/tiles", "c/sample_2/tiles"], "class/patient/*", ("AML", "sample_1")),
        (["tumor/tumor_001", "normal/normal_002"], "class/patient", ("normal", "normal_002")),
        (["AML/p1", "AML/p2", "control/p3"], "class/patient", ("AML", "p1")),
        (["AML/19-6574", "AML/18-0009", "control/3"], "class/patient", ("AML", "18-0009")),
        (["fold_0/all", "fold_0/hem", "fold_1/all"], "*/class", ("all", "")),
        (["Train/x", "TestA/y", "val/x"], "*/class", ("y", "")),
        (["training_set/x", "validation set/x"], "*/class", ("x", "")),
        (["train/x"], "*/class", ("x", "")),
        (["train/AML/1", "train/c/2", "test/AML/3", "test/c/4"], "*/class/patient", ("AML", "3")),
        (["images/AML", "images/c"], "*/class", ("AML", "")),
        (["data/train/AML", "data/test/c"], "*/*/class", ("c", "")),
        (["AML/train", "AML/test", "c/train"], "class/*", ("AML", "")),
        (["AML/images", "c/images"], "class/*", ("AML", "")),
        (["AML/p1/images", "c/p2/images"], "class/patient/*", ("AML", "p1")),
        (["ABE", "LYT/0001-1000", "LYT/1001-2000", "NGS/0001-1000"], "class/*", ("ABE", "")),
        (["LYT/0-99", "LYT/100-150", "c/0-99"], "class/*", ("LYT", "")),
        (["LYT/1-10", "LYT/11-20", "NGS/21-30"], "class/*", ("LYT", "")),
        (["train", "test"], "*", ("", "")),
        (["test", "control"], "class", ("control", "")),
        (["0-10", "11-20"], "class", ("0-10", "")),
    ],
)
def test_trees_that_can_be_read_in_one_way(tmp_path, folders, layout, first):
    _make(tmp_path, *folders)
    assert open_dataset(tmp_path).layout == layout
    found = _read(tmp_path)
    assert found[min(found)] == first
    assert _read(tmp_path, layout) == found, "the layout that is shown can be given"


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (["fold_0/all", "fold_1/all"], "splits 'fold_0', 'fold_1' passed over"),
        (["images/AML", "images/c"], "folder 'images' passed over"),
        (["AML/images", "c/images"], "folders 'images' passed over"),
        (["A", "LYT/0001-1000"], "numbered ranges '0001-1000' passed over"),
        (["train", "test"], "no folder is left that could name a class: images have no label"),
        (["p1", "p22"], "labels such as 'p1', 'p22' look like patients: if they are, use --layout patient"),
        (["im"], "folder 'im' passed over"),
        (["1", "2"], "labels such as '1', '2' look like patients: if they are, use --layout patient"),
        (["AML", "masks"], "labels such as 'masks' look like masks: if they are, move them out of the data set"),
        (
            ["CLL"],
            "all images lie in the one folder 'CLL', which is their label: if it means nothing, use --layout '*'",
        ),
        (
            ["NPM1/AEC", "control/BXY"],
            "folders such as 'AEC', 'BXY' are read as patients: if they are classes, use --layout '*/class'",
        ),
        (["train/patient_1"], "labels such as 'patient_1' look like patients: if they are, use --layout '*/patient'"),
    ],
)
def test_what_was_passed_over_is_said(tmp_path, folders, note):
    assert note in open_dataset(_make(tmp_path, *folders)).notes


# Masks


@pytest.mark.parametrize(
    ("folders", "kept", "name"),
    [
        (["images", "masks"], {"images"}, "masks"),
        (["imgs/AML", "labels/AML"], {"imgs/AML"}, "labels"),
        (["train/images", "train/annotations"], {"train/images"}, "annotations"),
        (["1/images", "1/Ground Truth", "2/images", "2/Ground Truth"], {"1/images", "2/images"}, "Ground Truth"),
        (["liver/tissue images", "liver/label masks"], {"liver/tissue images"}, "label masks"),
        (["Main Dataset/Baso", "GT Segmentation/Baso/expert1"], {"Main Dataset/Baso"}, "GT Segmentation"),
        (["AML", "AML/gt", "c"], {"AML", "c"}, "gt"),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "*"])
def test_masks_beside_images_are_left_out_and_said(tmp_path, folders, kept, name, layout):
    images = open_dataset(_make(tmp_path, *folders), layout)
    assert {path.rpartition("/")[0] for path in images.paths} == kept
    n = len(folders) - len(kept)
    counted = "1 mask or annotation" if n == 1 else f"{n} masks or annotations"
    assert images.notes[0] == (
        f"{counted} in '{name}' beside the images left out. To use them as images, list them in a CSV"
    )


def test_masks_beside_their_images_are_left_out_by_their_names(tmp_path):
    names = ["benign (1)", "benign (1)_mask", "benign (1)_mask_1", "x-GT", "y", "y.labels", "mask", "_mask", "z_gt"]
    for folder, name in [*(("benign", name) for name in names), ("other", "z")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.png").touch()
    images = open_dataset(tmp_path)
    kept = ["_mask", "benign (1)", "mask", "x-GT", "y", "z_gt"]
    assert images.paths == [*(f"benign/{name}.png" for name in kept), "other/z.png"]
    assert images.notes[0] == (
        "3 masks or annotations such as 'benign/benign (1)_mask.png' beside the images of the same name left out. To "
        "use them as images, list them in a CSV"
    )


def test_classes_that_are_called_like_masks_stay_where_no_images_lie_beside(tmp_path):
    assert len(open_dataset(_make(tmp_path, "segmented neutrophils", "masks", "band"))) == 3


# Not read without being told


@pytest.mark.parametrize(
    ("folders", "reason", "choices"),
    [
        (["TCIA/BAS", "TCIA/LYT"], "all images lie in the one folder 'TCIA'", ["*/class", "class/patient"]),
        (["CLL/1", "CLL/2"], "all images lie in the one folder 'CLL'", ["class/patient", "*/patient", "*/class"]),
        (
            ["bmc/ABE", "bmc/LYT/0001-1000"], "all images lie in the one folder 'bmc'",
            ["*/class/*", "class/patient/*"],
        ),
        (
            ["AML/1", "AML/2", "control/1"],
            "1 folder name occurs below more than one class, for example patient '1' in 'AML' and 'control'",
            ["class/patient", "class/patient-in-class", "patient/class"],
        ),
        (
            ["train/AML/1", "train/c/1", "test/c/1"], "1 folder name occurs below more than one class",
            ["*/class/patient", "*/class/patient-in-class", "*/patient/class"],
        ),
        (
            ["HE-100K/ADI", "HE-100K/TUM", "VAL-7K/ADI"],
            "1 folder name occurs below more than one folder, for example 'ADI' in 'HE-100K' and 'VAL-7K'",
            ["*/class", "class/*", "patient/class"],
        ),
        (["train/x", "extra/y"], "'train' may be a split or a class", ["*/class", "class/patient", "*/patient"]),
        (["AML/11-20", "c/31-40"], "may be patients or ranges", ["class/*", "class/patient", "patient/*"]),
        # patients above classes
        *(
            (
                [f"{one}/blast", f"{two}/{last}", f"{two}/mono"], f"'{one}', '{two}' above 'blast'",
                ["patient/class", "*/class"],
            )
            for one, two in [
                ("P0", "P1"), ("patient_12", "patient_7"), ("pat-3", "pat-4"), ("S-1234", "S-99"), ("1", "2"),
                ("TCGA-A1-A0SB", "TCGA-B2-1234"), ("1.2.840.1", "1.2.840.2"), ("Subject 01", "Subject 02"),
            ]
            for last in ("blast", "lymph")
        ),
        (["train/P0/blast", "test/P1/lymph"], "'P0', 'P1' above 'blast'", ["*/patient/class", "class"]),
        (["P1/blast", "P2/lymph", "unknown/mono"], "'P1', 'P2' above 'blast'", ["patient/class", "*/class"]),
        (["1/7", "2/8"], "'1', '2' above '7', '8'", ["class/patient", "patient/class", "*/patient"]),
        # classes above classes
        (
            ["lung_image_sets/lung_aca", "lung_image_sets/lung_n", "colon_image_sets/colon_n"],
            "look like classes more than like patients", ["*/class", "class/*", "class/patient"],
        ),
        (["myeloid/EOS", "lymphoid/LYT"], "look like classes", ["*/class", "class/*", "class/patient"]),
        (["AML/M0", "AML/M1", "ALL/L2"], "'L2', 'M0', 'M1' below 'ALL', 'AML' look like classes", None),
        (["lung/grade 1", "colon/grade 2"], "look like classes", None),
        (["AML/p1", "AML"], "the images lie 1 folder or 2 folders deep", ["class/*", "patient/*"]),
        (
            ["a/b/c", "d/e/f"], "the images lie 3 folders deep",
            ["*/class/patient", "class/*/patient", "class/patient/*"],
        ),
        (["w/w/BAS", "w/w/LYT"], "the images lie 3 folders deep", ["class", "*/class/patient"]),
        (["x/AML/fold_0/all", "x/AML/fold_1/hem"], "the images lie 4 folders deep", ["class", "*/class/*/patient"]),
        (["w/AML/1", "w/c/2"], "the images lie 3 folders deep", ["*/class/patient", "*/class/*"]),
        (["w/AML/1", "w/c"], "2 folders or 3 folders deep", ["*/class/*", "class/patient/*", "*/patient/*"]),
        (["a/b/c/d", "e/f"], "2 folders or 4 folders deep", ["class/patient/*", "class", "*/class/*"]),
        (
            ["w/training_data/fold_0/all", "w/validation_data/x"], "3 folders or 4 folders deep",
            ["class", "*/*/class/*"],
        ),
    ],
)  # fmt: skip
def test_trees_that_can_be_read_in_several_ways_stop_with_the_choices(tmp_path, folders, reason, choices):
    _make(tmp_path, *folders)
    text = _stop(tmp_path)
    assert "can be read in more than one way" in text
    assert reason in text
    assert "or list the images in a CSV with the columns path, label and patient" in text
    assert choices in (None, _choices(tmp_path))
    readings = [tuple(sorted(_read(tmp_path, choice).items())) for choice in _choices(tmp_path)]
    assert len(set(readings)) == len(readings) >= 2


def test_every_choice_has_an_example_and_counts(tmp_path):
    lines = _stop(_make(tmp_path, "AML/1", "AML/2", "control/1")).split("\n")
    assert lines[0].endswith("In 'AML/1/', choose one:")
    assert lines[1:4] == [
        "  --layout class/patient: label 'AML', patient '1' (2 labels, 2 patients)",
        "  --layout class/patient-in-class: label 'AML', patient 'AML/1' (2 labels, 3 patients)",
        "  --layout patient/class: label '1', patient 'AML' (2 labels, 2 patients)",
    ]


def test_images_beside_folders_stop(tmp_path):
    (_make(tmp_path, "AML") / "stray.png").touch()
    assert "No layout fits: move images that lie in no folder" in _stop(tmp_path)


# What was asked for


def test_two_people_of_one_name(tmp_path):
    _make(tmp_path, "AML/1", "AML/2", "control/1", "control/2")
    assert set(open_dataset(tmp_path, "class/patient-in-class").patients) == {
        "AML/1", "AML/2", "control/1", "control/2",
    }  # fmt: skip
    images = open_dataset(tmp_path, "class/patient")
    assert set(images.patients) == {"1", "2"}
    assert images.notes == (
        "patient '1' stands in 2 folders, such as 'AML/1' and 'control/1': read as one person. If these are different "
        "people, use --layout class/patient-in-class",
        "patient '2' stands in 2 folders, such as 'AML/2' and 'control/2': read as one person. If these are different "
        "people, use --layout class/patient-in-class",
    )


def test_many_shared_patients_are_named_shortly(tmp_path):
    _make(tmp_path, *(f"{label}/{n}" for label in "AB" for n in range(9)))
    notes = open_dataset(tmp_path, "class/patient").notes
    assert len(notes) == 4
    assert notes[-1] == "and 6 more patients that stand in several folders"


def test_one_patient_in_several_splits_is_said(tmp_path):
    _make(tmp_path, "train/AML/1", "test/AML/1", "test/c/2")
    (_, note) = open_dataset(tmp_path).notes
    assert "patient '1' stands in 2 folders, such as 'test/AML/1' and 'train/AML/1'" in note
    assert note.endswith("list the images in a CSV"), "numbering in the class would not help"


@pytest.mark.parametrize(
    ("folders", "layout", "skipping", "meant"),
    [
        (["ABE", "LYT/0001-1000"], "class", "'class/*'", "'*/class'"),
        (["bmc/LYT/0001-1000"], "class", "'*/class/*'", "'*/*/class'"),
        (["LYT/0001-1000"], "class/patient", "'class/*'", "'class/patient/*'"),
        (["AML/p/0001-1000"], "class/patient", "'class/patient/*'", "'*/class/patient'"),
    ],
)
def test_ranges_never_become_names_silently(tmp_path, folders, layout, skipping, meant):
    text = _stop(_make(tmp_path, *folders), layout)
    assert f"--layout {layout} would make the numbered range '0001-1000' in" in text
    assert f"Use --layout {skipping} to pass over ranges, or, if they are meant, --layout {meant}" in text


def test_a_layout_from_the_top_says_when_images_lie_deeper(tmp_path):
    text = _stop(_make(tmp_path, "x/AML", "x/AML/y"), "*/class")
    assert "--layout '*/class' needs every image exactly 2 folders deep" in text
    assert "1 of 2 are not, for example 'x/AML/y/a.png'" in text
    assert "Where the levels below mean nothing, use --layout '*/class/*'" in text


# Properties

_NAMES = st.sampled_from(["a", "b", "c", "1", "2", "train", "test", "fold_1", "images", "0001-1000", "1001-2000", "p1"])
_TREES = st.sets(st.lists(_NAMES, max_size=4).map(tuple), min_size=1, max_size=12)


@given(_TREES)
def test_every_tree_is_read_or_stops_with_layouts_that_fit(folders):
    try:
        layout, _ = read_levels(folders)
    except AmbiguousFoldersError as error:
        for text in re.findall(r"^  --layout (.*?): ", str(error), re.MULTILINE):
            chosen = parse_layout(shlex.split(text)[0])
            if chosen is None or not all(map(chosen.fits, folders)):
                pytest.fail(f"{text} does not fit")
        return
    if layout is None:
        assert folders == {()}
        return
    assert all(map(layout.fits, folders))
    patients: dict[str, set[str]] = {}
    for levels in folders:
        label, patient = layout.read(levels)
        assert {label, patient} - {""} <= set(levels)
        patients.setdefault(patient, set()).add(label)
    assert all(len(labels) == 1 for patient, labels in patients.items() if patient), (
        "nobody is in two classes without a message"
    )


@given(_TREES)
def test_reading_does_not_depend_on_order(folders):
    def outcome(tree):
        try:
            return read_levels(tree)
        except AmbiguousFoldersError as error:
            return str(error)

    assert outcome(sorted(folders)) == outcome(sorted(folders, reverse=True))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=9), st.sampled_from([1, 10, 100]))
def test_ranges_are_recognised_at_any_width(sizes, unit):
    bounds = [unit * 10 * size for size in sizes]
    starts = [1 + sum(bounds[:n]) for n in range(len(bounds))]
    tree = {("c", f"{start:05d}-{start + width - 1:05d}") for start, width in zip(starts, bounds, strict=True)}
    assert find_ranges(tree) == tree
    assert find_ranges({("c", f"19-{6574 + n}") for n in range(3)}) == set()


# The plan


def test_the_plan_shows_the_tree_as_it_was_read(tmp_path):
    _make(tmp_path, "fold_0/all", "fold_0/hem", "fold_1/all")
    (tmp_path / "fold_0/all/b.jpg").touch()
    (tmp_path / "readme.txt").touch()
    (tmp_path / "fold_0/x.svs").touch()
    assert describe_images(open_dataset(tmp_path)).split("\n") == [
        f"4 images (2 labels, 0 patients; layout */class) from '{tmp_path}'",
        "for example 'fold_0/all/a.png': label 'all', patient ''",
        "folders: * = 'fold_0', 'fold_1'; class = 'all', 'hem'",
        "labels: 3 'all', 1 'hem'",
        "files: 3 '.png', 1 '.jpg'",
        "note: images of kinds that are not read passed over: 1 .svs. Convert them to PNG or TIFF",
        "note: other files passed over: 1 .txt",
        "note: splits 'fold_0', 'fold_1' passed over",
    ]


def test_the_plan_counts_patients_and_images_without_one(tmp_path):
    rows = [("a", "x", "p"), ("b", "x", "p"), ("c", "", "q"), ("d", "y", "")]
    (tmp_path / "m.csv").write_text("path,label,patient,site\n" + "\n".join(",".join((*row, "S")) for row in rows))
    (tmp_path / "a").touch()
    text = describe_images(open_dataset(tmp_path / "m.csv"))
    assert "labels: 2 'x', 1 'y'; 1 image has none\n" in text
    assert "patients: 1 to 2 images each; 1 image has none\n" in text
    assert "further columns: 'site' (text)\n" in text


def test_levels_that_mean_nothing_are_said(tmp_path):
    _make(tmp_path, "x/AML/p1/s", "y/c/p2/t/u")
    assert open_dataset(tmp_path, "*/class/*").levels == "* = 'x', 'y'; class = 'AML', 'c'; levels below mean nothing"
    assert open_dataset(tmp_path, "class").levels == "levels above mean nothing; class = 's', 'u'"


def test_names_that_a_terminal_would_obey_are_escaped(tmp_path):
    images = open_dataset(_make(tmp_path, "a\x1b[2J/1", "b/2"))
    text = describe_images(images)
    assert "\x1b" not in text
    assert r"'a\x1b[2J'" in text
    assert "\x1b" not in _stop(_make(tmp_path, "b/1"))


def test_endings_are_counted(tmp_path):
    _make(tmp_path, "AML", "c")
    for name in (
        "a.GIF",
        "b.gif",
        "c.heic",
        "README",
        "x.averyveryverylongending",
        "Thumbs.db",
        ".hidden.gif",
        "d.a\x1bb",
    ):
        (tmp_path / name).touch()
    assert open_dataset(tmp_path).notes == (
        "images of kinds that are not read passed over: 2 .gif, 1 .heic. Convert them to PNG or TIFF",
        r"other files passed over: 1 without an ending, 1 .a\x1bb, 1 .averyveryve",
    )


def test_a_folder_of_other_kinds_says_so(tmp_path):
    for number in range(8):
        (tmp_path / f"a.{number}").touch()
    (tmp_path / "a.svs").touch()
    text = _stop(tmp_path)
    assert "no images below" in text
    assert "images of kinds that are not read passed over: 1 .svs. Convert them" in text
    assert "and 2 more endings" in text


def test_new_kinds_are_images(tmp_path):
    names = ["a.webp", "b.JP2", "c.j2k", "d.jpx", "e.jfif"]
    for name in names:
        (tmp_path / name).touch()
    assert open_dataset(tmp_path).paths == names


def test_json_of_a_list(tmp_path):
    facts = open_dataset(_make(tmp_path, "fold_0/all", "fold_0/hem", "fold_1/all")).to_json()
    assert facts == {
        "layout": "*/class", "labels": {"all": 2, "hem": 1}, "n_patients": 0, "columns": [],
        "notes": ["splits 'fold_0', 'fold_1' passed over"],
    }  # fmt: skip
