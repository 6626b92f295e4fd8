"""The step of `jumprelu` and `gated` in closed form: their activation functions look at one latent of one token.

Where few latents are active, everything but the encoder is computed from those alone; otherwise from all, in parts of
the batch that fit the memory.
"""

import itertools
from collections.abc import Iterator

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead
from cytosae.sae.kernels import find_kernels
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.training.activation_rules import RULES, Rule
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.fused_loss import ACTIVATIONS, decoder_block, encode_block, fused_loss_for
from cytosae.training.gradients import (
    MATRICES,
    Gradients,
    RowGradient,
    SparseGradients,
    SparsePiece,
    StoredGradients,
    blocks_of_latents,
    by_latent,
)
from cytosae.training.matmul import MatmulConfig, iter_parts

_TOKENS_AT_ONCE = 64
"""Tokens whose activation functions are computed together on a CPU, for a block of latents."""


@fused_loss_for(*RULES)
@torch.no_grad()
def fused_elementwise_loss(
    sae: Sae, x: torch.Tensor, inputs: LossInputs, matmul: MatmulConfig
) -> tuple[SaeLoss, Gradients]:
    """`training_loss` of the architecture and its gradients.

    Args:
        sae: The autoencoder.
        x: Tokens of the whole batch, shape `(N, D)`.
        inputs: Everything else that the loss depends on; `matmul` decides on types.
        matmul: How products are computed.
    """
    rule = RULES[type(sae)](sae, inputs, inputs.count(x))
    centred = x - sae.b_dec
    if matmul.sparse_below:
        bound = rule.bound.to(matmul.dtype)
        # Rounded down: an entry that is not needed does no harm.
        bound = torch.nextafter(bound, torch.full_like(bound, -torch.inf)) if matmul.dtype != x.dtype else bound
        entries = EncoderProduct(sae, centred, matmul).above_if_few(bound, matmul.sparse_below)
        if entries is not None:
            return rule.revive(x, *_sparse_loss(rule, x, centred, entries))
    return rule.revive(x, *_DenseLoss(rule, x, centred, matmul).compute())


def _sparse_loss(rule: Rule, x: torch.Tensor, centred: torch.Tensor, entries: CooMatrix) -> tuple[SaeLoss, Gradients]:
    """The loss and its gradients from entries that have an activation or a gradient."""
    sae = rule.sae
    pre = entries.with_values(entries.values.to(x.dtype))
    acts = rule.decoded(pre.values, pre.columns)
    transposed = pre.transpose().with_bounds()
    transposed_acts = transposed.with_values(rule.decoded(transposed.values, transposed.rows)[0]).drop_zeros()
    n_fired = transposed_acts.row_lengths()
    reconstructions = [pre.with_values(one).drop_zeros().matmul(sae.W_dec).add_(sae.b_dec) for one in acts]
    errors = _errors(rule, x, reconstructions)
    sparsity = _sparsity(rule, [one.sum() for one in acts], n_fired.sum())
    gs = [reconstruction.sub(x).mul_(2 / rule.inputs.variance) for reconstruction in reconstructions]
    products = [transposed.sampled_matmul(sae.W_dec, g) for g in gs]

    parts = [transposed.with_values(one) for one in rule.backward(transposed.values, transposed.rows, products)]
    sums = [part.row_sums().to(x.dtype) for part in parts]
    for name, gradient in rule.vectors(sums, slice(None)).items():
        getattr(sae, name).grad = gradient
    sae.b_dec.grad = gs[0].sum(dim=0) - sae.W_enc @ sums[0]
    piece = SparsePiece(0, transposed_acts, parts[0].drop_zeros(), gs[0])
    gradients = SparseGradients([piece], centred)
    return SaeLoss(_terms(errors, sparsity), n_fired, reconstructions[0]), gradients


class _DenseLoss:
    """The loss and its gradients from all latents, in parts of the batch.

    Args:
        rule: The activation function.
        x: Tokens, shape `(N, D)`.
        centred: Tokens minus `b_dec`.
        matmul: How products are computed.
    """

    def __init__(self, rule: Rule, x: torch.Tensor, centred: torch.Tensor, matmul: MatmulConfig) -> None:
        sae = rule.sae
        self._rule, self._sae, self._x, self._dtype = rule, sae, x, matmul.dtype
        self._centred = centred.to(matmul.dtype)
        # A block's weights, and its matrices of tokens and latents, stay in the processor's cache.
        self._blocks = list(blocks_of_latents(len(sae.b_enc), x.device))
        self._parts = list(iter_parts(len(x), matmul.n_tokens(len(sae.b_enc))))
        sizes = [max(one.stop - one.start for one in several) for several in (self._parts, self._blocks)]
        self._n_rows = max(1, sizes[0]) if runs_ahead(x.device) else _TOKENS_AT_ONCE
        self._kernels = find_kernels(self._centred, self._centred, ACTIVATIONS)
        # New memory costs as much as the arithmetic in it, so that a block's matrices take the place of those before.
        self._room = [x.new_empty(sizes[0] * sizes[1], dtype=matmul.dtype) for _ in range(1 + rule.n_decoded)]

    def compute(self) -> tuple[SaeLoss, Gradients]:
        """The loss and its gradients: those of the matrices by block if the batch is one part, else kept in `grad`."""
        sae, rule, x = self._sae, self._rule, self._x
        n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)
        reconstructions = [sae.b_dec.detach().repeat(len(x), 1) for _ in range(rule.n_decoded)]
        sums = [x.new_zeros(()) for _ in range(rule.n_decoded)]
        for part in self._parts:
            pre = self._encode(part)
            for latents, block in zip(self._blocks, pre, strict=True):
                n_fired[latents].add_(self._decode(block, part, latents, reconstructions, sums))
        errors = _errors(rule, x, reconstructions)
        sparsity = _sparsity(rule, sums, n_fired.sum())
        gs = [reconstruction.sub(x).mul_(2 / rule.inputs.variance) for reconstruction in reconstructions]
        for name, parameter in sae.named_parameters():
            parameter.grad = None if name in MATRICES else torch.zeros_like(parameter)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += gs[0].sum(dim=0)
        gs_cast = [g.to(self._dtype) for g in gs]
        gradients: Gradients
        if len(self._parts) == 1:
            gradients = _DenseGradients(self, pre, gs_cast)
        else:
            del pre, block  # of the last part
            self._store_gradients(gs_cast)
            gradients = StoredGradients(sae)
        return SaeLoss(_terms(errors, sparsity), n_fired, reconstructions[0]), gradients

    def _store_gradients(self, gs: list[torch.Tensor]) -> None:
        """Add the gradients of all parts up in the parameters' `grad`."""
        for name in MATRICES:
            getattr(self._sae, name).grad = torch.empty_like(getattr(self._sae, name))
        for part in self._parts:
            # The second pass needs sums over all tokens, known only after the first one: each part is encoded again.
            for name, latents, values in self.gradients(self._encode(part), part, gs):
                total = by_latent(name, getattr(self._sae, name).grad)[latents]
                # The first part fills in what has no value yet.
                total.add_(values) if part.start else total.copy_(values)

    def gradients(self, pre: list[torch.Tensor], part: slice, gs: list[torch.Tensor]) -> Iterator[RowGradient]:
        """The gradients that some tokens give to the matrices; those of vectors are added to their `grad`.

        Args:
            pre: What `_encode` gave for these tokens.
            part: Which tokens.
            gs: Gradient of every reconstruction, in the type of the products, of all tokens.
        """
        for latents, block in zip(self._blocks, pre, strict=True):
            yield from self._gradients_of_block(block, part, latents, [g[part] for g in gs])

    def _encode(self, part: slice) -> list[torch.Tensor]:
        """Latents before the nonlinearity, shape `(n, latents)` in every block."""
        return [encode_block(self._sae, self._centred[part], latents) for latents in self._blocks]

    def _decode(
        self,
        pre: torch.Tensor,
        part: slice,
        latents: slice,
        reconstructions: list[torch.Tensor],
        sums: list[torch.Tensor],
    ) -> torch.Tensor:
        """Add what some tokens and latents decode to, and its sums; says on how many tokens each latent is active."""
        wide = self._x.dtype
        decoded = self._matrices(pre)[: len(sums)]
        if self._kernels is not None:
            vectors, _ = self._rule.constants(latents)
            n_fired, *totals = self._kernels.activate(self._sae.architecture, pre, decoded, vectors)
            for total, one in zip(sums, totals, strict=True):
                total += one.sum()
        else:
            n_fired = self._x.new_zeros(pre.shape[1])
            for rows in self._rows(pre):
                acts = self._rule.decoded(pre[rows].to(wide), latents)
                n_fired += (acts[0] > 0).to(wide).sum(dim=0)
                for total, kept, one in zip(sums, decoded, acts, strict=True):
                    total += one.sum()
                    kept[rows] = one
        W_dec = decoder_block(self._sae, latents, self._dtype)
        for reconstruction, one in zip(reconstructions, decoded, strict=True):
            reconstruction[part].add_(one @ W_dec)
        counts: torch.Tensor = n_fired.to(torch.int64)
        return counts

    def _gradients_of_block(
        self, pre: torch.Tensor, part: slice, latents: slice, gs: list[torch.Tensor]
    ) -> Iterator[RowGradient]:
        """The gradients that some tokens give to some latents."""
        sae, wide = self._sae, self._x.dtype
        acts, *products = self._matrices(pre)
        W_dec = decoder_block(self._sae, latents, self._dtype).t()
        for product, g in zip(products, gs, strict=True):
            torch.mm(g, W_dec, out=product)
        grad_pre = products[0]  # which it replaces
        if self._kernels is None:
            sums = self._differentiate(pre, latents, acts, products)
        else:
            rule = self._rule
            found = self._kernels.differentiate(
                sae.architecture, pre, acts, products, rule.constants(latents), rule.n_summed
            )
            sums = list(found.to(wide))
        for name, gradient in self._rule.vectors(sums, latents).items():
            getattr(sae, name).grad[latents].add_(gradient)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad -= sae.W_enc[:, latents] @ sums[0]
        yield RowGradient("W_dec", latents, acts.t() @ gs[0])
        yield RowGradient("W_enc", latents, grad_pre.t() @ self._centred[part])

    def _differentiate(
        self, pre: torch.Tensor, latents: slice, acts: torch.Tensor, products: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Fill in activations, and gradients before the nonlinearity in place of the first product.

        Returns:
            Sums over tokens of what the rule's `backward` gives, shape `(n,)` each.
        """
        wide = self._x.dtype
        sums = [self._x.new_zeros(pre.shape[1]) for _ in range(self._rule.n_summed)]
        for rows in self._rows(pre):
            here = pre[rows].to(wide)
            acts[rows] = self._rule.decoded(here, latents)[0]
            parts = self._rule.backward(here, latents, [one[rows].to(wide) for one in products])
            grad_pre = next(parts)
            for total, one in zip(sums, itertools.chain([grad_pre], parts), strict=True):
                total += one.sum(dim=0, dtype=wide)
            products[0][rows] = grad_pre
        return sums

    def _matrices(self, pre: torch.Tensor) -> list[torch.Tensor]:
        """Matrices of a block's shape, in the type of the products."""
        return [room[: pre.numel()].view(pre.shape) for room in self._room]

    def _rows(self, pre: torch.Tensor) -> list[slice]:
        """Few tokens at a time, so that all that is computed from their entries stays in the processor's cache."""
        return list(iter_parts(len(pre), self._n_rows))


class _DenseGradients(Gradients):
    """The gradients of a batch that is one part.

    Args:
        loss: What computes them.
        pre: Latents before the nonlinearity, shape `(n, latents)` in every block.
        gs: Gradient of every reconstruction, in the type of the products.
    """

    repeats_cheaply = False

    def __init__(self, loss: _DenseLoss, pre: list[torch.Tensor], gs: list[torch.Tensor]) -> None:
        self._loss, self._pre, self._gs = loss, pre, gs

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`; may be asked for once."""
        return self._loss.gradients(self._pre, slice(None), self._gs)


def _errors(rule: Rule, x: torch.Tensor, reconstructions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Unexplained share of the variance of every reconstruction."""
    errors = [(reconstruction - x).square().sum() / rule.inputs.variance for reconstruction in reconstructions]
    return list(rule.inputs.token_ranks.sum(torch.stack(errors)))


def _sparsity(rule: Rule, sums: list[torch.Tensor], n_active: torch.Tensor) -> torch.Tensor:
    """The sparsity term of the whole batch, from this rank's sums."""
    ranks = rule.inputs.token_ranks
    return rule.sparsity(list(ranks.sum(torch.stack(sums))), ranks.sum(n_active))


def _terms(errors: list[torch.Tensor], sparsity: torch.Tensor) -> LossTerms:
    """The loss and its parts; a second reconstruction is the gate's."""
    aux = errors[1] if len(errors) > 1 else torch.zeros_like(errors[0])
    return LossTerms(errors[0] + sparsity + aux, errors[0], sparsity, aux)
