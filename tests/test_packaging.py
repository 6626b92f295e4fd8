"""What gets installed: our three packages, whole, and nothing with a generic name."""

import ast
import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "cytosae": "cytosae",
    "cytosae_cache": "cache/cytosae_cache",
    "cytosae_pipeline": "pipeline/cytosae_pipeline",
}


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def _modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_setup_cfg_lists_exactly_the_packages_on_disk():
    listed = set(_setup()["options"]["packages"].split())
    found = set()
    for name, folder in SOURCES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == found
    assert not (ROOT / "cache" / "__init__.py").exists()
    assert not (ROOT / "pipeline" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from nothing else."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    # From a copy: setuptools writes into the folder, and tests of several processes would disturb each other.
    for item in ROOT.iterdir():
        if item.is_file():
            shutil.copy(item, source)
    for name in ("benchmarks", "cache", "cytosae", "docs", "pipeline", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> list[str]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_source_distribution_contains_what_the_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    needed = {"LICENSE", "constraints.txt", "pyproject.toml", "setup.cfg"}
    for folder in ("benchmarks", "docs", "scripts", "tests"):
        files = [item for item in (ROOT / folder).rglob("*") if item.is_file() and "__pycache__" not in item.parts]
        needed |= {item.relative_to(ROOT).as_posix() for item in files}
    assert needed <= packed


def test_the_wheel_holds_nothing_generic(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(SOURCES)


def test_the_wheel_holds_every_module_and_data_file(wheel):
    for name, folder in SOURCES.items():
        packed = {
            item.removeprefix(f"{name}/") for item in wheel if item.startswith(f"{name}/") and item.endswith(".py")
        }
        assert packed == _modules(ROOT / folder)
        assert f"{name}/py.typed" in wheel
    assert "cytosae_pipeline/assets/cytosae_tiny14.pth" in wheel


def test_the_wheel_holds_the_whole_page_and_no_development_files(wheel):
    folder = "cytosae_pipeline/report/"
    packed = {name.removeprefix(folder) for name in wheel if name.startswith(folder) and not name.endswith(".py")}
    source = ROOT / "pipeline" / folder
    pages = [source / "page", source / "rating" / "page"]
    on_disk = {path.relative_to(source).as_posix() for page in pages for path in page.rglob("*") if path.is_file()}
    assert packed == on_disk
    assert {"rating/page/index.html", "rating/page/rate.js", "rating/page/rate.css"} <= packed
    assert {Path(name).parts[1] for name in packed if name.startswith("page/")} == {
        "index.html",
        "app.js",
        "core",
        "charts",
        "views",
    }


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_arrows_run_one_way():
    forbidden = {
        "cytosae": {"cytosae_cache", "cytosae_pipeline", "zarr", "click", "wandb", "dask"},
        "cytosae_cache": {"cytosae", "cytosae_pipeline", "torch", "click", "wandb", "transformers"},
        "cytosae_pipeline": set(),
    }
    for name, folder in SOURCES.items():
        for path in (ROOT / folder).rglob("*.py"):
            # Data sets of torch are made when asked for; nothing else of the cache knows torch.
            allowed = {"torch"} if path.name in ("store.py", "torch_views.py") else set()
            assert not _imports(path) & (forbidden[name] - allowed), path


def test_every_dependency_is_used_and_every_import_is_declared():
    options = _setup()["options"]
    declared = {line.split(">")[0].strip() for line in options["install_requires"].split("\n") if line.strip()}
    used = {name for folder in SOURCES.values() for path in (ROOT / folder).rglob("*.py") for name in _imports(path)}
    third_party = {name for name in used if name not in sys.stdlib_module_names and name not in SOURCES}
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "umap": "umap-learn"}
    # Imported where they are asked for; some extras, like s3fs, are for libraries of ours alone.
    extras = {
        line.split(">")[0].strip()
        for extra, lines in _setup()["options.extras_require"].items()
        if extra != "test"
        for line in lines.split()
    }
    found = {names.get(name, name) for name in third_party}
    assert declared <= found
    assert found <= declared | extras


def test_no_module_is_too_long():
    long = {
        str(path): count
        for folder in SOURCES.values()
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert not long
