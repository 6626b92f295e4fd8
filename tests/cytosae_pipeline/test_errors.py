"""Texts of errors: names are quoted safely, and long lists are cut."""

import pytest

from cytosae_pipeline.errors import escape, join_few, quote, say_count


@pytest.mark.parametrize(("n", "text"), [(0, ""), (1, "a0"), (3, "a0, a1, a2"), (1003, "a0, a1, a2 and 1,000 more")])
def test_a_long_list_is_cut(n, text):
    assert join_few((f"a{number}" for number in range(n)), 3) == text


def test_names_cannot_control_a_terminal():
    assert quote("\x1b[2J\n") == "'\\x1b[2J\\n'"
    assert len(quote("a" * 5000)) < 110
    assert escape("a\tb\x9b1m\r\n", keep="\n\t") == "a\tb\\x9b1m\\r\n"


def test_one_thing_has_no_plural():
    assert [say_count(n, "image") for n in (0, 1, 2, 1234)] == ["0 images", "1 image", "2 images", "1,234 images"]
    assert [say_count(n, "class has", "classes have") for n in (1, 2)] == ["1 class has", "2 classes have"]
