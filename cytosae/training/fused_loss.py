"""Losses with gradients in closed form: fast paths beside an architecture's `training_loss`.

`relu`: no gradient of the activations is computed (`b_dec` needs only a column sum), pre-activations become activations
in place, the ghost term is computed for dead latents alone, tokens are processed in parts that fit a memory budget, and
where few latents are active all products except the encoder's are sparse.
"""

from collections.abc import Callable

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.sae.relu import EPSILON, ReluSae, norm_as_divisor
from cytosae.training.matmul import MatmulConfig, iter_parts

_ROWS_PER_BLOCK = 64
"""Tokens counted together: a block stays in the processor's cache."""
_SAMPLED_ROWS = 8
"""One token in this many is checked to estimate the share of active latents."""

FusedLoss = Callable[[Sae, torch.Tensor, LossInputs, MatmulConfig], SaeLoss]
"""Loss of a whole batch of tokens, shape `(N, D)`, whose gradients replace the parameters' `grad`."""

_fused_losses: dict[type[Sae], FusedLoss] = {}


def fused_loss_for(kind: type[Sae]) -> Callable[[FusedLoss], FusedLoss]:
    """Register a function as the fast path of an architecture's `training_loss`."""

    def register(function: FusedLoss) -> FusedLoss:
        _fused_losses[kind] = function
        return function

    return register


def find_fused_loss(sae: Sae) -> FusedLoss | None:
    """The fast path for an autoencoder, if its architecture has one."""
    return _fused_losses.get(type(sae))


@fused_loss_for(ReluSae)
@torch.no_grad()
def fused_relu_loss(sae: Sae, x: torch.Tensor, inputs: LossInputs, matmul: MatmulConfig) -> SaeLoss:
    """`ReluSae.training_loss` and its gradients, which replace the parameters' `grad`.

    Args:
        sae: The autoencoder, its decoder rows of unit norm unless `inputs.norm_weighted_l1`.
        x: Tokens, shape `(N, D)`.
        inputs: Everything else that the loss depends on, for the whole batch; `matmul` decides on types.
        matmul: How products are computed.
    """
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        parameter.grad = None if parameter.ndim == 2 else torch.zeros_like(parameter)
    dead = None
    if inputs.use_ghost_grads and inputs.dead_mask is not None:
        # CPU-GPU sync point: the number of dead latents decides a shape.
        dead = inputs.dead_mask.nonzero().squeeze(1)
    norms = sae.W_dec.norm(dim=1) if inputs.norm_weighted_l1 else torch.ones_like(sae.b_enc)
    l1 = norms * inputs.weights.l1_coefficient
    sums = _Sums(sae, dead if dead is not None and len(dead) else None, l1, matmul)
    weights = inputs.token_weights if inputs.token_weights is not None else x.new_ones(len(x))
    reconstruction = torch.empty_like(x)
    for part in iter_parts(len(x), matmul.n_tokens(sae.b_enc.shape[0])):
        reconstruction[part] = sums.add(x[part], weights[part, None], len(x))
    return SaeLoss(sums.finish(norm_weighted_l1=inputs.norm_weighted_l1), sums.n_fired, reconstruction)


class _Sums:
    """Sums the loss and its gradients over parts of the tokens.

    Args:
        sae: The autoencoder; gradients are added to its parameters' `grad`.
        dead: Latents that get ghost gradients, int64; None for none.
        l1: Weight of each latent's activation, shape `(S,)`.
        matmul: How products are computed.
    """

    def __init__(self, sae: Sae, dead: torch.Tensor | None, l1: torch.Tensor, matmul: MatmulConfig) -> None:
        self._sae, self._dead, self._l1, self._matmul = sae, dead, l1, matmul
        self._n_tokens = 0
        dtype = matmul.dtype
        self._W_enc, self._b_enc = sae.W_enc.to(dtype), sae.b_enc.to(dtype)
        self._W_dec: torch.Tensor | None = None
        wide = torch.float32 if sae.b_enc.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self._terms = torch.zeros(3, dtype=wide, device=sae.b_enc.device)
        self._sums = torch.zeros_like(sae.b_enc, dtype=wide)
        self.n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)

    def add(self, x: torch.Tensor, weights: torch.Tensor, n_all: int) -> torch.Tensor:
        """Add tokens.

        Args:
            x: Shape `(n, D)`.
            weights: Weight of each token's error, shape `(n, 1)`.
            n_all: Number of tokens in the whole batch.

        Returns:
            Their reconstruction, shape `(n, D)`.
        """
        sae, matmul = self._sae, self._matmul
        centred = x - sae.b_dec
        centred_cast = centred.to(matmul.dtype)
        acts = torch.addmm(self._b_enc, centred_cast, self._W_enc)
        exp_pre = acts[:, self._dead].exp() if self._dead is not None else None
        acts.relu_()
        # CPU-GPU sync point, only if sparse products are enabled.
        sample = acts[::_SAMPLED_ROWS]
        sparse = matmul.sparse_below > 0 and int(sample.count_nonzero()) < matmul.sparse_below * sample.numel()
        part: _SparsePart | _DensePart
        if sparse:
            part = _SparsePart(sae, CooMatrix.from_dense(acts), centred)
        else:
            part = _DensePart(sae, acts, centred_cast, self._decoder())
        del acts, sample
        self._n_tokens += len(x)
        reconstruction = part.decode().add_(sae.b_dec)
        residual = reconstruction - x
        inverse_norm = 1 / norm_as_divisor(x)
        error = residual.square().mul_(inverse_norm)
        scale = n_all * x.shape[1]
        self._terms[0] += (error * weights).sum(dtype=self._terms.dtype) / scale
        g = residual * (inverse_norm * weights * (2 / scale))
        part.count(self._sums, self.n_fired)
        part.backward(g, self._l1 / n_all)
        if exp_pre is not None:
            self._add_ghost_term(exp_pre, centred_cast, residual.neg_(), error, scale)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += g.sum(dim=0)
        return reconstruction

    def finish(self, *, norm_weighted_l1: bool) -> LossTerms:
        """The loss, after all tokens were added; completes the gradients."""
        sae = self._sae
        assert sae.b_dec.grad is not None
        assert sae.b_enc.grad is not None
        l1_terms = self._sums.to(self._l1.dtype) * self._l1 / self._n_tokens
        self._terms[1] = l1_terms.sum()
        if norm_weighted_l1:
            assert sae.W_dec.grad is not None
            squared_norms = sae.W_dec.square().sum(dim=1).clamp_min(torch.finfo(l1_terms.dtype).tiny)
            sae.W_dec.grad.addcmul_((l1_terms / squared_norms)[:, None], sae.W_dec)
        sae.b_dec.grad -= sae.W_enc @ sae.b_enc.grad
        mse, l1, ghost = self._terms.to(sae.b_enc.dtype)
        return LossTerms(mse + l1 + ghost, mse, l1, ghost)

    def _decoder(self) -> torch.Tensor:
        """`W_dec` in the type of the products, converted on first use."""
        if self._W_dec is None:
            self._W_dec = self._sae.W_dec.to(self._matmul.dtype)
        return self._W_dec

    def _add_ghost_term(
        self, exp_pre: torch.Tensor, centred_cast: torch.Tensor, residual: torch.Tensor, error: torch.Tensor, scale: int
    ) -> None:
        """The ghost term of `ReluSae` and its gradients, for dead latents alone."""
        sae, dead, dtype = self._sae, self._dead, self._matmul.dtype
        rows = sae.W_dec[dead].to(dtype)
        ghost = (exp_pre @ rows).to(residual.dtype)
        stretch = residual.norm(dim=-1, keepdim=True) / (EPSILON + 2 * ghost.norm(dim=-1, keepdim=True))
        difference = ghost.mul_(stretch).sub_(residual)
        inverse_norm = 1 / norm_as_divisor(residual)
        ghost_error = difference.square().mul_(inverse_norm)
        rescale = error / (ghost_error + EPSILON)
        self._terms[2] += (rescale * ghost_error).sum(dtype=self._terms.dtype) / scale
        g = difference.mul_(rescale).mul_(inverse_norm * stretch * (2 / scale)).to(dtype)
        grad_pre = (g @ rows.t()).mul_(exp_pre)
        assert sae.W_dec.grad is not None
        assert sae.W_enc.grad is not None
        assert sae.b_enc.grad is not None
        sae.W_dec.grad[dead] += (exp_pre.t() @ g).to(residual.dtype)
        sae.W_enc.grad[:, dead] += (centred_cast.t() @ grad_pre).to(residual.dtype)
        sae.b_enc.grad[dead] += grad_pre.sum(dim=0, dtype=residual.dtype)


class _DensePart:
    """Products over all latents.

    Args:
        sae: The autoencoder; gradients are added to its parameters' `grad`.
        acts: Activations, shape `(n, S)`.
        centred_cast: Centred tokens in the type of the products, shape `(n, D)`.
        W_dec: Decoder in the type of the products.
    """

    def __init__(self, sae: Sae, acts: torch.Tensor, centred_cast: torch.Tensor, W_dec: torch.Tensor) -> None:
        self._sae, self._acts, self._centred_cast, self._W_dec = sae, acts, centred_cast, W_dec

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, in the type of the weights, shape `(n, D)`."""
        return (self._acts @ self._W_dec).to(self._sae.b_dec.dtype)

    def backward(self, g: torch.Tensor, l1: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`. Must be called last: it frees the activations.

        Args:
            g: Gradient of the reconstruction, shape `(n, D)`.
            l1: Gradient of the sparsity term where a latent is active, shape `(S,)`.
        """
        sae, acts = self._sae, self._acts
        del self._acts
        g = g.to(acts.dtype)
        _add_product(sae.W_dec, acts.t(), g)
        grad_pre = torch.addmm(l1.to(acts.dtype), g, self._W_dec.t())
        torch.ops.aten.threshold_backward.grad_input(grad_pre, acts, 0, grad_input=grad_pre)
        del acts
        _add_product(sae.W_enc, self._centred_cast.t(), grad_pre)
        assert sae.b_enc.grad is not None
        sae.b_enc.grad += grad_pre.sum(dim=0, dtype=sae.b_enc.dtype)

    def count(self, sums: torch.Tensor, n_fired: torch.Tensor) -> None:
        """Add each latent's activations and the number of tokens on which it is active, shape `(S,)` each."""
        wide = self._sae.b_enc.dtype
        for rows in torch.split(self._acts, _ROWS_PER_BLOCK):
            sums += rows.sum(dim=0, dtype=wide)
            n_fired += (rows > 0).to(wide).sum(dim=0).to(torch.int64)


class _SparsePart:
    """The same products over active latents alone, in the type of the weights.

    Args:
        sae: The autoencoder; gradients are added to its parameters' `grad`.
        acts: Activations, shape `(n, S)`.
        centred: Centred tokens, shape `(n, D)`.
    """

    def __init__(self, sae: Sae, acts: CooMatrix, centred: torch.Tensor) -> None:
        self._sae, self._centred = sae, centred
        self._acts = acts.with_values(acts.values.to(centred.dtype))

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, shape `(n, D)`."""
        return self._acts.matmul(self._sae.W_dec)

    def backward(self, g: torch.Tensor, l1: torch.Tensor) -> None:
        """Add the gradients of `W_enc`, `b_enc` and `W_dec`; see `_DensePart.backward`."""
        sae, acts = self._sae, self._acts
        assert sae.b_enc.grad is not None
        _add(sae.W_dec, acts.transpose().matmul(g))
        grad_pre = acts.with_values(acts.sampled_matmul(g, sae.W_dec) + l1[acts.columns]).transpose()
        sae.W_enc.grad = grad_pre.transposed_matmul(self._centred, sae.W_enc.grad)
        sae.b_enc.grad += grad_pre.row_sums().to(sae.b_enc.dtype)

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
    """Add to a parameter's gradient, which may not exist yet."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype).contiguous()
    else:
        parameter.grad.add_(gradient)
