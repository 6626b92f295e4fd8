"""`explore --rate`: a blinded rating of latents, served on this machine only."""

import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config import ExploreConfig
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.rating.files import rater_path
from cytosae_pipeline.rating.items import FEWEST_ACTIVE, Plan, plan_items
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.explore.server import require_libraries
from cytosae_pipeline.report.rating.candidates import find_candidates
from cytosae_pipeline.report.rating.service import RatingService
from cytosae_pipeline.report.records.choice import choose_latents
from cytosae_pipeline.report.records.thumbnails import explain_no_pictures
from cytosae_pipeline.workspace.runs import resolve_sae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rating:
    """A rating that is served, or has ended."""

    url: str
    """Address of the page; it contains a secret, without which every request is refused."""
    rater: str
    """The rater."""
    n_rated: int
    """Items rated."""
    n_items: int
    """Items to be rated, decoys included."""
    path: Path
    """File of the rater's answers."""

    def describe(self) -> str:
        """The same as text."""
        return (
            f"{self.rater} has rated {self.n_rated:,} of {say_count(self.n_items, 'item')}\n"
            f"open in a browser on this machine: {self.url}\npress Ctrl-C to stop; the same command goes on"
        )


def rate(config: ExploreConfig, on_ready: Callable[[Rating], None]) -> Rating:
    """Serve the rating on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        config: Options; `rate` is the rater.
        on_ready: Called once the server accepts requests.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, an option does not fit them, the images
            were not found, or no latent can be rated.
    """
    require_libraries("flask", "werkzeug")
    from cytosae_pipeline.report.explore.http_server import ExploreServer, bind
    from cytosae_pipeline.report.rating.app import make_rating_app

    rater = config.rate
    assert rater is not None
    config = resolve_sae(config)
    # Before the data are loaded: a port that is in use is reported at once.
    with bind(config.port) as listener:
        host, port = listener.getsockname()
        data = open_report_data(config, profiles=False)
        images = list_stored_images(data.store, config)
        if images is None:
            raise UserError(f"latents cannot be rated without pictures: {''.join(explain_no_pictures(data.store))}")
        latents, _ = choose_latents(data, explore=True)
        with data.store.open_reader(verify=not config.no_verify) as reader:
            found = find_candidates(data, reader, latents)
            plan = plan_items(found, len(latents), rater=rater, seed=config.rate_seed, decoy_every=config.decoy_every)
            _require_items(plan)
            service = RatingService(data, images, reader, plan.items, rater)
            token = secrets.token_urlsafe(24)
            url = f"http://{host}:{port}/{token}/index.html"
            path = rater_path(data.inputs.folder, rater)
            n_rated, n_items = service.count()
            app = make_rating_app(service, port=port, token=token)
            with ExploreServer(app, listener) as server, contextlib.suppress(KeyboardInterrupt):
                on_ready(Rating(url, rater, n_rated, n_items, path))
                server.run()
            service.closed = True
            return Rating(url, rater, *service.count(), path)


def _require_items(plan: Plan) -> None:
    """Say which latents are left out.

    Raises:
        UserError: If none is left.
    """
    left_out = []
    if plan.too_rare:
        left_out.append(
            f"{say_count(plan.too_rare, 'latent is', 'latents are')} active on fewer than {FEWEST_ACTIVE} images"
        )
    if plan.no_intruder:
        left_out.append(
            f"{say_count(plan.no_intruder, 'latent is', 'latents are')} active on the top images of all others, so "
            "that there is no intruder"
        )
    if not plan.items:
        raise UserError(f"no latent can be rated: {'; '.join(left_out)}. Name others with --latents")
    if left_out:
        logger.info(f"left out of the rating: {'; '.join(left_out)}")
