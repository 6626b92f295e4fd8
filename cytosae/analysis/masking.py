"""Latent masking: classifying reconstructions from some latents (PatchSAE, Lim et al. 2024, arXiv:2412.05276).

An image's feature is the mean of its T token vectors. An autoencoder decodes linearly, so masking latents of every
token with a mask m, decoding `x^_t = (a_t * m) W_dec + b_dec` and averaging over the tokens gives

    mean_t x^_t = (s * m) W_dec + b_dec,    s = mean_t a_t: the image's scores (docs/definitions.md, section 6).

The classifier (`cytosae.analysis.probe`) is linear as well. With features standardised by mean and scale, its weights
`W (D, C)` and its intercept c, the logits of a masked image are

    sum_s m_s s_s M_s + base,    M = W_dec (W / scale)  (S, C),    base = (b_dec - mean) (W / scale) + c.

So image scores and token means are sufficient. No token is decoded, and a mask of k latents costs k rows of M.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from cytosae.analysis.probe import Probe, check_labels, check_shape, members_of
from cytosae.statistics.ties import topk_with_ties

Masking = Literal["kept", "removed", "random_removed", "class_kept", "class_removed"]
"""Which latents are masked; see `MaskingExperiment`."""

MASKINGS: tuple[Masking, ...] = get_args(Masking)
"""All kinds of masking, in the order of the results."""

_IMAGES_AT_ONCE = 64
_LATENTS_AT_ONCE = 4096


class ClassScores:
    """Mean scores of each class, and their differences from those of all images.

    Args:
        n_classes: Classes C.
        n_latents: Latents S.
        device: Device of the state.
    """

    def __init__(self, n_classes: int, n_latents: int, *, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(n_classes, n_latents, dtype=torch.float64, device=device)
        self._n_images = torch.zeros(n_classes, dtype=torch.int64, device=device)

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images.

        Args:
            scores: Shape `(n, S)`.
            labels: Class of each image, int64, shape `(n,)`.

        Raises:
            ValueError: If the shapes do not fit or a label is not a class.
        """
        check_shape("scores", scores, (len(labels), self._sums.shape[1]))
        check_labels(labels, len(self._n_images))
        members = members_of(labels.to(self._sums.device), len(self._n_images))
        self._sums.addmm_(members.to(self._sums), scores.to(self._sums))
        self._n_images += members.sum(dim=1)

    def merge(self, other: "ClassScores") -> None:
        """Add the scores that another accumulator received for other images."""
        self._sums += other._sums.to(self._sums.device)
        self._n_images += other._n_images.to(self._sums.device)

    def differences(self) -> torch.Tensor:
        """Mean score of the class minus mean score of all images, float64, shape `(C, S)`."""
        overall = self._sums.sum(dim=0) / self._n_images.sum().clamp(min=1)
        return self._sums / self._n_images.clamp(min=1)[:, None] - overall


class MaskingCounts(NamedTuple):
    """Correctly classified images per class; all int64, on the CPU."""

    ks: tuple[int, ...]
    """Numbers of latents kept or removed."""
    n_class_latents: tuple[int, ...]
    """Latents in the classes' set for each k: at most C k, because classes may share latents."""
    n_images: torch.Tensor
    """Images classified, shape `(C,)`."""
    original: torch.Tensor
    """Correct on the original activations, shape `(C,)`."""
    reconstruction: torch.Tensor
    """Correct on the reconstruction from all latents, shape `(C,)`."""
    masked: dict[Masking, torch.Tensor]
    """Correct on masked reconstructions, shape `(n_ks, C)`."""


class MaskingExperiment:
    """Counts how often a probe is correct on reconstructions from some of the latents.

    For each k, the same latents are masked in all tokens of an image:

    - `kept`: only the image's k latents with the largest scores remain, ties to the smaller latent;
    - `removed`: all other latents remain;
    - `random_removed`: all but k of the image's active latents remain, drawn from (seed, row) alone: the control;
    - `class_kept`: only the classes' set remains, the same for all images: the union over the classes of the k latents
      with the largest difference of `ClassScores`, ties to the smaller latent;
    - `class_removed`: all other latents remain.

    Args:
        probe: The classifier.
        W_dec: Decoder, shape `(S, D)`.
        b_dec: Its bias, shape `(D,)`.
        differences: `ClassScores.differences` of the training images, shape `(C, S)`.
        ks: Numbers of latents, at least 1; larger ones than S become S.
        seed: Seed of `random_removed`; 0 or more.
        device: Device of the computation, which is in float64.

    Raises:
        ValueError: If the shapes do not fit, or `ks` or `seed` is out of range.
    """

    def __init__(
        self,
        probe: Probe,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        differences: torch.Tensor,
        ks: Sequence[int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        n_features, n_classes = probe.weights.shape
        n_latents = differences.shape[1]
        check_shape("W_dec", W_dec, (n_latents, n_features))
        check_shape("differences", differences, (n_classes, n_latents))
        if not ks or min(ks) < 1 or seed < 0:
            raise ValueError(f"ks must be numbers of 1 or more and seed 0 or more, found {tuple(ks)} and {seed}")
        self.ks = tuple(sorted({min(int(k), n_latents) for k in ks}))
        """Numbers of latents in use, ascending."""
        self._seed = seed
        self._probe = Probe(*(part.to(device) for part in probe))
        folded = self._probe.weights / self._probe.scale[:, None]
        self._effects = torch.cat([part.to(folded) @ folded for part in torch.split(W_dec, _LATENTS_AT_ONCE)])
        self._base = (b_dec.to(folded) - self._probe.mean) @ folded + self._probe.intercept
        self._class_sets = _class_sets(differences.to(device), self.ks)
        self._n_images = torch.zeros(n_classes, dtype=torch.int64, device=device)
        self._n_correct = torch.zeros(2 + len(MASKINGS) * len(self.ks), n_classes, dtype=torch.int64, device=device)

    def update(self, rows: torch.Tensor, features: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Classify images; each row may come once, in any order and split.

        Args:
            rows: Row numbers, int64, shape `(n,)`.
            features: Token means of the original activations, shape `(n, D)`.
            scores: Float32, shape `(n, S)`, all at least 0.
            labels: Class of each image, int64, shape `(n,)`.

        Raises:
            ValueError: If the shapes do not fit, a label is not a class or a score is below 0.
        """
        n_latents, n_classes = self._effects.shape
        check_shape("rows", rows, (len(labels),))
        check_shape("features", features, (len(labels), len(self._probe.mean)))
        check_shape("scores", scores, (len(labels), n_latents))
        check_labels(labels, n_classes)
        if not (scores >= 0).all():
            raise ValueError("scores must be 0 or more: they are means of activations")
        labels = labels.to(self._n_correct.device)
        self._n_images += torch.bincount(labels, minlength=n_classes)
        for start in range(0, len(labels), _IMAGES_AT_ONCE):
            part = slice(start, start + _IMAGES_AT_ONCE)
            logits = self._logits(rows[part], features[part], scores[part].to(self._n_correct.device, torch.float32))
            correct = logits.argmax(dim=2) == labels[part]  # the first of equal logits
            self._n_correct.index_add_(1, labels[part], correct.to(torch.int64))

    def merge(self, other: "MaskingExperiment") -> None:
        """Add the counts of another experiment with the same arguments on other rows.

        Raises:
            ValueError: If its `ks` differ.
        """
        if other.ks != self.ks:
            raise ValueError(f"only experiments with the same ks can be merged, found {self.ks} and {other.ks}")
        self._n_correct += other._n_correct.to(self._n_correct.device)
        self._n_images += other._n_images.to(self._n_correct.device)

    def result(self) -> MaskingCounts:
        """The counts so far."""
        n_correct = self._n_correct.cpu()
        masked = dict(zip(MASKINGS, n_correct[2:].view(len(MASKINGS), len(self.ks), -1), strict=True))
        sizes = itertools.accumulate(map(len, self._class_sets))
        return MaskingCounts(self.ks, tuple(sizes), self._n_images.cpu(), n_correct[0], n_correct[1], masked)

    def _logits(self, rows: torch.Tensor, features: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits of every kind of feature in the order of the counts, shape `(n_kinds, n, C)`."""
        wide = scores.to(self._effects.dtype)
        full = wide @ self._effects + self._base
        own = self._sums(wide, topk_with_ties(scores, self.ks[-1]).indices)
        random = self._sums(wide, _draw(rows, scores, self.ks[-1], self._seed))
        by_class = torch.stack([wide[:, part] @ self._effects[part] for part in self._class_sets]).cumsum(dim=0)
        single = torch.stack([self._probe.logits(features), full])
        return torch.cat([single, self._base + own, full - own, full - random, self._base + by_class, full - by_class])

    def _sums(self, scores: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Contribution of each image's first k latents, shape `(n, k_max)`, to its logits; shape `(n_ks, n, C)`."""
        effects = scores.gather(1, latents)[:, :, None] * self._effects[latents]
        ends = torch.tensor(self.ks, device=scores.device) - 1
        return effects.cumsum(dim=1)[:, ends].transpose(0, 1)


def _draw(rows: torch.Tensor, scores: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """K active latents of each image in random order, then any inactive ones; int64, shape `(n, k)`."""
    n_latents = scores.shape[1]
    # Raw bits are the same in every version of numpy (NEP 19); 63 of them fit into a positive int64.
    raw = [np.random.Philox(np.random.SeedSequence((seed, row, 1))).random_raw(n_latents) >> 1 for row in rows.tolist()]
    keys = torch.from_numpy(np.array(raw, dtype=np.int64).reshape(len(rows), n_latents)).to(scores.device)
    return torch.where(scores > 0, keys, -1).topk(k, dim=1).indices


def _class_sets(differences: torch.Tensor, ks: Sequence[int]) -> list[torch.Tensor]:
    """Latents in the classes' set of each k that are not in that of the previous k."""
    order = differences.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    best = torch.empty_like(order).scatter_(1, order, places).amin(dim=0)
    return [((best >= low) & (best < high)).nonzero()[:, 0] for low, high in itertools.pairwise([0, *ks])]
