"""The step of `topk`, `batchtopk` and `matryoshka` in closed form: everything but the encoder over active latents."""

import itertools
import math

import torch

from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.sae.topk import BatchTopKSae, MatryoshkaSae, TopKSae, find_nth_largest, keep_largest, n_among_largest
from cytosae.sae.world import World
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.fused_loss import fused_loss_for
from cytosae.training.gradients import Gradients, RowAddition, SparseGradients, SparsePiece, SumOfGradients
from cytosae.training.matmul import MatmulConfig, iter_parts

_CANDIDATES = 1.6
"""Candidates for each entry that is kept, as a screen aims at: too few cost another encoding, too many some sorting."""
_N_SCREENS = 3
"""Bounds that are tried in a step; the last one is 0, above which all positive entries are."""
_LEAST_SHARE = 0.05
"""Share of the running threshold from which a screen rises again after it was 0."""
_SAMPLED_TOKENS = 256
"""Tokens from which a first threshold is estimated."""


@fused_loss_for(TopKSae, BatchTopKSae, MatryoshkaSae)
@torch.no_grad()
def fused_topk_loss(
    sae: TopKSae, x: torch.Tensor, inputs: LossInputs, matmul: MatmulConfig
) -> tuple[SaeLoss, Gradients]:
    """`TopKSae.training_loss` and its gradients.

    Args:
        sae: The autoencoder.
        x: Tokens of the whole batch, shape `(N, D)`.
        inputs: Everything else that the loss depends on; `matmul` decides on types.
        matmul: How products are computed.
    """
    dead = sae.find_dead(inputs)  # first, while a GPU has nothing to do: their number decides a shape
    centred = x - sae.b_dec
    active = _select(sae, centred, inputs, matmul)
    acts = active.with_values(active.values.to(x.dtype))
    by_latent = acts.transpose().with_bounds()
    reconstruction, unexplained, pieces = _reconstruct(sae, x, acts, by_latent, inputs)
    sae.b_enc.grad = torch.cat([piece.grad_pre.row_sums() for piece in pieces]).to(x.dtype)
    sae.b_dec.grad = pieces[0].g.sum(dim=0)
    if inputs.latent_ranks.rank:  # the same on all of them, which add theirs up
        sae.b_dec.grad.zero_()
    aux, addition = _revive(sae, dead, x - reconstruction, centred, inputs, matmul)
    sae.b_dec.grad -= sae.W_enc @ sae.b_enc.grad
    n_fired = by_latent.row_lengths()
    terms = LossTerms(unexplained + aux, unexplained, x.new_zeros(()), aux)
    gradients: Gradients = SparseGradients(pieces, centred)
    if addition is not None:
        gradients = SumOfGradients(gradients, addition)
    return SaeLoss(terms, n_fired, reconstruction), gradients


def _select(sae: TopKSae, centred: torch.Tensor, inputs: LossInputs, matmul: MatmulConfig) -> CooMatrix:
    """Latents that the step uses."""
    product = EncoderProduct(sae, centred, matmul)
    if not isinstance(sae, BatchTopKSae):
        return _keep_largest_of_ranks(product.largest(sae.k), sae.k, inputs.latent_ranks)
    ranks = inputs.ranks
    n_wanted = sae.k * inputs.count(centred)
    # CPU-GPU sync point, as in the loop: what is encoded depends on what was found.
    threshold = sae.threshold if sae.threshold > 0 else _estimate_threshold(sae, centred, inputs)
    candidates = _find_candidates(sae, product, threshold, n_wanted, matmul.dtype, ranks)
    kept = _keep_largest(candidates, n_among_largest(candidates.values, n_wanted, ranks))
    sae.follow_kept_(kept.values, ranks)
    return kept


def _find_candidates(
    sae: BatchTopKSae, product: EncoderProduct, threshold: torch.Tensor, n: int, dtype: torch.dtype, ranks: World
) -> CooMatrix:
    """Entries among which are the n largest of all ranks, or all positive ones if there are fewer.

    They are those above a share of the running threshold, which lags behind in a young run and scatters with the
    batches. So the share follows what the steps before found; the selection is the same whatever it is.
    """
    for number in range(_N_SCREENS):
        share = sae.screen_share if number < _N_SCREENS - 1 else 0.0
        candidates = product.above((share * threshold).to(dtype))
        n_found = ranks.add(len(candidates.values))
        sae.screen_share = _next_share(share, n_found / max(n, 1))
        if n_found >= n or not share:
            break
    return candidates


def _next_share(share: float, ratio: float) -> float:
    """The share of the threshold for the next screen, after one that found `ratio` candidates for each wanted entry."""
    if ratio < 1 and share <= _LEAST_SHARE:
        return 0.0
    # Entries above a bound grow about as its square falls. Down at once, up in small steps: too high costs more.
    change = math.sqrt(ratio / _CANDIDATES)
    return max(share, _LEAST_SHARE) * min(max(change, 0.4), 1.1)


def _keep_largest_of_ranks(entries: CooMatrix, k: int, ranks: World) -> CooMatrix:
    """Those of the entries that are among the k largest of their token on all ranks, each of which has other latents.

    Args:
        entries: The k largest of every token on this rank, by token; fewer if fewer are positive.
        k: How many are kept.
        ranks: The processes.
    """
    if ranks.size == 1:
        return entries
    lengths = entries.row_lengths()
    slots = torch.arange(len(entries.rows), device=lengths.device) - (lengths.cumsum(0) - lengths)[entries.rows]
    values = entries.values.new_full((entries.shape[0], k), -torch.inf)
    values[entries.rows, slots] = entries.values
    everything = torch.cat(ranks.gather(values), dim=1)
    kept = torch.zeros_like(everything, dtype=torch.bool)
    kept.scatter_(1, everything.topk(k, dim=1, sorted=False).indices, True)
    own = kept[:, ranks.rank * k : (ranks.rank + 1) * k]
    # CPU-GPU sync point: the number of entries decides a shape.
    return entries.take(own[entries.rows, slots].nonzero().squeeze(1))


def _keep_largest(entries: CooMatrix, n: int) -> CooMatrix:
    """The n largest of the entries, all if there are fewer; ties as `keep_largest` breaks them.

    Args:
        entries: In any order on a CPU, where only what may be kept is sorted.
        n: How many are kept.
    """
    if not n:
        return entries.take(entries.columns[:0])
    if runs_ahead(entries.values.device):
        if len(entries.values) <= n:
            return entries
        # A GPU sorts with all of its cores, without a sync point, and looks for the n-th value with a few.
        return entries.take(entries.values.sort(descending=True, stable=True).indices[:n].sort().values)
    if len(entries.values) > n:
        smallest = find_nth_largest(entries.values, n)
        entries = entries.take((entries.values >= smallest).nonzero().squeeze(1))
    entries = entries.sort()
    return entries if len(entries.values) <= n else entries.take(keep_largest(entries.values, n))


def _estimate_threshold(sae: TopKSae, centred: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """The value at which k latents per token are active, from a few tokens; 0-dimensional, at least 0.

    It is the mean of all ranks, each of which counts by its tokens: any value that is the same on all of them will do.
    """
    sample = centred[:: max(1, len(centred) // _SAMPLED_TOKENS)]
    pre = torch.addmm(sae.b_enc, sample, sae.W_enc).flatten()
    own = pre.topk(min(len(pre), sae.k * len(sample))).values[-1:].clamp_min(0)
    mean = inputs.token_ranks.sum(own.sum() * (len(centred) / inputs.count(centred)))
    return inputs.latent_ranks.sum(mean) / inputs.latent_ranks.size


def _reconstruct(
    sae: TopKSae, x: torch.Tensor, acts: CooMatrix, by_latent: CooMatrix, inputs: LossInputs
) -> tuple[torch.Tensor, torch.Tensor, list[SparsePiece]]:
    """Reconstruction, unexplained share of the variance, and the gradients of every nested dictionary's own latents.

    Args:
        sae: The autoencoder.
        x: Tokens, shape `(N, D)`.
        acts: Activations, by token.
        by_latent: The same, transposed.
        inputs: What the loss depends on.
    """
    bounds = [0, *sae.dictionaries]
    n_dictionaries, by_token = len(bounds) - 1, acts.split_columns(bounds)
    variance = inputs.variance
    reconstruction = sae.b_dec.expand_as(x)
    unexplained, residuals = x.new_zeros(()), []
    for (start, end), inside in zip(itertools.pairwise(bounds), by_token, strict=True):
        reconstruction = inputs.latent_ranks.sum(inside.matmul(sae.W_dec[start:end])).add_(reconstruction)
        residuals.append(reconstruction - x)
        unexplained = unexplained + residuals[-1].square().sum() / variance
    pieces: list[SparsePiece] = []
    scale = 2 / n_dictionaries / variance
    own = zip(itertools.pairwise(bounds), residuals, by_latent.split_rows(bounds), strict=True)
    for (start, end), residual, piece in reversed(list(own)):
        # A latent takes part in its own dictionary and in all larger ones.
        g = residual.mul_(scale) if not pieces else residual.mul_(scale).add_(pieces[-1].g)
        grad_pre = piece.with_values(piece.sampled_matmul(sae.W_dec[start:end], g))
        pieces.append(SparsePiece(start, piece, grad_pre, g))
    return reconstruction, inputs.token_ranks.sum(unexplained) / n_dictionaries, pieces[::-1]


def _revive(
    sae: TopKSae,
    dead: torch.Tensor,
    residual: torch.Tensor,
    centred: torch.Tensor,
    inputs: LossInputs,
    matmul: MatmulConfig,
) -> tuple[torch.Tensor, RowAddition | None]:
    """The term AuxK, and its gradients for dead latents; adds to the gradient of `b_enc`."""
    zero = residual.new_zeros(())
    n_dead = inputs.latent_ranks.add(len(dead))
    if not n_dead:
        return zero, None
    dtype, k_aux = matmul.dtype, sae.n_revived(n_dead)
    W_enc, W_dec = sae.W_enc.t()[dead].to(dtype), sae.W_dec[dead].to(dtype)
    grads = RowAddition(dead, torch.zeros_like(sae.W_dec[dead]), torch.zeros_like(sae.W_dec[dead]))
    error = inputs.token_ranks.sum(residual.square().sum()).clamp_min(torch.finfo(residual.dtype).tiny)
    scale = inputs.weights.aux_coefficient / error
    total = zero
    for part in iter_parts(len(residual), matmul.n_tokens(n_dead)):
        tokens = centred[part].to(dtype)
        acts = torch.addmm(sae.b_enc[dead].to(dtype), tokens, W_enc.t()).relu_()
        if k_aux < n_dead:
            acts = _keep_revived(acts, k_aux, inputs.latent_ranks)
        difference = inputs.latent_ranks.sum((acts @ W_dec).to(residual.dtype)) - residual[part]
        total = total + difference.square().sum() * scale
        g = difference.mul_(2 * scale).to(dtype)
        grads.W_dec.add_(acts.t() @ g)
        grad_pre = (g @ W_dec.t()).mul_(acts > 0)
        grads.W_enc.add_(grad_pre.t() @ tokens)
        assert sae.b_enc.grad is not None
        sae.b_enc.grad[dead] += grad_pre.sum(dim=0, dtype=residual.dtype)
    return inputs.token_ranks.sum(total), grads


def _keep_revived(acts: torch.Tensor, k: int, ranks: World) -> torch.Tensor:
    """Activations of dead latents, shape `(n, dead)`, of which the k largest of a token on all ranks are kept."""
    kept = acts.topk(min(k, acts.shape[1]), dim=1, sorted=False)
    values = kept.values
    if ranks.size > 1:
        parts = ranks.gather(values.t().contiguous())
        first = sum(len(part) for part in parts[: ranks.rank])
        everything = torch.cat(parts)
        among = torch.zeros_like(everything, dtype=torch.bool)
        among.scatter_(0, everything.topk(k, dim=0, sorted=False).indices, True)
        values = values * among[first : first + values.shape[1]].t()
    return torch.zeros_like(acts).scatter_(1, kept.indices, values)
