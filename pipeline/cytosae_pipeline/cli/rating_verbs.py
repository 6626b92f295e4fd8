"""The verb about ratings of latents."""

from typing import Any

from cytosae_pipeline.cli.group import verb
from cytosae_pipeline.cli.options import config_options, make_config
from cytosae_pipeline.cli.output import print_result
from cytosae_pipeline.config import RatingsConfig


@verb
@config_options(RatingsConfig)
def ratings(as_json: bool, **values: Any) -> None:
    """Show how raters rated latents, and how well they agree.

    Reads the answers of everybody who rated latents with `explore --rate`: how many intruders and decoys each rater
    found, the agreement of raters beyond chance (Cohen's and Fleiss' kappa, docs/definitions.md, section 14), and which
    latents passed. `report --passed` and `explore --passed` show these alone.

    \b
    cytosae-cache ratings --dataset_name mll23 --sae_path latest
    cytosae-cache ratings --dataset_name mll23 --sae_path latest --raters_needed 3 --yes_of majority --json
    """
    config = make_config(RatingsConfig, values)
    from cytosae_pipeline.rating.summary import run_ratings

    result = run_ratings(config)
    print_result(result, result.describe(), as_json)
