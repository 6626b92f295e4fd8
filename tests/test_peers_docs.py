"""docs/comparison.md: each cell's evidence exists in the program that it is about."""

import os
import re
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.campaign.environments import RIVALS, environment_dir

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "comparison.md").read_text()
ENVIRONMENTS = os.environ.get("CYTOSAE_TEST_PEERS")
OURS = "cytosae-cache"
NAMES = {"SAELens": "saelens", "cytosae-cache": OURS}
PACKAGES = {"saelens": "sae_lens"}


def _table(heading: str) -> list[list[str]]:
    lines = TEXT[TEXT.index(f"\n{heading}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


FEATURES = [row[0] for row in _table("| | SAELens |")]
EVIDENCE = _table("| feature | in | found in |")


def _sources(program: str) -> dict[str, str]:
    """The texts of a program's modules, by their path."""
    if program == OURS:
        folders = [ROOT / "cytosae", ROOT / "cache" / "cytosae_cache", ROOT / "pipeline" / "cytosae_pipeline"]
    else:
        if not ENVIRONMENTS:
            pytest.skip("CYTOSAE_TEST_PEERS names no folder of environments")
        (site,) = environment_dir(program, Path(ENVIRONMENTS)).glob("lib/python*/site-packages")
        folders = [site / PACKAGES.get(program, program)]
    return {
        path.relative_to(folder.parent).as_posix(): path.read_text(errors="replace")
        for folder in folders
        for path in folder.rglob("*.py")
    }


def test_every_cell_of_the_table_of_features_has_its_evidence():
    features = [row[0] for row in EVIDENCE if row[0]]
    assert features == FEATURES
    programs = [row[1] for row in EVIDENCE]
    assert programs == ["SAELens", "dictionary_learning", "sparsify", "overcomplete", OURS] * len(FEATURES)


def test_versions_are_those_that_are_installed():
    rows = {row[1].split("`")[1]: row[2] for row in _table("| program | package |")}
    assert rows == {rival.package: rival.requirements[0].split("==")[1] for rival in RIVALS.values()}


def test_commands_in_the_document_have_options_that_exist():
    lines = re.findall(r"^ {4}python -m benchmarks\.peers (.*)$", TEXT, re.MULTILINE)
    assert len(lines) == 12
    for line in lines:
        peers.parse(line.split())


@pytest.mark.parametrize("program", [*RIVALS, OURS])
def test_evidence_is_found(program):
    sources = _sources(program)
    for _, name, text in EVIDENCE:
        if NAMES.get(name, name) != program:
            continue
        quoted = re.findall(r"`([^`]*)`", text)
        found = [re.fullmatch(r"([\w/]+\.py):(.*)", item) for item in quoted]
        for item, reference in zip(quoted, found, strict=True):
            if reference is not None:
                assert reference[2] in sources[reference[1]], f"{program}: {item}"
            else:
                matches = [path for path, source in sources.items() if re.search(item, source)]
                assert not matches, f"{program}: {item} in {matches}"
