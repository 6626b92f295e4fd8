"""How the stores of a workspace were built: from which images and which checkpoint, on this machine.

A record lies below `<root>/out`, never in a store: paths of this machine go nowhere else.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from cytosae_cache.format.spec import canonical_json
from cytosae_cache.storage.atomic import write_file
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.workspace.paths import EMBEDDED_MODEL, Workspace

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 16
_EMBEDDED = "embedded"
_PATHS = ("images", "model_path")

_OF_ONE_BUILD = ("root_dir", "store", "overwrite", "delete_first", "shards", "dask")
RECORDED = tuple(field.name for field in fields(BuildConfig) if field.name not in _OF_ONE_BUILD)
"""Options that are recorded: not those that say where the store is, which part was built or where, nor how an
older one was replaced."""


def record_build(store: ActivationStore, config: BuildConfig) -> None:
    """Record the options of a build; a workspace that cannot be written is no reason to stop.

    Args:
        store: The store, finished or not.
        config: Options of its build.
    """
    options = {name: value for name, value in asdict(config).items() if name in RECORDED}
    options |= {name: _recorded_form(options[name], config.root_dir) for name in _PATHS}
    path = _record_path(store, config.root_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(options, indent=1) + "\n").encode(), durable=False)
    except OSError as error:
        logger.info(f"where the images lie is not remembered, because '{path}' cannot be written: {error}")


def find_build(store: ActivationStore, root_dir: Path) -> BuildConfig | None:
    """The options that a store was built with, all paths absolute; None if this workspace does not know them.

    Args:
        store: The store.
        root_dir: Folder of the workspace.
    """
    path = _record_path(store, root_dir)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"it has more than {_MAX_BYTES:,} bytes")
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise UserError("it is no JSON object")
        options = {name: found[name] for name in RECORDED if name in found}
        options |= {name: _absolute(options.get(name), root_dir) for name in _PATHS}
        return BuildConfig(**options, root_dir=root_dir)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning(f"ignoring '{path}', which does not say how the store was built: {error}")
        return None


def find_images(store: ActivationStore, root_dir: Path, given: Path | None, *, advise: bool = True) -> Path:
    """Where the images of a store are to be looked for; nothing need be there.

    Args:
        store: The store.
        root_dir: Folder of the workspace.
        given: The place that the user names, if any.
        advise: Whether to say that it can be named, if the images are no longer where the store was built from.

    Returns:
        That place, else where the store was built from, else the data set's own folder in the workspace.
    """
    found = given or _recorded(store, root_dir, "images", advise=advise)
    return found or Workspace(root_dir).dataset_dir(store.provenance.dataset)


def find_model(store: ActivationStore, root_dir: Path, given: Path | None) -> Path | None:
    """The checkpoint that the user names, else the one that a store was built with; None if it is not known.

    Args:
        store: The store.
        root_dir: Folder of the workspace.
        given: The place that the user names, if any.
    """
    return given or _recorded(store, root_dir, "model_path")


def _recorded(
    store: ActivationStore, root_dir: Path, name: Literal["images", "model_path"], *, advise: bool = True
) -> Path | None:
    """A place that a build was given, if it still exists."""
    build = find_build(store, root_dir)
    path: Path | None = getattr(build, name) if build is not None else None
    if path is None or path == Path(_EMBEDDED):
        return path
    what = {"images": "images", "model_path": "checkpoint"}[name]
    if not path.exists():
        advice = f": pass --{name} PATH" if advise else ""
        logger.info(f"the store was built with the {what} '{path}', which is not there any more{advice}")
        return None
    logger.info(f"{what}: '{path}', as when the store was built")
    return path


def _recorded_form(path: Path | None, root_dir: Path) -> str | None:
    """A path that stays right: below the workspace as from there, for it may be moved as a whole; else absolute."""
    if path is None:
        return None
    if path in (Path(_EMBEDDED), EMBEDDED_MODEL):
        return _EMBEDDED
    absolute, root = (Path(os.path.abspath(item)) for item in (path, root_dir))  # noqa: PTH100 - keeps links
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def _absolute(path: object, root_dir: Path) -> object:
    """A path from its recorded form; anything but text is left to the record's checks."""
    if not isinstance(path, str) or path == _EMBEDDED:
        return path
    return os.path.abspath(root_dir / path)  # noqa: PTH100


def _record_path(store: ActivationStore, root_dir: Path) -> Path:
    """The record of a store, wherever the store lies now."""
    identity: list[Any] = [store.provenance.dataset, store.spec.hash, store.provenance.list_digest]
    return Workspace(root_dir).builds_dir / f"{hashlib.sha256(canonical_json(identity)).hexdigest()[:16]}.json"
