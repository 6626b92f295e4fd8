"""An autoencoder cut by its latents: each of several processes holds some, with everything that belongs to them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.registry import make_sae
from cytosae.sae.world import World
from cytosae.training.gradients import by_latent

_OF_ALL = ("b_dec",)
"""Tensors that every process holds whole, besides single numbers."""


class LatentParts:
    """Cuts tensors with a row or a value for each latent, and puts them together again. A world of one cuts nothing.

    Args:
        ranks: The processes.
        n_latents: Latents S of all of them together.
    """

    def __init__(self, ranks: World, n_latents: int) -> None:
        self._ranks = ranks
        self.own = ranks.share(n_latents)
        """This process' latents."""

    @property
    def is_cut(self) -> bool:
        """Whether this process has a part only."""
        return self._ranks.size > 1

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process' part of a whole tensor of an autoencoder, a gradient or a moment of it, or a count."""
        if not self._has_parts(name, tensor):
            return tensor
        return by_latent(name, by_latent(name, tensor)[self.own])

    def join(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor on rank 0, from every process' part; on the others, something of no meaning."""
        if not self._has_parts(name, tensor):
            return tensor
        parts = self._ranks.gather(by_latent(name, tensor), only_first=True)
        return by_latent(name, torch.cat(parts)) if parts else tensor

    def join_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Values of all latents, shape `(S,)`, on every process, from every process' own ones."""
        return torch.cat(self._ranks.gather(counts)) if self.is_cut else counts

    def cut_sae(self, sae: Sae, device: torch.device) -> Sae:
        """This process' latents of a whole autoencoder on a device; the autoencoder itself if nothing is cut."""
        if not self.is_cut:
            return sae
        own = make_sae(sae.architecture, len(sae.b_dec), self.own.stop - self.own.start, device=device, **sae.settings)
        self.copy_sae_(own, sae)
        return own

    @torch.no_grad()
    def copy_sae_(self, own: Sae, sae: Sae) -> None:
        """Copy this process' part of a whole autoencoder, in place."""
        if self.is_cut:
            own.load_state_dict({name: self.cut(name, values) for name, values in sae.state_dict().items()})

    def join_sae(self, sae: Sae) -> Sae | None:
        """A copy of the whole autoencoder on rank 0; None on others."""
        if not self.is_cut:
            return copy.deepcopy(sae)
        tensors = {name: self.join(name, values) for name, values in sae.state_dict().items()}
        if self._ranks.rank:
            return None
        whole = make_sae(
            sae.architecture, len(sae.b_dec), len(tensors["b_enc"]), device=sae.b_enc.device, **sae.settings
        )
        whole.load_state_dict(tensors)
        return whole

    def map_optimizer(
        self, state: Mapping[str, Any], names: Sequence[str], change: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> dict[str, Any]:
        """An optimiser's state with its tensors cut or joined.

        Args:
            state: Its state dict.
            names: Names of its parameters, in its order.
            change: `cut` or `join`.
        """
        moments = {
            number: {key: change(names[number], values) for key, values in one.items()}
            for number, one in state["state"].items()
        }
        return {**state, "state": moments}

    def _has_parts(self, name: str, tensor: torch.Tensor) -> bool:
        return self.is_cut and tensor.ndim > 0 and name not in _OF_ALL
