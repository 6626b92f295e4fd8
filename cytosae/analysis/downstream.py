"""How much of an encoder's embedding, and of what a probe reads from it, survives a reconstruction of a block.

Three embeddings of an image are compared: from its original activations, from reconstructed ones, and from ablated
ones, which know nothing of the image. Formulas: docs/definitions.md, section 9.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from cytosae.analysis.probe import Probe
from cytosae.sae.devices import widest_type

_TINY = 1e-12
"""Differences of losses at most this large are rounding; nothing can be recovered of them."""


class Embeddings(NamedTuple):
    """Embeddings of the same images, each of shape `(n, D)`."""

    original: torch.Tensor
    """From the original activations."""
    reconstructed: torch.Tensor
    """From the reconstructed ones."""
    ablated: torch.Tensor
    """From the ablated ones."""


@dataclass(frozen=True)
class ProbeValues:
    """What a probe of the labels makes of the embeddings of test images."""

    n_images: int
    """Test images."""
    cross_entropy: float
    """Mean cross-entropy on the original embeddings, in nats."""
    cross_entropy_reconstructed: float
    """The same on those of the reconstruction."""
    cross_entropy_ablated: float
    """The same on those of the ablation."""
    loss_recovered: float | None
    """`(CE_ablated - CE_reconstructed) / (CE_ablated - CE_original)`; None if the ablation does no harm."""
    accuracy: float
    """Share of images classified correctly on the original embeddings."""
    accuracy_reconstructed: float
    """The same on those of the reconstruction."""
    accuracy_ablated: float
    """The same on those of the ablation."""
    agreement: float
    """Share of images for which the prediction from the reconstruction is that from the original."""


@dataclass(frozen=True)
class EmbeddingValues:
    """How close the embeddings are."""

    n_images: int
    """Images."""
    cosine: float
    """Mean cosine similarity of the embeddings of original and reconstruction."""
    cosine_ablated: float
    """The same of original and ablation."""
    error_recovered: float | None
    """`1 - sum ||e - e_reconstructed||^2 / sum ||e - e_ablated||^2`; None if the ablation does no harm."""


class DownstreamStatistics:
    """Accumulates sums over images, by group, in float64 where the device has it; results do not depend on the order.

    Args:
        n_groups: Groups of images that are measured apart.
        device: Device of the sums.
    """

    def __init__(self, n_groups: int = 0, *, device: torch.device | str = "cpu") -> None:
        wide = widest_type(device)
        # The last row is of images without a group.
        self._n_images = torch.zeros(n_groups + 1, dtype=torch.int64, device=device)
        self._embedding = torch.zeros(n_groups + 1, 4, dtype=wide, device=device)
        self._n_tested = torch.zeros(n_groups + 1, dtype=torch.int64, device=device)
        self._probe = torch.zeros(n_groups + 1, 7, dtype=wide, device=device)

    @torch.no_grad()
    def update(self, embeddings: Embeddings, groups: torch.Tensor) -> None:
        """Add images.

        Args:
            embeddings: Their embeddings.
            groups: Group of each, int64, shape `(n,)`, -1 for none.
        """
        wide = self._embedding.dtype
        original, *others = (part.to(self._embedding) for part in embeddings)
        cosines = [torch.nn.functional.cosine_similarity(original, other, dim=1) for other in others]
        errors = [(original - other).square().sum(dim=1) for other in others]
        self._add(self._n_images, self._embedding, groups, torch.stack([*cosines, *errors], dim=1).to(wide))

    @torch.no_grad()
    def update_probe(self, embeddings: Embeddings, groups: torch.Tensor, probe: Probe, labels: torch.Tensor) -> None:
        """Add test images of a probe.

        Args:
            embeddings: Their embeddings.
            groups: Group of each, int64, shape `(n,)`, -1 for none.
            probe: The probe; the softmax of its logits is the probability of each class.
            labels: Class of each image, int64, shape `(n,)`.
        """
        logits = [probe.logits(part.cpu()) for part in embeddings]
        losses = [torch.nn.functional.cross_entropy(part, labels, reduction="none") for part in logits]
        guesses = [part.argmax(dim=1) for part in logits]
        correct = [(guess == labels).double() for guess in guesses]
        values = torch.stack([*losses, *correct, (guesses[0] == guesses[1]).double()], dim=1)
        self._add(self._n_tested, self._probe, groups, values)

    def merge(self, other: Self) -> None:
        """Add what another one has counted."""
        for name in ("_n_images", "_embedding", "_n_tested", "_probe"):
            getattr(self, name).add_(getattr(other, name))

    def embedding(self, group: int | None = None) -> EmbeddingValues | None:
        """How close the embeddings of all images are, or of one group's; None without images."""
        rows = slice(None) if group is None else slice(group, group + 1)
        n = int(self._n_images[rows].sum())
        if not n:
            return None
        cosine, ablated, error, worst = self._embedding[rows].sum(dim=0).tolist()
        return EmbeddingValues(n, cosine / n, ablated / n, 1 - error / worst if worst > _TINY * n else None)

    def probe(self, group: int | None = None) -> ProbeValues | None:
        """What the probe makes of all test images, or of one group's; None without test images."""
        rows = slice(None) if group is None else slice(group, group + 1)
        n = int(self._n_tested[rows].sum())
        if not n:
            return None
        loss, again, ablated, *shares = (self._probe[rows].sum(dim=0) / n).tolist()
        recovered = (ablated - again) / (ablated - loss) if ablated - loss > _TINY else None
        return ProbeValues(n, loss, again, ablated, recovered, *shares)

    @staticmethod
    def _add(counts: torch.Tensor, sums: torch.Tensor, groups: torch.Tensor, values: torch.Tensor) -> None:
        """Add images' values to the rows of their groups."""
        rows = torch.where(groups < 0, len(counts) - 1, groups).to(counts.device)
        counts += torch.bincount(rows, minlength=len(counts))
        sums.index_add_(0, rows, values.to(sums))
