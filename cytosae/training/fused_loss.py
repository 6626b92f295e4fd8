"""Losses with gradients in closed form: fast paths beside an architecture's `training_loss`.

No gradient of the tokens is computed (`b_dec` needs only a column sum), and where few latents are active all products
except the encoder's are sparse. Gradients of the matrices are computed when the optimiser asks for them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, SaeLoss
from cytosae.training.gradients import Gradients
from cytosae.training.matmul import MatmulConfig

FusedLoss = Callable[[Any, torch.Tensor, LossInputs, MatmulConfig], tuple[SaeLoss, Gradients]]
"""Loss of a whole batch of tokens, shape `(N, D)`, and its gradients."""

ACTIVATIONS = "cytosae.training.triton_activations"
"""The module of kernels for activation functions on a GPU."""

_MODULES = ("fused_relu", "fused_topk", "fused_elementwise")

_fused_losses: dict[type[Sae], FusedLoss] = {}


def fused_loss_for(*kinds: type[Sae]) -> Callable[[FusedLoss], FusedLoss]:
    """Register a function as the fast path of an architecture's `training_loss`."""

    def register(function: FusedLoss) -> FusedLoss:
        _fused_losses.update(dict.fromkeys(kinds, function))
        return function

    return register


def find_fused_loss(sae: Sae) -> FusedLoss | None:
    """The fast path for an autoencoder, if its architecture has one; a subclass may have another loss and has none."""
    for module in _MODULES:
        importlib.import_module(f"cytosae.training.{module}")
    return _fused_losses.get(type(sae))


def encode_block(sae: Sae, centred: torch.Tensor, latents: slice) -> torch.Tensor:
    """Some latents before the nonlinearity, shape `(N, n)`, of tokens minus `b_dec`, shape `(N, D)`; in their type."""
    b_enc, W_enc = (part[..., latents].to(centred.dtype) for part in (sae.b_enc, sae.W_enc))
    return torch.addmm(b_enc, centred, W_enc)


def decoder_block(sae: Sae, latents: slice, dtype: torch.dtype) -> torch.Tensor:
    """Decoder rows of some latents in the type of the products, shape `(n, D)`."""
    return sae.W_dec[latents].to(dtype)
