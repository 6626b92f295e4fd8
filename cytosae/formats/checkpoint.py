"""Autoencoder files `{'cfg': plain dict, 'state_dict': tensors}`, read without unpickling."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cytosae.formats.interop import (
    SAELENS_CONFIG,
    SAELENS_WEIGHTS,
    InteropError,
    read_saelens,
    read_safetensors,
    unwrap_cfg,
)
from cytosae.formats.safe_unpickle import RestrictedPickleError, check_archive, read_restricted, to_plain
from cytosae.sae.base import Sae
from cytosae.sae.registry import ARCHITECTURES, make_sae

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SaeCheckpointError(ValueError):
    """An autoencoder's file cannot be used; the message states what was found and what was expected."""


class SaeNotFoundError(SaeCheckpointError, FileNotFoundError):
    """The file does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


class LoadedSae(NamedTuple):
    """An autoencoder and the config in its file."""

    sae: Sae
    """The autoencoder, in evaluation mode."""
    cfg: dict[str, Any]
    """Plain JSON values."""


def save_sae(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write an autoencoder so that `torch.load(path, weights_only=True)` opens it. A plain write: not atomic.

    Args:
        path: The file.
        sae: The autoencoder.
        cfg: JSON values; `arch` and `settings` are added.

    Raises:
        TypeError: If `cfg` contains anything but JSON values.
    """
    plain = json.loads(json.dumps({**cfg, "arch": sae.architecture, "settings": sae.settings}))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    # Through a file object: given a path, torch would write its name into the archive.
    with path.open("wb") as file:
        torch.save({"cfg": plain, "state_dict": state}, file)


def load_sae(path: Path | str, *, device: torch.device | str = "cpu", encoder_only: bool = False) -> LoadedSae:
    """Read an autoencoder of this package, of the reference, or of SAELens. Nothing in the file is executed.

    Args:
        path: A `.pt` or `.safetensors` file, or a folder with SAELens' `cfg.json`.
        device: Device of the autoencoder.
        encoder_only: Leave `W_dec` empty, shape `(0, D)`: this halves the memory, and `decode` raises.

    Raises:
        SaeNotFoundError: If the file does not exist.
        SaeCheckpointError: If it is not an autoencoder, or its tensors do not fit together.
    """
    path = Path(path)
    is_folder = path.is_dir() and (path / SAELENS_CONFIG).is_file()
    if not is_folder and not path.is_file():
        raise SaeNotFoundError(
            f"no autoencoder at '{path}'. List existing ones with: cytosae-cache list; "
            "train one with: cytosae-cache train"
        )
    value = _read_exchanged(path) if is_folder or path.suffix == ".safetensors" else _read_checkpoint(path)
    if not isinstance(value, dict) or not {"cfg", "state_dict"} <= set(value):
        raise SaeCheckpointError(
            f"'{path}' must contain 'cfg' and 'state_dict', found {_names(value)}: it is not an autoencoder"
        )
    state, cfg = value["state_dict"], _plain_cfg(path, value["cfg"])
    if not isinstance(cfg, dict):
        raise SaeCheckpointError(f"'cfg' in '{path}' must be a dict, found {type(cfg).__name__}")
    architecture = cfg.get("arch", "relu")
    if architecture not in ARCHITECTURES:
        raise SaeCheckpointError(
            f"'{path}' has architecture {architecture!r}; this version knows: {', '.join(ARCHITECTURES)}"
        )
    sae = _make_shell(path, architecture, state, cfg.get("settings"))
    d_in = len(sae.b_dec)
    if encoder_only:
        state = {**state, "W_dec": torch.empty(0, d_in)}
        sae.W_dec = torch.nn.Parameter(torch.empty(0, d_in, device="meta"))
    sae.load_state_dict({name: state[name].float() for name in sae.state_dict()}, assign=True)
    return LoadedSae(sae.requires_grad_(False).eval().to(device), cfg)


def weights_file(path: Path) -> Path:
    """The file with an autoencoder's tensors: the path itself, or the one in a SAELens folder."""
    return path / SAELENS_WEIGHTS if path.is_dir() else path


def read_torch(path: Path, *, device: torch.device | str = "cpu") -> Any:  # noqa: ANN401 - tensors and plain values
    """`torch.load` of a file of tensors and plain values.

    Raises:
        SaeCheckpointError: If the file is damaged or contains anything else.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle can make torch raise anything
        raise SaeCheckpointError(f"'{path}' cannot be read: {_first_line(error)}") from error


def _read_exchanged(path: Path) -> Any:  # noqa: ANN401
    """A file or folder in another program's format."""
    try:
        return read_saelens(path) if path.is_dir() else read_safetensors(path)
    except InteropError as error:
        raise SaeCheckpointError(f"'{path}' cannot be used: {error}") from error


def _read_checkpoint(path: Path) -> Any:  # noqa: ANN401
    """A torch checkpoint, ours or the reference's."""
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except RestrictedPickleError as error:
        raise SaeCheckpointError(str(error)) from error
    except pickle.UnpicklingError:
        return _read_reference(path)
    except Exception as error:
        raise SaeCheckpointError(f"'{path}' is not a torch checkpoint: {_first_line(error)}") from error


def _read_reference(path: Path) -> Any:  # noqa: ANN401
    """A checkpoint with a pickled config object, as the reference writes it."""
    try:
        return read_restricted(path)
    except RestrictedPickleError as error:
        raise SaeCheckpointError(str(error)) from error


def _plain_cfg(path: Path, cfg: object) -> Any:  # noqa: ANN401 - JSON values
    """The file's config as JSON values."""
    try:
        return unwrap_cfg(to_plain(cfg))
    except RestrictedPickleError as error:
        raise SaeCheckpointError(f"'cfg' in '{path}' cannot be used: {error}") from error


def _make_shell(path: Path, architecture: str, state: object, settings: object) -> Sae:
    """An autoencoder on the meta device that a file's tensors fit."""
    wanted = list(make_sae(architecture, 1, 1, device="meta", k=1).state_dict())
    if not isinstance(state, dict) or set(state) != set(wanted):
        raise SaeCheckpointError(f"'state_dict' in '{path}' must contain {', '.join(wanted)}, found {_names(state)}")
    if not all(map(_is_usable, state.values())):
        raise SaeCheckpointError(f"'state_dict' in '{path}' must contain dense floating-point tensors of 16 to 64 bits")
    found = {name: tuple(state[name].shape) for name in wanted}
    d_in, n_latents = found["W_enc"] if len(found["W_enc"]) == 2 else (0, 0)
    given, names = settings if isinstance(settings, dict) else {}, ARCHITECTURES[architecture].setting_names
    try:
        sae = make_sae(
            architecture, d_in, n_latents, device="meta", **{name: given[name] for name in names if name in given}
        )
        fits = found == {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    except (ValueError, TypeError) as error:
        if d_in * n_latents:
            raise SaeCheckpointError(f"'settings' in '{path}' cannot be used: {error}") from error
        fits = False
    if not fits:
        expected = "(D,S), (S,), (S,D), (D,)" if len(wanted) == 4 else f"the shapes of architecture {architecture}"
        raise SaeCheckpointError(f"the tensors in '{path}' do not fit together: found {found}, expected {expected}")
    if max(state[name].nbytes for name in wanted) > weights_file(path).stat().st_size:
        # A stride of 0 makes a tensor of any size from one number.
        raise SaeCheckpointError(f"the tensors in '{path}' are larger than the file: found {found}")
    # After conversion to float32, whose range a finite float64 may exceed.
    bad = [name for name in wanted if not torch.isfinite(state[name].float()).all()]
    if bad:
        raise SaeCheckpointError(f"{', '.join(bad)} in '{path}' contain NaN or infinity: its training failed")
    return sae


def _is_usable(tensor: object) -> bool:
    """Whether it is a dense tensor of numbers that float32 can represent; files may contain other kinds."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
    )


def _names(value: object) -> str:
    """Some of a dict's keys, or the type of any other value."""
    if not isinstance(value, dict):
        return type(value).__name__
    return str(sorted(name[:40] if isinstance(name, str) else f"<{type(name).__name__}>" for name in value)[:8])


def _first_line(error: BaseException) -> str:
    """The first line of an error's text; torch's are long."""
    return (str(error) or type(error).__name__).splitlines()[0]
