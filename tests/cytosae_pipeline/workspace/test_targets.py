"""Where a result goes."""

import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.workspace.targets import resolve_target


def test_links_are_followed_to_their_end_and_everything_else_is_left(tmp_path):
    plain, missing = tmp_path / "plain", tmp_path / "missing" / "x"
    plain.mkdir()
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to(plain)
    (tmp_path / "dangling").symlink_to(missing)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert resolve_target(plain) == plain
    assert resolve_target(missing) == missing
    assert resolve_target(tmp_path / "one") == plain
    assert resolve_target(tmp_path / "one" / "x") == tmp_path / "one" / "x"
    for name in ("dangling", "loop"):
        with pytest.raises(UserError, match=f"{name}' is a link to '.+', whose folder does not exist. Create or mount"):
            resolve_target(tmp_path / name)
