"""The reference loss and its gradients in closed form: the fast path beside `objective.reference_loss`.

No gradient for the activations is computed (`b_dec` needs only a column sum), pre-activations become activations and
gradients in place, the ghost term touches dead latents alone, tokens are taken in parts that fit a memory budget, and
where few latents are active all products but the encoder's run over the active ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cytosae.nonzeros import Nonzeros
from cytosae.objective import EPSILON, LossTerms, norm_as_divisor
from cytosae.sae import SparseAutoencoder


@dataclass(frozen=True)
class Products:
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


class ClosedForm(NamedTuple):
    """What the fast path computes beside the parameters' gradients."""

    terms: LossTerms
    """The loss with its parts."""
    n_fired: torch.Tensor
    """Tokens on which each latent is active, int64, shape `(S,)`."""
    reconstruction: torch.Tensor
    """Reconstruction, shape `(B, T, D)`."""


@torch.no_grad()
def reference_gradients(
    sae: SparseAutoencoder,
    x: torch.Tensor,
    *,
    l1_coefficient: float,
    dead_mask: torch.Tensor | None = None,
    mse_cls_coefficient: float = 1.0,
    products: Products | None = None,
) -> ClosedForm:
    """`reference_loss` and its gradients, which replace the parameters' `grad`.

    Args:
        sae: The autoencoder, its decoder rows of unit norm.
        x: Activations, shape `(B, T, D)`.
        l1_coefficient: Weight of the sparsity term.
        dead_mask: Latents that get ghost gradients, bool, shape `(S,)`; none by default.
        mse_cls_coefficient: Weight of token 0's error.
        products: How products are computed; in the weights' own type by default.
    """
    products = products or Products(dtype=sae.W_enc.dtype)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        parameter.grad = torch.zeros_like(parameter)
    # CPU-GPU sync point: the number of dead latents decides a shape.
    dead = dead_mask.nonzero().squeeze(1) if dead_mask is not None else None
    sums = _Sums(sae, dead if dead is not None and len(dead) else None, products)
    tokens = x.flatten(0, 1)
    weights = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    weights[:, 0] = mse_cls_coefficient
    reconstruction = torch.empty_like(tokens)
    for part in _parts(len(tokens), products.n_tokens(sae.b_enc.shape[0])):
        reconstruction[part] = sums.add(tokens[part], weights.view(-1, 1)[part], l1_coefficient, len(tokens))
    return ClosedForm(sums.finish(), sums.n_fired, reconstruction.view(x.shape))


def _parts(n_tokens: int, longest: int) -> Iterator[slice]:
    """Equal stretches of tokens, as few as possible."""
    n_parts = max(1, -(-n_tokens // longest))
    bounds = [n_tokens * number // n_parts for number in range(n_parts + 1)]
    return (slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False))


class _Sums:
    """Loss and gradients, summed over parts of the tokens.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        dead: Latents that get ghost gradients, int64; None for none.
        products: How products are computed.
    """

    def __init__(self, sae: SparseAutoencoder, dead: torch.Tensor | None, products: Products) -> None:
        self._sae, self._dead, self._products = sae, dead, products
        dtype = products.dtype
        self._W_enc, self._b_enc = sae.W_enc.to(dtype), sae.b_enc.to(dtype)
        self._W_dec: torch.Tensor | None = None
        wide = torch.float32 if x_is_mps(sae) else torch.float64
        self._terms = torch.zeros(3, dtype=wide, device=sae.b_enc.device)
        self.n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)

    def add(self, x: torch.Tensor, weights: torch.Tensor, l1_coefficient: float, n_all: int) -> torch.Tensor:
        """Count tokens.

        Args:
            x: Shape `(n, D)`.
            weights: Weight of each token's error, shape `(n, 1)`.
            l1_coefficient: Weight of the sparsity term.
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
        sparse = products.sparse_below > 0 and int(acts.count_nonzero()) < products.sparse_below * acts.numel()
        part: _SparsePart | _DensePart
        if sparse:
            part = _SparsePart(sae, Nonzeros.of(acts), centred)
            del acts
        else:
            part = _DensePart(sae, acts, factor, self._decoder())
        reconstruction = part.decode().add_(sae.b_dec)
        residual = reconstruction - x
        over = 1 / norm_as_divisor(x)
        error = residual.square().mul_(over)
        scale = n_all * x.shape[1]
        self._terms[0] += (error * weights).sum(dtype=self._terms.dtype) / scale
        self._terms[1] += part.total() * (l1_coefficient / n_all)
        g = residual * (over * weights * (2 / scale))
        if revived is not None:
            self._revive(revived, factor, residual.neg_(), error, scale)
        part.backward(g, l1_coefficient / n_all, self.n_fired)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += g.sum(dim=0)
        return reconstruction

    def finish(self) -> LossTerms:
        """The loss, once all tokens are counted; completes the gradient of `b_dec`."""
        sae = self._sae
        assert sae.b_dec.grad is not None
        assert sae.b_enc.grad is not None
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
    """Products over all latents.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        acts: Activations, shape `(n, S)`.
        factor: Centred activations of the residual stream in the products' type, shape `(n, D)`.
        W_dec: Decoder in the products' type.
    """

    def __init__(self, sae: SparseAutoencoder, acts: torch.Tensor, factor: torch.Tensor, W_dec: torch.Tensor) -> None:
        self._sae, self._acts, self._factor, self._W_dec = sae, acts, factor, W_dec

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, in the weights' type, shape `(n, D)`."""
        return (self._acts @ self._W_dec).to(self._sae.b_dec.dtype)

    def total(self) -> torch.Tensor:
        """Sum of all activations."""
        return self._acts.sum(dim=1, dtype=self._sae.b_dec.dtype).sum()

    def backward(self, g: torch.Tensor, l1: float, n_fired: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`.

        Args:
            g: Gradient of the reconstruction, shape `(n, D)`.
            l1: Gradient of every active latent's sparsity.
            n_fired: Counts to add to.
        """
        sae, acts = self._sae, self._acts
        g = g.to(acts.dtype)
        pull = torch.addmm(acts.new_tensor(l1), g, self._W_dec.t())
        pull = torch.ops.aten.threshold_backward(pull, acts, 0)
        _add_product(sae.W_dec.grad, acts.t(), g)
        _add_product(sae.W_enc.grad, self._factor.t(), pull)
        assert sae.b_enc.grad is not None
        sae.b_enc.grad += pull.sum(dim=0, dtype=sae.b_enc.dtype)
        for rows in acts.split(_COUNTED_AT_ONCE):
            n_fired += (rows > 0).to(torch.float32).sum(dim=0).to(torch.int64)


class _SparsePart:
    """The same over active latents alone, in the weights' own type.

    Args:
        sae: The autoencoder; its parameters' `grad` are added to.
        acts: Activations.
        centred: Centred activations of the residual stream, shape `(n, D)`.
    """

    def __init__(self, sae: SparseAutoencoder, acts: Nonzeros, centred: torch.Tensor) -> None:
        self._sae, self._centred = sae, centred
        self._acts = acts.with_values(acts.values.to(centred.dtype))

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, shape `(n, D)`."""
        return self._acts.decode(self._sae.W_dec)

    def total(self) -> torch.Tensor:
        """Sum of all activations."""
        return self._acts.values.sum()

    def backward(self, g: torch.Tensor, l1: float, n_fired: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`; see `_DensePart.backward`."""
        sae, acts = self._sae, self._acts
        assert sae.W_enc.grad is not None
        assert sae.b_enc.grad is not None
        assert sae.W_dec.grad is not None
        pull = acts.with_values(acts.dots(g, sae.W_dec) + l1)
        sae.W_dec.grad += acts.by_column().decode(g)
        pull = pull.by_column()
        sae.W_enc.grad += pull.decode(self._centred).t()
        n_latents = pull.shape[0]
        sae.b_enc.grad += torch.bincount(pull.rows, pull.values.double(), minlength=n_latents).to(sae.b_enc.dtype)
        n_fired += torch.bincount(pull.rows, minlength=n_latents)


_COUNTED_AT_ONCE = 64
"""Tokens counted at once: a block stays in the processor's cache."""


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, without a copy where the types are the same."""
    assert total is not None
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def x_is_mps(sae: SparseAutoencoder) -> bool:
    """Whether the autoencoder lies where there is no float64."""
    return sae.b_enc.device.type == "mps"
