"""Architectures that keep a fixed number of latents: per token, per batch, and in nested dictionaries."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss

_THRESHOLD_DECAY = 0.95
"""Decay of the running threshold: one batch's threshold is accurate to a percent, and a slower decay would lag."""

Select = Callable[[torch.Tensor], Sequence[CooMatrix]]


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

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, **more)
        if isinstance(k, bool) or k not in range(1, n_latents + 1):
            raise ValueError(f"k must be a whole number from 1 to the {n_latents} latents, found {k!r}")
        self.k = int(k)

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`; needs all latents."""
        kth_value = pre.topk(self.k, dim=-1).values[..., -1:]
        return torch.relu(pre) * (pre >= kth_value)

    def select(self, pre: torch.Tensor) -> CooMatrix:
        """Latents that a training step uses, from pre-activations of shape `(N, S)`."""
        values, columns = pre.topk(self.k, dim=1, sorted=False)
        return _positive_entries(values, columns, pre.shape[1])

    def losses(self, x: torch.Tensor, decoded: "_Decoded", variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction, shape `(N, D)`, and unexplained share of the variance, 0-dimensional."""
        reconstruction = decoded(self.W_dec.shape[0]) + self.b_dec
        return reconstruction, (reconstruction - x).square().sum() / variance

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Unexplained share of the variance, and AuxK: dead latents learn to explain the residual; see `Sae`.

        The auxiliary term (Gao et al. 2024, appendix A.2) is `||e - e^||^2 / ||e||^2` with the residual `e = x - x^`
        detached and `e^` decoded without `b_dec` from the D/2 largest dead latents; its gradient reaches their encoder.
        """
        dead_mask, weights = inputs.dead_mask, inputs.weights
        dead = dead_mask.nonzero().squeeze(1) if dead_mask is not None and weights.aux_coefficient else x.new_zeros(0)
        k_aux = min(x.shape[1] // 2, len(dead))

        def select(pre: torch.Tensor) -> list[CooMatrix]:
            chosen = [self.select(pre)]
            if k_aux:
                values, at = pre[:, dead].topk(k_aux, dim=1, sorted=False)
                chosen.append(_positive_entries(values, dead[at], pre.shape[1]))
            return chosen

        selected: list[CooMatrix] = []
        values = _Encode.apply(x, self.b_dec, self.W_enc, self.b_enc, select, inputs.dtype, selected)  # type: ignore[no-untyped-call]
        active = selected[0]
        decoded = _Decoded(values[0], self.W_dec, active)
        reconstruction, mse = self.losses(x, decoded, inputs.variance)
        aux = x.new_zeros(())
        if k_aux:
            residual = (x - reconstruction).detach()
            explained = _Decode.apply(values[1], self.W_dec, selected[1])  # type: ignore[no-untyped-call]
            tiny = torch.finfo(x.dtype).tiny
            unexplained = (explained - residual).square().sum() / residual.square().sum().clamp_min(tiny)
            aux = weights.aux_coefficient * inputs.share * unexplained
        n_fired = torch.bincount(active.columns, minlength=self.W_dec.shape[0])
        zero = x.new_zeros(())
        return SaeLoss(LossTerms(mse + aux, mse, zero, aux), n_fired, reconstruction)

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

    Training keeps a running mean of the smallest activation that was kept. Afterwards this is the threshold below which
    latents are inactive, so that a token's latents do not depend on its batch: a JumpReLU with one threshold for all.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Mean number of active latents per token.
        **more: As for `Sae`.
    """

    architecture: ClassVar[str] = "batchtopk"
    needed_settings: ClassVar[frozenset[str]] = frozenset()
    needs_whole_rows: ClassVar[bool] = False
    saelens_architecture: ClassVar[str | None] = "jumprelu"
    is_saelens_default: ClassVar[bool] = False

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, k=k, **more)
        self.threshold: torch.Tensor
        self.register_buffer("threshold", torch.zeros_like(self.b_dec[0]))

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre) * (pre > self.threshold.to(pre.dtype))

    def select(self, pre: torch.Tensor) -> CooMatrix:
        """See `TopKSae`; updates the running threshold."""
        n_wanted = self.k * len(pre)
        # The last steps' threshold usually leaves far fewer candidates; the selection is the same.
        candidates = CooMatrix.from_dense(torch.relu(pre) * (pre > self.threshold / 2))
        if len(candidates.values) < n_wanted:
            candidates = CooMatrix.from_dense(torch.relu(pre))
        if len(candidates.values) > n_wanted:
            at = candidates.values.topk(n_wanted, sorted=False).indices.sort().values
            candidates = CooMatrix(candidates.rows[at], candidates.columns[at], candidates.values[at], candidates.shape)
        if len(candidates.values):
            minimum = candidates.values.min().to(self.threshold.dtype)
            decay = torch.where(self.threshold > 0, _THRESHOLD_DECAY, 0.0)
            self.threshold.copy_(decay * self.threshold + (1 - decay) * minimum)
        return candidates

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

    def losses(self, x: torch.Tensor, decoded: "_Decoded", variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TopKSae`: the reconstruction from all latents, and the mean over the nested dictionaries."""
        n_latents = self.W_dec.shape[0]
        unexplained, reconstruction = x.new_zeros(()), self.b_dec.expand_as(x)
        bounds = [0, *(max(1, round(share * n_latents)) for share in self.prefixes)]
        for start, end in itertools.pairwise(bounds):
            reconstruction = reconstruction + decoded(end, start)
            unexplained = unexplained + (reconstruction - x).square().sum() / variance
        return reconstruction, unexplained / len(self.prefixes)


class _Decoded:
    """Decodes the selected latents, or those in a range.

    Args:
        values: Their activations, shape `(n,)`, with a gradient.
        W_dec: Decoder.
        active: Tokens and latents that the values belong to.
    """

    def __init__(self, values: torch.Tensor, W_dec: torch.Tensor, active: CooMatrix) -> None:
        self._values, self._W_dec, self._active = values, W_dec, active

    def __call__(self, end: int, start: int = 0) -> torch.Tensor:
        """Reconstruction without `b_dec` from latents `start` to `end`, shape `(N, D)`."""
        active, values = self._active, self._values
        if (start, end) != (0, active.shape[1]):
            inside = ((active.columns >= start) & (active.columns < end)).nonzero().squeeze(1)
            active = CooMatrix(active.rows[inside], active.columns[inside], active.values[inside], active.shape)
            values = values[inside]
        return cast("torch.Tensor", _Decode.apply(values, self._W_dec, active))  # type: ignore[no-untyped-call]


class _Encode(torch.autograd.Function):
    """Values of selected latents; only these get a gradient, and none is computed for `x`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        b_dec: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        select: Select,
        dtype: torch.dtype,
        selected: list[CooMatrix],
    ) -> tuple[torch.Tensor, ...]:
        """Encode; the selected entries are appended to `selected`."""
        centred = x - b_dec
        pre = torch.addmm(b_enc.to(dtype), centred.to(dtype), W_enc.to(dtype))
        selected += [entries.with_values(entries.values.to(x.dtype)) for entries in select(pre)]
        ctx.save_for_backward(centred, W_enc)
        ctx.selected = list(selected)
        return tuple(entries.values for entries in selected)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Gradients of `b_dec`, `W_enc` and `b_enc`."""
        centred, W_enc = ctx.saved_tensors
        rows = torch.cat([entries.rows for entries in ctx.selected])
        columns = torch.cat([entries.columns for entries in ctx.selected])
        grad_pre = CooMatrix(rows, columns, torch.cat(grads), ctx.selected[0].shape).transpose()
        grad_b_enc = grad_pre.row_sums().to(W_enc.dtype)
        return None, -(W_enc @ grad_b_enc), grad_pre.transposed_matmul(centred), grad_b_enc, None, None, None


class _Decode(torch.autograd.Function):
    """Reconstruction from selected latents."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, W_dec: torch.Tensor, active: CooMatrix) -> torch.Tensor:  # noqa: ANN401
        """`A @ W_dec`."""
        ctx.save_for_backward(values, W_dec)
        ctx.active = active
        return active.with_values(values).matmul(W_dec)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Gradients of the values and of `W_dec`."""
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        acts = ctx.active.with_values(values)
        return acts.sampled_matmul(grad, W_dec), acts.transpose().matmul(grad), None


def _positive_entries(values: torch.Tensor, columns: torch.Tensor, n_latents: int) -> CooMatrix:
    """The positive entries among k values per row, shape `(N, k)`, with their columns."""
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    rows, at = (values > 0).nonzero(as_tuple=True)
    return CooMatrix(rows, columns[rows, at], values[rows, at], (len(values), n_latents))
