"""The HTTP server of the explorer: werkzeug's threaded one on a socket of 127.0.0.1.

Werkzeug's server hands over a request before its body is read, so that the application can refuse it first. It has one
thread per connection, so that idle connections and slow computations do not block others. Its documentation calls it a
development server because it is not made for many users or the open network; this one has a single user on one machine.
"""

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.file_limit import free_files

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"

_MAX_CONNECTIONS = 500
"""Connections at once; more would run out of file descriptors, which accept() answers with a busy loop."""

_FILES_PER_CONNECTION = 3
"""Its socket, what werkzeug waits with, and a file that is being read."""

_IDLE_TIMEOUT_S = 20.0
_FINISH_TIMEOUT_S = 5.0
_BACKLOG = 128


class ExploreServer(ThreadedWSGIServer):
    """Serves a WSGI application on a bound socket.

    Args:
        app: The application.
        listener: Socket bound to a port of 127.0.0.1; it starts to listen here.
    """

    def __init__(self, app: "WSGIApplication", listener: socket.socket) -> None:
        listener.listen(_BACKLOG)
        self._unfinished = _CountedApp(app)
        self._room = threading.Semaphore(min(_MAX_CONNECTIONS, max(2, free_files() // _FILES_PER_CONNECTION)))
        # Werkzeug logs every request; what fails inside the application is logged by Flask.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        host, port = listener.getsockname()[:2]
        super().__init__(host, port, self._unfinished, _Handler, fd=listener.fileno())

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401 - as in the standard library
        """Wait until there is room for another connection; False if there is none for as long as one may be idle."""
        return self._room.acquire(timeout=_IDLE_TIMEOUT_S)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the standard library
        """Start the thread of a connection."""
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as above
        """Serve a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the standard library
        """Log a connection that broke off, for example at Ctrl-C; Flask logs the application's own errors."""
        logger.debug("connection from %s failed", client_address, exc_info=True)

    def run(self) -> None:
        """Serve until Ctrl-C; responses that are being computed then have five seconds to finish."""
        self.serve_forever()
        with contextlib.suppress(KeyboardInterrupt):
            self._unfinished.wait(_FINISH_TIMEOUT_S)


class _Handler(WSGIRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE_TIMEOUT_S

    def send_header(self, keyword: str, value: str) -> None:
        """Send every header but the name and version of this program."""
        if keyword != "Server":
            super().send_header(keyword, value)

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: ANN401 - as in werkzeug
        """Log nothing: malformed requests and timeouts are normal for a server that browsers talk to."""


class _CountedApp:
    """An application that counts its requests under way."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app, self._n = app, 0
        self._changed = threading.Condition()

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        self._add(1)
        try:
            return self._app(environ, start_response)
        finally:
            self._add(-1)

    def wait(self, timeout_s: float) -> None:
        """Wait until no request is under way, or for the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: self._n == 0, timeout_s)

    def _add(self, n: int) -> None:
        with self._changed:
            self._n += n
            self._changed.notify_all()


def bind(port: int) -> socket.socket:
    """A socket bound to a port of 127.0.0.1, which no other machine can reach; it does not listen yet.

    Args:
        port: The port; 0 for any free one.

    Raises:
        UserError: If the port is already in use or cannot be opened.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        in_use = error.errno == errno.EADDRINUSE
        problem = "is already in use" if in_use else f"cannot be opened ({error.strerror})"
        raise UserError(
            f"port {port} of {HOST} {problem}. Give another --port, or leave it out to use a free one"
        ) from error
    return listener
