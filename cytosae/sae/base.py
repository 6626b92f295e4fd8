"""The base class of all sparse autoencoders: shared parameters, encoding and decoding, and what a subclass decides."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cytosae.sae.kernels import WIDEST_ROW, find_kernels
from cytosae.sae.loss import LossInputs, SaeLoss

_ROWS_PER_BLOCK = 2048
"""Rows of `W_dec` processed together on a CPU: a block stays in the processor's cache."""

SMALLEST_NORM = 1e-8
"""Norm of a decoder row below which it is not measured, so that nothing is divided by 0."""


class SaeOutput(NamedTuple):
    """Result of one forward pass; leading dimensions are those of the input."""

    pre: torch.Tensor
    """Latents before the nonlinearity, shape `(..., S)`."""
    acts: torch.Tensor
    """Latent activations a, shape `(..., S)`, at least 0."""
    reconstruction: torch.Tensor
    """Reconstruction x^, shape `(..., D)`."""


class SaeSource(NamedTuple):
    """Where an autoencoder was read from."""

    path: Path
    """Its file or folder."""
    cfg: dict[str, Any]
    """The config in it, as JSON values."""
    sha256: str
    """Its identity: SHA-256 of architecture, settings and tensors, which decide what it computes, in hex."""
    activation: dict[str, Any] | None = None
    """What the user stated about its activation function, as JSON values; None if nothing."""


class Sae(nn.Module, ABC):
    """A sparse autoencoder (docs/definitions.md, section 4); `activate` and `training_loss` define the architecture.

    `a = activate((x - b_dec) W_enc + b_enc)`, `x^ = a W_dec + b_dec`. Weights start Kaiming-uniform (He et al. 2015),
    decoder rows with unit norm, biases at zero. They are drawn on the CPU from the seed alone, so every device starts
    from the same numbers and the global random state is not touched.

    A subclass sets the class attributes below and is registered in `cytosae.sae.registry`. Nothing outside the subclass
    and the registry depends on which architecture it is.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        seed: Seed of the weights.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `d_in` or `n_latents` is below 1.
    """

    architecture: ClassVar[str]
    """Name in options and files."""
    setting_names: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments, besides the sizes, that define the architecture; also attributes of the same names."""
    needed_settings: ClassVar[frozenset[str]] = frozenset()
    """Those of `setting_names` without which a trained autoencoder's function is not known; others only train it."""
    training_options: ClassVar[frozenset[str]] = frozenset()
    """Names of the training options and loss coefficients that `training_loss` uses, other than `setting_names`."""
    needs_whole_rows: ClassVar[bool] = False
    """Whether a latent's activation depends on other latents of the same token."""
    fits_to_tokens: ClassVar[bool] = False
    """Whether `fit_to_tokens_` does anything, that is, whether training must read a sample of tokens first."""
    calibrates: ClassVar[bool] = False
    """Whether `calibrate_` does anything, that is, whether it must see a sample of tokens before it is saved."""
    splits_latents: ClassVar[bool] = False
    """Whether its fused loss adds up what processes computed that hold different latents."""
    lr_factors: ClassVar[Mapping[str, float]] = {}
    """Learning rate of a parameter divided by that of the others, for parameters that learn at another rate."""
    fits_reference: ClassVar[bool] = False
    """Whether the reference's checkpoint format can represent it."""
    saelens_architecture: ClassVar[str | None] = None
    """Architecture in SAELens with the same function; None if there is none."""
    is_saelens_default: ClassVar[bool] = True
    """Whether a SAELens folder that this package did not write is read as this class."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        seed: int = 42,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.source: SaeSource | None = None
        """Where it was read from; None if it was made in memory."""
        if d_in < 1 or n_latents < 1:
            raise ValueError(f"d_in and n_latents must be 1 or more, found {d_in} and {n_latents}")
        where = "meta" if device is not None and torch.device(device).type == "meta" else "cpu"
        W_enc, W_dec = torch.empty(d_in, n_latents, device=where), torch.empty(n_latents, d_in, device=where)
        if where == "cpu":
            generator = torch.Generator().manual_seed(seed)
            nn.init.kaiming_uniform_(W_enc, generator=generator)
            nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc = nn.Parameter(W_enc.to(device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(W_dec.to(device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype))
        if where == "cpu":
            self.normalise_decoder_()

    # --- what an architecture decides

    @abstractmethod
    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Latent activations from latents before the nonlinearity, as used after training.

        Args:
            pre: Shape `(..., n)`.
            latents: Which latents `pre` contains, as a slice or indices; all by default, and all are required if
                `needs_whole_rows`.
        """

    def activate_(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """`activate`, which may overwrite `pre`; an architecture overrides it where that is faster."""
        return self.activate(pre, latents)

    @property
    def active_above(self) -> torch.Tensor | None:
        """The value above which a latent's activation is its pre-activation, and else 0; None if that is not all.

        One for all latents, 0-dimensional, or one for each, shape `(S,)`; at least 0.
        """
        return None

    @property
    def inactive_below(self) -> torch.Tensor | None:
        """The value up to which a latent is not active, in the shapes of `active_above`; None if latents compete."""
        return self.active_above

    @abstractmethod
    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """The training loss, differentiable by autograd.

        Args:
            x: Tokens of the whole batch, shape `(N, D)`.
            inputs: Everything else that the loss depends on.
        """

    @torch.no_grad()
    def fit_to_tokens_(self, tokens: torch.Tensor) -> None:
        """Initialise parameters from a sample of tokens, shape `(n, D)`, in place; does nothing by default."""

    @torch.no_grad()
    def calibrate_(self, tokens: torch.Tensor) -> None:
        """Set what training does not use but inference does, from a sample of tokens, shape `(n, D)`, in place."""

    @property
    def settings(self) -> dict[str, Any]:
        """Values of `setting_names`, as JSON values: with the sizes, they define the same architecture again."""
        values = {name: getattr(self, name) for name in self.setting_names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Entries of SAELens' config beyond the common ones, and its tensors, float32 on the CPU."""
        return {}, {name: part.detach().cpu().float().contiguous() for name, part in self.state_dict().items()}

    @classmethod
    def from_saelens(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict from SAELens' tensors.

        Raises:
            ValueError: If the architecture cannot represent them.
        """
        return dict(tensors)

    @classmethod
    def settings_from_saelens(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings from a SAELens config that this package did not write; unchecked."""
        return {}

    @torch.no_grad()
    def non_finite(self) -> list[str]:
        """Names of tensors that contain NaN or infinity, and of what the architecture computes from them alone."""
        return [name for name, part in self.state_dict().items() if not is_finite(part)]

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        """Parameters and buffers measured in the unit of activations, shape `(S,)` or 0-dimensional."""
        return (self.b_enc,)

    # --- what all architectures share

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Latents before the nonlinearity, shape `(..., S)`, from activations of shape `(..., D)`."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor | npt.ArrayLike) -> torch.Tensor:
        """Latent activations as after training, with the thresholds or the top-k of the architecture.

        Args:
            x: Activations, shape `(..., D)`: a tensor, or an array as stores give it, of any floating-point type.

        Returns:
            Shape `(..., S)`, in the type and on the device of the weights.
        """
        return self.activate(self.pre_activations(self._to_tensor(x)))

    def decode(self, acts: torch.Tensor | npt.ArrayLike) -> torch.Tensor:
        """Reconstruction, shape `(..., D)`, from latent activations of shape `(..., S)`.

        Raises:
            RuntimeError: If only the encoder was loaded.
        """
        acts = self._to_tensor(acts)
        if not len(self.W_dec):
            raise RuntimeError("this autoencoder has no decoder: it was loaded with encoder_only=True")
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> SaeOutput:
        """Encode and decode activations of shape `(..., D)`."""
        pre = self.pre_activations(x)
        acts = self.activate(pre)
        return SaeOutput(pre, acts, self.decode(acts))

    def _to_tensor(self, values: torch.Tensor | npt.ArrayLike) -> torch.Tensor:
        """Values in the type and on the device of the weights; a tensor that has both is returned as it is."""
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(device=self.b_enc.device, dtype=self.b_enc.dtype)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print`."""
        d_in, n_latents = self.W_enc.shape
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"{d_in} -> {n_latents:,} latents{settings}"

    def pre_activations_in(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`pre_activations` of tokens, shape `(N, D)`, with a matrix product in another type, for training.

        The gradient of `b_dec` needs only a column sum. It comes from a term that is 0; autograd would otherwise
        compute a whole matrix for it.
        """
        centred = (x - self.b_dec.detach()).to(dtype)
        bias = self.b_enc + (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        return torch.addmm(bias.to(dtype), centred, self.W_enc.to(dtype))

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scale every row of `W_dec` to unit norm, in place."""
        W_dec, tiny = self.W_dec.detach(), torch.finfo(self.W_dec.dtype).tiny
        kernels = find_kernels(W_dec, W_dec) if W_dec.dtype == torch.float32 and W_dec.is_contiguous() else None
        if kernels is not None and W_dec.shape[1] <= WIDEST_ROW:
            kernels.normalise_rows_(W_dec, tiny)
            return
        # On a GPU, a block more is two launches more.
        n_rows = _ROWS_PER_BLOCK if W_dec.device.type == "cpu" else len(W_dec)
        for rows in torch.split(W_dec, n_rows):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(tiny))

    @torch.no_grad()
    def tie_(self) -> None:
        """Set the encoder to the decoder's transpose, in place (Gao et al. 2024, arXiv:2406.04093)."""
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def rescale_latents_(self, factor: torch.Tensor) -> None:
        """Multiply every latent's activation by a positive factor and divide its decoder row by it, in place.

        Args:
            factor: Shape `(S,)` or 0-dimensional; one factor for all latents if `needs_whole_rows`.
        """
        self.W_enc.mul_(factor)
        self.W_dec.div_(factor[..., None] if factor.ndim else factor)
        for bias in self._latent_units():
            bias.mul_(factor)

    @torch.no_grad()
    def decoder_norms(self) -> torch.Tensor:
        """Norm of every row of `W_dec`, at least `SMALLEST_NORM`, shape `(S,)`."""
        norms: torch.Tensor = torch.linalg.vector_norm(self.W_dec, dim=1)
        return norms.clamp_min(SMALLEST_NORM)

    @torch.no_grad()
    def centre_input_(self) -> None:
        """Turn an autoencoder whose encoder reads `x` into one whose encoder reads `x - b_dec`, in place."""
        shift = torch.zeros_like(self.b_enc, dtype=torch.float64)
        for bias, rows in zip(self.b_dec, self.W_enc, strict=True):
            shift.add_(rows.double(), alpha=float(bias))
        self._shift_pre_activations_(shift)

    def _shift_pre_activations_(self, shift: torch.Tensor) -> None:
        """Add a constant to what the encoder's product gives, in place; float64, shape `(S,)`."""
        self.b_enc.copy_(self.b_enc + shift)

    @torch.no_grad()
    def fold_scaling_(self, mean: torch.Tensor, scale: float) -> None:
        """Turn an autoencoder of `(x - mean) / scale` into one of `x`, in place; decoder rows keep their norm.

        Args:
            mean: Shape `(D,)`.
            scale: Positive.
        """
        self.b_dec.mul_(scale).add_(mean)
        for bias in self._latent_units():
            bias.mul_(scale)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is a finite number; takes no memory of the tensor's size."""
    return not tensor.numel() or all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())
