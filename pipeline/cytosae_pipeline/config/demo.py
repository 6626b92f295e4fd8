"""Options of `demo`."""

from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config.fields import MAX_SEED, Config, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of `demo`."""

    root_dir: Path = option(Path("cytosae-demo"), "Folder for the demo's images and outputs.")
    seed: int = option(0, "Seed of the cohort.", minimum=0, maximum=MAX_SEED)
    scanners: bool = option(
        False,
        "Scan the patients with two scanners that differ in colour, unevenly over the groups, and compare groups "
        "within the scanners (report --strata): what a confounder does, and how it is seen.",
    )
