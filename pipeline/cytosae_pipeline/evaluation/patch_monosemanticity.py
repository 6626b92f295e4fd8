"""How similar the patches are that activate each latent, by compartment of the masks."""

from dataclasses import dataclass

import numpy as np
import torch

from cytosae.statistics.patch_monosemanticity import PatchMonosemanticityStatistics
from cytosae_pipeline.evaluation.monosemanticity import summarise
from cytosae_pipeline.images.masks import Masks
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.statistics.inputs import Inputs


@dataclass(frozen=True)
class CompartmentMonosemanticity:
    """Similarity of the patches of each latent in one compartment (docs/definitions.md, section 12)."""

    name: str
    """Name of the compartment; `all patches` for all of them."""
    n_patches: int
    """Its patches."""
    median: float | None
    """Median over the latents that have a score; None if none has."""
    any_pair: float | None
    """Mean cosine of any two of the patches that are of different images; None if there are none."""
    n_latents: int
    """Latents that have a score: those that are active on such patches of at least two images."""
    scores: list[float | None]
    """Score of each latent, S of them; None for the others."""


@dataclass(frozen=True)
class PatchMonosemanticity:
    """The same for all patches and for each compartment."""

    n_images: int
    """Images that have a mask."""
    n_without: int
    """Images that were looked at and have no usable mask."""
    compartments: list[CompartmentMonosemanticity]
    """All patches, the background, then the compartments of the masks."""

    def describe(self) -> str:
        """The result as a small table."""
        width = max(len(one.name) for one in self.compartments)
        lines = [f"{'':<{width}}  {'patches':>9}  {'median':>7}  {'any two':>7}  {'latents':>8}"]
        lines += [
            f"{one.name:<{width}}  {one.n_patches:>9,}  {_shown(one.median)}  {_shown(one.any_pair)}  "
            f"{one.n_latents:>8,}"
            for one in self.compartments
        ]
        return "\n".join([f"monosemanticity of patches of {self.n_images:,} images with masks", *lines])


def measure_patch_monosemanticity(inputs: Inputs, masks: Masks, *, no_verify: bool = False) -> PatchMonosemanticity:
    """Measure how similar the patches are that activate each latent, in one pass over the images with masks.

    A patch belongs to the compartment that most of its pixels are in; to the first one if several have as many.

    Args:
        inputs: Autoencoder and store.
        masks: Masks of images of the store.
        no_verify: Skip checksums while reading.

    Raises:
        NotEnoughMemoryError: If the sums do not fit into memory.
    """
    layout, width, sae = inputs.store.spec.tokens, inputs.store.d_model, inputs.sae
    names, device = ["all patches", "background", *masks.names], accumulator_device(sae.W_enc.device)
    advice = "Leave out --masks, or evaluate an autoencoder with fewer latents"
    n_bytes = 8 * len(names) * inputs.n_latents * width
    require_memory(n_bytes, available_ram(), "comparing the patches of every compartment", advice)
    found = [PatchMonosemanticityStatistics(inputs.n_latents, width, device=device) for _ in names]
    compartments, first = masks.shares.argmax(axis=2), layout.n_cls + layout.n_registers
    with (
        inputs.store.open_reader(verify=not no_verify) as reader,
        Progress("patches", len(masks.rows), "images") as bar,
        torch.no_grad(),
    ):
        for row, of_patch in zip(masks.rows, torch.from_numpy(compartments), strict=True):
            # One image at a time: a product rounds differently with its shape.
            tokens = torch.from_numpy(reader.read(np.array([row])))[0].to(sae.W_enc.device)
            acts, patches = sae.encode(tokens)[first:].to(device), tokens[first:].to(device)
            found[0].update(patches, acts)
            for number in np.unique(of_patch).tolist():
                inside = (of_patch == number).to(device)
                found[1 + number].update(patches[inside], acts[inside])
            bar.advance()
    compared = [
        CompartmentMonosemanticity(name=name, n_patches=one.n_patches, **summarise(one.result()))
        for name, one in zip(names, found, strict=True)
    ]
    return PatchMonosemanticity(len(masks.rows), masks.n_without, compared)


def _shown(value: float | None) -> str:
    """A number of a table."""
    return f"{'-':>7}" if value is None else f"{value:>7.4f}"
