"""`explore`: the page served on this machine alone, with everything computed when it is asked for."""

import importlib.util
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae_pipeline.config.report import ExploreConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.report.data.material import open_report_data
from cytosae_pipeline.report.data.notes import read_notes
from cytosae_pipeline.report.explore.service import ExploreService
from cytosae_pipeline.report.explore.uploads import open_uploads
from cytosae_pipeline.report.records.choice import choose_latents, top_image_rows
from cytosae_pipeline.report.records.masking import measure_masking
from cytosae_pipeline.report.records.overview import overview_record
from cytosae_pipeline.workspace.find import list_stored_images

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_THREADS = 16
"""Browsers open at most six connections to a server: two that wait for numbers leave threads for pictures."""


@dataclass(frozen=True)
class Serving:
    """What `explore` serves."""

    url: str
    """Address of the page; it holds a secret, without which nothing is answered."""
    n_latents: int
    """Latents that can be looked at."""
    n_images: int
    """Images that can be looked at."""
    can_upload: bool
    """Whether it reads new images."""
    notes: Path
    """Where names and notes are kept."""

    def describe(self) -> str:
        """The same for people."""
        uploads = "" if self.can_upload else "; with --model_path CHECKPOINT also images of your own"
        return (
            f"{self.n_latents:,} latents and {self.n_images:,} images to look at{uploads}\n"
            f"open in a browser on this machine: {self.url}\nCtrl-C ends it"
        )


@dataclass(frozen=True)
class Ended:
    """What `explore` leaves."""

    n_notes: int
    """Latents with a name or a note."""
    notes: Path
    """Where these are kept."""


def explore(config: ExploreConfig, on_ready: Callable[[Serving], None]) -> Ended:
    """Serve the page until Ctrl-C or a request to end.

    Args:
        config: Options.
        on_ready: Called once the address is answered.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or an option does not fit them.
    """
    _require("flask", "waitress")
    with _bind(config.port) as listener:
        port = int(listener.getsockname()[1])
        material = open_report_data(config)
        store = material.store
        latents, reason = choose_latents(material, explore=True)
        uploads = open_uploads(store, config)
        images = list_stored_images(store, config)
        messages = []
        if images is None:
            logger.info("the images are not at hand, so maps are shown without cells: say where with --images PATH")
            messages.append("The images are not at hand: maps are shown without cells. Say where with --images PATH.")
        overview = overview_record(
            material,
            latents,
            reason,
            top_image_rows(material, latents),
            thumbnails=images is not None,
            masking=measure_masking(material, messages),
            messages=messages,
            explore=True,
            can_upload=uploads is not None,
        )
        token = secrets.token_urlsafe(24)
        with ExploreService(material, latents, overview, images, uploads) as page:
            serving = Serving(
                url=f"http://{_HOST}:{port}/{token}/index.html",
                n_latents=material.n_latents,
                n_images=int(store.valid.sum()),
                can_upload=uploads is not None,
                notes=material.notes_path,
            )
            _serve(page, listener, port, token, lambda: on_ready(serving))
    return Ended(len(read_notes(material.notes_path, material.n_latents)), material.notes_path)


def make_server(page: ExploreService, listener: socket.socket, port: int, token: str) -> Any:  # noqa: ANN401 - waitress's
    """The server, with its threads started; `run` answers until it is interrupted.

    Args:
        page: Makes the answers.
        listener: Socket that is bound to a port of 127.0.0.1.
        port: The port.
        token: First part of every path.
    """
    import waitress
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser

    from cytosae_pipeline.report.data.limits import MAX_UPLOAD
    from cytosae_pipeline.report.explore.app import find_refusal, make_app

    class Parser(HTTPRequestParser):  # type: ignore[misc]
        """Takes no body from whoever may not ask: it would fill memory before the application could refuse it."""

        completed: bool

        def received(self, data: bytes) -> int:
            n_used = int(super().received(data))
            refused = not self.completed and self.headers_finished and find_refusal(
                self.headers.get("HOST", ""), self.path, port=port, token=token
            )  # fmt: skip
            if not refused:
                return n_used
            self.completed = self.connection_close = True
            self.body_rcv, self.chunked, self.expect_continue = None, False, False
            self.headers |= {"CONTENT_LENGTH": "0", "CONNECTION": "close"}
            return len(data)

    class Channel(HTTPChannel):  # type: ignore[misc]
        parser_class = Parser

    # It warns of requests that wait, and of those that are cut off at the end: here both are usual.
    logging.getLogger("waitress").setLevel(logging.ERROR)
    server = waitress.create_server(
        make_app(page, port=port, token=token),
        sockets=[listener],
        threads=_THREADS,
        ident="",
        # Uploads stay in memory: cells of patients have no business in a folder for temporary files.
        inbuf_overflow=2 * MAX_UPLOAD,
        # Twice the limit, so that a file somewhat too large still gets an answer that says so.
        max_request_body_size=2 * MAX_UPLOAD,
        # Connections that send nothing must not keep others out for long; select() could not hold so many.
        connection_limit=1000,
        channel_timeout=20,
        cleanup_interval=5,
        asyncore_use_poll=True,
    )
    server.channel_class = Channel
    return server


def _serve(page: ExploreService, listener: socket.socket, port: int, token: str, on_ready: Callable[[], None]) -> None:
    """Serve until interrupted."""
    server = make_server(page, listener, port, token)
    try:
        on_ready()
        server.run()  # returns on Ctrl-C, once answers under way are finished or five seconds are over
    except KeyboardInterrupt:
        server.task_dispatcher.shutdown()
    finally:
        server.close()


def _bind(port: int) -> socket.socket:
    """A socket at a port of 127.0.0.1, which no other machine reaches.

    Raises:
        UserError: If the port is not to be had.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {_HOST} is not to be had ({error.strerror}): give another --port, or none for a free one"
        ) from error
    return listener


def _require(*names: str) -> None:
    """Refuse to begin where a library is missing.

    Raises:
        UserError: If one is.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'explore needs {" and ".join(missing)}, which is not installed: pip install "cytosae-cache[explore]"'
        )
