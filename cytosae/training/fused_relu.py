"""The step of `relu`, the reference's architecture, in closed form.

The ghost term is computed for dead latents alone. Where few latents are active, all products except the encoder's are
sparse; otherwise tokens are processed in parts that fit a memory budget.
"""

from collections.abc import Iterator

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead, widest_type
from cytosae.sae.kernels import find_kernels
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.sae.relu import EPSILON, ReluSae, norm_as_divisor
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.fused_loss import ACTIVATIONS, decoder_block, encode_block, fused_loss_for
from cytosae.training.gradients import (
    Gradients,
    RowAddition,
    RowGradient,
    SparseGradients,
    SparsePiece,
    StoredGradients,
    SumOfGradients,
    blocks_of_latents,
    by_latent,
)
from cytosae.training.matmul import MatmulConfig, iter_parts

_ROWS_PER_BLOCK, _ROWS_PER_BLOCK_GPU = 64, 2048
"""Tokens counted together on a CPU, where a block stays in the processor's cache, and on a GPU."""


@fused_loss_for(ReluSae)
@torch.no_grad()
def fused_relu_loss(sae: Sae, x: torch.Tensor, inputs: LossInputs, matmul: MatmulConfig) -> tuple[SaeLoss, Gradients]:
    """`ReluSae.training_loss` and its gradients.

    Args:
        sae: The autoencoder, its decoder rows of unit norm unless `inputs.norm_weighted_l1`.
        x: Tokens, shape `(N, D)`.
        inputs: Everything else that the loss depends on, for the whole batch; `matmul` decides on types.
        matmul: How products are computed.
    """
    sae.b_enc.grad, sae.b_dec.grad = torch.zeros_like(sae.b_enc), torch.zeros_like(sae.b_dec)
    dead = None
    if inputs.use_ghost_grads and inputs.dead_mask is not None:
        # CPU-GPU sync point: the number of dead latents decides a shape.
        dead = inputs.dead_mask.nonzero().squeeze(1)
        # Ranks without dead latents of their own take part in the others' ghost term.
        dead = dead if inputs.latent_ranks.add(len(dead)) else None
    l1 = torch.full_like(sae.b_enc, inputs.weights.l1_coefficient)
    if inputs.norm_weighted_l1:
        l1 = sae.W_dec.norm(dim=1) * l1
    sums = _Sums(sae, dead, l1, inputs, matmul, n_all=inputs.count(x))
    weights = None if inputs.token_weights is None else inputs.token_weights[:, None]
    active = None
    if matmul.sparse_below:
        product = EncoderProduct(sae, x - sae.b_dec, matmul)
        active = product.above_if_few(x.new_zeros((), dtype=matmul.dtype), matmul.sparse_below)
    parts = list(iter_parts(len(x), matmul.n_tokens(len(sae.b_enc))))
    gradients: Gradients
    if active is not None or len(parts) == 1:
        reconstruction, gradients = sums.add(x, weights, active)
    else:
        reconstruction, total = torch.empty_like(x), _GradientSum(sae)
        for part in parts:
            reconstruction[part], own = sums.add(x[part], None if weights is None else weights[part], None)
            total.add(own)
        gradients = StoredGradients(sae)
    terms, gradients = sums.finish(gradients)
    return SaeLoss(terms, sums.n_fired, reconstruction), gradients


class _Sums:
    """Sums the loss over parts of the tokens, and the gradients of everything but the matrices.

    Args:
        sae: The autoencoder; gradients of its biases are added to their `grad`.
        dead: Latents that get ghost gradients, int64; None for none.
        l1: Weight of each latent's activation, shape `(S,)`.
        inputs: What the loss depends on.
        matmul: How products are computed.
        n_all: Tokens of the whole batch.
    """

    def __init__(
        self,
        sae: Sae,
        dead: torch.Tensor | None,
        l1: torch.Tensor,
        inputs: LossInputs,
        matmul: MatmulConfig,
        *,
        n_all: int,
    ) -> None:
        self._sae, self._dead, self._l1, self._inputs, self._matmul = sae, dead, l1, inputs, matmul
        self._n_all = n_all
        wide = widest_type(sae.b_enc.device)
        self._terms = torch.zeros(3, dtype=wide, device=sae.b_enc.device)
        self._sums = torch.zeros_like(sae.b_enc, dtype=wide)
        self.n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)

    def add(
        self, x: torch.Tensor, weights: torch.Tensor | None, active: CooMatrix | None
    ) -> tuple[torch.Tensor, Gradients]:
        """Add tokens.

        Args:
            x: Shape `(n, D)`.
            weights: Weight of each token's error, shape `(n, 1)`; None for 1.
            active: Their activations; None if too many are active.

        Returns:
            Their reconstruction, shape `(n, D)`, and their gradients of the matrices.
        """
        sae, matmul = self._sae, self._matmul
        centred = x - sae.b_dec
        centred_cast = centred.to(matmul.dtype)
        part = _DensePart(sae, centred_cast) if active is None else _SparsePart(sae, active, centred)
        del centred
        latent_ranks = self._inputs.latent_ranks
        reconstruction = latent_ranks.sum(part.decode()).add_(sae.b_dec)
        residual = reconstruction - x
        inverse_norm = 1 / norm_as_divisor(x)
        error = residual.square().mul_(inverse_norm)
        scale = self._n_all * x.shape[1]
        factor = inverse_norm if weights is None else inverse_norm * weights
        weighted = error if weights is None else error * weights
        self._terms[0].add_(weighted.sum(dtype=self._terms.dtype) / scale)
        ghosts_residual = None if self._dead is None else -residual
        g = residual.mul_(factor * (2 / scale))
        part.count(self._sums, self.n_fired)
        gradients: Gradients = part.gradients(g, self._l1 / self._n_all)
        if ghosts_residual is not None:
            gradients = SumOfGradients(gradients, self._ghost_term(centred_cast, ghosts_residual, error, scale))
        if not latent_ranks.rank:  # the same on all of them, which add theirs up
            assert sae.b_dec.grad is not None
            sae.b_dec.grad += g.sum(dim=0)
        return reconstruction, gradients

    def finish(self, gradients: Gradients) -> tuple[LossTerms, Gradients]:
        """The loss and the complete gradients, after all tokens were added."""
        inputs = self._inputs
        l1_terms = self._sums.to(self._l1.dtype) * self._l1 / self._n_all
        self._terms[1] = inputs.latent_ranks.sum(l1_terms.sum())
        if inputs.norm_weighted_l1:
            squared_norms = self._sae.W_dec.square().sum(dim=1).clamp_min(torch.finfo(l1_terms.dtype).tiny)
            gradients = _NormGradients(self._sae, gradients, l1_terms / squared_norms)
        mse, l1, ghost = inputs.token_ranks.sum(self._terms).to(self._sae.b_enc.dtype)
        return LossTerms(mse + l1 + ghost, mse, l1, ghost), gradients

    def _ghost_term(
        self, centred_cast: torch.Tensor, residual: torch.Tensor, error: torch.Tensor, scale: int
    ) -> RowAddition:
        """The ghost term of `ReluSae` and its gradients, for dead latents alone."""
        sae, dead, dtype = self._sae, self._dead, self._matmul.dtype
        assert dead is not None
        W_enc, rows = sae.W_enc.t()[dead].to(dtype), sae.W_dec[dead].to(dtype)
        exp_pre = torch.addmm(sae.b_enc[dead].to(dtype), centred_cast, W_enc.t()).exp_()
        ghost = self._inputs.latent_ranks.sum((exp_pre @ rows).to(residual.dtype))
        stretch = residual.norm(dim=-1, keepdim=True) / (EPSILON + 2 * ghost.norm(dim=-1, keepdim=True))
        difference = ghost.mul_(stretch).sub_(residual)
        inverse_norm = 1 / norm_as_divisor(residual)
        ghost_error = difference.square().mul_(inverse_norm)
        rescale = error / (ghost_error + EPSILON)
        self._terms[2].add_((rescale * ghost_error).sum(dtype=self._terms.dtype) / scale)
        g = difference.mul_(rescale).mul_(inverse_norm * stretch * (2 / scale)).to(dtype)
        grad_pre = (g @ rows.t()).mul_(exp_pre)
        _add_bias_gradients(sae, dead, grad_pre.sum(dim=0, dtype=residual.dtype))
        grads = (grad_pre.t() @ centred_cast).to(residual.dtype), (exp_pre.t() @ g).to(residual.dtype)
        return RowAddition(dead, *grads)


class _DensePart(Gradients):
    """Products over all latents, in blocks of latents: weights are converted to the type of the products in the cache.

    Args:
        sae: The autoencoder; gradients of its biases are added to their `grad`.
        centred_cast: Centred tokens in the type of the products, shape `(n, D)`.
    """

    repeats_cheaply = False

    def __init__(self, sae: Sae, centred_cast: torch.Tensor) -> None:
        self._sae, self._centred_cast, self._dtype = sae, centred_cast, centred_cast.dtype
        self._kernels = find_kernels(centred_cast, centred_cast, ACTIVATIONS)
        self._blocks = list(blocks_of_latents(len(sae.b_enc), centred_cast.device))
        self._n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)
        self._sums = torch.zeros_like(sae.b_enc, dtype=widest_type(sae.b_enc.device))
        self._acts = [self._encode(latents) for latents in self._blocks]
        self._W_dec: list[torch.Tensor] = []

    def _encode(self, latents: slice) -> torch.Tensor:
        """Activations of a block, shape `(n, latents)`, which are counted and added up."""
        acts = encode_block(self._sae, self._centred_cast, latents)
        wide = self._sae.b_enc.dtype
        if self._kernels is not None:
            n_fired, sums = self._kernels.activate("relu", acts, [acts], [])
            self._n_fired[latents], self._sums[latents] = n_fired.to(torch.int64), sums
            return acts
        acts.relu_()
        n_rows = _ROWS_PER_BLOCK if acts.device.type == "cpu" else _ROWS_PER_BLOCK_GPU
        for rows in torch.split(acts, n_rows):
            self._sums[latents].add_(rows.sum(dim=0, dtype=wide))
            self._n_fired[latents].add_((rows > 0).to(wide).sum(dim=0).to(torch.int64))
        return acts

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, in the type of the weights, shape `(n, D)`."""
        reconstruction: torch.Tensor | None = None
        for latents, acts in zip(self._blocks, self._acts, strict=True):
            W_dec = decoder_block(self._sae, latents, self._dtype)
            product = acts @ W_dec
            reconstruction = (
                product.to(self._sae.b_dec.dtype) if reconstruction is None else reconstruction.add_(product)
            )
            if runs_ahead(W_dec.device):  # a CPU converts them as fast as it reads them
                self._W_dec.append(W_dec)
        assert reconstruction is not None
        return reconstruction

    def gradients(self, g: torch.Tensor, l1: torch.Tensor) -> Gradients:
        """The gradients of the matrices.

        Args:
            g: Gradient of the reconstruction, shape `(n, D)`.
            l1: Gradient of the sparsity term where a latent is active, shape `(S,)`.
        """
        self._g, self._l1 = g.to(self._dtype), l1.to(self._dtype)
        return self

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`; may be asked for once."""
        wide = self._sae.b_enc.dtype
        for latents, acts in zip(self._blocks, self._acts, strict=True):
            W_dec = self._W_dec.pop(0) if self._W_dec else decoder_block(self._sae, latents, self._dtype)
            grad_pre = torch.addmm(self._l1[latents], self._g, W_dec.t())
            del W_dec
            if self._kernels is None:
                torch.ops.aten.threshold_backward.grad_input(grad_pre, acts, 0, grad_input=grad_pre)
                sum_pre = grad_pre.sum(dim=0, dtype=wide)
            else:
                sum_pre = self._kernels.differentiate("relu", acts, acts, [grad_pre], ([], 0.0), 1)[0].to(wide)
            yield RowGradient("W_dec", latents, acts.t() @ self._g)
            _add_bias_gradients(self._sae, latents, sum_pre)
            yield RowGradient("W_enc", latents, grad_pre.t() @ self._centred_cast)

    def count(self, sums: torch.Tensor, n_fired: torch.Tensor) -> None:
        """Add each latent's activations and the number of tokens on which it is active, shape `(S,)` each."""
        sums += self._sums
        n_fired += self._n_fired


class _SparsePart:
    """The same products over active latents alone, in the type of the weights.

    Args:
        sae: The autoencoder; gradients of its biases are added to their `grad`.
        acts: Activations, shape `(n, S)`.
        centred: Centred tokens, shape `(n, D)`.
    """

    def __init__(self, sae: Sae, acts: CooMatrix, centred: torch.Tensor) -> None:
        self._sae, self._centred = sae, centred
        self._acts = acts.with_values(acts.values.to(centred.dtype))
        self._by_latent = self._acts.transpose().with_bounds()

    def decode(self) -> torch.Tensor:
        """Reconstruction without `b_dec`, shape `(n, D)`."""
        return self._acts.matmul(self._sae.W_dec)

    def gradients(self, g: torch.Tensor, l1: torch.Tensor) -> Gradients:
        """See `_DensePart.gradients`."""
        sae, acts = self._sae, self._by_latent
        grad_pre = acts.with_values(acts.sampled_matmul(sae.W_dec, g) + l1[acts.rows])
        _add_bias_gradients(sae, slice(None), grad_pre.row_sums().to(sae.b_enc.dtype))
        return SparseGradients([SparsePiece(0, acts, grad_pre, g)], self._centred)

    def count(self, sums: torch.Tensor, n_fired: torch.Tensor) -> None:
        """See `_DensePart.count`."""
        sums += self._by_latent.row_sums().to(sums.dtype)
        n_fired += self._by_latent.row_lengths()


class _NormGradients(Gradients):
    """Gradients with those of an L1 that weighs activations by the norms of the decoder's rows.

    Args:
        sae: The autoencoder.
        gradients: All others.
        factors: Gradient of the term by each row, divided by the row, shape `(S,)`.
    """

    def __init__(self, sae: Sae, gradients: Gradients, factors: torch.Tensor) -> None:
        self._W_dec, self._gradients, self._factors = sae.W_dec, gradients, factors
        self.repeats_cheaply = gradients.repeats_cheaply

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`."""
        for gradient in self._gradients.rows():
            if gradient.name == "W_dec":
                factors, rows = self._factors[gradient.latents, None], self._W_dec[gradient.latents]
                yield gradient._replace(values=gradient.widen(self._W_dec).addcmul_(factors, rows))
            else:
                yield gradient
            del gradient  # it need not live while the next one is computed


class _GradientSum:
    """Adds the gradients of parts up in the parameters' `grad`."""

    def __init__(self, sae: Sae) -> None:
        self._sae = sae
        for parameter in (sae.W_enc, sae.W_dec):
            parameter.grad = torch.zeros_like(parameter)

    def add(self, gradients: Gradients) -> None:
        """Add a part's."""
        for name, latents, values in gradients.rows():
            by_latent(name, getattr(self._sae, name).grad)[latents] += values


def _add_bias_gradients(sae: Sae, latents: slice | torch.Tensor, grad_b_enc: torch.Tensor) -> None:
    """Add the gradients that some latents' pre-activations give to `b_enc` and `b_dec`.

    Args:
        sae: The autoencoder.
        latents: Which latents.
        grad_b_enc: Sum over tokens of the gradient before the nonlinearity, shape `(n,)`.
    """
    assert sae.b_enc.grad is not None
    assert sae.b_dec.grad is not None
    sae.b_enc.grad[latents] += grad_b_enc  # latents may be a tensor of indices
    sae.b_dec.grad -= sae.W_enc[:, latents] @ grad_b_enc
