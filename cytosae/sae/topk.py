"""Architectures that keep a fixed number of latents: of each token, of each batch, and of nested dictionaries."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch

from cytosae.sae.base import LossInputs, LossTerms, Sae, SaeLoss
from cytosae.sae.coo import CooMatrix

_THRESHOLD_MEMORY = 0.95
"""Share of the running threshold that a step keeps: a batch's own is exact to a percent, and more would lag behind."""

Select = Callable[[torch.Tensor], Sequence[CooMatrix]]


class TopKSae(Sae):
    """Keeps the k largest positive latents of every token (Gao et al. 2024, arXiv:2406.04093).

    Equal values at the k-th place are all kept, so that the result does not depend on an order.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Active latents a token.
        **more: As for `Sae`.

    Raises:
        ValueError: If `k` is no whole number from 1 to S.
    """

    architecture: ClassVar[str] = "topk"
    needs_whole_rows: ClassVar[bool] = True

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, **more)
        if k not in range(1, n_latents + 1):
            raise ValueError(f"k must be a whole number from 1 to the {n_latents} latents, found {k}")
        self.k = k

    @property
    def settings(self) -> dict[str, Any]:
        """See `Sae`."""
        return {"k": self.k}

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`; needs all latents."""
        least = pre.topk(self.k, dim=-1).values[..., -1:]
        return torch.relu(pre) * (pre >= least)

    def select(self, pre: torch.Tensor) -> CooMatrix:
        """Latents that a training step uses, of pre-activations of shape `(N, S)`."""
        values, columns = pre.topk(self.k, dim=1, sorted=False)
        return _nonzeros(values, columns, pre.shape[1])

    def losses(self, x: torch.Tensor, decoded: "_Decoded", variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction and share of the variance left, 0-dimensional; see `training_loss`."""
        reconstruction = decoded(self.W_dec.shape[0]) + self.b_dec
        return reconstruction, (reconstruction - x).square().sum() / variance

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Share of the variance left, and AuxK: dead latents learn to explain the residual.

        The auxiliary term (Gao et al. 2024, appendix A.2) is `||e - e^||^2 / ||e||^2` with the residual `e = x - x^`
        detached and `e^` decoded without `b_dec` from the D/2 largest dead latents; its gradient reaches their encoder.
        """
        dead_mask, weights = inputs.dead_mask, inputs.weights
        dead = dead_mask.nonzero().squeeze(1) if dead_mask is not None and weights.aux else x.new_zeros(0)
        k_aux = min(x.shape[1] // 2, len(dead))

        def select(pre: torch.Tensor) -> list[CooMatrix]:
            chosen = [self.select(pre)]
            if k_aux:
                values, at = pre[:, dead].topk(k_aux, dim=1, sorted=False)
                chosen.append(_nonzeros(values, dead[at], pre.shape[1]))
            return chosen

        selected: list[CooMatrix] = []
        values = _Encode.apply(x, self.b_dec, self.W_enc, self.b_enc, select, inputs.dtype, selected)  # type: ignore[no-untyped-call]
        places = selected[0]
        decoded = _Decoded(values[0], self.W_dec, places)
        reconstruction, mse = self.losses(x, decoded, inputs.variance)
        aux = x.new_zeros(())
        if k_aux:
            residual = (x - reconstruction).detach()
            again = _Decode.apply(values[1], self.W_dec, selected[1])  # type: ignore[no-untyped-call]
            left = (again - residual).square().sum() / residual.square().sum().clamp_min(torch.finfo(x.dtype).tiny)
            aux = weights.aux * inputs.share * left
        n_fired = torch.bincount(places.columns, minlength=self.W_dec.shape[0])
        zero = x.new_zeros(())
        return SaeLoss(LossTerms(mse + aux, mse, zero, aux), n_fired, reconstruction)


class BatchTopKSae(TopKSae):
    """Keeps the k N largest positive latents of a batch of N tokens (Bussmann et al. 2024, arXiv:2412.06410).

    While training, a running mean of the smallest activation kept becomes the threshold under which latents are
    silent afterwards, so that a token's latents do not depend on its batch: a JumpReLU with one threshold for all.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Active latents a token, on average.
        **more: As for `Sae`.
    """

    architecture: ClassVar[str] = "batchtopk"
    needs_whole_rows: ClassVar[bool] = False

    def __init__(self, d_in: int, n_latents: int, *, k: int = 32, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, k=k, **more)
        self.threshold: torch.Tensor
        self.register_buffer("threshold", torch.zeros_like(self.b_dec[0]))

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre) * (pre > self.threshold.to(pre.dtype))

    def select(self, pre: torch.Tensor) -> CooMatrix:
        """See `TopKSae`; moves the running threshold."""
        n_wanted = self.k * len(pre)
        # Far fewer candidates, if last steps' threshold still tells; the choice is the same.
        candidates = CooMatrix.of(torch.relu(pre) * (pre > self.threshold / 2))
        if len(candidates.values) < n_wanted:
            candidates = CooMatrix.of(torch.relu(pre))
        if len(candidates.values) > n_wanted:
            at = candidates.values.topk(n_wanted, sorted=False).indices.sort().values
            candidates = CooMatrix(candidates.rows[at], candidates.columns[at], candidates.values[at], candidates.shape)
        if len(candidates.values):
            least = candidates.values.min().to(self.threshold.dtype)
            share = torch.where(self.threshold > 0, _THRESHOLD_MEMORY, 0.0)
            self.threshold.copy_(share * self.threshold + (1 - share) * least)
        return candidates

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        return (self.b_enc, self.threshold)


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK whose first latents must do without the later ones (Bussmann et al. 2025, arXiv:2503.17547).

    The loss is the mean over nested dictionaries, each made of the first latents: general ones come first.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Active latents a token, on average.
        prefixes: Share of all latents in each nested dictionary, rising to 1.
        **more: As for `Sae`.

    Raises:
        ValueError: If the shares do not rise from above 0 to 1.
    """

    architecture: ClassVar[str] = "matryoshka"

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
        if sorted({0.0, *self.prefixes}) != [0.0, *self.prefixes] or self.prefixes[-1] != 1:
            raise ValueError(f"prefixes must be shares that rise from above 0 to 1, found {self.prefixes}")

    @property
    def settings(self) -> dict[str, Any]:
        """See `Sae`."""
        return {"k": self.k, "prefixes": list(self.prefixes)}

    def losses(self, x: torch.Tensor, decoded: "_Decoded", variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TopKSae`: the mean over the nested dictionaries, and the reconstruction of the whole."""
        n_latents = self.W_dec.shape[0]
        left, reconstruction = x.new_zeros(()), self.b_dec.expand_as(x)
        bounds = [0, *(max(1, round(share * n_latents)) for share in self.prefixes)]
        for start, end in itertools.pairwise(bounds):
            reconstruction = reconstruction + decoded(end, start)
            left = left + (reconstruction - x).square().sum() / variance
        return reconstruction, left / len(self.prefixes)


class _Decoded:
    """Decodes the selected latents, or those in a range of them.

    Args:
        values: Their activations, shape `(n,)`, with a gradient.
        W_dec: Decoder.
        places: Where they are.
    """

    def __init__(self, values: torch.Tensor, W_dec: torch.Tensor, places: CooMatrix) -> None:
        self._values, self._W_dec, self._places = values, W_dec, places

    def __call__(self, end: int, start: int = 0) -> torch.Tensor:
        """Reconstruction without `b_dec` from latents `start` to `end`, shape `(N, D)`."""
        places, values = self._places, self._values
        if (start, end) != (0, places.shape[1]):
            inside = ((places.columns >= start) & (places.columns < end)).nonzero().squeeze(1)
            places = CooMatrix(places.rows[inside], places.columns[inside], places.values[inside], places.shape)
            values = values[inside]
        return cast("torch.Tensor", _Decode.apply(values, self._W_dec, places))  # type: ignore[no-untyped-call]


class _Encode(torch.autograd.Function):
    """Values of selected latents; the gradient touches those alone and none is computed for `x`."""

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
        """Encode; what was selected is added to `selected`."""
        centred = x - b_dec
        pre = torch.addmm(b_enc.to(dtype), centred.to(dtype), W_enc.to(dtype))
        selected += [places.with_values(places.values.to(x.dtype)) for places in select(pre)]
        ctx.save_for_backward(centred, W_enc)
        ctx.places = list(selected)
        return tuple(places.values for places in selected)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Gradients of `b_dec`, `W_enc` and `b_enc`."""
        centred, W_enc = ctx.saved_tensors
        rows = torch.cat([places.rows for places in ctx.places])
        columns = torch.cat([places.columns for places in ctx.places])
        pull = CooMatrix(rows, columns, torch.cat(grads), ctx.places[0].shape).by_column()
        grad_b_enc = pull.row_sums().to(W_enc.dtype)
        return None, -(W_enc @ grad_b_enc), pull.transposed_product(centred), grad_b_enc, None, None, None


class _Decode(torch.autograd.Function):
    """Reconstruction from selected latents."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, W_dec: torch.Tensor, places: CooMatrix) -> torch.Tensor:  # noqa: ANN401
        """`A @ W_dec`."""
        ctx.save_for_backward(values, W_dec)
        ctx.places = places
        return places.with_values(values).decode(W_dec)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Gradients of the values and of `W_dec`."""
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        places = ctx.places.with_values(values)
        return places.dots(grad, W_dec), places.by_column().decode(grad), None


def _nonzeros(values: torch.Tensor, columns: torch.Tensor, n_latents: int) -> CooMatrix:
    """The positive ones of some values of every row, shape `(N, k)`, with their columns."""
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    rows, at = (values > 0).nonzero(as_tuple=True)
    return CooMatrix(rows, columns[rows, at], values[rows, at], (len(values), n_latents))
