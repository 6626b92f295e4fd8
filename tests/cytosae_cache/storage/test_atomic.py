"""Files appear only once they are complete."""

import os

import pytest

from cytosae_cache.storage.atomic import replacing, write_file


def test_a_file_keeps_its_old_contents_until_it_is_replaced(tmp_path):
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        os.write(file, b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
