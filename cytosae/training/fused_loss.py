"""The reference loss and its gradients in closed form: the fast path beside `objective.reference_loss`.

No gradient for the activations is computed (`b_dec` needs only a column sum), pre-activations become activations and
gradients in place, the ghost term touches dead latents alone, tokens are taken in parts that fit a memory budget, and
where few latents are active all products but the encoder's run over the active ones.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cytosae.sae.base import LossTerms, Sae, SaeLoss
from cytosae.sae.coo import CooMatrix
from cytosae.training.loss import EPSILON, norm_as_divisor

_COUNTED_AT_ONCE = 64
"""Tokens counted at once: a block stays in the processor's cache."""
_SAMPLED_ROWS = 8
"""One token in so many is looked at to see how few latents are active."""


@dataclass(frozen=True)
class MatmulConfig:
    """How matrix products are computed."""

    dtype: torch.dtype = torch.float32
    """Type of the dense products' factors; sums are float32 inside a product, and the weights stay float32."""
    max_bytes: int = 1 << 29
    """Bytes of the largest tensor of tokens times latents."""
    sparse_below: float = 0.1
    """Share of active latents below which products run over those alone; 0 for never."""

    def n_tokens(self, n_latents: int) -> int:
        """Tokens of a part."""
        return max(1, self.max_bytes // (n_latents * self.dtype.itemsize))


@torch.no_grad()
def fused_reference_loss(
    sae: Sae,
    x: torch.Tensor,
    *,
    l1_coefficient: float,
    dead_mask: torch.Tensor | None = None,
    mse_cls_coefficient: float = 1.0,
    norm_weighted_l1: bool = False,
    products: MatmulConfig | None = None,
) -> SaeLoss:
    """`reference_loss` and its gradients, which replace the parameters' `grad`.

    Args:
        sae: The autoencoder, its decoder rows of unit norm.
        x: Activations, shape `(B, T, D)`.
        l1_coefficient: Weight of the sparsity term.
        dead_mask: Latents that get ghost gradients, bool, shape `(S,)`; none by default.
        mse_cls_coefficient: Weight of token 0's error.
        norm_weighted_l1: As for `reference_loss`.
        products: How products are computed; in the weights' own type by default.
    """
    products = products or MatmulConfig(dtype=sae.W_enc.dtype)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        parameter.grad = None if parameter.ndim == 2 else torch.zeros_like(parameter)
    # CPU-GPU sync point: the number of dead latents decides a shape.
    dead = dead_mask.nonzero().squeeze(1) if dead_mask is not None else None
    norms = sae.W_dec.norm(dim=1) if norm_weighted_l1 else torch.ones_like(sae.b_enc)
    sums = _Sums(sae, dead if dead is not None and len(dead) else None, norms * l1_coefficient, products)
    tokens = x.flatten(0, 1)
    weights = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    weights[:, 0] = mse_cls_coefficient
    reconstruction = torch.empty_like(tokens)
    for part in iter_parts(len(tokens), products.n_tokens(sae.b_enc.shape[0])):
        reconstruction[part] = sums.add(tokens[part], weights.view(-1, 1)[part], len(tokens))
    return SaeLoss(sums.finish(norm_weighted_l1=norm_weighted_l1), sums.n_fired, reconstruction.view(x.shape))


def iter_parts(n_tokens: int, longest: int) -> Iterator[slice]:
    """Equal stretches of tokens, as few as possible."""
    n_parts = max(1, -(-n_tokens // longest))
    bounds = [n_tokens * number // n_parts for number in range(n_parts + 1)]
    return (slice(start, end) for start, end in itertools.pairwise(bounds))


class _Sums:
    """Loss and gradients, summed over parts of the tokens.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        dead: Latents that get ghost gradients, int64; None for none.
        l1: Weight of each latent's activation, shape `(S,)`.
        products: How products are computed.
    """

    def __init__(self, sae: Sae, dead: torch.Tensor | None, l1: torch.Tensor, products: MatmulConfig) -> None:
        self._sae, self._dead, self._l1, self._products = sae, dead, l1, products
        self._n_tokens = 0
        dtype = products.dtype
        self._W_enc, self._b_enc = sae.W_enc.to(dtype), sae.b_enc.to(dtype)
        self._W_dec: torch.Tensor | None = None
        wide = torch.float32 if sae.b_enc.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self._terms = torch.zeros(3, dtype=wide, device=sae.b_enc.device)
        self._sums = torch.zeros_like(sae.b_enc, dtype=wide)
        self.n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)

    def add(self, x: torch.Tensor, weights: torch.Tensor, n_all: int) -> torch.Tensor:
        """Count tokens.

        Args:
            x: Shape `(n, D)`.
            weights: Weight of each token's error, shape `(n, 1)`.
            n_all: Tokens of the whole batch.

        Returns:
            Their reconstruction, shape `(n, D)`.
        """
        sae, products = self._sae, self._products
        centred = x - sae.b_dec
        factor = centred.to(products.dtype)
        acts = torch.addmm(self._b_enc, factor, self._W_enc)
        revived = acts[:, self._dead].exp() if self._dead is not None else None
        acts.relu_()
        # CPU-GPU sync point only where sparse products are wanted.
        sample = acts[::_SAMPLED_ROWS]
        sparse = products.sparse_below > 0 and int(sample.count_nonzero()) < products.sparse_below * sample.numel()
        part: _SparsePart | _DensePart
        if sparse:
            part = _SparsePart(sae, CooMatrix.of(acts), centred)
        else:
            part = _DensePart(sae, acts, factor, self._decoder())
        del acts, sample
        self._n_tokens += len(x)
        reconstruction = part.decode().add_(sae.b_dec)
        residual = reconstruction - x
        over = 1 / norm_as_divisor(x)
        error = residual.square().mul_(over)
        scale = n_all * x.shape[1]
        self._terms[0] += (error * weights).sum(dtype=self._terms.dtype) / scale
        g = residual * (over * weights * (2 / scale))
        part.count(self._sums, self.n_fired)
        part.backward(g, self._l1 / n_all)
        if revived is not None:
            self._revive(revived, factor, residual.neg_(), error, scale)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += g.sum(dim=0)
        return reconstruction

    def finish(self, *, norm_weighted_l1: bool) -> LossTerms:
        """The loss, once all tokens are counted; completes the gradients."""
        sae = self._sae
        assert sae.b_dec.grad is not None
        assert sae.b_enc.grad is not None
        pressure = self._sums.to(self._l1.dtype) * self._l1 / self._n_tokens
        self._terms[1] = pressure.sum()
        if norm_weighted_l1:
            assert sae.W_dec.grad is not None
            lengths = sae.W_dec.square().sum(dim=1).clamp_min(torch.finfo(pressure.dtype).tiny)
            sae.W_dec.grad.addcmul_((pressure / lengths)[:, None], sae.W_dec)
        sae.b_dec.grad -= sae.W_enc @ sae.b_enc.grad
        mse, l1, ghost = self._terms.to(sae.b_enc.dtype)
        return LossTerms(mse + l1 + ghost, mse, l1, ghost)

    def _decoder(self) -> torch.Tensor:
        """`W_dec` in the products' type, made when first needed."""
        if self._W_dec is None:
            self._W_dec = self._sae.W_dec.to(self._products.dtype)
        return self._W_dec

    def _revive(
        self, revived: torch.Tensor, factor: torch.Tensor, residual: torch.Tensor, error: torch.Tensor, scale: int
    ) -> None:
        """The ghost term (`objective.ghost_term`) and its gradients, for dead latents alone."""
        sae, dead, dtype = self._sae, self._dead, self._products.dtype
        rows = sae.W_dec[dead].to(dtype)
        ghost = (revived @ rows).to(residual.dtype)
        stretch = residual.norm(dim=-1, keepdim=True) / (EPSILON + 2 * ghost.norm(dim=-1, keepdim=True))
        difference = ghost.mul_(stretch).sub_(residual)
        over = 1 / norm_as_divisor(residual)
        ghost_error = difference.square().mul_(over)
        rescale = error / (ghost_error + EPSILON)
        self._terms[2] += (rescale * ghost_error).sum(dtype=self._terms.dtype) / scale
        g = difference.mul_(rescale).mul_(over * stretch * (2 / scale)).to(dtype)
        pull = (g @ rows.t()).mul_(revived)
        assert sae.W_dec.grad is not None
        assert sae.W_enc.grad is not None
        assert sae.b_enc.grad is not None
        sae.W_dec.grad[dead] += (revived.t() @ g).to(residual.dtype)
        sae.W_enc.grad[:, dead] += (factor.t() @ pull).to(residual.dtype)
        sae.b_enc.grad[dead] += pull.sum(dim=0, dtype=residual.dtype)


class _DensePart:
    """MatmulConfig over all latents.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        acts: Activations, shape `(n, S)`.
        factor: Centred activations of the residual stream in the products' type, shape `(n, D)`.
        W_dec: Decoder in the products' type.
    """

    def __init__(self, sae: Sae, acts: torch.Tensor, factor: torch.Tensor, W_dec: torch.Tensor) -> None:
        self._sae, self._acts, self._factor, self._W_dec = sae, acts, factor, W_dec

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, in the weights' type, shape `(n, D)`."""
        return (self._acts @ self._W_dec).to(self._sae.b_dec.dtype)

    def backward(self, g: torch.Tensor, l1: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`; comes last, for it gives up the activations.

        Args:
            g: Gradient of the reconstruction, shape `(n, D)`.
            l1: Gradient of every active latent's sparsity, shape `(S,)`.
        """
        sae, acts = self._sae, self._acts
        del self._acts
        g = g.to(acts.dtype)
        _add_product(sae.W_dec, acts.t(), g)
        pull = torch.addmm(l1.to(acts.dtype), g, self._W_dec.t())
        torch.ops.aten.threshold_backward.grad_input(pull, acts, 0, grad_input=pull)
        del acts
        _add_product(sae.W_enc, self._factor.t(), pull)
        assert sae.b_enc.grad is not None
        sae.b_enc.grad += pull.sum(dim=0, dtype=sae.b_enc.dtype)

    def count(self, sums: torch.Tensor, n_fired: torch.Tensor) -> None:
        """Add each latent's activations, and on how many tokens it is active, shape `(S,)`."""
        wide = self._sae.b_enc.dtype
        for rows in torch.split(self._acts, _COUNTED_AT_ONCE):
            sums += rows.sum(dim=0, dtype=wide)
            n_fired += (rows > 0).to(wide).sum(dim=0).to(torch.int64)


class _SparsePart:
    """The same over active latents alone, in the weights' own type.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        acts: Activations.
        centred: Centred activations of the residual stream, shape `(n, D)`.
    """

    def __init__(self, sae: Sae, acts: CooMatrix, centred: torch.Tensor) -> None:
        self._sae, self._centred = sae, centred
        self._acts = acts.with_values(acts.values.to(centred.dtype))

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, shape `(n, D)`."""
        return self._acts.decode(self._sae.W_dec)

    def backward(self, g: torch.Tensor, l1: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`; see `_DensePart.backward`."""
        sae, acts = self._sae, self._acts
        assert sae.b_enc.grad is not None
        _add(sae.W_dec, acts.by_column().decode(g))
        pull = acts.with_values(acts.dots(g, sae.W_dec) + l1[acts.columns]).by_column()
        sae.W_enc.grad = pull.transposed_product(self._centred, sae.W_enc.grad)
        sae.b_enc.grad += pull.row_sums().to(sae.b_enc.dtype)

    def count(self, sums: torch.Tensor, n_fired: torch.Tensor) -> None:
        """See `_DensePart.count`."""
        columns, n_latents = self._acts.columns, len(sums)
        sums += torch.bincount(columns, self._acts.values.to(sums.dtype), minlength=n_latents)
        n_fired += torch.bincount(columns, minlength=n_latents)


def _add_product(parameter: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to a parameter's gradient, without a copy where the types are the same."""
    if parameter.grad is not None and parameter.grad.dtype == left.dtype:
        parameter.grad.addmm_(left, right)
    else:
        _add(parameter, left @ right)


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to a parameter's gradient, which this may be the first part of."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype).contiguous()
    else:
        parameter.grad.add_(gradient)
