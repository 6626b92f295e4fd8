"""The stores and training runs of a workspace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae_cache.errors import StoreError
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.runtime.progress import format_bytes
from cytosae_pipeline.runtime.tables import format_number, format_table
from cytosae_pipeline.workspace.find import describe_block
from cytosae_pipeline.workspace.paths import Workspace
from cytosae_pipeline.workspace.runs import CONFIG_NAME, open_run, run_folders, written_at

_METRICS = {
    "l0": ("eval/l0", "metrics/l0"),
    "explained_variance": ("eval/explained_variance", "metrics/explained_variance"),
}
"""Where a run's numbers are found: on held-out images, else of its last logged step."""


@dataclass(frozen=True)
class Inventory:
    """Stores and runs as JSON values."""

    root: Path
    """Folder that was searched."""
    stores: list[dict[str, Any]]
    """One entry per store; unreadable ones have an `error`."""
    runs: list[dict[str, Any]]
    """One entry per training run; unreadable ones have an `error`."""

    def describe(self) -> str:
        """The inventory for humans."""
        lines = [f"activation stores in '{Workspace(self.root).activations_dir}':"]
        lines += _describe(self.stores, ("data set", "encoder", "block", "images", "size", "state", "path"), _store_row)
        lines += [] if self.stores else ["  none; build one with: cytosae-cache build --help"]
        lines += [f"training runs in '{Workspace(self.root).checkpoints_dir}':"]
        header = ("run", "arch", "latents", "L0", "expl. var.", "data set", "date", "state", "path")
        lines += _describe(self.runs, header, _run_row)
        lines += [] if self.runs else ["  none; train one with: cytosae-cache train --help"]
        lines += [f"finish run '{run['name']}' with: {run['next']}" for run in self.runs if run.get("next")]
        return "\n".join(lines)


def take_inventory(root: Path | str) -> Inventory:
    """Describe every store and run below a root folder."""
    root = Path(root)
    workspace = Workspace(root)
    stores = [_store_entry(path) for path in _store_paths(workspace)]
    return Inventory(root, stores, [_run_entry(path) for path in run_folders(workspace)])


def _store_paths(workspace: Workspace) -> Iterator[Path]:
    """What is named like a store, and folders of data sets that cannot be read, sorted."""
    for folder in sorted(workspace.activations_dir.glob("*")):
        try:
            yield from sorted(path for path in folder.iterdir() if path.suffix == ".zarr")
        except NotADirectoryError:
            continue
        except OSError:
            yield folder


def _describe(entries: list[dict[str, Any]], header: Sequence[str], row: Callable[[Any], list[str]]) -> list[str]:
    """A table of what can be read, and a line for everything else."""
    readable = [[escape(cell) for cell in row(entry)] for entry in entries if "error" not in entry]
    lines = [format_table(header, readable, indent="  ")] if readable else []
    return lines + [f"  {entry['path']}  unusable: {entry['error']}" for entry in entries if "error" in entry]


def _store_entry(path: Path) -> dict[str, Any]:
    """What a store is."""
    try:
        if path.exists() and not path.is_dir():
            raise UserError("it is not a folder")
        return _describe_store(path)
    except (StoreError, UserError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, StoreError) else str(error)
        return {"path": str(path), "error": reason or type(error).__name__}


def _describe_store(path: Path) -> dict[str, Any]:
    """A store that can be read."""
    store = ActivationStore(path)
    return {
        "path": str(path),
        "dataset": store.provenance.dataset,
        "model_name": store.spec.model_name,
        "block_layer": None if store.spec.imported else store.spec.block - store.spec.n_blocks,
        "block": describe_block(store.spec),
        "precision": store.spec.precision,
        "store_dtype": store.spec.store_dtype,
        "n_images": store.n_images,
        "bytes": store.n_images * store.spec.record_bytes,
        "complete": store.complete,
        "n_finished_shards": store.n_finished_shards,
        "n_shards": store.n_shards,
    }


def _store_row(store: Mapping[str, Any]) -> list[str]:
    """A store's line of the table."""
    state = "complete" if store["complete"] else f"unfinished, {store['n_finished_shards']}/{store['n_shards']} shards"
    size = f"{format_bytes(store['bytes'])} {store['store_dtype']}"
    return [
        store["dataset"], store["model_name"], store["block"], f"{store['n_images']:,}", size, state, store["path"],
    ]  # fmt: skip


def _run_entry(folder: Path) -> dict[str, Any]:
    """A run's name, numbers and state, from its config and files."""
    try:
        run = open_run(folder)
    except UserError as error:
        return {"name": folder.name, "path": str(folder), "error": str(error)}
    if run.damage is not None:
        return {"name": folder.name, "path": str(folder), "error": run.damage}
    metrics, sae = run.last_metrics(), run.sae
    return {
        "name": run.name,
        "architecture": run.recipe.get("arch"),
        "n_latents": run.recipe.get("n_latents"),
        **{name: next((metrics[key] for key in keys if key in metrics), None) for name, keys in _METRICS.items()},
        "dataset": run.recipe.get("dataset_name"),
        "date": written_at(sae or folder / CONFIG_NAME).isoformat(timespec="seconds"),
        "status": "trained" if sae else "unfinished",
        "sae": str(sae) if sae else None,
        "path": str(sae or folder),
        "next": None if sae else run.resume_command,
    }


def _run_row(run: Mapping[str, Any]) -> list[str]:
    """A run's line of the table."""
    latents = run["n_latents"]
    return [
        run["name"],
        str(run["architecture"] or "-"),
        f"{latents:,}" if isinstance(latents, int) else "-",
        format_number(run["l0"], ".1f"),
        format_number(run["explained_variance"], ".4f"),
        str(run["dataset"]),
        run["date"][:16].replace("T", " "),
        run["status"],
        run["path"],
    ]
