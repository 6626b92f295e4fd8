"""The rating over HTTP: what each address returns. Guards and headers are those of the explorer."""

import json
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files

from flask import Flask, Response, request
from werkzeug.exceptions import RequestEntityTooLarge

from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_pipeline.report.explore.app import make_guarded_app
from cytosae_pipeline.report.explore.errors import MissingError
from cytosae_pipeline.report.explore.responses import parse_number, respond
from cytosae_pipeline.report.rating.service import RatingService
from cytosae_pipeline.report.records.page_files import read_page_files

_MAX_ANSWER_BYTES = 1 << 16
_SHARED = ("core/base.css", "core/data.js", "core/dom.js", "core/colors.js", "core/state.js", "charts/cell.js",
           "charts/charts.css")  # fmt: skip
"""Files of the report's page that this one uses, too. None contains anything of a data set."""
_OWN = ("rate.js", "rate.css")
_NOT_WRITTEN = "The rating cannot be written now. See the terminal in which cytosae-cache explore was started."


def make_rating_app(service: RatingService, *, port: int, token: str) -> Flask:
    """The WSGI application; arguments as for the explorer's `make_app`."""
    app = make_guarded_app(lambda: service.closed, port=port, token=token)
    known = _read_files()

    def add(rule: str, view: Callable[..., Response], method: str = "GET") -> None:
        app.add_url_rule(
            f"/<token>/{rule}", endpoint=rule, view_func=view, methods=[method], provide_automatic_options=False
        )

    def own_file(name: str) -> Response:
        # Known names only: this looks up a dictionary, never the disk.
        if name not in known:
            raise MissingError
        return respond(name.rpartition(".")[2], known[name])

    def put_answer(at: str) -> Response:
        request.max_content_length = _MAX_ANSWER_BYTES
        try:
            value = json.loads(request.get_data(cache=False))
        except RequestEntityTooLarge:
            return respond("txt", "The answer is too long", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except (ValueError, RecursionError):
            return respond("txt", "An answer must be JSON", HTTPStatus.BAD_REQUEST)
        try:
            service.save(parse_number(at), value)
        except (WriteError, StoreBusyError) as error:
            app.logger.error(str(error))  # not to the browser: it contains paths
            return respond("txt", _NOT_WRITTEN, HTTPStatus.SERVICE_UNAVAILABLE)
        return respond("txt", "saved")

    add("index.html", lambda: own_file("index.html"))
    add("page/<path:name>", lambda name: own_file(f"page/{name}"))
    add("data/state.json", lambda: respond("json", json.dumps(service.state())))
    add("data/items/<name>", lambda name: respond("json", json.dumps(service.item(parse_number(name, ".json")))))
    add(
        "pictures/<at>/<group>/<name>",
        lambda at, group, name: respond(
            "jpg", service.picture(parse_number(at), parse_number(group), parse_number(name, ".jpg"))
        ),
    )
    add("answers/<at>", put_answer, "PUT")
    return app


def _read_files() -> dict[str, bytes]:
    """The page's files by their address."""
    folder, shared = files("cytosae_pipeline.report.rating") / "page", read_page_files()
    return {
        "index.html": (folder / "index.html").read_bytes(),
        **{f"page/{name}": shared[f"page/{name}"] for name in _SHARED},
        **{f"page/{name}": (folder / name).read_bytes() for name in _OWN},
    }
