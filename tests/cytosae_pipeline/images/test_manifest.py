"""CSV manifests as people have them, and messages that say what to do about the rest."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from cytosae_pipeline.images.columns import type_cells, type_columns
from cytosae_pipeline.images.image_list import DatasetError
from cytosae_pipeline.images.listing import open_dataset
from cytosae_pipeline.images.summary import describe_images
from tests.support.datasets import list_triples, write_csv


def _error(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(path)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def test_manifest(tmp_path):
    path = write_csv(tmp_path, "path,label,patient\nx/b.png,AML,p2\na.png,control,p1\n", "a.png", "x/b.png")
    images = open_dataset(path)
    assert images.layout == "manifest"
    assert images.root == tmp_path
    assert images.notes == ()
    assert list_triples(images) == [("a.png", "control", "p1"), ("x/b.png", "AML", "p2")]


def test_folder_with_a_manifest_is_read_through_it(tmp_path):
    path = write_csv(tmp_path, "path,label\nx/b.png,AML\n", "a.png", "x/b.png", name="manifest.csv")
    images = open_dataset(tmp_path)
    assert list_triples(images) == [("x/b.png", "AML", "")]
    assert images == open_dataset(path)
    assert images.digest() == open_dataset(path).digest()


def test_a_layout_that_was_asked_for_wins_over_the_manifest(tmp_path):
    write_csv(tmp_path, "path,label\nx/b.png,AML\n", "y/a.png", "x/b.png", name="manifest.csv")
    images = open_dataset(tmp_path, "class")
    assert images.labels == ["x", "y"]
    assert images.notes[-1] == "manifest.csv is not read, because --layout was given"


@pytest.mark.parametrize(
    "text",
    [
        "patient,path,label\np1,a.png,AML\n",
        "\ufeffpath,label,patient\na.png,AML,p1\n",
        "path,label,patient\r\na.png,AML,p1\r\n",
        "path,label,patient\ra.png,AML,p1\r",
        " path , label , patient \n a.png , AML , p1 \n",
        "path,label,patient\n\na.png,AML,p1\n\n\n",
        "path,label,patient\n./a.png,AML,p1",
        '"path","label","patient"\n"a.png","AML","p1"\n',
        "path,label,patient\na.png,AML,p1,,\n",
    ],
    ids=["order", "bom", "crlf", "cr", "blanks", "empty-lines", "dot", "quotes", "trailing-commas"],
)
def test_spellings_of_the_same_manifest(tmp_path, text):
    images = open_dataset(write_csv(tmp_path, text, "a.png"))
    assert list_triples(images) == [("a.png", "AML", "p1")]
    assert images.notes == ()


def test_columns_and_cells_may_be_missing(tmp_path):
    assert list_triples(open_dataset(write_csv(tmp_path, "path\na.png\n", "a.png"))) == [("a.png", "", "")]
    assert list_triples(open_dataset(write_csv(tmp_path, "path,patient\na.png,7\n", "a.png"))) == [("a.png", "", "7")]
    text = "path,label,patient\na.png,,p1\nb.png,AML\nc.png\n"
    images = open_dataset(write_csv(tmp_path, text, "a.png"))
    assert list_triples(images) == [("a.png", "", "p1"), ("b.png", "AML", ""), ("c.png", "", "")]


def test_further_columns_are_kept_and_noted(tmp_path):
    images = open_dataset(
        write_csv(tmp_path, ",path,age,label,site\n0,a.png,61,AML,\n1,b.png,,AML, A \n", "a.png", "b.png")
    )
    assert list_triples(images) == [("a.png", "AML", ""), ("b.png", "AML", "")]
    assert images.columns == ("age", "site")
    assert [row.cells for row in images.rows] == [("61", ""), ("", "A")]
    assert images.notes == ("further columns kept with the images: 'age', 'site'",)
    assert images.digest() != images.without_columns().digest()
    assert (
        images.without_columns().digest()
        == open_dataset(write_csv(tmp_path, "path,label\na.png,AML\nb.png,AML\n")).digest()
    )


def test_an_image_list_with_columns_changes_with_every_cell_and_name(tmp_path):
    texts = ["path,x\na.png,1\n", "path,x\na.png,2\n", "path,y\na.png,1\n", "path\na.png\n", "path,x,y\na.png,1,2\n"]
    assert len({open_dataset(write_csv(tmp_path, text, "a.png")).digest() for text in texts}) == len(texts)
    assert open_dataset(write_csv(tmp_path, "path,x\na.png,\n")).columns == (), "an empty column is none"


def test_columns_that_cannot_be_kept_are_named(tmp_path):
    names = [f"c{number}" for number in range(70)]
    text = f"path,label,{','.join(names)},{'n' * 101},notes\na.png,AML,{'1,' * 70}2,{'t' * 1001}\n"
    images = open_dataset(write_csv(tmp_path, text, "a.png"))
    assert images.columns == tuple(names[:64])
    assert "columns not kept: 'c64', 'c65', 'c66', 'c67', 'c68', 'c69', 'nnn" in images.notes[1]
    assert images.notes[1].endswith(
        "...', 'notes' (at most 64 columns are kept, with names of up to 100 and cells of up to 1,000 letters)"
    )


def test_many_columns_are_named_shortly(tmp_path):
    text = f"path,label,{','.join(f'c{n}' for n in range(30))}\na.png,AML,{','.join('1' * 30)}\n"
    assert open_dataset(write_csv(tmp_path, text, "a.png")).notes[0].endswith("'c9' and 20 more")


@pytest.mark.parametrize(
    "header",
    [
        "Path,Label,Patient", "PATH,LABEL,PATIENT", "filename,class,patient_id", "file_name,Class Name,Patient ID",
        "Image,Cell Type,PatientID", "image_path,cell-type,Subject", "file,label,donor", "File Path,label,Subject ID",
        "path;label;patient", "path\tlabel\tpatient", "sep=;\npath;label;patient", '"path";"label";"patient"',
        ";;\npath;label;patient", "\n\npath,label,patient",
    ],
)  # fmt: skip
def test_headers_as_programs_write_them(tmp_path, header):
    separator = next(one for one in "\t;," if one in header)
    text = f"{header}\na.png{separator}AML{separator}007\n{separator}{separator}\n"
    assert list_triples(open_dataset(write_csv(tmp_path, text, "a.png"))) == [("a.png", "AML", "007")]


def test_other_names_are_said(tmp_path):
    images = open_dataset(write_csv(tmp_path, "image,class,Patient ID\na.png,AML,1\n", "a.png"))
    assert images.notes == (
        "column 'image' is read as the path", "column 'class' is read as the label",
        "column 'Patient ID' is read as the patient",
    )  # fmt: skip


def test_the_plain_name_comes_first_and_the_other_is_kept(tmp_path):
    images = open_dataset(write_csv(tmp_path, "filename,path,class,label,Label\nx,a.png,1,AML,2\n", "a.png"))
    assert list_triples(images) == [("a.png", "AML", "")]
    assert images.columns == ("filename", "class", "Label")


@pytest.mark.parametrize(
    ("header", "role"),
    [("image,filename", "path"), ("path,class,cell type", "label"), ("path,subject,donor", "patient")],
)
def test_two_columns_that_may_be_the_same(tmp_path, header, role):
    text = _error(write_csv(tmp_path, f"{header}\na.png,AML,1\n", "a.png"))
    first, second = header.split(",")[-2:]
    assert f"columns '{first}' and '{second}' of" in text
    assert f"may both be the {role}: rename the right one to {role}" in text


def test_no_label_is_said(tmp_path):
    images = open_dataset(write_csv(tmp_path, "path,diagnosis\na.png,AML\n", "a.png"))
    assert images.notes[0].endswith("is called label: the images have none")
    assert images.columns == ("diagnosis",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_with_its_mark_is_read(tmp_path, encoding):
    text = "path\tlabel\r\nä.png\tBlast\r\n"
    text = text if encoding == "utf-16" else "\ufeff" + text
    assert list_triples(open_dataset(write_csv(tmp_path, text.encode(encoding), "ä.png"))) == [("ä.png", "Blast", "")]


def test_utf16_that_is_cut_off(tmp_path):
    message = _error(write_csv(tmp_path, "path\n".encode("utf-16") + b"\0"))
    assert "is not UTF-16" in message
    assert "Save it as UTF-8" in message


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_accents_of_macos_and_of_others_name_the_same_file(tmp_path, on_disk, listed):
    name = unicodedata.normalize(on_disk, "Zellen/Ä/ö") + "/é.png"
    text = "path,label\n" + unicodedata.normalize(listed, name) + ",x\n"
    (row,) = open_dataset(write_csv(tmp_path, text, name)).rows
    assert row.path == name if on_disk != listed else row.seen is not None
    assert row.seen is not None
    assert (tmp_path / row.path).is_file()


def test_labels_that_are_the_same_text_are_one(tmp_path):
    a, b = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    images = open_dataset(write_csv(tmp_path, f"path,label,patient\na.png,x,{a}\nb.png,X,{b}\n", "a.png", "b.png"))
    assert images.patients == [a, a]
    assert images.notes == (
        "labels 'X' and 'x' differ in upper and lower case only: kept apart",
        "patient 'Müller' is spelt with two encodings of its letters: read as one",
    )


def test_line_breaks_in_names_become_blanks(tmp_path):
    text = 'path,label,patient\na.png,"blast\r\ncell","p\n\n 1"\nb.png,"x\x0by\u2028z",\n'
    images = open_dataset(write_csv(tmp_path, text, "a.png"))
    assert list_triples(images) == [("a.png", "blast cell", "p 1"), ("b.png", "x y z", "")]
    assert "labels over several lines were joined: 'blast cell', 'x y z'" in images.notes
    assert "patients over several lines were joined: 'p 1'" in images.notes


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "one picture"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "one picture"),
        (b"II*\0\x08", "one picture"),
        (b"BM\x36\0\x0c\0\0\0", "one picture"), (b"RIFF\x24\0\0\0WEBPVP8 ", "one picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "one picture"), (b"GIF89a\x01\0\x01\0", "one picture"),
        (b"PK\x03\x04\x14\0", "an Excel workbook or a ZIP archive"), (b"PAR1\x15\x04\x15", "a Parquet table"),
        (b"\x1f\x8b\x08\0", "a compressed archive"), (b"%PDF-1.7\n", "a PDF"), (b"\x89HDF\r\n", "an HDF5 file"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path, data, kind):
    text = _error(write_csv(tmp_path, data, name="x"))
    assert f"is {kind}: expected a folder of images or a CSV" in text
    assert "UTF-8" not in text


def test_an_empty_picture_is_a_picture(tmp_path):
    assert "is one picture" in _error(write_csv(tmp_path, b"", name="a.JPG"))


def test_headers_that_begin_like_another_file(tmp_path):
    for first in ("BM", "PAR1", "GIF8"):
        images = open_dataset(write_csv(tmp_path, f"{first},path\n1,a.png\n", "a.png"))
        assert images.columns == (first,)


# Types of further columns


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-2", "0"], np.array([1, -2, 0])),
        (["1", "", "3"], np.array([1, np.nan, 3])),
        (["1", "NA", "nan"], np.array([1, np.nan, np.nan])),
        (["1.5", "2", "-1e3", ".5"], np.array([1.5, 2, -1000, 0.5])),
        (["007", "8"], ["007", "8"]),
        (["00.5", "1"], ["00.5", "1"]),
        (["1", "x"], ["1", "x"]),
        (["1,5", "2"], ["1,5", "2"]),
        (["inf", "1"], ["inf", "1"]),
        (["1e999", "1"], ["1e999", "1"]),
        (["1_0"], ["1_0"]),
        (["\u0661"], ["\u0661"]),
        (["1" * 30], ["1" * 30]),
        (["9007199254740993", ""], ["9007199254740993", ""]),
        (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        (["9007199254740993", "5"], np.array([9007199254740993, 5])),
        (["nan", "na"], ["nan", "na"]),
        (["True", "False"], ["True", "False"]),
        (["-", "."], ["-", "."]),
        (["1", "-", "None", "#N/A"], np.array([1, np.nan, np.nan, np.nan])),
        (["1E5", "2E7"], ["1E5", "2E7"]),
        (["12", "1e5"], ["12", "1e5"]),
        (["1e-05", "1.5e3", "1e+16"], np.array([1e-05, 1500, 1e16])),
    ],
)
def test_types_of_columns(cells, expected):
    found = type_cells(cells)
    if isinstance(expected, list):
        assert found.dtype.kind == "T"
        assert found.tolist() == expected
    else:
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_columns_of_a_list_in_row_order(tmp_path):
    images = open_dataset(write_csv(tmp_path, "path,x,site\nb.png,2,S\na.png,1,\n", "a.png"))
    columns = type_columns(images)
    assert list(columns) == ["x", "site"]
    assert columns["x"].tolist() == [1, 2]
    assert columns["site"].tolist() == ["", "S"]


def test_quotes_and_letters_of_other_scripts(tmp_path):
    text = 'path,label,patient\n"x, y.png","AML, M3 ""var""",Müller\n血/b.png,芽球,患者\n'
    images = open_dataset(write_csv(tmp_path, text, "x, y.png"))
    assert list_triples(images) == [("x, y.png", 'AML, M3 "var"', "Müller"), ("血/b.png", "芽球", "患者")]


@pytest.mark.parametrize(
    "path",
    [
        "/abs/a.png", "../a.png", "x/../../a.png", "x/../a.png", "x\\a.png", "C:/x/a.png", "c:a.png", "C:\\a.png",
        "\\\\server\\a.png", "", "   ", ".", "./", "..",
    ],
)  # fmt: skip
def test_bad_paths_are_named_with_their_line(tmp_path, path):
    text = _error(write_csv(tmp_path, f"path,label\na.png,AML\n{path},AML\n", "a.png"))
    assert "line 3" in text
    assert "cells.csv" in text
    assert f"found path {path.strip()!r}" in text
    assert "relative path" in text


@pytest.mark.parametrize("path", ["10:30.png", "x/C:a.png", "...png", "..a.png", "a..b/c.png"])
def test_harmless_paths_pass(tmp_path, path):
    assert open_dataset(write_csv(tmp_path, f"path\n{path}\n", path)).paths == [path]


def test_line_numbers_count_the_lines_of_the_file(tmp_path):
    text = 'path,label\n"a.png","two\nlines"\n\nb.png,x\n/c.png,x\n'
    assert "line 6" in _error(write_csv(tmp_path, text, "a.png"))


@pytest.mark.parametrize("again", ["a.png", "./a.png", " a.png", ".//a.png", "././a.png"])
def test_a_path_twice(tmp_path, again):
    text = _error(write_csv(tmp_path, f"path,label\na.png,AML\nb.png,AML\n{again},control\n", "a.png"))
    assert "line 4" in text
    assert "'a.png' is listed twice" in text


def test_a_comma_without_quotes(tmp_path):
    text = _error(write_csv(tmp_path, "path,label\na.png,AML\ncell, old.png,AML\n", "a.png", "cell, old.png"))
    assert "line 3" in text
    assert "double quotes" in text


@pytest.mark.parametrize(
    "header", ["", "name,label", "label", "url;label;patient", "path,label,label", "path,path", "path,x,x"]
)
def test_wrong_header_names_what_was_found_and_expected(tmp_path, header):
    text = _error(write_csv(tmp_path, f"{header}\na.png,AML\n", "a.png"))
    assert "label and patient" in text
    assert "commas" in text
    for name in header.replace(";", ",").split(","):
        assert repr(name) in text or not header


def test_empty_file(tmp_path):
    assert "columns []" in _error(write_csv(tmp_path, ""))


def test_no_rows(tmp_path):
    assert "lists no images" in _error(write_csv(tmp_path, "path,label\n"))


def test_none_of_the_files_exists(tmp_path):
    text = _error(write_csv(tmp_path, "path\nx/a.png\nx/b.png\n"))
    assert "exists (2 images listed); the first would be" in text
    assert str(tmp_path / "x/a.png") in text
    assert "folder of the CSV" in text


def test_names_too_long_for_the_disk_do_not_exist(tmp_path):
    assert "exists (1 image listed)" in _error(write_csv(tmp_path, f"path\n{'a' * 300}.png\n"))


def test_some_missing_files_are_kept(tmp_path):
    assert open_dataset(write_csv(tmp_path, "path\na.png\nb.png\nc.png\n", "b.png")).paths == [
        "a.png",
        "b.png",
        "c.png",
    ]


def test_nul_bytes(tmp_path):
    assert "NUL" in _error(write_csv(tmp_path, b"path\na\0.png\n"))


@pytest.mark.parametrize(
    "text", ["path\nzelle-ä.png\n".encode("cp1252"), b"\xe4\xf6\xfc", "path\n\u00e4".encode("utf-16-le")]
)
def test_not_utf8(tmp_path, text):
    message = _error(write_csv(tmp_path, text))
    assert "not UTF-8" in message
    assert "Save it as UTF-8" in message


@pytest.mark.parametrize(
    "text", ["p" * 200_000, "path\n" + "p" * 200_000, 'path\n"' + "a\n" * 100_000], ids=["header", "cell", "quote"]
)
def test_cells_too_long_for_a_csv(tmp_path, text):
    assert "is not valid CSV" in _error(write_csv(tmp_path, text))


# Quotes


def test_a_quote_that_is_never_closed(tmp_path):
    text = _error(write_csv(tmp_path, 'path,label\na.png,x\nb.png,"y\nc.png,z\n', "a.png"))
    assert "line 3 is not valid CSV: unexpected end of data" in text
    assert "A double quote around a cell is closed before the separator; one inside it is written twice" in text


@pytest.mark.parametrize(
    "text",
    [
        'path,label\na.png,"x\nb.png,y"\nc.png,z\n',
        'path,label,patient\na.png,"x,p\nb.png,y,q\nc.png,z",r\n',
        'path\tlabel\na.png\t"x\nb.png\ty"\n',
    ],
)
def test_a_quote_that_swallows_lines(tmp_path, text):
    message = _error(write_csv(tmp_path, text, "a.png", "b.png", "c.png"))
    assert "line 2: a double quote opened there is closed only in line" in message
    assert 'Close it, or write a quote that is meant as ""' in message


def test_a_quote_that_reopens(tmp_path):
    assert "line 2 is not valid CSV" in _error(write_csv(tmp_path, 'path,label\na.png,"x\nb.png,"y"\n', "a.png"))


def test_a_path_over_two_lines(tmp_path):
    text = _error(write_csv(tmp_path, 'path,label\n"a\n.png",x\nb.png,y\n', "b.png"))
    assert r"the path 'a\n.png' goes over several lines; close its double quote" in text


# Unknown names


def test_names_that_say_unknown(tmp_path):
    words = ["NA", "NaN", "nan", "None", "null", "N/A", "-", "#N/A"]
    text = "path,label,patient\n" + "".join(f"{n}.png,{word},{word}\n" for n, word in enumerate(words))
    images = open_dataset(write_csv(tmp_path, f"{text}8.png,AML,p1\n", *(f"{n}.png" for n in range(9))))
    assert [row.label for row in images.rows] == [""] * 8 + ["AML"]
    assert [row.patient for row in images.rows] == [""] * 8 + ["p1"]
    assert images.notes[0] == (
        "8 labels called '#N/A', '-', 'N/A', 'NA', 'NaN', 'None', 'nan', 'null' are read as unknown"
    )
    assert images.notes[1].startswith("8 patients called")
    assert "labels: 1 'AML'; 8 images have none" in describe_images(images)


def test_types_of_further_columns_are_in_the_plan(tmp_path):
    text = "path,age,dose,batch\na.png,61,0.5,1E5\nb.png,7,,2E5\n"
    text = describe_images(open_dataset(write_csv(tmp_path, text, "a.png", "b.png")))
    assert "further columns: 'age' (whole numbers), 'dose' (numbers), 'batch' (text)" in text


@pytest.mark.parametrize("names", ["site,site", "site,Site", "stain,\uff33tain"])
def test_further_columns_of_one_name(tmp_path, names):
    text = _error(write_csv(tmp_path, f"path,label,{names}\na.png,AML,1,2\n", "a.png"))
    assert text.endswith("rename one")
    assert all(repr(name) in text for name in names.split(","))


# Files that do not exist


@pytest.mark.parametrize(
    ("listed", "exists", "hint"),
    [
        ("x/a.PNG", "x/a.png", "'x/a.png' exists: write capitals and ending as the file has them"),
        ("X/a.png", "x/a.png", "'x/a.png' exists: write capitals"),
        ("x/a", "x/a.png", "'x/a.png' exists: write capitals"),
        ("x/a.jpg", "x/a.png", "'x/a.png' exists: write capitals"),
        (
            "x/a.png",
            "images/x/a.png",
            "'images/x/a.png' exists: write 'images/' before the paths, or move the CSV there",
        ),
        ("data/x/a.png", "x/a.png", "'x/a.png' exists: leave out 'data/' before it"),
    ],
)
@pytest.mark.parametrize("others", [0, 2])
def test_missing_files_are_said_with_a_hint(tmp_path, listed, exists, hint, others):
    names = [f"ok{n}.png" for n in range(others)]
    path = write_csv(tmp_path, "path\n" + "\n".join([listed, *names]), exists, *names)
    if not others:
        text = _error(path)
        assert "exists (1 image listed)" in text
    else:
        text = open_dataset(path).notes[-1]
        assert f"1 of 3 files does not exist, for example '{listed}'" in text
    assert hint in text


def test_nothing_like_a_missing_file(tmp_path):
    path = write_csv(tmp_path, "path\na.png\nq/b.png\nq/c.png\n", "a.png", "d.png")
    assert open_dataset(path).notes == ("2 of 3 files do not exist, for example 'q/b.png', 'q/c.png'",)


def test_backslashes_say_what_to_write(tmp_path):
    assert "Replace \\ by /" in _error(write_csv(tmp_path, "path\nx\\a.png\n", "x/a.png"))


# A layout and a CSV


def test_a_layout_for_a_csv_is_refused(tmp_path):
    path = write_csv(tmp_path, "path,label\na.png,AML\n", "a.png")
    with pytest.raises(
        DatasetError, match="--layout 'class/\\*' is for folders, but '.*' is a CSV: .* Leave out --layout"
    ):
        open_dataset(path, "class/*")
