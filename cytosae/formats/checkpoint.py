"""Autoencoder files `{'cfg': plain dict, 'state_dict': tensors}`, read without unpickling."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cytosae.backbones.errors import shown
from cytosae.formats.foreign import Activation, ForeignSae, InteropError, check_activation, show_names
from cytosae.formats.readers import SaeFiles, find_files, read_foreign, strip_prefix
from cytosae.formats.reference import unwrap_cfg
from cytosae.formats.saelens import is_saelens_config
from cytosae.formats.safe_unpickle import RestrictedPickleError, read_restricted, to_plain
from cytosae.formats.tensor_file import digest_tensors, read_tensors
from cytosae.pickles import load_torch
from cytosae.sae.base import Sae, SaeSource
from cytosae.sae.registry import ARCHITECTURES, check_stated, make_sae

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


def load_sae(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    encoder_only: bool = False,
    activation: Activation | None = None,
) -> LoadedSae:
    """Read an autoencoder of this package, of the reference, or of another program. Nothing in the file is executed.

    docs/autoencoders.md lists the programs. What another program computes differently, such as an encoder that does not
    subtract the decoder's bias from the input, is folded into the weights, or refused.

    Args:
        path: A `.pt` or `.safetensors` file, or the folder of another program.
        device: Device of the autoencoder.
        encoder_only: Leave `W_dec` empty, shape `(0, D)`: this halves the memory, and `decode` raises.
        activation: The activation function, for files that do not contain it.

    Raises:
        SaeNotFoundError: If the file does not exist.
        SaeCheckpointError: If it is not an autoencoder, its tensors do not fit together, or it computes what no
            architecture can represent.
    """
    path = Path(path)
    try:
        return _load(path, device, encoder_only, activation)
    except OSError as error:
        if error.errno is None:  # an error of our own
            raise
        raise SaeCheckpointError(f"'{path}' cannot be read: {os.strerror(error.errno)}") from error


def _load(path: Path, device: torch.device | str, encoder_only: bool, activation: Activation | None) -> LoadedSae:
    """`load_sae`, with errors of the disk as they are."""
    files = find_files(path)
    if files is None:
        raise SaeNotFoundError(
            f"no autoencoder at '{path}'. List existing ones with: cytosae-cache list; "
            "train one with: cytosae-cache train"
        )
    try:
        found = _read(path, files, activation)
    except InteropError as error:
        raise SaeCheckpointError(f"'{path}' cannot be used: {error}") from error
    cfg = found.cfg
    architecture = cfg.get("arch", "relu")
    if architecture not in ARCHITECTURES:
        raise SaeCheckpointError(
            f"'{path}' has architecture {shown(repr(architecture))}; this version knows: {', '.join(ARCHITECTURES)}"
        )
    sae = _make_shell(path, architecture, found.state_dict, cfg.get("settings"), files.weights.stat().st_size)
    identity = _digest(architecture, sae.settings, found)
    _fill(sae, found)
    if bad := sae.non_finite():
        raise SaeCheckpointError(
            f"{', '.join(bad)} in '{path}' contain NaN or infinity: its training failed, or its numbers are too large "
            "for float32"
        )
    if encoder_only:
        sae.W_dec = torch.nn.Parameter(torch.empty(0, len(sae.b_dec)))
    stated = None if activation is None else activation._asdict()
    sae.source = SaeSource(path, cfg, identity, stated)
    return LoadedSae(sae.requires_grad_(False).eval().to(device), cfg)


def load(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    encoder_only: bool = False,
    sae_arch: str | None = None,
    sae_k: int | None = None,
    sae_threshold: float | None = None,
) -> Sae:
    """Read an autoencoder of any supported program, ready to use: in evaluation mode, without gradients.

    `sae.encode(x)` gives the activations as after training. `sae.source` says what was read.

    Args:
        path: A `.pt` or `.safetensors` file, or the folder of another program (docs/autoencoders.md).
        device: Device of the autoencoder.
        encoder_only: Leave `W_dec` empty, shape `(0, D)`: this halves the memory, and `decode` raises.
        sae_arch: Architecture, for files that do not contain the activation function.
        sae_k: Its active latents per token (topk, batchtopk).
        sae_threshold: The activation that a latent must exceed, the same for all latents (batchtopk).

    Raises:
        SaeNotFoundError: If the file does not exist.
        SaeCheckpointError: If it is not an autoencoder, or it computes what no architecture can represent.
        ValueError: If what is stated does not fit together.
    """
    check_stated(sae_arch, sae_k, sae_threshold)
    activation = None if sae_arch is None else Activation(sae_arch, sae_k, sae_threshold)
    return load_sae(path, device=device, encoder_only=encoder_only, activation=activation).sae


def digest_sae(sae: Sae) -> str:
    """SHA-256 of an autoencoder's architecture, settings and tensors, in hex: its identity, wherever it is saved."""
    return _digest(sae.architecture, sae.settings, ForeignSae({}, sae.state_dict()))


def _digest(architecture: str, settings: Mapping[str, Any], found: ForeignSae) -> str:
    """The identity of an autoencoder, from its tensors before anything is folded into them."""
    about = json.dumps([architecture, settings, found.is_centred, found.has_unit_decoder], sort_keys=True)
    factor = {} if found.decoder_factor is None else {"decoder_factor": found.decoder_factor}
    return digest_tensors({**found.state_dict, **factor}, about, dtype=torch.float32)


def read_torch(path: Path, *, device: torch.device | str = "cpu") -> Any:  # noqa: ANN401 - tensors and plain values
    """`torch.load` of a file of tensors and plain values.

    Raises:
        SaeCheckpointError: If the file is damaged or contains anything else.
    """
    try:
        return load_torch(path, device=device)
    except Exception as error:  # a damaged pickle can make torch raise anything
        raise SaeCheckpointError(f"'{path}' cannot be read: {_first_line(error)}") from error


def _read(path: Path, files: SaeFiles, activation: Activation | None) -> ForeignSae:
    """The autoencoder in some files, its tensors still unchecked."""
    if files.weights.suffix == ".safetensors":
        cfg, tensors = read_tensors(files.weights)
        if cfg is None:
            return read_foreign(files, tensors, activation)
        value: Any = {"cfg": cfg, "state_dict": tensors}
    else:
        value = _read_checkpoint(files.weights)
        if not isinstance(value, dict) or not {"cfg", "state_dict"} <= set(value):
            return read_foreign(files, value, activation)
    cfg, state = _plain_cfg(path, value["cfg"]), value["state_dict"]
    if not isinstance(cfg, dict):
        raise SaeCheckpointError(f"'cfg' in '{path}' must be a dict, found {type(cfg).__name__}")
    if is_saelens_config(cfg):
        return read_foreign(files, state, activation, config=cfg)
    check_activation(activation, cfg)
    if isinstance(state, dict) and all(isinstance(name, str) for name in state):
        state = strip_prefix(state)
    return ForeignSae(cfg, state)


def _read_checkpoint(path: Path) -> Any:  # noqa: ANN401
    """A torch checkpoint, ours or the reference's."""
    with path.open("rb") as file:
        if file.read(1) == b"{":
            raise SaeCheckpointError(
                f"'{path}' begins with a JSON header, as saev writes it; it states what the autoencoder computes and "
                "is not read. Save the state dict alone with torch.save, and give --sae_arch"
            )
    try:
        return load_torch(path)
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


def _make_shell(path: Path, architecture: str, state: object, settings: object, n_bytes: int) -> Sae:
    """An autoencoder on the meta device that a file's tensors fit."""
    wanted = list(make_sae(architecture, 1, 1, device="meta", k=1).state_dict())
    if not isinstance(state, dict) or set(state) != set(wanted):
        raise SaeCheckpointError(
            f"'state_dict' in '{path}' must contain {', '.join(wanted)}, found {show_names(state)}"
        )
    if not all(map(_is_usable, state.values())):
        raise SaeCheckpointError(f"'state_dict' in '{path}' must contain dense floating-point tensors of 16 to 64 bits")
    found = {name: tuple(state[name].shape) for name in wanted}
    d_in, n_latents = found["W_enc"] if len(found["W_enc"]) == 2 else (0, 0)
    given, kind = {} if settings is None else settings, ARCHITECTURES[architecture]
    if not isinstance(given, dict) or not kind.needed_settings <= set(given):
        raise SaeCheckpointError(
            f"'settings' in '{path}' must contain {', '.join(kind.setting_names) or 'nothing'} for architecture "
            f"{architecture}, found {shown(repr(given))}"
        )
    try:
        sae = make_sae(
            architecture, d_in, n_latents, device="meta",
            **{name: given[name] for name in kind.setting_names if name in given},
        )  # fmt: skip
        fits = found == {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    except (ValueError, TypeError, OverflowError) as error:
        if d_in * n_latents:
            raise SaeCheckpointError(f"'settings' in '{path}' cannot be used: {shown(str(error), 300)}") from error
        fits = False
    if not fits:
        expected = "(D,S), (S,), (S,D), (D,)" if len(wanted) == 4 else f"the shapes of architecture {architecture}"
        raise SaeCheckpointError(f"the tensors in '{path}' do not fit together: found {found}, expected {expected}")
    if max(state[name].nbytes for name in wanted) > n_bytes:
        # A stride of 0 makes a tensor of any size from one number.
        raise SaeCheckpointError(f"the tensors in '{path}' are larger than the file: found {found}")
    return sae


@torch.no_grad()
def _fill(sae: Sae, found: ForeignSae) -> None:
    """Fill an autoencoder on the meta device, and fold in what its program computes differently."""
    is_folded = not found.is_centred or found.has_unit_decoder or found.decoder_factor is not None
    # Copied before folding: parts of one memory may be several tensors.
    state = {name: found.state_dict[name].to(torch.float32, copy=is_folded) for name in sae.state_dict()}
    sae.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    if found.decoder_factor is not None:
        sae.W_dec.mul_(found.decoder_factor.float()[:, None])
    if not found.is_centred:
        sae.centre_input_()
    if found.has_unit_decoder:
        sae.rescale_latents_(sae.decoder_norms())


def _is_usable(tensor: object) -> bool:
    """Whether it is a dense tensor of numbers that float32 can represent; files may contain other kinds."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
    )


def _first_line(error: BaseException) -> str:
    """The first line of an error's text; torch's are long."""
    return (str(error) or type(error).__name__).splitlines()[0]
