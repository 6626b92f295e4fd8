"""The one place that knows the layout of `<root>/dataset` and `<root>/out`."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cytosae_pipeline.errors import UserError

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "cytosae_tiny14.pth"
"""Checkpoint of the small vision transformer in the package, which the word `embedded` stands for."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_MAX_LETTERS = 200
"""Longest name of data sets in a folder's name; file systems allow 255 bytes, and more may follow."""


@dataclass(frozen=True)
class Workspace:
    """Paths below one root folder."""

    root: Path
    """Folder that contains dataset/ and out/."""

    def dataset_dir(self, dataset: str) -> Path:
        """Images of a data set, unless `--images` names another folder."""
        return self.root / "dataset" / safe_name(dataset, "data set")

    def stores_dir(self, dataset: str) -> Path:
        """Activation stores of a data set."""
        return self.activations_dir / safe_name(dataset, "data set")

    @property
    def activations_dir(self) -> Path:
        """Activation stores of all data sets."""
        return self.root / "out" / "activations"

    @property
    def checkpoints_dir(self) -> Path:
        """Training runs."""
        return self.root / "out" / "checkpoints"

    @property
    def builds_dir(self) -> Path:
        """Records of how stores were built."""
        return self.root / "out" / "builds"

    def datasets_with_stores(self) -> list[str]:
        """Data sets that have a folder of activation stores, sorted."""
        return sorted(path.name for path in self.activations_dir.glob("*") if path.is_dir())

    def store_path(self, dataset: str, spec_hash: str) -> Path:
        """One activation store."""
        return self.stores_dir(dataset) / f"{spec_hash}.zarr"

    def list_path(self, store: Path | str, dataset: str, what: Literal["skipped", "duplicates"]) -> Path:
        """List of some of a store's images, beside the store; that of a remote store stays on this machine."""
        if isinstance(store, Path):
            return store.with_name(f"{store.name}.{what}.csv")
        return self.stores_dir(dataset) / f"{PurePosixPath(store).name}.{what}.csv"

    def run_dir(self, run: str) -> Path:
        """One training run."""
        return self.checkpoints_dir / safe_name(run, "run")

    def feature_dir(self, sae_path: Path, vit_type: str, dataset: str) -> Path:
        """Statistics of one autoencoder on one data set, or on several that are joined."""
        folder = f"sae_{safe_name(run_of_sae(sae_path), 'run')}"
        name = short_name(safe_name(dataset, "data set"))
        return self.root / "out" / "feature_data" / folder / safe_name(vit_type, "vit_type") / name


def resolve_model_path(path: Path | None) -> Path | None:
    """The checkpoint's path, with the word `embedded` resolved."""
    return EMBEDDED_MODEL if path == Path("embedded") else path


def run_of_sae(sae_path: Path) -> str:
    """Name of the run of an autoencoder's file: its folder if that is a run's folder, else the file's stem."""
    path = sae_path.resolve()
    if (path.parent / "config.json").is_file() or path.parent.parent.name == "checkpoints":
        return path.parent.name
    return sae_stem(path)


def sae_stem(sae_path: Path) -> str:
    """Name of an autoencoder without its ending; the folders of other programs, such as `layers.5`, have none."""
    return sae_path.name if sae_path.is_dir() and sae_path.suffix != ".saelens" else sae_path.stem


def final_name(model_name: str, block: str, module_name: str, n_latents: int) -> str:
    """File name of a finished autoencoder, as the reference names it."""
    return f"final_sparse_autoencoder_{file_part(model_name)}_{block}_{module_name}_{n_latents}.pt"


def checkpoint_name(n_images: int, model_name: str, block: str, module_name: str, n_latents: int) -> str:
    """File name of an intermediate checkpoint, as the reference names it: images seen come first."""
    return f"{n_images}_sparse_autoencoder_{file_part(model_name)}_{block}_{module_name}_{n_latents}.pt"


def file_part(name: str) -> str:
    """A name turned into part of a file name: a hub name's slash becomes a dash."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", name)


def short_name(name: str) -> str:
    """The name, if a folder can have it; of a longer one, as of many data sets, its beginning and a digest."""
    if len(name) <= _MAX_LETTERS:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: _MAX_LETTERS - len(digest) - 1]}-{digest}"


def safe_name(name: str, what: str) -> str:
    """The name, if it is safe as the name of a folder.

    Raises:
        UserError: If it contains anything but letters, digits and `. _ + -`, or begins with a dot.
    """
    if not _SAFE.fullmatch(name):
        raise UserError(f"{what} name {name!r} cannot be the name of a folder: use letters, digits and . _ + - only")
    return name
