"""Documents that promise something about the code are compared with it."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

import cytosae_pipeline
from cytosae.sae.registry import ARCHITECTURES
from cytosae.training.lr_schedule import SCHEDULERS
from cytosae_cache.creation import create_store
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.config.layout import parse_layout
from tests.support.stores import PROVENANCE, make_activations, make_spec, make_store, make_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def _rows(text: str, heading: str) -> dict[str, list[str]]:
    """The table under a header line, by the name in its first cell."""
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("store_dtype", ["float16", "int8"])
def test_the_store_format_is_as_documented(tmp_path, store_dtype):
    spec = make_spec(store_dtype=store_dtype)
    activations = make_activations(11).astype(np.float16)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[3], spec=spec)
    text = (ROOT / "docs" / "store-format.md").read_text()
    arrays = _rows(text, "| array |")
    if store_dtype == "int8":
        arrays |= _rows(text, "| array of int8 stores |")
    found = {
        str(path.parent.relative_to(store.path)): path
        for path in store.path.rglob("zarr.json")
        if (path.parent / "c").exists()
    }
    assert set(arrays) == set(found)
    sizes = {"N": 11, "T": 5, "D": 8, "M": 3}
    for name, (shape, dtype, _) in arrays.items():
        array = store.zarr_array() if name == "activations" else None
        actual = array if array is not None else store.column(name)
        expected = tuple(eval(part, sizes) for part in shape.strip("(),").split(","))
        assert actual.shape == expected, name
        assert dtype == ("string" if actual.dtype.kind == "T" else actual.dtype.name), name
    assert set(_rows(text, "| key |")) == {
        "format",
        "complete",
        "spec",
        "files",
        "contents",
        "digest",
        *Provenance.__dataclass_fields__,
    }
    assert set(_rows(text, "| field of the spec |")) == set(StoreSpec.__dataclass_fields__)
    assert ActivationStore.open(store.path).complete


def test_further_columns_are_as_documented(tmp_path):
    columns = {"x": np.arange(3), "age": np.zeros(3), "site": np.array(["S"] * 3, dtype=np.dtypes.StringDType())}
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(3), PROVENANCE, shard_images=3, columns=columns)
    rows = _rows((ROOT / "docs" / "store-format.md").read_text(), "| array of stores with K further columns |")
    assert set(rows) == {"images/columns/names", "images/columns/<k>"}
    folder = store.path / "images" / "columns"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"names", "0", "1", "2"}
    types = {"string" if column.dtype.kind == "T" else column.dtype.name for column in store.image_columns.values()}
    assert types == set(re.split(", | or ", rows["images/columns/<k>"][1]))


def test_every_layout_of_the_table_is_one():
    names = _rows((ROOT / "docs" / "data-sets.md").read_text(), "| `--layout` |")
    assert len(names) > 8
    for name in names:
        assert parse_layout(name.strip("'")) is not None


def _code(path: Path) -> Iterator[str]:
    """Lines of code in a document: indented or fenced in Markdown, and Markdown cells of notebooks."""
    texts = [path.read_text()]
    if path.suffix == ".ipynb":
        cells = json.loads(texts[0])["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for text in texts:
        is_fenced = False
        for line in text.splitlines():
            is_fenced ^= line.startswith("```")
            if is_fenced or line.startswith("    "):
                yield line


def test_every_command_in_the_documents_is_one_that_the_program_has():
    n_commands = 0
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCUMENTS, *NOTEBOOKS]:
        for line in _code(path):
            match = re.search(rf"cytosae-cache ((?:{'|'.join(cli.commands)})\b.*)", line)
            if match is None:
                continue
            n_commands += 1
            words = shlex.split(match[1].rstrip("\\"), comments=True)
            command = cli.commands[words[0]]
            known = {option for item in command.params if isinstance(item, click.Option) for option in item.opts}
            for word in words[1:]:
                if word.startswith("--"):
                    assert word.replace("_", "-") in known, (path.name, line)
    assert n_commands > 60


def test_the_documents_name_every_verb():
    table = _rows((ROOT / "docs" / "command-line.md").read_text(), "| verb |")
    verbs = {name.strip("` ") for cell in table for name in cell.split(",")}
    assert verbs == set(cli.commands)


def test_the_readme_and_the_index_name_every_document():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    for path in [*DOCUMENTS, *NOTEBOOKS]:
        if path.stem not in ("index", "api", "gallery"):
            assert f"]({path.relative_to(ROOT).as_posix()})" in readme, path
        if path.stem != "index":
            assert f"\n{path.relative_to(ROOT / 'docs').with_suffix('').as_posix()}\n" in index, path


def test_every_link_to_a_file_leads_to_one():
    for path in [*ROOT.glob("*.md"), *DOCUMENTS, *NOTEBOOKS]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).is_file(), (path.name, target)


def test_every_document_that_the_code_names_exists():
    named = {name for text in _messages() for name in re.findall(r"docs/[\w-]+\.md", text)}
    assert len(named) > 4
    for name in named:
        assert (ROOT / name).is_file(), name


def _messages() -> Iterator[str]:
    """Every text in the source; NUL stands for what is filled in."""
    for folder in ("cytosae", "cache", "pipeline"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_of_the_index_of_errors_is_one_of_the_code():
    texts = list(_messages())
    quoted = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(quoted) > 40
    for message in quoted:
        parts = message.split("…")
        assert any(all(part in text for part in parts) for text in texts), message


def test_notebooks_are_stored_without_outputs():
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        for cell in notebook["cells"]:
            assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None), path


def test_the_citation_has_the_version_of_the_package():
    assert f"\nversion: {cytosae_pipeline.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_fault_of_the_table_has_its_test():
    names = re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(names) > 20
    for file, name in names:
        assert f"\ndef {name}(" in next((ROOT / "tests").rglob(file)).read_text(), f"{file}::{name}"


def test_the_architectures_are_as_documented():
    text = (ROOT / "docs" / "training.md").read_text()
    assert set(_rows(text, "| `--arch` |")) == set(ARCHITECTURES)
    for name in SCHEDULERS:
        assert f"`{name}`" in text


def test_all_known_encoders_are_documented():
    from cytosae.backbones.registry import ARCHITECTURES as ENCODERS

    text = (ROOT / "docs" / "encoders.md").read_text()
    section = text[text.index("## Known names") : text.index("## Compared with")]
    named = set(re.findall(r"`([a-z0-9_]+)`", section)) - {"_reg", "_quickgelu"}
    named |= {f"{name}_reg" for name in named if name.startswith("dinov2_")}
    named |= {f"{name}_quickgelu" for name in named if name.startswith("clip_")}
    assert named == set(ENCODERS)
