"""The kinds of files that the verbs read, each with a valid example and the commands that read it."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.fault_stages import make_images
from tests.support.mutation_trials import Command, Kind, Prepare
from tests.support.nursery import Nursery

_STORE = "out/activations/cells/*.zarr"
_RUN = "out/checkpoints/r"
_DATA = "out/feature_data/sae_r/custom/cells"
_EMBEDDED = "pipeline/cytosae_pipeline/assets/cytosae_tiny14.pth"


def build(*more: object, images: str = "dataset/cells/manifest.csv", model: object = "embedded") -> Command:
    """`build` of the cells, or of other images or with another encoder below the root folder."""
    return lambda root: [
        "build", "--root_dir", root, "--dataset_name", "cells", "--images", root / images, "--model_path",
        root / model if isinstance(model, Path) else model, "--workers", 0, "--shard_images", 4, *more,
    ]  # fmt: skip


def train(*more: object, images: int = 24) -> Command:
    """`train` of the run `r`."""
    return lambda root: [
        "train", "--root_dir", root, "--dataset_name", "cells", "--expansion_factor", 2, "--batch_size", 8,
        "--total_training_tokens", images, "--lr_warm_up_steps", 2, "--n_checkpoints", 3, "--wandb_log_frequency", 1,
        "--precision", "fp32", "--run_name", "r", *more,
    ]  # fmt: skip


def read_with(verb: str, *more: object, sae: str = "r") -> Command:
    """A verb that reads the store with an autoencoder, by its run's name or its path below the root folder."""
    return lambda root: [
        verb, "--root_dir", root, "--dataset_name", "cells", "--sae_path", root / sae if "/" in sae else sae,
        *(root / word if isinstance(word, Path) else word for word in more),
    ]  # fmt: skip


def _of_store(verb: str, *more: object) -> Command:
    return lambda root: [verb, *sorted(root.glob(_STORE))[:1], *more]


def _list(root: Path) -> list[object]:
    return ["list", "--root_dir", root]


_REPORT = read_with("report", "--n_latents", 2, "--masking_images", 0, "--out", Path("page"))
_EXPORT = read_with("export", "--format", "csv", "--out", Path("tables"))


def _run(root: Path, nursery: Nursery, *commands: Command) -> None:
    for command in commands:
        ended = nursery.run(*command(root))
        if ended.code != 0:
            raise RuntimeError(ended.output)


def _with_picture(root: Path, nursery: Nursery, *, ending: str) -> None:
    """Four pictures in one format."""
    folder = root / "dataset/pictures"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "abcd":
        pixels = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{name}.{ending}")
    (folder / "manifest.csv").write_text("path,label\n" + "".join(f"{name}.{ending},x\n" for name in "abcd"))


def _with_cells(root: Path, nursery: Nursery) -> None:
    make_images(root, nursery)


def _with_store(root: Path, nursery: Nursery) -> None:
    make_images(root, nursery)
    _run(root, nursery, build())
    (root / "grid.toml").write_text('l1_coefficient = [0.0005]\narch = "relu"\nseed = 3\n')


def with_compressed_store(root: Path, nursery: Nursery) -> None:
    """The same with lz4, and without the other formats."""
    make_images(root, nursery)
    _run(root, nursery, build("--compression", "lz4"), train())


def with_sae(root: Path, nursery: Nursery) -> None:
    """Cells, their store, a run, and its autoencoder in three other formats."""
    _with_store(root, nursery)
    _run(root, nursery, train())
    for form, target in (("saelens", "x/y"), ("safetensors", "x/x.safetensors"), ("reference", "x/x.pt")):
        (root / "x").mkdir(exist_ok=True)
        _run(
            root, nursery,
            lambda root, form=form, target=target: [
                "export", "--root_dir", root, "--sae_path", "r", "--format", form, "--out", root / target
            ],
        )  # fmt: skip


def _with_results(root: Path, nursery: Nursery) -> None:
    with_sae(root, nursery)
    _run(root, nursery, read_with("features", "--top_k", 3), read_with("classes"), read_with("patients"))
    notes = {"format": 1, "notes": {"4": {"name": "a name", "note": "a note"}, "9": {"name": "b", "note": ""}}}
    (root / _DATA / "latent_notes.json").write_text(json.dumps(notes, indent=1))


_UNTIL = """
import os, sys, threading, time
sys.argv = ["cytosae-cache", *{arguments!r}]
def end():
    while not all(map(os.path.exists, {paths!r})):
        time.sleep(0.001)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
from cytosae_pipeline.cli.app import main
main()
"""
"""Runs a command and ends it like a kill as soon as some files are there."""


def _with_half_a_run(root: Path, nursery: Nursery) -> None:
    _with_store(root, nursery)
    arguments = list(map(str, train(images=480)(root)))
    paths = [str(root / _RUN / f"training_state{name}.pt") for name in ("", ".before")]
    _run(root, nursery, lambda root: ["-c", _UNTIL.format(arguments=arguments, paths=paths)])
    if not all(Path(path).exists() for path in paths):
        raise RuntimeError("the run ended before it had two states")


def _with_half_a_build(root: Path, nursery: Nursery) -> None:
    make_images(root, nursery)
    nursery.run(*build()(root), kill_at_marks=(root, 2))
    if not list(root.glob(f"{_STORE}/progress/*.json")):
        raise RuntimeError("the build ended before it was killed")


def _with_rows(root: Path, nursery: Nursery) -> None:
    """The same rows in every format of files."""
    import anndata
    import h5py
    import pyarrow
    import pyarrow.parquet
    import torch

    rows = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    labels = [f"l{row % 3}" for row in range(12)]
    np.save(root / "x.npy", rows)
    np.savez(root / "x.npz", embeddings=rows, labels=np.array(labels))
    torch.save({"embeddings": torch.from_numpy(rows)}, root / "x.pt")
    with h5py.File(root / "x.h5", "w") as file:
        file.create_dataset("embeddings", data=rows, chunks=(4, 8), compression="gzip")
    columns = {"embedding": list(rows), "label": labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "x.parquet")
    table = anndata.AnnData(rows)
    table.obs["label"] = labels
    table.write_h5ad(root / "x.h5ad")
    (root / "labels.csv").write_text("path,label\n" + "".join(f"i{row},{labels[row]}\n" for row in range(12)))


def _with_encoders(root: Path, nursery: Nursery) -> None:
    """The embedded network, and a small one as a folder of transformers."""
    from transformers import ViTConfig, ViTModel

    _with_picture(root, nursery, ending="png")
    (root / "vit.pth").write_bytes((Path(__file__).parents[2] / _EMBEDDED).read_bytes())
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(root / "folder")
    (root / "folder/preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )


def _import(name: str, *more: object) -> Command:
    return lambda root: [
        "import", root / name, "--root_dir", root, "--dataset_name", "rows", "--model_name", "m", *more,
    ]  # fmt: skip


def sign(root: Path) -> None:
    """Make the digests of a store right again, as somebody would who wrote it."""
    for store in root.glob(_STORE):
        try:
            record = json.loads((store / "zarr.json").read_text())
            ours = record["attributes"]["cytosae_cache"]
            ours["files"] = {name: hashlib.sha256((store / name).read_bytes()).hexdigest() for name in ours["files"]}
            rest = {name: value for name, value in ours.items() if name != "digest"}
            text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            ours["digest"] = hashlib.sha256(text.encode()).hexdigest()
            (store / "zarr.json").write_text(json.dumps(record))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
            return


def make_kinds() -> Iterator[Kind]:
    """All kinds, those of one workspace after each other."""
    for ending in ("jpg", "png", "tif", "webp", "bmp", "jp2"):
        of_pictures = build(images="dataset/pictures/manifest.csv")
        yield Kind(
            f"picture .{ending}", "bytes", f"dataset/pictures/a.{ending}", _picture_of[ending], {"build": of_pictures},
            is_data=True,
        )  # fmt: skip
    yield Kind("manifest", "csv", "dataset/cells/manifest.csv", _with_cells, {"build": build()}, is_data=True)
    yield from _kinds_of_stores()
    yield from _kinds_of_runs()
    yield from _kinds_of_results()
    yield from _kinds_of_imports()
    yield from _kinds_of_encoders()


_picture_of: dict[str, Prepare] = {
    ending: partial(_with_picture, ending=ending) for ending in ("jpg", "png", "tif", "webp", "bmp", "jp2")
}


def _kinds_of_stores() -> Iterator[Kind]:
    readers = {
        "features": read_with("features"), "verify": _of_store("verify"), "train": train("--run_name", "s"),
        "info": _of_store("info"), "list": _list,
    }  # fmt: skip
    for name, form, file in (
        ("zarr.json", "json", "zarr.json"), ("activations/zarr.json", "json", "activations/zarr.json"),
        ("metadata of a table", "json", "images/path/zarr.json"), ("table", "bytes", "images/path/c/0"),
        ("table of sums", "bytes", "moments/sum/c/0/0"), ("shard", "bytes", "activations/c/0/0/0"),
    ):  # fmt: skip
        yield Kind(f"store: {name}", form, f"{_STORE}/{file}", with_sae, readers)
        if name != "shard":
            yield Kind(
                f"store: {name}, signed again", form, f"{_STORE}/{file}", with_sae, readers, is_data=True, amend=sign
            )
    few = {"features": read_with("features"), "verify": _of_store("verify")}
    yield Kind("store: lz4 shard", "bytes", f"{_STORE}/activations/c/0/0/0", with_compressed_store, few)
    yield Kind(
        "completion mark", "json", f"{_STORE}/progress/*.json", _with_half_a_build,
        {"build": build(), "list": _list},
    )  # fmt: skip
    deep = {
        "verify --deep": lambda root: ["verify", "--root_dir", root, "--dataset_name", "cells", "--deep"],
        "build": build(), "report": _REPORT,
    }  # fmt: skip
    yield Kind("record of a build", "json", "out/builds/*.json", _with_results, deep)
    yield Kind(
        "sweep", "toml", "grid.toml", _with_store,
        {"train --sweep": lambda root: [*train("--run_name", "g")(root), "--sweep", root / "grid.toml"]}, is_data=True,
    )  # fmt: skip


def _kinds_of_runs() -> Iterator[Kind]:
    for name, form, file, sae in (
        (".pt", "zip", f"{_RUN}/final_*.pt", "r"),
        (".safetensors", "safetensors", "x/x.safetensors", "x/x.safetensors"),
        ("of the reference", "zip", "x/x.pt", "x/x.pt"), ("of SAELens: cfg.json", "json", "x/y/cfg.json", "x/y"),
        ("of SAELens: weights", "safetensors", "x/y/sae_weights.safetensors", "x/y"),
    ):  # fmt: skip
        yield Kind(f"autoencoder {name}", form, file, with_sae, {"features": read_with("features", sae=sae)})
    used = {"features": read_with("features"), "list": _list, "train": train()}
    yield Kind("finished run: config.json", "json", f"{_RUN}/config.json", with_sae, used)
    yield Kind("finished run: metrics.jsonl", "json lines", f"{_RUN}/metrics.jsonl", with_sae, used)
    again = {"train": train(images=480), "list": _list}
    for name, form in (
        ("config.json", "json"), ("metrics.jsonl", "json lines"), ("training_state.pt", "zip"),
        ("training_state.before.pt", "zip"),
    ):  # fmt: skip
        yield Kind(f"unfinished run: {name}", form, f"{_RUN}/{name}", _with_half_a_run, again)


def _kinds_of_results() -> Iterator[Kind]:
    users = {"export": _EXPORT, "report": _REPORT}
    for name, form, is_data in (
        ("features.json", "json", False), ("patients.json", "json", False),
        ("max_activating_image_indices.pt", "zip", False), ("max_activating_image_values.pt", "zip", False),
        ("sae_mean_acts.pt", "zip", False), ("top_entropy.pt", "zip", False), ("patient_counts.npz", "zip", False),
        ("cls_sae_cnt.npy", "bytes", False), ("images.csv", "csv", False), ("labels.txt", "csv", False),
        ("patients.csv", "csv", False), ("latent_notes.json", "json", True),
    ):  # fmt: skip
        yield Kind(f"results: {name}", form, f"{_DATA}/{name}", _with_results, users, is_data=is_data)
    grouped = {
        "export --groups": lambda root: [*_EXPORT(root), "--groups", root / "dataset/cells/patients.csv"],
        "report --groups": lambda root: [*_REPORT(root), "--groups", root / "dataset/cells/patients.csv"],
    }
    yield Kind("groups of patients", "csv", "dataset/cells/patients.csv", _with_results, grouped, is_data=True)


def _kinds_of_imports() -> Iterator[Kind]:
    for name in ("x.npy", "x.npz", "x.pt", "x.h5", "x.h5ad", "x.parquet"):
        form = "zip" if name in ("x.npz", "x.pt") else "bytes"
        yield Kind(f"import {name[1:]}", form, name, _with_rows, {"import": _import(name)}, is_data=True)
    labelled = {"import": lambda root: [*_import("x.npy")(root), "--labels", root / "labels.csv"]}
    yield Kind("import: labels", "csv", "labels.csv", _with_rows, labelled, is_data=True)


def _kinds_of_encoders() -> Iterator[Kind]:
    pictures = "dataset/pictures/manifest.csv"
    yield Kind(
        "encoder .pth", "zip", "vit.pth", _with_encoders,
        {"build": build(images=pictures, model=Path("vit.pth"))}, is_data=True,
    )  # fmt: skip
    folder = {"build": build(images=pictures, model=Path("folder"))}
    for name, form in (
        ("config.json", "json"),
        ("preprocessor_config.json", "json"),
        ("model.safetensors", "safetensors"),
    ):
        yield Kind(f"encoder: {name}", form, f"folder/{name}", _with_encoders, folder, is_data=True)
