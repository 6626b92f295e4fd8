"""The verbs that write, on a small sample, as stages of the fault campaign."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cytosae_pipeline.demo.cohort import plan_cohort, write_cohort
from tests.support.fault_trials import Stage
from tests.support.nursery import Nursery

IMPORTS = (
    "cytosae_pipeline.training.loop", "cytosae_pipeline.training.sweep", "cytosae_pipeline.statistics.verbs",
    "cytosae_pipeline.export.run", "cytosae_pipeline.report.static", "cytosae_pipeline.importing.store", "h5py",
    "cytosae_pipeline.demo.run", "anndata.io", "pyarrow.parquet", "scipy.sparse", "sklearn.linear_model",
)  # fmt: skip
"""Modules that the commands need, imported once."""

Prepare = Callable[[Path, Nursery], None]
Command = Callable[[Path], Sequence[object]]

_FEATURES = (
    "*/custom/cells/features.json", "*/custom/cells/*.pt", "*/custom/cells/images.csv", "*/custom/cells/labels.txt",
)  # fmt: skip


def make_images(root: Path, nursery: Nursery, *, size: int = 64) -> None:
    """Drawn cells of six patients in three groups; another size gives other pixels under the same names."""
    write_cohort(
        root / "dataset" / "cells", plan_cohort(seed=0, n_patients_per_group=2, cells_per_patient=4), size=size
    )


def _run(root: Path, nursery: Nursery, command: Command) -> None:
    ended = nursery.run(*command(root))
    if ended.code != 0:
        raise RuntimeError(ended.output)


def _build(*more: object) -> Command:
    return lambda root: [
        "build", "--root_dir", root, "--dataset_name", "cells", "--images", root / "dataset/cells/manifest.csv",
        "--model_path", "embedded", "--workers", 0, "--shard_images", 4, *more,
    ]  # fmt: skip


def _import(*more: object) -> Command:
    return lambda root: [
        "import", root / "x.npy", "--root_dir", root, "--dataset_name", "rows", "--model_name", "m",
        "--shard_images", 8, *more,
    ]  # fmt: skip


def _train(*more: object) -> Command:
    return lambda root: [
        "train", "--root_dir", root, "--dataset_name", "cells", "--expansion_factor", 2, "--batch_size", 8,
        "--total_training_tokens", 96, "--lr_warm_up_steps", 2, "--n_checkpoints", 3, "--wandb_log_frequency", 1,
        "--precision", "fp32", *more,
    ]  # fmt: skip


def _read(verb: str, *more: object, run: str = "r") -> Command:
    return lambda root: [verb, "--root_dir", root, "--dataset_name", "cells", "--sae_path", run, *more]


def _out(command: Command, name: str) -> Command:
    return lambda root: [*command(root), "--out", root / name]


def _with_rows(root: Path, nursery: Nursery, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    np.save(root / "x.npy", rng.standard_normal((40, 16)).astype(np.float32))


def _with_old_rows(root: Path, nursery: Nursery) -> None:
    _with_rows(root, nursery)
    _run(root, nursery, _import())
    _with_rows(root, nursery, seed=1)


def _with_store(root: Path, nursery: Nursery) -> None:
    make_images(root, nursery)
    _run(root, nursery, _build())


def _with_old_store(root: Path, nursery: Nursery) -> None:
    _with_store(root, nursery)
    make_images(root, nursery, size=48)


def _with_grid(root: Path, nursery: Nursery) -> None:
    _with_store(root, nursery)
    (root / "grid.toml").write_text("l1_coefficient = [0.0005, 0.001]\n")


def _with_saes(root: Path, nursery: Nursery) -> None:
    _with_store(root, nursery)
    for run, seed in (("r", 1), ("s", 2)):
        _run(root, nursery, _train("--run_name", run, "--seed", seed))


def _after(*commands: Command) -> Prepare:
    """Two autoencoders, and what further commands make."""

    def prepare(root: Path, nursery: Nursery) -> None:
        _with_saes(root, nursery)
        for command in commands:
            _run(root, nursery, command)

    return prepare


def _tables(name: str, *more: object) -> Command:
    return _out(_read("export", "--format", name, *more), "tables")


def _sae(name: str, target: str, run: str, *more: object) -> Command:
    return lambda root: [
        "export", "--root_dir", root, "--sae_path", run, "--format", name, "--out", root / target, *more,
    ]  # fmt: skip


_SAVE_NOTES = """
from pathlib import Path
from cytosae_pipeline.statistics.notes import save_note
try:
    for latent in range({n}):
        save_note(Path({path!r}), 9, latent, {{"name": {text!r}, "note": ""}})
except OSError as error:
    print("Error:", error)
    raise SystemExit(1)
"""


def _notes(text: str, n: int = 1) -> Command:
    return lambda root: ["-c", _SAVE_NOTES.format(path=str(root / "latent_notes.json"), text=text, n=n)]


_DEMO = """
from pathlib import Path
from cytosae_pipeline.demo import run
run._N_PATIENTS_PER_GROUP, run._N_CELLS_PER_PATIENT, run._N_LATENTS = 3, 4, 6
try:
    run.run_demo(Path({path!r}))
except (OSError, ValueError) as error:
    print("Error:", error)
    raise SystemExit(1)
"""


def _demo(root: Path) -> Sequence[object]:
    """A smaller one; the real one takes a minute."""
    return ["-c", _DEMO.format(path=str(root))]


_OLD_TABLES = (_read("features", "--top_k", 3), _read("patients"))
_NEW_FEATURES = _read("features", "--top_k", 5)

STAGES = (
    Stage("build", make_images, _build()),
    Stage("build --workers 2", make_images, _build("--workers", 2)),
    Stage("build --overwrite", _with_old_store, _build("--overwrite"), ("out/activations/cells/*.zarr",)),
    Stage("import", _with_rows, _import()),
    Stage("import --overwrite", _with_old_rows, _import("--overwrite"), ("out/activations/rows/*.zarr",)),
    Stage("train", _with_store, _train("--run_name", "r")),
    Stage("train --sweep", _with_grid, lambda root: [*_train()(root), "--sweep", root / "grid.toml"]),
    Stage(
        "features", _after(_read("features", "--top_k", 3)), _NEW_FEATURES,
        tuple(f"out/feature_data/{name}" for name in _FEATURES),
    ),
    Stage(
        "classes", _after(_read("classes")), _read("classes", "--threshold", 0.3),
        ("out/feature_data/*/custom/cells/class*",),
    ),
    Stage(
        "patients", _after(_read("patients")), _read("patients", "--threshold", 0.3),
        ("out/feature_data/*/custom/cells/patient*", "out/feature_data/*/custom/cells/cls_sae_cnt.npy"),
    ),
    Stage("export csv", _after(*_OLD_TABLES), _tables("csv")),
    Stage(
        "export csv --overwrite", _after(*_OLD_TABLES, _tables("csv"), _NEW_FEATURES), _tables("csv", "--overwrite"),
        ("tables",),
    ),
    Stage("export parquet", _after(*_OLD_TABLES), _tables("parquet")),
    Stage(
        "export anndata --overwrite", _after(*_OLD_TABLES, _tables("anndata"), _NEW_FEATURES),
        _tables("anndata", "--overwrite"), ("tables",),
    ),
    Stage(
        "export anndata as zarr", _after(*_OLD_TABLES), _tables("anndata", "--anndata_as", "zarr"),
    ),
    Stage(
        "export saelens --overwrite", _after(_sae("saelens", "x", "r")), _sae("saelens", "x", "s", "--overwrite"),
        ("x",),
    ),
    Stage(
        "export safetensors --overwrite", _after(_sae("safetensors", "x.safetensors", "r")),
        _sae("safetensors", "x.safetensors", "s", "--overwrite"), ("x.safetensors",),
    ),
    Stage(
        "export reference --overwrite", _after(_sae("reference", "x.pt", "r")),
        _sae("reference", "x.pt", "s", "--overwrite"), ("x.pt",),
    ),
    Stage(
        "report", _after(*_OLD_TABLES, _out(_read("report", "--n_latents", 2, "--masking_images", 0), "page")),
        _out(_read("report", "--n_latents", 3, "--masking_images", 0), "page"), ("page",),
    ),
    Stage(
        "explore (notes)", lambda root, nursery: _run(root, nursery, _notes("old")), _notes("new"),
        ("latent_notes.json",),
    ),
    Stage("explore (six notes)", lambda root, nursery: None, _notes("new", 6)),
    Stage("demo", lambda root, nursery: None, _demo),
)  # fmt: skip
