"""Options that name masks of a store's images: which patches lie in the nucleus, the cytoplasm or the background."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config.fields import Config, option
from cytosae_pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MaskChoice(Config):
    """Options of everything that tells patches apart by masks."""

    masks: Path | None = option(
        None,
        "Folder of label images named as the images (0 background, 1 and more compartments): the page shows each "
        "latent's share of activation by compartment, and evaluate --monosemanticity how similar its patches are.",
    )
    mask_names: str | None = option(
        None, "Names of the compartments from 1 on, separated by commas: nucleus,cytoplasm."
    )
    mask_images: int = option(1000, "Most images whose masks are read, spread over the store.", minimum=1)

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        parse_names(self.mask_names)
        if self.mask_names is not None and self.masks is None:
            raise UserError("mask_names needs the folder of the masks: give --masks FOLDER, too")


def parse_names(text: str | None) -> tuple[str, ...]:
    """Names written as `nucleus,cytoplasm`; none if no text was given.

    Raises:
        UserError: If one is empty, or stands twice.
    """
    names = () if text is None else tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise UserError(f"mask_names must be different names separated by commas, found {text!r}")
    return names
