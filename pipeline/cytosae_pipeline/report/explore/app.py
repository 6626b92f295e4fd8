"""The live page over HTTP: who may ask, what is there, and what every answer says to the browser."""

import hmac
import json
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request

from cytosae.backbones.images import UnreadableImageError
from cytosae_pipeline.report.data.limits import MAX_UPLOAD
from cytosae_pipeline.report.explore.service import ExploreService, MissingError, RefusedError
from cytosae_pipeline.report.records.page_files import read_page_files, read_policy

HOST = "127.0.0.1"
_MAX_NOTE_BYTES = 1 << 18
_READING = ("GET", "HEAD")
_KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "jpg": "image/jpeg",
    "json": "application/json",
    "txt": "text/plain; charset=utf-8",
}
_COMPUTING_FAILED = "This could not be done. The terminal in which cytosae-cache explore runs says why."


def make_app(page: ExploreService, *, port: int, token: str) -> Flask:
    """The application: everything lies below the token, and is answered to pages of this server alone.

    Args:
        page: Makes the answers.
        port: Port on 127.0.0.1 at which it is reached.
        token: First part of every path; whoever does not know it finds nothing.
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
        refusal = find_refusal(host, request.path, port=port, token=token)
        if refusal is not None:
            return _refuse(refusal)
        if request.method not in _READING and not _is_same_origin(host):
            return _refuse(HTTPStatus.FORBIDDEN)
        return None

    @app.url_value_preprocessor
    def leave_token_out(endpoint: str | None, values: dict[str, Any] | None) -> None:
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
            return _answer("txt", str(error), HTTPStatus.BAD_REQUEST)
        if not page.closed:
            app.log_exception(sys.exc_info())
        return _answer("txt", _COMPUTING_FAILED, HTTPStatus.INTERNAL_SERVER_ERROR)

    for status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.BAD_REQUEST):
        app.register_error_handler(status, _restate)
    _add_routes(app, page)
    return app


def find_refusal(host: str, path: str, *, port: int, token: str) -> HTTPStatus | None:
    """Why a request is not answered, whatever it asks; None if it may ask.

    Args:
        host: Its header Host.
        path: Its path.
        port: Port on 127.0.0.1.
        token: First part of every path.
    """
    # Browsers leave out port 80.
    hosts = {name if port == 80 else f"{name}:{port}" for name in (HOST, "localhost")}
    # A page of another site whose name was made to point to this machine sends that name (DNS rebinding).
    if host not in hosts:
        return HTTPStatus.FORBIDDEN
    given = path.split("/", 2)[1] if path.startswith("/") else ""
    known = hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
    return None if known else HTTPStatus.NOT_FOUND


def _add_routes(app: Flask, page: ExploreService) -> None:
    """What there is."""
    own = read_page_files()

    def add(rule: str, view: Callable[..., Response], method: str = "GET") -> None:
        app.add_url_rule(
            f"/<token>/{rule}", endpoint=rule, view_func=view, methods=[method], provide_automatic_options=False
        )

    def own_file(name: str) -> Response:
        # Only known names: the dictionary is looked up, never the disk.
        data = own.get(f"page/{name}")
        if data is None:
            raise MissingError
        return _answer(name.rpartition(".")[2], data)

    def numbered(make: Callable[[int], bytes], kind: str) -> Callable[[str], Response]:
        return lambda name: _answer(kind, make(_number(name, f".{kind}")))

    def put_note(name: str) -> Response:
        body = request.get_data()
        if len(body) > _MAX_NOTE_BYTES:
            return _answer("txt", "The note is too long", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return _answer("txt", "A note must be JSON", HTTPStatus.BAD_REQUEST)
        other = page.keep_note(_number(name, ""), value)
        if other is not None:
            return _answer("json", json.dumps(other), HTTPStatus.CONFLICT)
        return _answer("txt", "saved")

    def post_upload() -> Response:
        body = request.get_data(cache=False)
        if len(body) > MAX_UPLOAD:
            text = f"The file is larger than {MAX_UPLOAD >> 20} MB"
            return _answer("txt", text, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return _answer("json", json.dumps(page.upload(body), allow_nan=False))

    add("index.html", lambda: _answer("html", own["index.html"]))
    add("page/<path:name>", own_file)
    add("data/overview.js", lambda: _answer("js", page.overview()))
    add("data/patients.js", lambda: _answer("js", page.patients()))
    add("data/latents/<name>", numbered(page.latent, "js"))
    add("data/images/<name>", numbered(page.image, "js"))
    add("data/comparisons/<name>", numbered(page.comparison, "js"))
    add("thumbnails/<name>", numbered(page.thumbnail, "jpg"))
    add("notes/<name>", put_note, "PUT")
    add("data/notes/<name>", lambda name: _answer("json", json.dumps(page.note(_number(name, ".json")))))
    add("upload", post_upload, "POST")


def _is_same_origin(host: str) -> bool:
    """Whether a page of this server sends the request: by its origin or, if it names none, by the browser's word."""
    origin = request.headers.get("Origin")
    if origin is not None:
        return origin == f"http://{host}"
    return request.headers.get("Sec-Fetch-Site") == "same-origin"


def _number(name: str, ending: str) -> int:
    """The number in a name such as `12.js`, written in the one usual way."""
    found = re.fullmatch(r"(0|[1-9][0-9]{0,8})" + re.escape(ending), name, re.ASCII)
    if found is None:
        raise MissingError
    return int(found[1])


def _answer(kind: str, data: bytes | str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """A response."""
    return Response(data, status=status, content_type=_KINDS[kind])


def _refuse(status: HTTPStatus) -> Response:
    """A response that says no more than what its number means."""
    return _answer("txt", status.phrase, status)


def _restate(error: Any) -> Response:  # noqa: ANN401 - werkzeug's exception
    """Flask's own answer to a wrong address or method, in few words."""
    response: Response = error.get_response()
    response.set_data(HTTPStatus(error.code).phrase)
    response.content_type = _KINDS["txt"]
    return response
