"""Rooms import only rooms below them, and no module is part of a circle; imports inside functions count, too."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "cytosae": ROOT / "cytosae",
    "cytosae_cache": ROOT / "cache" / "cytosae_cache",
    "cytosae_pipeline": ROOT / "pipeline" / "cytosae_pipeline",
}

ORDER: dict[str, list[set[str]]] = {
    "cytosae": [{"pickles"}, {"backbones", "sae"}, {"training", "statistics"}, {"formats", "analysis"}],
    "cytosae_cache": [
        {"errors"}, {"storage"}, {"format"}, {"reading"}, {"views", "torch_views"}, {"store"}, {"joined_store"},
        {"creation", "shard_data"}, {"writer"}, {"verify"},
    ],
    "cytosae_pipeline": [
        {"errors"}, {"config", "assets"}, {"runtime"}, {"workspace"}, {"images"}, {"building"}, {"importing"},
        {"training", "statistics"}, {"evaluation", "rating"}, {"export"}, {"report"}, {"atlas"}, {"demo"}, {"api"},
        {"plot"}, {"cli"}, {"__main__"},
    ],
}  # fmt: skip
"""Rooms of each package, lowest first; those of one set do not know each other. CONTRIBUTING.md describes them."""

REPORT = [{"data"}, {"measures"}, {"records"}, {"figures", "explore"}, {"rating", "static"}]
"""The same inside `cytosae_pipeline.report`."""


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> Iterator[str]:
    """Modules of ours that a module imports anywhere, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole
                elif node.module in MODULES:
                    yield node.module


IMPORTS = {name: set(_imports(path)) - {name} for name, path in MODULES.items()}


def _levels(order: list[set[str]]) -> dict[str, int]:
    return {room: level for level, rooms in enumerate(order) for room in rooms}


def _climbers(prefix: str, order: list[set[str]]) -> list[str]:
    """Imports from a room into one that is not below it."""
    level, found = _levels(order), []
    for name, imported in IMPORTS.items():
        here = name.removeprefix(f"{prefix}.").split(".")[0]
        if not name.startswith(f"{prefix}."):
            continue
        for other in sorted(imported):
            there = other.removeprefix(f"{prefix}.").split(".")[0]
            if other.startswith(f"{prefix}.") and there != here and not level[there] < level[here]:
                found.append(f"{name} -> {other}")
    return found


@pytest.mark.parametrize("package", SOURCES)
def test_rooms_import_only_rooms_below_them(package):
    rooms = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")}
    assert rooms == set(_levels(ORDER[package]))
    assert _climbers(package, ORDER[package]) == []


def test_rooms_of_the_report_import_only_rooms_below_them():
    prefix = "cytosae_pipeline.report"
    assert {name.split(".")[2] for name in MODULES if name.startswith(f"{prefix}.")} == set(_levels(REPORT))
    assert _climbers(prefix, REPORT) == []


def test_no_module_is_part_of_a_circle():
    # Raises CycleError, naming the modules, if there is one.
    tuple(TopologicalSorter(IMPORTS).static_order())


def test_the_packages_know_each_other_in_one_direction():
    for name, imported in IMPORTS.items():
        if not name.startswith("cytosae_pipeline"):
            package = name.split(".")[0]
            assert {other.split(".")[0] for other in imported} <= {package}, name


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for order in (*ORDER.values(), REPORT):
        for rooms in order:
            for room in rooms:
                assert f"`{room}" in text, room


def test_no_exported_function_is_named_like_a_module_beside_it():
    for name, path in MODULES.items():
        siblings = {other.rpartition(".")[2] for other in MODULES if other.rpartition(".")[0] == name}
        tree = ast.parse(path.read_text())
        exported = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and path.name == "__init__.py"
            for alias in node.names
        }
        assert not siblings & (exported | imported), name
