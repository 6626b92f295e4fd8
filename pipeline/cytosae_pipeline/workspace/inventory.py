"""The stores and training runs of a workspace."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae_cache.errors import StoreError
from cytosae_cache.store import ActivationStore, iter_stores
from cytosae_pipeline.runtime.progress import format_bytes
from cytosae_pipeline.workspace.find import describe_block
from cytosae_pipeline.workspace.paths import Workspace


@dataclass(frozen=True)
class Inventory:
    """Stores and runs as JSON values."""

    root: Path
    """Folder that was searched."""
    stores: list[dict[str, Any]]
    """One entry per store; unreadable ones have an `error`."""
    runs: list[dict[str, Any]]
    """One entry per training run."""

    def describe(self) -> str:
        """The inventory for humans."""
        lines = [f"activation stores in '{Workspace(self.root).activations_dir}':"]
        lines += [_store_line(store) for store in self.stores] or ["  none; build one with: cytosae-cache build --help"]
        lines += [f"training runs in '{Workspace(self.root).checkpoints_dir}':"]
        lines += [f"  {run['name']}  {run['n_latents']:,} latents  {run['status']}" for run in self.runs] or [
            "  none; train one with: cytosae-cache train --help"
        ]
        return "\n".join(lines)


def take_inventory(root: Path | str) -> Inventory:
    """Describe every store and run below a root folder."""
    root = Path(root)
    workspace = Workspace(root)
    folders = sorted(path for path in workspace.activations_dir.glob("*") if path.is_dir())
    stores = [_store_entry(path) for folder in folders for path in iter_stores(folder)]
    configs = sorted(workspace.checkpoints_dir.glob("*/config.json"))
    return Inventory(root, stores, [_run_entry(path) for path in configs])


def _store_entry(path: Path) -> dict[str, Any]:
    try:
        store = ActivationStore(path)
    except StoreError as error:
        return {"path": str(path), "error": str(error)}
    return {
        "path": str(path),
        "dataset": store.provenance.dataset,
        "model_name": store.spec.model_name,
        "block_layer": None if store.spec.imported else store.spec.block - store.spec.n_blocks,
        "block": describe_block(store.spec),
        "precision": store.spec.precision,
        "n_images": store.n_images,
        "bytes": store.n_images * store.spec.record_bytes,
        "complete": store.complete,
        "n_finished_shards": store.n_finished_shards,
        "n_shards": store.n_shards,
    }


def _store_line(store: dict[str, Any]) -> str:
    if "error" in store:
        return f"  {store['path']}  unusable: {store['error']}"
    state = "complete" if store["complete"] else f"unfinished, {store['n_finished_shards']}/{store['n_shards']} shards"
    return (
        f"  {store['dataset']}  {store['model_name']} {store['block']}  {store['n_images']:,} images  "
        f"{format_bytes(store['bytes'])}  {state}  {store['path']}"
    )


def _run_entry(path: Path) -> dict[str, Any]:
    """A run's name, size and state, from its config and files."""
    recipe = json.loads(path.read_text())["recipe"]
    finals = sorted(path.parent.glob("final_*.pt"))
    return {
        "name": path.parent.name,
        "dataset": recipe["dataset_name"],
        "n_latents": recipe["n_latents"],
        "status": "trained" if finals else "unfinished",
        "sae": str(finals[0]) if finals else None,
    }
