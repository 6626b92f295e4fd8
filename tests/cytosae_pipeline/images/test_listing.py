"""Folders and CSV manifests as people have them, and messages that say what to do about the rest."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.folders import scan_folder
from cytosae_pipeline.images.image_list import DatasetError, DatasetNotFoundError, ImageList, ImageRow
from cytosae_pipeline.images.listing import open_dataset, resolve_inside
from cytosae_pipeline.images.manifest import read_manifest
from tests.support.datasets import list_triples, touch, write_csv

ROOT = Path(__file__).parents[3]


def _error(path: Path, *args) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(path, *args)
    text = str(caught.value)
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines)
    assert len(text) < 900
    assert len(lines) < 10
    return text


# Layouts


@pytest.mark.parametrize("layout", ["auto", "class"])
def test_class_layout(tmp_path, layout):
    touch(tmp_path, "neutrophil/b.png", "blast/a.png", "blast/c.png")
    images = open_dataset(tmp_path, layout)
    assert images.layout == "class"
    assert list_triples(images) == [
        ("blast/a.png", "blast", ""),
        ("blast/c.png", "blast", ""),
        ("neutrophil/b.png", "neutrophil", ""),
    ]
    assert images.labels == ["blast", "blast", "neutrophil"]
    assert images.patients == ["", "", ""]
    assert images.paths == ["blast/a.png", "blast/c.png", "neutrophil/b.png"]
    assert images.notes == ()
    assert len(images) == 3


def test_patient_layout(tmp_path):
    touch(tmp_path, "p1/a.png", "p2/b.png")
    images = open_dataset(tmp_path, "patient")
    assert images.layout == "patient"
    assert list_triples(images) == [("p1/a.png", "", "p1"), ("p2/b.png", "", "p2")]


@pytest.mark.parametrize("layout", ["auto", "class/patient"])
def test_class_patient_layout(tmp_path, layout):
    touch(tmp_path, "AML/p1/a.png", "AML/p2/a.png", "control/p3/a.png")
    images = open_dataset(tmp_path, layout)
    assert images.layout == "class/patient"
    assert images.labels == ["AML", "AML", "control"]
    assert images.patients == ["p1", "p2", "p3"]


def test_flat_folder(tmp_path):
    images = open_dataset(touch(tmp_path, "b.png", "a.png"))
    assert images.layout == "flat"
    assert list_triples(images) == [("a.png", "", ""), ("b.png", "", "")]


def test_explicit_layout_goes_by_the_nearest_folders(tmp_path):
    touch(tmp_path, "export/2024/AML/p1/a.png", "AML/p2/b.png")
    assert list_triples(open_dataset(tmp_path, "class/patient")) == [
        ("AML/p2/b.png", "AML", "p2"),
        ("export/2024/AML/p1/a.png", "AML", "p1"),
    ]
    assert open_dataset(tmp_path, "patient").patients == ["p2", "p1"]


def test_one_image(tmp_path):
    assert len(open_dataset(touch(tmp_path, "blast/a.png"))) == 1


@pytest.mark.parametrize(
    ("layout", "needed"),
    [("class", "1 folder deep"), ("patient", "1 folder deep"), ("class/patient", "2 folders deep")],
)
def test_not_deep_enough_names_a_file(tmp_path, layout, needed):
    text = _error(touch(tmp_path, "AML/p1/a.png", "stray.png"), layout)
    assert f"--layout {layout} needs every image at least {needed}" in text
    assert "1 of 2 are not, for example 'stray.png'" in text


@pytest.mark.parametrize("layout", ["class", "patient", "class/patient"])
def test_layout_given_for_a_flat_folder(tmp_path, layout):
    text = _error(touch(tmp_path, "a.png"), layout)
    assert f"--layout {layout}" in text
    assert "'a.png'" in text


def test_class_folders_are_too_shallow_for_class_patient(tmp_path):
    assert "'AML/a.png'" in _error(touch(tmp_path, "AML/a.png"), "class/patient")


# What counts as an image


def test_suffixes_in_any_case(tmp_path):
    names = ["a.JPG", "b.Jpeg", "c.PNG", "d.bmp", "e.TIF", "f.tiff", "g.jpeg", "h.x.tif"]
    assert open_dataset(touch(tmp_path, *names)).paths == names


def test_files_that_are_not_images_are_skipped(tmp_path):
    touch(
        tmp_path,
        "blast/a.png",
        "blast/Thumbs.db",
        "blast/.DS_Store",
        "blast/._a.png",
        "blast/.hidden/b.png",
        ".git/c.png",
        "__MACOSX/blast/a.png",
        "blast/__MACOSX/a.png",
        "blast/@eaDir/a.png",
        "blast/notes.txt",
        "README.md",
        "labels.csv",
        "blast/a.png.part",
        "blast/png",
        "blast/d.gif",
        "blast/slide.svs",
        "desktop.ini",
    )
    (tmp_path / "blast" / "folder.png").mkdir()
    assert open_dataset(tmp_path).paths == ["blast/a.png"]


def test_folder_named_like_an_image_is_a_folder(tmp_path):
    assert open_dataset(touch(tmp_path, "scan.tif/a.png")).labels == ["scan.tif"]


def test_empty_folder(tmp_path):
    text = _error(tmp_path)
    assert str(tmp_path) in text
    assert ".jpg" in text
    assert ".tif" in text


def test_folder_without_images(tmp_path):
    assert "no images" in _error(touch(tmp_path, "a/b.svs", "c.txt"))


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="--images") as caught:
        open_dataset(tmp_path / "nowhere")
    assert isinstance(caught.value, DatasetNotFoundError)
    assert isinstance(caught.value, UserError)
    assert f"'{tmp_path / 'nowhere'}'" in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert "path[,label][,patient]" in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DatasetNotFoundError):
        open_dataset(tmp_path / "pipe.png")
    assert open_dataset(touch(tmp_path, "a.png")).paths == ["a.png"]


# Links


def test_link_to_a_file_outside_is_not_followed_and_noted(tmp_path):
    touch(tmp_path, "outside/x.png", "data/blast/a.png")
    (tmp_path / "data/blast/b.png").symlink_to(tmp_path / "outside/x.png")
    images = open_dataset(tmp_path / "data")
    assert images.paths == ["blast/a.png"]
    assert images.notes[0] == "link 'blast/b.png' leads out of the folder: not followed"


def test_link_to_a_folder_outside_is_not_followed_and_noted(tmp_path):
    touch(tmp_path, "outside/x.png", "data/blast/a.png")
    (tmp_path / "data/lymphocyte").symlink_to(tmp_path / "outside")
    (tmp_path / "data/up").symlink_to("..")
    images = open_dataset(tmp_path / "data")
    assert images.paths == ["blast/a.png"]
    assert "'lymphocyte'" in images.notes[0]
    assert "'up'" in images.notes[1]


def test_a_neighbour_whose_name_begins_alike_is_outside(tmp_path):
    touch(tmp_path, "data-secret/x.png", "data/blast/a.png")
    (tmp_path / "data/blast/b.png").symlink_to(tmp_path / "data-secret/x.png")
    images = open_dataset(tmp_path / "data")
    assert images.paths == ["blast/a.png"]
    with pytest.raises(DatasetError, match="leads out"):
        resolve_inside(tmp_path / "data", "../data-secret/x.png")


def test_only_links_says_why_there_are_no_images(tmp_path):
    touch(tmp_path, "outside/x.png", "outside/y.png")
    (tmp_path / "data").mkdir()
    for name in ("x.png", "y.png"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "outside" / name)
    text = _error(tmp_path / "data")
    assert "2 links were not followed" in text
    assert "'x.png' leads out" in text


def test_many_links_are_noted_shortly(tmp_path):
    touch(tmp_path, "outside/x.png", "data/a.png")
    for number in range(50):
        (tmp_path / f"data/l{number:02d}.png").symlink_to(tmp_path / "outside/x.png")
    notes = open_dataset(tmp_path / "data").notes
    assert len(notes) == 11
    assert notes[-1] == "and 40 more links not followed"


def test_links_within_the_folder(tmp_path):
    touch(tmp_path, "blast/a.png")
    (tmp_path / "blast/b.png").symlink_to("a.png")
    (tmp_path / "copy").symlink_to("blast")
    images = open_dataset(tmp_path)
    assert images.paths == ["blast/a.png", "blast/b.png"]
    assert "'copy'" in images.notes[0]


def test_loops_and_dangling_links_do_not_hang(tmp_path):
    touch(tmp_path, "blast/a.png")
    (tmp_path / "blast/self").symlink_to(".")
    (tmp_path / "blast/up").symlink_to("..")
    (tmp_path / "blast/me.png").symlink_to("me.png")
    (tmp_path / "blast/ping.png").symlink_to("pong.png")
    (tmp_path / "blast/pong.png").symlink_to("ping.png")
    (tmp_path / "blast/gone.png").symlink_to("nothing.png")
    assert open_dataset(tmp_path).paths == ["blast/a.png"]


def test_the_root_may_be_a_link(tmp_path):
    touch(tmp_path, "disk/blast/a.png")
    (tmp_path / "data").symlink_to("disk")
    images = open_dataset(tmp_path / "data", "class")
    assert images.paths == ["blast/a.png"]
    assert images.notes == ()
    assert images.root == tmp_path / "data"


@pytest.mark.parametrize("relative", ["../x.png", "blast/../../x.png", "/etc/hostname", "link.png", "folder/x.png"])
def test_resolve_inside_refuses_what_leads_out(tmp_path, relative):
    touch(tmp_path, "x.png", "data/blast/a.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "data/folder").symlink_to(tmp_path)
    with pytest.raises(DatasetError, match="leads out of the data set's folder") as caught:
        resolve_inside(tmp_path / "data", relative)
    assert repr(relative) in str(caught.value)


def test_resolve_inside_follows_what_stays_inside(tmp_path):
    touch(tmp_path, "blast/a.png")
    (tmp_path / "b.png").symlink_to("blast/a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    wanted = (tmp_path / "blast/a.png").resolve()
    assert resolve_inside(tmp_path, "blast/a.png") == wanted
    assert resolve_inside(tmp_path, "b.png") == wanted
    assert not resolve_inside(tmp_path, "missing.png").exists()
    assert not resolve_inside(tmp_path, "loop.png").is_file()


# Order


def test_rows_are_sorted_by_the_bytes_of_their_paths(tmp_path):
    names = [
        "b/1.png",
        "B/1.png",
        "a-b/1.png",
        "a/1.png",
        "ä/1.png",
        "é/1.png",
        "Z/10.png",
        "Z/9.png",
        "血液/1.png",
        "😀/1.png",
        "\uff21/1.png",
    ]
    paths = open_dataset(touch(tmp_path, *names)).paths
    assert paths == sorted(names, key=str.encode)
    assert paths[:5] == ["B/1.png", "Z/10.png", "Z/9.png", "a-b/1.png", "a/1.png"]
    assert paths[-2:] == ["\uff21/1.png", "😀/1.png"], "UTF-16 would have them the other way round"


def test_an_image_list_sorts_itself():
    rows = tuple(ImageRow(path, "", "") for path in ("b", "a", "B"))
    assert ImageList(Path(), rows, "flat").paths == ["B", "a", "b"]


def test_odd_names_are_kept(tmp_path):
    names = ["a b/x, y.png", "a b/'q'.png", 'a b/"d".png', "a b/new\nline.png", "a b/#%&.png"]
    assert sorted(open_dataset(touch(tmp_path, *names)).paths) == sorted(names)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("folder", ["blast", "😀", "\uff21"])
def test_names_that_are_not_utf8(tmp_path, folder):
    touch(tmp_path, f"{folder}/a.png")
    Path(os.fsdecode(os.fsencode(tmp_path / folder) + b"/zelle-\xe4.png")).touch()
    text = _error(tmp_path)
    assert "not UTF-8; rename" in text
    assert "zelle-" in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_do_not_matter_on_other_files(tmp_path):
    touch(tmp_path, "blast/a.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bl\xe4tter.txt")).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4nk")).symlink_to("..")
    images = open_dataset(tmp_path)
    assert images.paths == ["blast/a.png"]
    for note in images.notes:
        note.encode()


# Digest and head


def _list(*rows: tuple[str, str, str]) -> ImageList:
    return ImageList(Path("/r"), tuple(ImageRow(*row) for row in rows), "manifest")


def test_digest_changes_with_anything_that_matters():
    lists = [
        _list(("a", "x", "p"), ("b", "y", "q")),
        _list(("a", "x", "p"), ("c", "y", "q")),
        _list(("a", "x", "p"), ("b", "z", "q")),
        _list(("a", "x", "p"), ("b", "y", "r")),
        _list(("a", "x", "p")),
        _list(("a", "p", "x"), ("b", "y", "q")),
        _list(("a", "xp", ""), ("b", "y", "q")),
        _list(("a", "", "xp"), ("b", "y", "q")),
        _list(("a", 'x","p', ""), ("b", "y", "q")),
        _list(("a", "x", "p"), ("b", "y", "q"), ("c", "", "")),
        _list(),
    ]
    assert len({images.digest() for images in lists}) == len(lists)
    assert all(len(images.digest()) == 64 for images in lists)


def test_digest_is_the_same_wherever_and_however_the_rows_come():
    rows = [("a", "x", "p"), ("b", "y", "q"), ("ä", "", "")]
    assert _list(*rows).digest() == _list(*reversed(rows)).digest()
    elsewhere = ImageList(Path("/other"), _list(*rows).rows, "class", ("a note",))
    assert elsewhere.digest() == _list(*rows).digest()
    # stored in the attributes of every store: it must never change
    assert _list(("a", "x", "p")).digest() == "f8ba99c97738bf7eb8fdb23cafc059430a0289bad4c7f717b41032efcd569629"


def test_digest_of_csv_and_folder_agree(tmp_path):
    path = write_csv(tmp_path, "label,path\ny,y/b.png\nx,x/a.png\n", "x/a.png", "y/b.png")
    assert read_manifest(path).digest() == scan_folder(tmp_path).digest()


@pytest.mark.parametrize("n_rows", [1, 2, 7, 100])
def test_head_is_spread_evenly(n_rows):
    images = _list(*((f"{number:03d}", "", "") for number in range(n_rows)))
    for n in range(n_rows + 3):
        head = images.spread(n)
        assert len(head) == min(n, n_rows)
        places = [int(path) for path in head.paths]
        assert len(set(places)) == len(places)
        assert set(head.rows) <= set(images.rows)
        steps = {b - a for a, b in itertools.pairwise(places)}
        assert max(steps, default=0) - min(steps, default=0) <= 1
        if places:
            assert abs(places[0] - (n_rows - 1 - places[-1])) <= 1, "as much is left out before as behind"


def test_head_shows_all_folders_and_keeps_the_rest():
    images = ImageList(
        Path("/r"), tuple(ImageRow(f"{c}/{n}", c, "") for c in "abcd" for n in range(25)), "class", ("note",)
    )
    head = images.spread(4)
    assert head.labels == ["a", "b", "c", "d"]
    assert (head.root, head.layout, head.notes) == (images.root, "class", ("note",))
    assert head.digest() != images.digest()
    assert images.spread(1000) == images


def test_rows_hold_nothing_but_strings(tmp_path):
    (row,) = open_dataset(touch(tmp_path, "blast/a.png")).rows
    assert all(type(getattr(row, name)) is str for name in ("path", "label", "patient"))
    assert not hasattr(row, "__dict__")


def test_importing_needs_no_torch():
    code = "import sys, cytosae_pipeline.images.listing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": ".:cache:pipeline"}, check=True)


def test_real_crops(test_data):
    images = open_dataset(test_data / "bccd_cells")
    assert images.layout == "manifest"
    assert len(images) == 1780
    assert len(set(images.labels)) == 3
    assert len(set(images.patients)) == 364
    assert open_dataset(test_data / "bccd_cells", "class").labels == images.labels


def test_the_nearest_name_beside_a_missing_folder_is_suggested(tmp_path):
    (tmp_path / "monocytes").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"no images at '.*monocites'.* Did you mean 'monocytes'\?"):
        open_dataset(tmp_path / "monocites")
    with pytest.raises(DatasetNotFoundError, match="--images PATH$"):
        open_dataset(tmp_path / "platelets")
    with pytest.raises(DatasetNotFoundError, match="--images PATH$"):
        open_dataset(tmp_path / "gone" / "monocites")


def test_folders_that_are_too_deep_are_one_message(tmp_path):
    folder = tmp_path.joinpath(*["a"] * 110)
    folder.mkdir(parents=True)
    with pytest.raises(DatasetError, match="lies more than 100 folders deep: give a folder further down"):
        scan_folder(tmp_path)
