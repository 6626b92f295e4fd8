"""Every reader splits our CSV files where they were joined, whatever a name contains."""

import csv
import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae_pipeline.workspace.csv_files import CsvWriter, to_csv, write_csv

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_what_is_written_is_read_back(rows, line_end):
    file = io.StringIO(newline="")
    CsvWriter(file, ["a", "b", "c"], line_end=line_end).write(rows)
    assert list(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [["a", "b", "c"], *rows]


@pytest.mark.parametrize("name", ["a\rb", "\r", "a\r\nb", 'a"\rb', "a,b"])
def test_a_lone_carriage_return_ends_no_line(name):
    data = to_csv(["row", "path"], [[0, name], [1, "plain"]])
    assert list(csv.reader(io.StringIO(data.decode(), newline=""))) == [["row", "path"], ["0", name], ["1", "plain"]]
    assert data.endswith(b"\n1,plain\n")


def test_rows_without_it_are_quoted_only_where_needed():
    assert to_csv(["a", "b"], [[1, "x y"], [2.5, "x,y"]]) == b'a,b\n1,x y\n2.5,"x,y"\n'


def test_a_file_is_the_bytes_of_the_rows_and_takes_no_memory_for_them(tmp_path):
    rows = [[1, "a\rb", "ä,\n"], [2, "", '"']]
    write_csv(tmp_path / "a.csv", ["x", "y", "z"], rows)
    assert (tmp_path / "a.csv").read_bytes() == to_csv(["x", "y", "z"], rows)
    tracemalloc.start()
    try:
        write_csv(tmp_path / "b.csv", ["row", "name"], ([row, f"name {row}"] for row in range(100_000)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 * peak < (tmp_path / "b.csv").stat().st_size
