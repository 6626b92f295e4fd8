"""The rating over HTTP: what each address returns. Guards and headers are those of the explorer."""

import json
import re
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files

from flask import Flask, Response, request
from werkzeug.exceptions import RequestEntityTooLarge

from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_pipeline.report.explore.app import make_guarded_app
from cytosae_pipeline.report.explore.errors import MissingError
from cytosae_pipeline.report.rating.service import RatingService
from cytosae_pipeline.report.records.page_files import read_page_files

_MAX_ANSWER_BYTES = 1 << 16
_SHARED = ("core/base.css", "core/data.js", "core/dom.js", "core/colors.js", "core/state.js", "charts/cell.js",
           "charts/charts.css")  # fmt: skip
"""Files of the report's page that this one uses, too. None contains anything of a data set."""
_OWN = ("rate.js", "rate.css")
_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "jpg": "image/jpeg",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
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
        return _respond(name.rpartition(".")[2], known[name])

    def put_answer(at: str) -> Response:
        request.max_content_length = _MAX_ANSWER_BYTES
        try:
            value = json.loads(request.get_data(cache=False))
        except RequestEntityTooLarge:
            return _respond("txt", "The answer is too long", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except (ValueError, RecursionError):
            return _respond("txt", "An answer must be JSON", HTTPStatus.BAD_REQUEST)
        try:
            service.save(_number(at), value)
        except (WriteError, StoreBusyError) as error:
            app.logger.error(str(error))  # not to the browser: it contains paths
            return _respond("txt", _NOT_WRITTEN, HTTPStatus.SERVICE_UNAVAILABLE)
        return _respond("txt", "saved")

    add("index.html", lambda: own_file("index.html"))
    add("page/<path:name>", lambda name: own_file(f"page/{name}"))
    add("data/state.json", lambda: _respond("json", json.dumps(service.state())))
    add("data/items/<name>", lambda name: _respond("json", json.dumps(service.item(_number(name, ".json")))))
    add(
        "pictures/<at>/<group>/<name>",
        lambda at, group, name: _respond("jpg", service.picture(_number(at), _number(group), _number(name, ".jpg"))),
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


def _number(name: str, ending: str = "") -> int:
    """The number in a name such as `12.json`, in its one canonical spelling."""
    found = re.fullmatch(r"(0|[1-9][0-9]{0,8})" + re.escape(ending), name, re.ASCII)
    if found is None:
        raise MissingError
    return int(found[1])


def _respond(kind: str, data: bytes | str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """A response."""
    return Response(data, status=status, content_type=_CONTENT_TYPES[kind])
