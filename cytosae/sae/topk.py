"""Architectures that keep a fixed number of latents: per token, per batch, and in nested dictionaries."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from cytosae.sae.base import Sae
from cytosae.sae.devices import runs_ahead
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss
from cytosae.sae.world import ALONE, World

_THRESHOLD_DECAY = 0.95
"""Decay of the running threshold: one batch's threshold is accurate to a percent, and a slower decay would lag."""
_CANDIDATES_ABOVE = (0.7, 0.3, 0.0)
"""Shares of the running threshold, tried in turn, that the calibrated one must exceed; the result is the same."""
_TOKENS_AT_ONCE = 512


class TopKSae(Sae):
    """Keeps the k largest positive latents of every token (Gao et al. 2024, arXiv:2406.04093).

    Ties at the k-th place are all kept, so that the result does not depend on the order of the latents.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Active latents per token.
        **more: As for `Sae`.

    Raises:
        ValueError: If `k` is not a whole number from 1 to S.
    """

    architecture: ClassVar[str] = "topk"
    setting_names: ClassVar[tuple[str, ...]] = ("k",)
    needed_settings: ClassVar[frozenset[str]] = frozenset({"k"})
    training_options: ClassVar[frozenset[str]] = frozenset({"aux_coefficient"})
    saelens_architecture: ClassVar[str | None] = "topk"
    needs_whole_rows: ClassVar[bool] = True
    splits_latents: ClassVar[bool] = True

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, **more)
        if isinstance(k, bool) or k not in range(1, n_latents + 1):
            raise ValueError(f"k must be a whole number from 1 to the {n_latents} latents, found {k!r}")
        self.k = int(k)

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`; needs all latents."""
        kth_value = pre.topk(self.k, dim=-1).values[..., -1:]
        return torch.relu(pre) * (pre >= kth_value)

    @property
    def dictionaries(self) -> list[int]:
        """Sizes of the nested dictionaries that must each reconstruct, ascending to S."""
        return [len(self.b_enc)]

    def keep(self, pre: torch.Tensor, ranks: World = ALONE) -> torch.Tensor:
        """Which latents a training step keeps, bool.

        Args:
            pre: Pre-activations of the batch, shape `(N, S)`.
            ranks: Processes that have other tokens of the batch.
        """
        at = pre.topk(self.k, dim=1, sorted=False).indices
        return torch.zeros_like(pre, dtype=torch.bool).scatter_(1, at, True) & (pre > 0)

    def find_dead(self, inputs: LossInputs) -> torch.Tensor:
        """Latents that AuxK revives in a step, int64, ascending."""
        if inputs.dead_mask is None or not inputs.weights.aux_coefficient:
            return torch.empty(0, dtype=torch.int64, device=self.b_enc.device)
        # CPU-GPU sync point: the number of dead latents decides a shape.
        return inputs.dead_mask.nonzero().squeeze(1)

    def n_revived(self, n_dead: int) -> int:
        """Dead latents of a token that learn to explain its residual."""
        return min(self.W_dec.shape[1] // 2, n_dead)

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Unexplained share of the variance, and AuxK: dead latents learn to explain the residual; see `Sae`.

        The auxiliary term (Gao et al. 2024, appendix A.2) is `||e - e^||^2 / ||e||^2` with the residual `e = x - x^`
        detached and `e^` decoded without `b_dec` from the D/2 largest dead latents; its gradient reaches their encoder.
        `cytosae.training.fused_topk` is its fast path.
        """
        pre, W_dec = self.pre_activations_in(x, inputs.dtype), self.W_dec.to(inputs.dtype)
        acts = torch.relu(pre) * self.keep(pre.detach(), inputs.token_ranks)
        mse = x.new_zeros(())
        for end in self.dictionaries:
            reconstruction = (acts[:, :end] @ W_dec[:end]).to(x.dtype) + self.b_dec
            mse = mse + (reconstruction - x).square().sum() / inputs.variance / len(self.dictionaries)
        mse, aux = inputs.token_ranks.total(mse), x.new_zeros(())
        if len(dead := self.find_dead(inputs)):
            residual = (x - reconstruction).detach()
            revived = torch.relu(pre[:, dead])
            kept = revived.topk(self.n_revived(len(dead)), dim=1, sorted=False)
            revived = torch.zeros_like(revived).scatter(1, kept.indices, kept.values)
            difference = (revived @ W_dec[dead]).to(x.dtype) - residual
            error = inputs.token_ranks.sum(residual.square().sum()).clamp_min(torch.finfo(x.dtype).tiny)
            aux = inputs.weights.aux_coefficient * inputs.token_ranks.total(difference.square().sum()) / error
        n_fired = (acts.detach() > 0).sum(dim=0)
        return SaeLoss(LossTerms(mse + aux, mse, x.new_zeros(()), aux), n_fired, reconstruction)

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See `Sae`."""
        _, tensors = super().to_saelens()
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}, tensors

    @classmethod
    def settings_from_saelens(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Sae`."""
        return {"k": config.get("k")}


class BatchTopKSae(TopKSae):
    """Keeps the k N largest positive latents of a batch of N tokens (Bussmann et al. 2024, arXiv:2412.06410).

    Afterwards a threshold below which latents are inactive takes the place of the batch, so that a token's latents do
    not depend on others: a JumpReLU with one threshold for all. Training keeps a running mean of the smallest
    activation that was kept, and `calibrate_` sets the threshold at which k latents per token of a sample are active.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Mean number of active latents per token.
        **more: As for `Sae`.
    """

    architecture: ClassVar[str] = "batchtopk"
    needed_settings: ClassVar[frozenset[str]] = frozenset()
    needs_whole_rows: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    saelens_architecture: ClassVar[str | None] = "jumprelu"
    is_saelens_default: ClassVar[bool] = False

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, k=k, **more)
        self.threshold: torch.Tensor
        self.register_buffer("threshold", self.b_dec.new_zeros(()))
        self.screen_share = 0.8
        """Share of the threshold above which a training step looks for what it keeps; any gives the same result."""

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre) * (pre > self.threshold.to(pre.dtype))

    @property
    def active_above(self) -> torch.Tensor | None:
        """See `Sae`."""
        return torch.relu(self.threshold)

    def keep(self, pre: torch.Tensor, ranks: World = ALONE) -> torch.Tensor:
        """See `TopKSae`; ties go to the first tokens, then to the first latents. Updates the running threshold."""
        values = torch.relu(pre).flatten()
        n_kept = n_among_largest(values[values > 0], self.k * ranks.add(len(pre)), ranks)
        kept = torch.zeros_like(values, dtype=torch.bool)
        kept[keep_largest(values, n_kept)] = True
        self.follow_kept_(values[kept], ranks)
        return kept.view(pre.shape)

    def follow_kept_(self, values: torch.Tensor, ranks: World = ALONE) -> None:
        """Move the running threshold towards the smallest activation that a step kept on any rank.

        Args:
            values: This rank's kept activations, flat.
            ranks: Processes that have other ones.
        """
        smallest = torch.cat(ranks.gather(values.min().reshape(1) if len(values) else values))
        if len(smallest):
            self.follow_threshold_(smallest.min())

    @torch.no_grad()
    def follow_threshold_(self, minimum: torch.Tensor) -> None:
        """Move the running threshold towards the smallest activation that a step kept, 0-dimensional."""
        decay = torch.where(self.threshold > 0, _THRESHOLD_DECAY, 0.0)
        self.threshold.copy_(decay * self.threshold + (1 - decay) * minimum.to(self.threshold.dtype))

    @torch.no_grad()
    def calibrate_(self, tokens: torch.Tensor) -> None:
        """See `Sae`: k latents per token are active on the sample, fewer if fewer are positive."""
        n_wanted = self.k * len(tokens)
        # The running threshold tells of nearly all entries that they cannot be above the new one.
        for share in _CANDIDATES_ABOVE:
            parts = torch.split(tokens, _TOKENS_AT_ONCE)
            found = torch.cat([self._above(part, share * self.threshold) for part in parts])
            if len(found) > n_wanted:
                self.threshold.copy_(find_nth_largest(found, n_wanted + 1))
                return
        self.threshold.zero_()

    def _above(self, tokens: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """Pre-activations above a bound, flat."""
        pre = self.pre_activations(tokens)
        return pre[pre > bound]

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See `Sae`; becomes a JumpReLU with the same threshold for all latents, and one below 0 becomes 0."""
        _, tensors = Sae.to_saelens(self)
        threshold = torch.relu(tensors["threshold"]).expand_as(tensors["b_enc"]).contiguous()
        return {}, {**tensors, "threshold": threshold}

    @classmethod
    def from_saelens(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Sae`."""
        if (threshold := tensors.get("threshold")) is None:
            return dict(tensors)
        if threshold.ndim != 1 or not len(threshold) or (threshold != threshold[0]).any():
            raise ValueError(f"{cls.architecture} has one threshold for all latents, found several")
        return {**tensors, "threshold": threshold[0].clone()}

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        return (self.b_enc, self.threshold)


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK whose first latents must reconstruct without the later ones (Bussmann et al. 2025, arXiv:2503.17547).

    The loss is the mean over nested dictionaries, each made of the first latents, so that general features come first.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Mean number of active latents per token.
        prefixes: Share of all latents in each nested dictionary, ascending to 1.
        **more: As for `Sae`.

    Raises:
        ValueError: If the shares do not ascend from above 0 to 1.
    """

    architecture: ClassVar[str] = "matryoshka"
    # Its nested dictionaries are ranges of latents, of which a process may have none.
    splits_latents: ClassVar[bool] = False
    setting_names: ClassVar[tuple[str, ...]] = ("k", "prefixes")

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        k: int = 32,
        prefixes: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        **more: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(d_in, n_latents, k=k, **more)
        self.prefixes = tuple(float(share) for share in prefixes)
        shares = [0.0, *self.prefixes]
        if shares[-1] != 1 or not all(before < share for before, share in itertools.pairwise(shares)):
            raise ValueError(f"prefixes must be shares that ascend from above 0 to 1, found {self.prefixes}")

    @property
    def dictionaries(self) -> list[int]:
        """See `TopKSae`."""
        return [max(1, round(share * len(self.b_enc))) for share in self.prefixes]


def n_among_largest(values: torch.Tensor, n: int, ranks: World = ALONE) -> int:
    """How many of the `n` largest values of all ranks are this rank's; ties go to the first ranks.

    Args:
        values: This rank's, flat; ranks may have different numbers of them.
        n: How many are wanted; all are taken if there are fewer.
        ranks: The processes.
    """
    parts = ranks.gather(values)
    n_all = sum(map(len, parts))
    if len(parts) == 1 or n_all <= n or not n:
        return min(n, len(values))
    smallest = find_nth_largest(torch.cat(parts), n)
    # CPU-GPU sync point: the numbers decide shapes.
    n_larger = [int((part > smallest).sum()) for part in parts]
    n_ties = [int((part == smallest).sum()) for part in parts]
    left = n - sum(n_larger) - sum(n_ties[: ranks.rank])
    return n_larger[ranks.rank] + max(0, min(n_ties[ranks.rank], left))


def find_nth_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of at least n values, shape `(m,)`, 0-dimensional; NaN is larger than all numbers."""
    if runs_ahead(values.device):  # for a single value, a GPU looks with few of its cores
        return values.topk(n).values[-1]
    return values.kthvalue(len(values) - n + 1).values


def keep_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Where the n largest of at least n values are, ascending, int64, shape `(n,)`; ties go to the first."""
    if not n:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    smallest = find_nth_largest(values, n)
    is_larger = values > smallest
    ties = (values == smallest).nonzero().squeeze(1)[: n - int(is_larger.sum())]
    is_larger[ties] = True
    return is_larger.nonzero().squeeze(1)
