"""The step of `jumprelu` and `gated` in closed form: their activation functions look at one latent of one token.

Where few latents are active, everything but the encoder is computed from those alone; otherwise from all, in parts of
the batch that fit the memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead
from cytosae.sae.gated import GatedSae
from cytosae.sae.jumprelu import JumpReluSae
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.fused_loss import fused_loss_for
from cytosae.training.gradients import (
    Gradients,
    SparseGradients,
    SparsePiece,
    StoredGradients,
    blocks_of_latents,
    by_latent,
)
from cytosae.training.matmul import MatmulConfig, iter_parts

_TOKENS_AT_ONCE = 64
"""Tokens whose activation functions are computed together on a CPU, for a block of latents."""

Latents = slice | torch.Tensor
SumTokens = Callable[[torch.Tensor], torch.Tensor]
"""Sums over tokens: what belongs to each entry becomes a value for each latent."""


class Backward(NamedTuple):
    """Gradients of an activation function."""

    pre: torch.Tensor
    """Gradient before the nonlinearity, of the same shape as there."""
    vectors: dict[str, torch.Tensor]
    """Gradients of the parameters with one value for each latent, by name."""


class Rule(ABC):
    """An activation function, its loss terms and their gradients.

    Args:
        sae: The autoencoder.
        inputs: What the loss depends on.
        n_tokens: Tokens N of the whole batch.
    """

    n_decoded: ClassVar[int] = 1
    """Number of matrices that are decoded."""

    def __init__(self, sae: Sae, inputs: LossInputs, n_tokens: int) -> None:
        self.sae, self.inputs, self.n_tokens = sae, inputs, n_tokens

    @property
    @abstractmethod
    def bound(self) -> torch.Tensor:
        """Latents at or below it have neither an activation nor a gradient: 0-dimensional or of shape `(S,)`."""

    @abstractmethod
    def decoded(self, pre: torch.Tensor, latents: Latents) -> list[torch.Tensor]:
        """What is decoded, the activations first.

        Args:
            pre: Latents before the nonlinearity, shape `(..., n)`.
            latents: Which latents they are.
        """

    @abstractmethod
    def sparsity(self, sums: list[torch.Tensor], n_active: torch.Tensor) -> torch.Tensor:
        """The sparsity term, from sums over the whole batch of what is decoded, and the number of active entries."""

    @abstractmethod
    def backward(
        self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor], sum_tokens: SumTokens
    ) -> Backward:
        """Gradients, after `sparsity`.

        Args:
            pre: Latents before the nonlinearity.
            latents: Which latents they are.
            products: Gradient of the squared error by what is decoded, of the same shape as `pre`, in the same order.
            sum_tokens: Sums over tokens.
        """


class _JumpRelu(Rule):
    """See `JumpReluSae`."""

    sae: JumpReluSae

    @property
    def bound(self) -> torch.Tensor:
        return torch.relu(self.sae.threshold.detach()) - self.sae.bandwidth / 2

    def decoded(self, pre: torch.Tensor, latents: Latents) -> list[torch.Tensor]:
        return [pre * (pre > torch.relu(self.sae.threshold[latents]))]

    def sparsity(self, sums: list[torch.Tensor], n_active: torch.Tensor) -> torch.Tensor:
        excess = n_active.to(self.sae.b_enc.dtype) / self.n_tokens / self.sae.k - 1
        coefficient = self.inputs.weights.l0_coefficient
        self._grad_active = 2 * coefficient * excess / self.sae.k / self.n_tokens
        return coefficient * excess.square()

    def backward(
        self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor], sum_tokens: SumTokens
    ) -> Backward:
        threshold, bandwidth = torch.relu(self.sae.threshold), self.sae.bandwidth
        (grad_acts,) = products
        near = (pre - threshold[latents]).abs() < bandwidth / 2
        grad_pre = grad_acts * (pre > threshold[latents])
        summed = latents if isinstance(latents, slice) else slice(None)  # one value for each latent
        kernel = threshold[summed] * sum_tokens(grad_acts * near) + self._grad_active * sum_tokens(near)
        grad_threshold = kernel / -bandwidth * (self.sae.threshold[summed] > 0)
        return Backward(grad_pre, {"b_enc": sum_tokens(grad_pre), "threshold": grad_threshold})


class _Gated(Rule):
    """See `GatedSae`."""

    n_decoded: ClassVar[int] = 2
    sae: GatedSae

    @property
    def bound(self) -> torch.Tensor:
        return self.sae.b_enc.new_zeros(())

    def decoded(self, pre: torch.Tensor, latents: Latents) -> list[torch.Tensor]:
        return [self.sae.activate(pre, latents), torch.relu(pre)]

    def sparsity(self, sums: list[torch.Tensor], n_active: torch.Tensor) -> torch.Tensor:
        return self.inputs.weights.l1_coefficient * sums[1] / self.n_tokens

    def backward(
        self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor], sum_tokens: SumTokens
    ) -> Backward:
        scaled = (pre - self.sae.b_enc[latents]) * self.sae.r_mag[latents].exp()
        is_open = pre > 0
        grad_magnitude = products[0] * (is_open & (scaled + self.sae.b_mag[latents] > 0))
        grad_gate = (products[1] + self.inputs.weights.l1_coefficient / self.n_tokens) * is_open
        grad_pre = grad_magnitude * self.sae.r_mag[latents].exp() + grad_gate
        # The magnitude is computed from `pre - b_enc`, so that its gradient does not reach `b_enc`.
        vectors = {
            "b_enc": sum_tokens(grad_gate),
            "r_mag": sum_tokens(grad_magnitude * scaled),
            "b_mag": sum_tokens(grad_magnitude),
        }
        return Backward(grad_pre, vectors)


_RULES: dict[type[Sae], type[Rule]] = {JumpReluSae: _JumpRelu, GatedSae: _Gated}


@fused_loss_for(*_RULES)
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
    rule = _RULES[type(sae)](sae, inputs, inputs.count(x))
    centred = x - sae.b_dec
    product = EncoderProduct(sae, centred, matmul)
    bound = rule.bound.to(matmul.dtype)
    # Rounded down: an entry that is not needed does no harm.
    bound = torch.nextafter(bound, torch.full_like(bound, -torch.inf)) if matmul.dtype != x.dtype else bound
    entries = product.above_if_few(bound, matmul.sparse_below) if matmul.sparse_below else None
    if entries is not None:
        return _sparse_loss(rule, x, centred, entries)
    return _DenseLoss(rule, x, centred, matmul).compute()


def _sparse_loss(rule: Rule, x: torch.Tensor, centred: torch.Tensor, entries: CooMatrix) -> tuple[SaeLoss, Gradients]:
    """The loss and its gradients from entries that have an activation or a gradient."""
    sae = rule.sae
    pre = entries.with_values(entries.values.to(x.dtype))
    acts = rule.decoded(pre.values, pre.columns)
    transposed = pre.transpose()
    transposed_acts = transposed.with_values(rule.decoded(transposed.values, transposed.rows)[0]).drop_zeros()
    n_fired = transposed_acts.row_lengths()
    reconstructions = [pre.with_values(one).drop_zeros().matmul(sae.W_dec).add_(sae.b_dec) for one in acts]
    errors = _errors(rule, x, reconstructions)
    sparsity = _sparsity(rule, [one.sum() for one in acts], n_fired.sum())
    gs = [reconstruction.sub(x).mul_(2 / rule.inputs.variance) for reconstruction in reconstructions]
    products = [transposed.sampled_matmul(sae.W_dec, g) for g in gs]

    def sum_tokens(values: torch.Tensor) -> torch.Tensor:
        return transposed.with_values(values).row_sums().to(x.dtype)

    backward = rule.backward(transposed.values, transposed.rows, products, sum_tokens)
    for name, gradient in backward.vectors.items():
        getattr(sae, name).grad = gradient
    sae.b_dec.grad = gs[0].sum(dim=0) - sae.W_enc @ sum_tokens(backward.pre)
    piece = SparsePiece(0, transposed_acts, transposed.with_values(backward.pre).drop_zeros(), gs[0])
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
        self._W_enc, self._W_dec = sae.W_enc.to(matmul.dtype), sae.W_dec.to(matmul.dtype)
        # A block's matrices of tokens and latents stay in the processor's cache.
        self._blocks = list(blocks_of_latents(len(sae.b_enc), x.device))
        self._parts = list(iter_parts(len(x), matmul.n_tokens(len(sae.b_enc))))
        sizes = [max(one.stop - one.start for one in several) for several in (self._parts, self._blocks)]
        self._n_rows = sizes[0] if runs_ahead(x.device) else _TOKENS_AT_ONCE
        # New memory costs as much as the arithmetic in it, so that a block's matrices take the place of those before.
        self._room = [x.new_empty(sizes[0] * sizes[1], dtype=matmul.dtype) for _ in range(1 + rule.n_decoded)]

    def compute(self) -> tuple[SaeLoss, Gradients]:
        """The loss; gradients are added up in the parameters' `grad`."""
        sae, rule, x = self._sae, self._rule, self._x
        n_fired = torch.zeros_like(sae.b_enc, dtype=torch.int64)
        reconstructions = [sae.b_dec.detach().repeat(len(x), 1) for _ in range(rule.n_decoded)]
        sums = [x.new_zeros(()) for _ in range(rule.n_decoded)]
        for part in self._parts:
            pre = self._encode(part)
            for latents in self._blocks:
                n_fired[latents] += self._decode(pre[:, latents], part, latents, reconstructions, sums)
        errors = _errors(rule, x, reconstructions)
        sparsity = _sparsity(rule, sums, n_fired.sum())
        gs = [reconstruction.sub(x).mul_(2 / rule.inputs.variance) for reconstruction in reconstructions]
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert sae.b_dec.grad is not None
        sae.b_dec.grad += gs[0].sum(dim=0)
        for part in self._parts:
            # The second pass needs what the first one knew of all tokens; more than one part is encoded again.
            pre = pre if len(self._parts) == 1 else self._encode(part)
            gs_cast = [g[part].to(self._dtype) for g in gs]
            for latents in self._blocks:
                self._add_gradients(pre[:, latents], part, latents, gs_cast)
        return SaeLoss(_terms(errors, sparsity), n_fired, reconstructions[0]), StoredGradients(sae)

    def _encode(self, part: slice) -> torch.Tensor:
        """Latents before the nonlinearity, shape `(n, S)`."""
        return torch.addmm(self._sae.b_enc.to(self._dtype), self._centred[part], self._W_enc)

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
        n_fired = self._x.new_zeros(pre.shape[1])
        for rows in self._rows(pre):
            acts = self._rule.decoded(pre[rows].to(wide), latents)
            n_fired += (acts[0] > 0).to(wide).sum(dim=0)
            for total, kept, one in zip(sums, decoded, acts, strict=True):
                total += one.sum()
                kept[rows] = one
        for reconstruction, one in zip(reconstructions, decoded, strict=True):
            reconstruction[part] += one @ self._W_dec[latents]
        return n_fired.to(torch.int64)

    def _add_gradients(self, pre: torch.Tensor, part: slice, latents: slice, gs: list[torch.Tensor]) -> None:
        """Add the gradients of some tokens and latents."""
        sae, wide = self._sae, self._x.dtype
        acts, *products = self._matrices(pre)
        for product, g in zip(products, gs, strict=True):
            torch.mm(g, self._W_dec[latents].t(), out=product)
        grad_pre = products[0]  # which it replaces
        sum_pre = self._x.new_zeros(pre.shape[1])

        def sum_tokens(values: torch.Tensor) -> torch.Tensor:
            return values.sum(dim=0, dtype=wide)

        for rows in self._rows(pre):
            here = pre[rows].to(wide)
            acts[rows] = self._rule.decoded(here, latents)[0]
            backward = self._rule.backward(here, latents, [one[rows].to(wide) for one in products], sum_tokens)
            grad_pre[rows] = backward.pre
            sum_pre += sum_tokens(backward.pre)
            for name, gradient in backward.vectors.items():
                getattr(sae, name).grad[latents] += gradient
        assert sae.b_dec.grad is not None
        sae.b_dec.grad -= sae.W_enc[:, latents] @ sum_pre
        further = {"W_dec": acts.t() @ gs[0], "W_enc": grad_pre.t() @ self._centred[part]}
        for name, gradient in further.items():
            by_latent(name, getattr(sae, name).grad)[latents] += gradient

    def _matrices(self, pre: torch.Tensor) -> list[torch.Tensor]:
        """Matrices of a block's shape, in the type of the products."""
        return [room[: pre.numel()].view(pre.shape) for room in self._room]

    def _rows(self, pre: torch.Tensor) -> list[slice]:
        """Few tokens at a time, so that all that is computed from their entries stays in the processor's cache."""
        return list(iter_parts(len(pre), self._n_rows))


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
