"""The page's own files: `index.html`, and scripts and styles in `page/`."""

import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

_INDEX = "index.html"


def read_page_files() -> dict[str, bytes]:
    """The page's own files by their address relative to `index.html`, with forward slashes."""
    found = dict(_walk(files("cytosae_pipeline.report") / "page", "page/"))
    return {_INDEX: found.pop(f"page/{_INDEX}"), **found}


def read_policy() -> str:
    """The content security policy that the page itself states, on one line.

    Raises:
        ValueError: If the page states none.
    """
    text = read_page_files()[_INDEX].decode("utf-8")
    found = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]+)"', text)
    if found is None:
        raise ValueError(f"{_INDEX} states no content security policy")
    return " ".join(found[1].split())


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Files of a folder and the folders in it, in the order of their names."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _walk(item, f"{prefix}{item.name}/")
        else:
            yield f"{prefix}{item.name}", item.read_bytes()
