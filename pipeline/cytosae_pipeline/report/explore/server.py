"""`explore`: the page served on this machine only, with every latent and image computed on request."""

import contextlib
import importlib.util
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cytosae_pipeline.config import ExploreConfig
from cytosae_pipeline.errors import UserError, install, say_count
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.explore.service import ExploreService
from cytosae_pipeline.report.explore.uploads import open_uploads
from cytosae_pipeline.report.measures.extras import find_extras
from cytosae_pipeline.report.records.cell_map import FEWEST_IMAGES, require_umap
from cytosae_pipeline.report.records.choice import choose_latents, image_rows
from cytosae_pipeline.report.records.effects import has_effects
from cytosae_pipeline.report.records.images import make_image_book
from cytosae_pipeline.report.records.masking import measure_masking
from cytosae_pipeline.report.records.overview import overview_record
from cytosae_pipeline.report.records.thumbnails import explain_no_pictures
from cytosae_pipeline.workspace.runs import resolve_sae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """What `explore` serves."""

    url: str
    """Address of the page; it contains a secret, without which every request is refused."""
    n_latents: int
    """Latents that can be opened."""
    n_images: int
    """Images that can be opened."""
    can_upload: bool
    """Whether new images can be analysed."""
    notes: Path
    """File of names and notes."""

    def describe(self) -> str:
        """The same as text."""
        uploads = "" if self.can_upload else "; add --model_path CHECKPOINT to analyse your own images"
        return (
            f"{say_count(self.n_latents, 'latent')} and {say_count(self.n_images, 'image')} to explore{uploads}\n"
            f"open in a browser on this machine: {self.url}\npress Ctrl-C to stop"
        )


@dataclass(frozen=True)
class Ended:
    """What `explore` leaves behind."""

    n_notes: int
    """Latents with a name or a note."""
    notes: Path
    """Their file."""


def explore(config: ExploreConfig, on_ready: Callable[[Serving], None]) -> Ended:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        config: Options.
        on_ready: Called once the server accepts requests.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or an option does not fit them.
    """
    require_libraries("flask", "werkzeug")
    require_umap(config)
    from cytosae_pipeline.report.explore.app import make_app
    from cytosae_pipeline.report.explore.http_server import ExploreServer, bind

    config = resolve_sae(config)
    # Before the data are loaded: a port that is in use is reported at once.
    with bind(config.port) as listener:
        host, port = listener.getsockname()
        report_data = open_report_data(config, profiles=False)
        store, extras = report_data.store, find_extras(report_data)
        latents, reason = choose_latents(report_data, explore=True)
        uploads = open_uploads(store, config)
        images = list_stored_images(store, config)
        messages = []
        if images is None:
            text = "".join(explain_no_pictures(store))
            logger.info(text)
            messages.append(f"{text[0].upper()}{text[1:]}.")
        masking, notes = measure_masking(report_data)
        book = make_image_book(report_data)
        overview = overview_record(
            report_data,
            latents,
            reason,
            image_rows(report_data, latents),
            thumbnails=images is not None,
            masking=masking,
            messages=[*messages, *notes],
            explore=True,
            can_upload=uploads is not None,
            effects=has_effects(report_data),
            book=book,
            has_map=config.map_images > 0 and int(store.valid.sum()) >= FEWEST_IMAGES,
            extras=extras,
        )
        token = secrets.token_urlsafe(24)
        with ExploreService(report_data, latents, overview, images, uploads, book, extras) as service:
            serving = Serving(
                url=f"http://{host}:{port}/{token}/index.html",
                n_latents=report_data.n_latents,
                n_images=int(store.valid.sum()),
                can_upload=uploads is not None,
                notes=report_data.notes_path,
            )
            app = make_app(service, port=port, token=token)
            with ExploreServer(app, listener) as server, contextlib.suppress(KeyboardInterrupt):
                on_ready(serving)
                server.run()
    return Ended(len(report_data.read_notes()), report_data.notes_path)


def require_libraries(*names: str) -> None:
    """Check that libraries are installed.

    Raises:
        UserError: If one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"explore needs {' and '.join(missing)}, which is not installed: {install('explore')}")
