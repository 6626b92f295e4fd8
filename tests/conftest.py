"""Fixtures shared by all tests: everything is small, made on the spot and CPU only."""

import os
import tempfile

# What is measured of the machine is remembered for this run of the tests alone, here and in child processes.
_CACHE = tempfile.TemporaryDirectory(prefix="cytosae-cache-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Before torch is imported, here and in child processes: on tiny tensors threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cytosae_pipeline.cli.app import cli
from tests.support.pictures import LABELS, LAYOUT, write_pictures, write_vit


@pytest.fixture
def test_data() -> Path:
    """The folder of real cell crops and the real ViT, or a skip that says how to provide it."""
    value = os.environ.get("CYTOSAE_TEST_DATA")
    if not value:
        pytest.skip("needs real data: set CYTOSAE_TEST_DATA to the folder with bccd_cells/ and vit/")
    return Path(value)


@dataclass(frozen=True)
class Workplace:
    """A root folder with images and a checkpoint, and the command line run in it."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "dataset" / "toy"

    @property
    def vit(self) -> Path:
        return self.root / "vit.pth"

    def run(self, verb: str, *arguments: object, code: int = 0) -> Result:
        return self.run_plain(verb, "--root_dir", self.root, *arguments, code=code)

    def run_plain(self, *arguments: object, code: int = 0) -> Result:
        command = [*map(str, arguments)]
        result = CliRunner().invoke(cli, command, catch_exceptions=True)
        if result.exit_code != code:
            raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
        return result

    def build(self, *arguments: object, code: int = 0) -> Result:
        is_toy = (self.images / LABELS[1] / "p1").is_dir() and not (self.images / "manifest.csv").exists()
        layout = ["--layout", LAYOUT] if is_toy and not {"--layout", "--images"} & set(arguments) else []
        return self.run(
            "build", "--dataset_name", "toy", "--model_path", self.vit, *layout, "--workers", 0, "--shard_images", 5,
            *arguments, code=code,
        )  # fmt: skip

    def train(self, *arguments: object, code: int = 0) -> Result:
        return self.run(
            "train", "--dataset_name", "toy", "--expansion_factor", 4, "--batch_size", 4, "--total_training_tokens", 60,
            "--lr_warm_up_steps", 3, "--wandb_log_frequency", 5, "--n_checkpoints", 2,
            "--precision", "fp32", *arguments, code=code,
        )  # fmt: skip

    @property
    def store(self) -> Path:
        (path,) = (self.root / "out" / "activations" / "toy").glob("*.zarr")
        return path

    def sae(self, run: str = "r") -> Path:
        (path,) = (self.root / "out" / "checkpoints" / run).glob("final_*.pt")
        return path

    def features(self, run: str = "r") -> Path:
        return self.root / "out" / "feature_data" / f"sae_{run}" / "custom" / "toy"


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory) -> dict[str, Path]:
    """Three stages of a workspace, made once: images and checkpoint; a store; a trained autoencoder."""
    stages = {}
    root = tmp_path_factory.mktemp("images")
    write_pictures(root / "dataset" / "toy")
    write_vit(root / "vit.pth")
    stages["images"] = root
    for stage, make in (("store", lambda place: place.build()), ("sae", lambda place: place.train("--run_name", "r"))):
        copy = tmp_path_factory.mktemp(stage) / "root"
        shutil.copytree(root, copy)
        make(Workplace(copy))
        stages[stage] = root = copy
    return stages


def _copy(pristine: Path, tmp_path: Path) -> Workplace:
    root = tmp_path / pristine.parent.name / "root"
    shutil.copytree(pristine, root)
    return Workplace(root)


@pytest.fixture
def with_images(_pristine, tmp_path) -> Workplace:
    return _copy(_pristine["images"], tmp_path)


@pytest.fixture
def with_store(_pristine, tmp_path) -> Workplace:
    return _copy(_pristine["store"], tmp_path)


@pytest.fixture
def with_sae(_pristine, tmp_path) -> Workplace:
    return _copy(_pristine["sae"], tmp_path)


@dataclass(frozen=True)
class Demo:
    """What `cytosae-cache demo` made and said."""

    root: Path
    output: str

    @property
    def report(self) -> Path:
        (path,) = self.root.glob("out/feature_data/*/custom/*/report")
        return path


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Demo:
    """The demo, run once for all tests that look at it."""
    root = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(cli, ["demo", "--root_dir", str(root)])
    assert result.exit_code == 0, result.output
    return Demo(root, result.output)


@pytest.fixture
def messages(caplog):
    """A function that returns the package's messages since the last call, one per line."""
    caplog.set_level("INFO", logger="cytosae_pipeline")

    def take() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return text

    return take
