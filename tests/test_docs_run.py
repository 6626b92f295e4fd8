"""What the documents tell users to type is typed, and one tutorial runs in a real kernel of Jupyter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "cache"), str(ROOT / "pipeline")])


@pytest.fixture
def clone(tmp_path, demo_run) -> Path:
    """A folder in which the demo has run, with an environment `.venv` that can be activated."""
    shutil.copytree(demo_run.root, tmp_path / "cytosae-demo")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    program = programs / "cytosae-cache"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{SOURCES}" exec "{sys.executable}" -m cytosae_pipeline "$@"\n')
    program.chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return tmp_path


def _typed(document: str, until: str) -> str:
    """The indented commands of a document up to a heading; of the installation, only what follows it."""
    text = (ROOT / document).read_text()
    lines = re.findall(
        r"^    (.+)$", re.sub(r"```.*?```", "", text[: text.index(until)], flags=re.DOTALL), re.MULTILINE
    )
    assert "pip install -c constraints.txt ." in lines[0]
    ran = lines[0].split("constraints.txt .")[1].removeprefix(" && ")
    return "\n".join([ran, *(line for line in lines[1:] if ".venv-dev" not in line)])


def _type(folder: Path, commands: list[str], text: str) -> str:
    environment = {**os.environ, "PYTHONPATH": SOURCES, "MPLBACKEND": "agg"}
    done = subprocess.run(
        [*commands], input=text, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _python(document: str) -> str:
    """The first block of Python in a document."""
    match = re.search(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.slow
def test_readme_and_quick_start_run_as_typed(clone):
    readme = _typed("README.md", "## Your own images")
    assert readme.count("cytosae-cache ") == 4
    assert "the planted groups are recovered" in _type(clone, ["bash", "-e"], readme)
    quick_start = _typed("docs/quick-start.md", "## Your own images")
    assert set(re.findall(r"cytosae-cache (\w+)", quick_start)) > {
        "demo",
        "build",
        "train",
        "evaluate",
        "features",
        "list",
    }
    # The demo was run by the commands of README.md already.
    assert "first" in _type(clone, ["bash", "-e"], quick_start.replace("\ncytosae-cache demo\n", "\n"))
    assert re.fullmatch(r"\[(\d+, ){4}\d+\]\n", _type(clone, [sys.executable], _python("README.md")))
    assert re.fullmatch(r"\[(\d+, ){4}\d+\]\n", _type(clone, [sys.executable], _python("docs/quick-start.md")))
    shown = _python("docs/index.md") + "\nprint(tuple(acts.shape), stats.n_active > 430)"
    assert _type(clone, [sys.executable], shown) == "(257, 1024) True\n"
    assert _python("docs/index.md").splitlines()[:-1] == _python("README.md").splitlines()[:-1]


@pytest.mark.slow
def test_a_tutorial_runs_in_a_kernel_with_its_progress_bars(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    notebook = nbformat.read(ROOT / "docs" / "tutorials" / "images_to_latents.ipynb", as_version=4)
    check = "import asyncio\nassert asyncio.get_running_loop().is_running()"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(check))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "".join(output.text for output in outputs if output.output_type == "stream")
    # With ipywidgets the bars are widgets, without it they are text.
    n_widgets = sum("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert n_widgets > 3 or ("build: 100%" in shown and "train: 100%" in shown)
    assert "Warning" not in shown
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "features" / "features.json").is_file()
