"""The explorer over HTTP: which requests are accepted, what each address returns, and the headers of every response."""

import hmac
import json
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.exceptions import RequestEntityTooLarge

from cytosae.backbones.images import UnreadableImageError
from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_pipeline.report.data.limits import MAX_UPLOAD
from cytosae_pipeline.report.explore.errors import MissingError, RefusedError
from cytosae_pipeline.report.explore.http_server import HOST
from cytosae_pipeline.report.explore.responses import CONTENT_TYPES, parse_number, respond
from cytosae_pipeline.report.explore.service import ExploreService
from cytosae_pipeline.report.records.page_files import read_page_files, read_policy

_MAX_NOTE_BYTES = 1 << 18
_READ_METHODS = ("GET", "HEAD")
_NOT_WRITTEN = "The notes cannot be written now. See the terminal in which cytosae-cache explore was started."
_INTERNAL_ERROR = "This failed. See the terminal in which cytosae-cache explore was started."


def make_app(service: ExploreService, *, port: int, token: str) -> Flask:
    """The WSGI application. Every path starts with the token, and only pages of this server may write.

    A request is refused before its body is read.

    Args:
        service: Computes the responses.
        port: Port on 127.0.0.1 at which the application is reached.
        token: Secret first part of every path; requests without it get 404.
    """
    app = make_guarded_app(lambda: service.closed, port=port, token=token)
    _add_routes(app, service)
    return app


def make_guarded_app(is_closed: Callable[[], bool], *, port: int, token: str) -> Flask:
    """An application without addresses yet: it refuses foreign requests, and every response has the same headers.

    Args:
        is_closed: Whether the server has ended: what fails then is not logged.
        port: Port on 127.0.0.1 at which the application is reached.
        token: Secret first part of every path; requests without it get 404.
    """
    app = Flask(__name__, static_folder=None)
    app.url_map.merge_slashes = False
    headers = {
        "Content-Security-Policy": read_policy(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Frame-Options": "DENY",
    }

    @app.before_request
    def guard() -> Response | None:
        host = request.headers.get("Host", "")
        refusal = _find_refusal(host, request.path, port=port, token=token)
        if refusal is not None:
            return _refuse(refusal)
        if request.method not in _READ_METHODS and not _is_same_origin(host):
            return _refuse(HTTPStatus.FORBIDDEN)
        return None

    @app.url_value_preprocessor
    def drop_token(endpoint: str | None, values: dict[str, Any] | None) -> None:
        (values or {}).pop("token", None)

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(headers)
        return response

    @app.errorhandler(Exception)
    def fail(error: Exception) -> Response:
        if isinstance(error, MissingError):
            return _refuse(HTTPStatus.NOT_FOUND)
        if isinstance(error, RefusedError | UnreadableImageError):
            return respond("txt", str(error), HTTPStatus.BAD_REQUEST)
        if isinstance(error, WriteError | StoreBusyError):
            app.logger.error(str(error))  # not to the browser: it contains paths
            return respond("txt", _NOT_WRITTEN, HTTPStatus.SERVICE_UNAVAILABLE)
        if not is_closed():
            app.log_exception(sys.exc_info())
        return respond("txt", _INTERNAL_ERROR, HTTPStatus.INTERNAL_SERVER_ERROR)

    for status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.BAD_REQUEST):
        app.register_error_handler(status, _shorten)
    return app


def _find_refusal(host: str, path: str, *, port: int, token: str) -> HTTPStatus | None:
    """Status with which a request is refused, or None.

    Args:
        host: Its header Host.
        path: Its path.
        port: Port on 127.0.0.1.
        token: First part of every path.
    """
    # Browsers leave out port 80.
    hosts = {name if port == 80 else f"{name}:{port}" for name in (HOST, "localhost")}
    # DNS rebinding: a page of another site whose name resolves to this machine sends that name.
    if host not in hosts:
        return HTTPStatus.FORBIDDEN
    given = path.split("/", 2)[1] if path.startswith("/") else ""
    known = hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
    return None if known else HTTPStatus.NOT_FOUND


def _add_routes(app: Flask, service: ExploreService) -> None:
    """The addresses below the token."""
    own = read_page_files()

    def add(rule: str, view: Callable[..., Response], method: str = "GET") -> None:
        app.add_url_rule(
            f"/<token>/{rule}", endpoint=rule, view_func=view, methods=[method], provide_automatic_options=False
        )

    def own_file(name: str) -> Response:
        # Known names only: this looks up a dictionary, never the disk.
        data = own.get(f"page/{name}")
        if data is None:
            raise MissingError
        return respond(name.rpartition(".")[2], data)

    def numbered(make: Callable[[int], bytes], kind: str) -> Callable[[str], Response]:
        return lambda name: respond(kind, make(parse_number(name, f".{kind}")))

    def put_note(name: str) -> Response:
        body = _read_body(_MAX_NOTE_BYTES, "The note is too long")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return respond("txt", "A note must be JSON", HTTPStatus.BAD_REQUEST)
        other = service.save_note(parse_number(name, ""), value)
        if other is not None:
            return respond("json", json.dumps(other), HTTPStatus.CONFLICT)
        return respond("txt", "saved")

    def post_upload() -> Response:
        body = _read_body(MAX_UPLOAD, f"The file is larger than {MAX_UPLOAD >> 20} MB")
        return respond("json", json.dumps(service.upload(body), allow_nan=False))

    add("index.html", lambda: respond("html", own["index.html"]))
    add("page/<path:name>", own_file)
    add("data/overview.js", lambda: respond("js", service.overview()))
    add("data/patients.js", lambda: respond("js", service.patients()))
    add("data/latents/<name>", numbered(service.latent, "js"))
    add("data/images/<name>", numbered(service.image, "js"))
    add(
        "data/effects/<latent>/<row>/<name>",
        lambda latent, row, name: respond(
            "js", service.effect(parse_number(latent, ""), parse_number(row, ""), parse_number(name, ".js"))
        ),
    )
    add("data/map.js", lambda: respond("js", service.map()))
    add("data/mapped/<name>", numbered(service.mapped, "js"))
    add("data/rows/<name>", numbered(service.rows, "js"))
    add("data/listings/label-<name>", numbered(partial(service.listing, "label"), "js"))
    add("data/listings/patient-<name>", numbered(partial(service.listing, "patient"), "js"))
    add("data/audit.js", lambda: respond("js", service.audit()))
    add("data/comparisons/all.js", lambda: respond("js", service.all_groups()))
    add("data/comparisons/<name>", numbered(service.comparison, "js"))
    add("thumbnails/<name>", numbered(service.thumbnail, "jpg"))
    add("notes/<name>", put_note, "PUT")
    add("data/notes/<name>", lambda name: respond("json", json.dumps(service.note(parse_number(name, ".json")))))
    add("upload", post_upload, "POST")


def _read_body(max_bytes: int, complaint: str) -> bytes:
    """The request's body, kept in memory: pictures of patients' cells must not end up in a temporary file.

    A body that is too long ends the request with status 413 and the complaint.
    """
    request.max_content_length = max_bytes
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        abort(respond("txt", complaint, HTTPStatus.REQUEST_ENTITY_TOO_LARGE))


def _is_same_origin(host: str) -> bool:
    """Whether a page of this server sends the request: by its Origin or, without one, by Sec-Fetch-Site."""
    origin = request.headers.get("Origin")
    if origin is not None:
        return origin == f"http://{host}"
    return request.headers.get("Sec-Fetch-Site") == "same-origin"


def _refuse(status: HTTPStatus) -> Response:
    """A response that contains nothing but the standard phrase of its status."""
    return respond("txt", status.phrase, status)


def _shorten(error: Any) -> Response:  # noqa: ANN401 - werkzeug's exception
    """Flask's own response to an unknown address or method, with the standard phrase as its body."""
    response: Response = error.get_response()
    response.set_data(HTTPStatus(error.code).phrase)
    response.content_type = CONTENT_TYPES["txt"]
    return response
