"""How similar the images are that activate each latent."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cytosae.statistics.monosemanticity import Monosemanticity, MonosemanticityStatistics
from cytosae_pipeline.evaluation.image_scores import ImageScores, embed
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class SaeMonosemanticity:
    """Similarity of the images of each latent (docs/definitions.md, section 12)."""

    median: float | None
    """Median over the latents that have a score; None if none has."""
    any_pair: float | None
    """Mean cosine of any two of the images: the score of a latent without meaning; None for a single image."""
    n_latents: int
    """Latents that have a score: those that are active on at least two images."""
    embedding: str
    """What represents an image: `cls` or `mean`, the mean of all tokens."""
    scores: list[float | None]
    """Score of each latent, S of them; None for the others."""

    def describe(self) -> str:
        """The result in a line."""
        if self.median is None or self.any_pair is None:
            return "monosemanticity: no latent is active on two of these images"
        what = "CLS tokens" if self.embedding == "cls" else "mean tokens"
        return (
            f"monosemanticity: median {self.median:.4f} over {self.n_latents:,} latents; any two images: "
            f"{self.any_pair:.4f} (cosine of {what})"
        )


def measure_monosemanticity(scores: ImageScores) -> SaeMonosemanticity:
    """Measure how similar the images are that activate each latent, in one pass.

    Args:
        scores: Scores of the images.
    """
    inputs = scores.inputs
    layout, device = inputs.store.spec.tokens, accumulator_device(inputs.sae.W_enc.device)
    found = MonosemanticityStatistics(inputs.n_latents, inputs.store.d_model, device=device)
    with Progress("monosemanticity", len(scores), "images") as bar:
        for images in scores:
            found.update(embed(images, layout), images.scores)
            bar.advance(len(images.scores))
    return SaeMonosemanticity(embedding="cls" if layout.n_cls else "mean", **summarise(found.result()))


def summarise(found: Monosemanticity) -> dict[str, Any]:
    """What is told of the scores of latents, of images or of patches: `median`, `any_pair`, `n_latents`, `scores`."""
    values = found.scores.numpy()
    is_defined = np.isfinite(values)
    return {
        "median": float(np.median(values[is_defined])) if is_defined.any() else None,
        "any_pair": found.any_pair if np.isfinite(found.any_pair) else None,
        "n_latents": int(is_defined.sum()),
        "scores": [value if kept else None for value, kept in zip(values.tolist(), is_defined.tolist(), strict=True)],
    }
