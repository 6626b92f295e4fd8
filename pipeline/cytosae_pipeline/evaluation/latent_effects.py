"""What one latent does to the encoder's embedding and to the labels that a probe reads from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.logistic_probe import fit_logistic_probe
from cytosae.analysis.probe import Probe
from cytosae.backbones.tail import Tail
from cytosae.sae.base import Sae
from cytosae.statistics.heatmaps import LatentEncoder
from cytosae_cache.reading.permutation import IntArray, spread_rows
from cytosae_pipeline.building.tail_file import find_tail, open_tail
from cytosae_pipeline.config import EffectOptions
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.halves import find_companions, split_in_halves
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex

PROBE_IMAGES = 1000
"""Images that the probe is trained on at most, spread over half of the store's labelled images."""

_LEAST_TRAINING = 2
_IMAGES_AT_ONCE = 32


class Effect(NamedTuple):
    """What scaling a latent changes in some images."""

    before: torch.Tensor
    """Probability of each class on the original embedding, float64, shape `(n, C)`."""
    after: torch.Tensor
    """The same once the latent is scaled, shape `(n, C)`."""
    cosine: torch.Tensor
    """Cosine similarity of the two embeddings, float64, shape `(n,)`."""


@dataclass(frozen=True)
class LatentEffects:
    """What scaling latents changes (docs/definitions.md, section 9)."""

    latents: tuple[int, ...]
    """The latents, L."""
    rows: IntArray
    """The images, shape `(n,)`."""
    factor: float
    """What their activations were multiplied by."""
    classes: list[str]
    """Labels that the probe tells apart, C."""
    n_train: int
    """Images that the probe was trained on."""
    before: npt.NDArray[np.float64]
    """Probability of each label on the original embedding, shape `(n, C)`."""
    after: npt.NDArray[np.float64]
    """The same once a latent is scaled, shape `(L, n, C)`."""
    cosine: npt.NDArray[np.float64]
    """Cosine similarity of the two embeddings, shape `(L, n)`."""

    @property
    def change(self) -> npt.NDArray[np.float64]:
        """Mean change of each label's probability over the images, shape `(L, C)`."""
        mean: npt.NDArray[np.float64] = (self.after - self.before).mean(axis=1)
        return mean


class EffectMeter:
    """Scales latents of cached images, and shows what becomes of embedding and labels.

    Scaling latent l by a factor f adds `(f - 1) a_l W_dec[l]` to every token, so that what the autoencoder does not
    reconstruct stays as it is, and f = 1 changes nothing.

    Args:
        sae: The autoencoder, with its decoder.
        tail: The rest of the encoder, on the same device.
        probe: A probe of the labels on the embeddings.
        classes: Their names.
        n_train: Images that it was trained on.
    """

    def __init__(self, sae: Sae, tail: Tail, probe: Probe, classes: Sequence[str], n_train: int) -> None:
        self.classes, self.n_train = list(classes), n_train
        self._sae, self._tail, self._probe = sae, tail, probe

    @torch.no_grad()
    def measure(self, activations: npt.NDArray[np.floating], latent: int, factor: float = 0.0) -> Effect:
        """Scale a latent in all tokens of some images.

        Args:
            activations: Stored activations, shape `(n, T, D)`.
            latent: The latent.
            factor: What its activations are multiplied by; 0 removes it.
        """
        stored = torch.from_numpy(activations)
        x = stored.to(self._sae.W_dec.device).float()
        encoder = LatentEncoder(self._sae, np.array([latent]))
        acts = encoder(stored)[..., 0].to(x)
        changed = x + (factor - 1) * acts[:, :, None] * self._sae.W_dec[latent].float()
        original, other = self._tail(x).cpu(), self._tail(changed).cpu()
        same = (acts == 0).all(dim=1).cpu()
        other[same] = original[same]
        cosine = torch.nn.functional.cosine_similarity(original.double(), other.double(), dim=1)
        before, after = (self._probe.logits(part).softmax(dim=1) for part in (original, other))
        return Effect(before, after, cosine)


def make_meter(inputs: Inputs, place: StorePlace | None, *, verify: bool = True) -> EffectMeter:
    """A meter whose probe is trained on half of the labelled images, whole patients, of the store.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        place: Options by which the store was found, for messages; None if there are none.
        verify: Whether to check checksums while reading.

    Raises:
        TailNotFoundError: If the store has no tail; the message says what to type.
        StoreError: If the tail is damaged or of another store.
        UserError: If fewer than two labels have training images.
    """
    store, device = inputs.store, inputs.sae.b_dec.device
    tail = open_tail(find_tail(store), place, device=device)
    names, numbers = LabelIndex.of(store.images.label)
    labelled = store.valid_rows[numbers[store.valid_rows] >= 0]
    half = labelled
    if len(labelled):
        half = labelled[split_in_halves(find_companions(store, labelled), numbers[labelled], seed=0)]
    chosen = half[spread_rows(len(half), PROBE_IMAGES)]
    enough = np.bincount(numbers[chosen], minlength=len(names)) >= _LEAST_TRAINING
    if enough.sum() < 2:
        raise UserError(
            f"what a latent changes is read from a probe of the labels, which needs two labels with {_LEAST_TRAINING} "
            f"training images each: {say_count(int(enough.sum()), 'label of', 'labels of')} store '{store.path}' "
            "has them. Label more images of more patients"
        )
    classes = [name for name, fits in zip(names, enough, strict=True) if fits]
    rows = chosen[enough[numbers[chosen]]]
    labels = torch.from_numpy((np.cumsum(enough) - 1)[numbers[rows]])
    features = []
    with store.open_reader(verify=verify) as reader, Progress("probe of the labels", len(rows), "images") as bar:
        for start in range(0, len(rows), _IMAGES_AT_ONCE):
            part = rows[start : start + _IMAGES_AT_ONCE]
            with torch.no_grad():
                features.append(tail(torch.from_numpy(reader.read(part)).to(device)).cpu())
            bar.advance(len(part))
    probe = fit_logistic_probe(torch.cat(features), labels, len(classes))
    return EffectMeter(inputs.sae, tail, probe, classes, len(rows))


def measure_effects(inputs: Inputs, options: EffectOptions) -> LatentEffects:
    """Scale latents in some images, and read the labels before and after.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        options: Latents, images and factor.

    Raises:
        UserError: If a latent or image does not exist, or as for `make_meter`.
        StoreError: As for `make_meter`.
    """
    store, rows = inputs.store, np.array(options.rows, dtype=np.int64)
    _require(all(0 <= latent < inputs.n_latents for latent in options.latents), f"latents 0 to {inputs.n_latents - 1}")
    there = all(0 <= row < store.n_images and store.valid[row] for row in options.rows)
    _require(there, f"readable images among the rows 0 to {store.n_images - 1}")
    meter = make_meter(inputs, None, verify=not options.no_verify)
    found = []
    with store.open_reader(verify=not options.no_verify) as reader:
        for start in range(0, len(rows), _IMAGES_AT_ONCE):
            x = reader.read(rows[start : start + _IMAGES_AT_ONCE])
            found.append([meter.measure(x, latent, options.factor) for latent in options.latents])
    by_latent = list(zip(*found, strict=True))
    after = np.stack([np.concatenate([part.after.numpy() for part in parts]) for parts in by_latent])
    cosine = np.stack([np.concatenate([part.cosine.numpy() for part in parts]) for parts in by_latent])
    before = np.concatenate([part.before.numpy() for part in by_latent[0]])
    return LatentEffects(options.latents, rows, options.factor, meter.classes, meter.n_train, before, after, cosine)


def _require(fits: bool, expected: str) -> None:
    """Refuse numbers that do not exist.

    Raises:
        UserError: If they do not.
    """
    if not fits:
        raise UserError(f"latents and rows must exist: expected {expected}")
