"""Write `format1/`: a small workspace with everything that users keep, and the numbers that it must go on giving.

Its files stand for those on people's disks, so they are never written again by newer code. A new kind of file gets a
folder of its own beside them. Run from the root of the repository, with an empty target:

    PYTHONPATH=.:cache:pipeline SOURCE_DATE_EPOCH=1767225600 OMP_NUM_THREADS=1 python tests/data/make_format1.py TARGET
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from cytosae.formats.checkpoint import load_sae
from cytosae.sae.registry import ARCHITECTURES
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.statistics.notes import LatentNote, write_notes
from tests.support.pictures import write_pictures, write_vit

N_IMAGES = 9
WIDTH = 8
STORES = ("cells", "cells_int8")


def run(root: Path, verb: str, *options: object) -> None:
    result = CliRunner().invoke(cli, [verb, "--root_dir", str(root), *map(str, options)])
    if result.exit_code:
        raise RuntimeError(result.output) from result.exception


def make_workspace(root: Path) -> None:
    write_pictures(root / "dataset" / "cells", N_IMAGES, n_patients=3)
    for path in (root / "dataset").rglob("*.png"):
        if path.name != "broken.png":
            Image.open(path).resize((12, 12)).save(path)
    write_vit(root / "vit.pth", width=WIDTH, depth=3, patch_size=28)
    build = ("--model_path", root / "vit.pth", "--workers", 0, "--shard_images", 4, "--precision", "fp32")
    run(root, "build", "--dataset_name", "cells", *build)
    images = ("--images", root / "dataset" / "cells")
    run(root, "build", "--dataset_name", "cells_int8", *images, *build, "--store-dtype", "int8")
    train = (
        "--dataset_name", "cells", "--batch_size", 4, "--total_training_tokens", 40, "--lr_warm_up_steps", 2,
        "--wandb_log_frequency", 5, "--precision", "fp32", "--device", "cpu",
    )  # fmt: skip
    run(root, "train", *train, "--expansion_factor", 3, "--n_checkpoints", 1, "--run_name", "run")
    (root / "saes").mkdir()
    for arch in ARCHITECTURES:
        k = ("--k", 4) if "k" in ARCHITECTURES[arch].setting_names else ()
        options = ("--arch", arch, *k, "--expansion_factor", 2, "--n_checkpoints", 0, "--run_name", arch)
        run(root, "train", *train, *options)
        (path,) = (root / "out" / "checkpoints" / arch).glob("final_*.pt")
        shutil.copy(path, root / "saes" / f"{arch}.pt")
        shutil.rmtree(path.parent)
    (sae,) = (root / "out" / "checkpoints" / "run").glob("final_*.pt")
    for verb in ("features", "classes", "patients"):
        run(root, verb, "--dataset_name", "cells", "--sae_path", sae, "--device", "cpu", "--precision", "fp32")
    folder = root / "out" / "feature_data" / "sae_run" / "custom" / "cells"
    write_notes(folder / "latent_notes.json", {1: LatentNote(name="granules", note="dark granules, 2 of 3 cells")})
    for path in [*(root / "out").rglob("*.lock"), *(root / "out").rglob("wandb")]:
        path.unlink() if path.is_file() else shutil.rmtree(path)


def find_store(root: Path, name: str) -> Path:
    (path,) = (root / "out" / "activations" / name).glob("*.zarr")
    return path


def describe_store(path: Path) -> dict[str, object]:
    """What a reader of any version must find in a store."""
    with ActivationStore.open(path) as store:
        rows = store.valid_rows
        values = store[rows].astype(np.float64)
        return {
            "spec_hash": store.spec.hash,
            "list_digest": store.provenance.list_digest,
            "spec": store.spec.to_json(),
            "n_images": store.n_images,
            "valid_rows": rows.tolist(),
            "paths": list(store.images.path),
            "labels": list(store.images.label),
            "patients": list(store.images.patient),
            "sums": values.sum(axis=(1, 2)).tolist(),
            "values": values[:, 3, 5].tolist(),
        }


def describe_sae(path: Path, x: torch.Tensor) -> dict[str, object]:
    """What an autoencoder's file must give on activations, float32, shape `(n, T, D)`."""
    sae, cfg = load_sae(path, device=torch.device("cpu"))
    with torch.no_grad():
        acts = sae.encode(x)
        return {
            "arch": cfg["arch"],
            "spec_hash": cfg["spec_hash"],
            "l0": (acts > 0).sum(dim=(1, 2)).tolist(),
            "acts": acts.double().sum(dim=(1, 2)).tolist(),
            "reconstruction": sae.decode(acts).double().sum(dim=(1, 2)).tolist(),
        }


def read_example(root: Path) -> torch.Tensor:
    """The activations that autoencoders are described on."""
    with ActivationStore.open(find_store(root, "cells")) as store:
        return torch.from_numpy(store[[0, 3, 7]]).float()


def describe_workspace(root: Path) -> dict[str, object]:
    stores = {name: describe_store(find_store(root, name)) for name in STORES}
    x = read_example(root)
    return {"stores": stores, "saes": {path.stem: describe_sae(path, x) for path in sorted(root.glob("saes/*.pt"))}}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_workspace(target)
    (target / "numbers.json").write_text(json.dumps(describe_workspace(target), indent=1) + "\n")
