"""The activation functions of `jumprelu` and `gated`, their loss terms and their gradients, entry by entry."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from cytosae.sae.base import Sae
from cytosae.sae.gated import GatedSae
from cytosae.sae.jumprelu import JumpReluSae
from cytosae.sae.loss import LossInputs, SaeLoss
from cytosae.training.gradients import Gradients, WithOuterProduct

Latents = slice | torch.Tensor


class Rule(ABC):
    """An activation function, its loss terms and their gradients.

    Args:
        sae: The autoencoder.
        inputs: What the loss depends on.
        n_tokens: Tokens N of the whole batch.
    """

    n_decoded: ClassVar[int] = 1
    """Number of matrices that are decoded."""
    n_summed: ClassVar[int]
    """Number of matrices that `backward` gives."""

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
    def backward(self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The gradient before the nonlinearity, and what else `vectors` needs the sums over tokens of.

        Args:
            pre: Latents before the nonlinearity.
            latents: Which latents they are.
            products: Gradient of the squared error by what is decoded, of the same shape as `pre`, in the same order.
        """

    @abstractmethod
    def vectors(self, sums: list[torch.Tensor], latents: slice) -> dict[str, torch.Tensor]:
        """Gradients of the parameters with one value for each latent, by name, after `sparsity`.

        Args:
            sums: Sums over tokens of what `backward` gives, shape `(n,)` each.
            latents: Which latents they are.
        """

    @abstractmethod
    def constants(self, latents: slice) -> tuple[list[torch.Tensor], float]:
        """What the kernels of `triton_activations` compute with: vectors of shape `(n,)`, and a number."""

    def revive(self, x: torch.Tensor, loss: SaeLoss, gradients: Gradients) -> tuple[SaeLoss, Gradients]:
        """Add what revives dead latents to a loss and its gradients: nothing by default.

        Args:
            x: Tokens, shape `(N, D)`.
            loss: The loss without it.
            gradients: Gradients of the matrices; those of vectors are in their `grad`, or will be added to it.
        """
        return loss, gradients


class _JumpRelu(Rule):
    """See `JumpReluSae`."""

    n_summed: ClassVar[int] = 3
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

    def backward(self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        threshold = torch.relu(self.sae.threshold)[latents]
        (grad_acts,) = products
        yield grad_acts * (pre > threshold)
        near = (pre - threshold).abs() < self.sae.bandwidth / 2
        yield grad_acts * near
        yield near

    def vectors(self, sums: list[torch.Tensor], latents: slice) -> dict[str, torch.Tensor]:
        threshold = self.sae.threshold[latents]
        kernel = torch.relu(threshold) * sums[1] + self._grad_active * sums[2]
        return {"b_enc": sums[0], "threshold": kernel / -self.sae.bandwidth * (threshold > 0)}

    def constants(self, latents: slice) -> tuple[list[torch.Tensor], float]:
        return [torch.relu(self.sae.threshold[latents])], self.sae.bandwidth / 2

    def revive(self, x: torch.Tensor, loss: SaeLoss, gradients: Gradients) -> tuple[SaeLoss, Gradients]:
        sae, found = self.sae, self.sae.pre_activation_loss(x, self.inputs)
        if found is None:
            return loss, gradients
        assert sae.b_enc.grad is not None
        sae.b_enc.grad.sub_(found.factors, alpha=found.share)
        terms = loss.terms._replace(loss=loss.terms.loss + found.term, ghost=found.term)
        return loss._replace(terms=terms), WithOuterProduct(gradients, found.factors.neg(), found.direction)


class _Gated(Rule):
    """See `GatedSae`."""

    n_decoded: ClassVar[int] = 2
    n_summed: ClassVar[int] = 4
    sae: GatedSae

    @property
    def bound(self) -> torch.Tensor:
        return self.sae.b_enc.new_zeros(())

    def decoded(self, pre: torch.Tensor, latents: Latents) -> list[torch.Tensor]:
        return [self.sae.activate(pre, latents), torch.relu(pre)]

    def sparsity(self, sums: list[torch.Tensor], n_active: torch.Tensor) -> torch.Tensor:
        return self.inputs.weights.l1_coefficient * sums[1] / self.n_tokens

    def backward(self, pre: torch.Tensor, latents: Latents, products: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        scaled = (pre - self.sae.b_enc[latents]) * self.sae.r_mag[latents].exp()
        is_open = pre > 0
        grad_magnitude = products[0] * (is_open & (scaled + self.sae.b_mag[latents] > 0))
        grad_gate = (products[1] + self.inputs.weights.l1_coefficient / self.n_tokens) * is_open
        yield grad_magnitude * self.sae.r_mag[latents].exp() + grad_gate
        # The magnitude is computed from `pre - b_enc`, so that its gradient does not reach `b_enc`.
        yield grad_gate
        yield grad_magnitude * scaled
        yield grad_magnitude

    def vectors(self, sums: list[torch.Tensor], latents: slice) -> dict[str, torch.Tensor]:
        return dict(zip(("b_enc", "r_mag", "b_mag"), sums[1:], strict=True))

    def constants(self, latents: slice) -> tuple[list[torch.Tensor], float]:
        sae = self.sae
        vectors = [sae.b_enc[latents], sae.r_mag[latents].exp(), sae.b_mag[latents]]
        return vectors, self.inputs.weights.l1_coefficient / self.n_tokens


RULES: dict[type[Sae], type[Rule]] = {JumpReluSae: _JumpRelu, GatedSae: _Gated}
"""The activation function of each architecture."""
