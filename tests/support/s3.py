"""A real S3 server on loopback, with faults on demand."""

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Faults:
    """Which requests the server fails."""

    remaining: int = 0
    """Number of requests that will still fail."""
    methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD")
    """Methods of the requests that fail."""
    n_requests: int = 0
    """Requests seen."""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by method, and by method and query for those that a query distinguishes, such as `GET list-type`."""
    n_failed: int = 0
    """Requests failed."""
    ignores_conditions: bool = False
    """Whether the server takes no notice of `If-Match` and `If-None-Match`, as older ones do."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrap(self, application: Callable[..., Any]) -> Callable[..., Any]:
        def answer(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
            with self.lock:
                self.n_requests += 1
                self.seen[_describe(environment)] += 1
                fail = self.remaining > 0 and environment["REQUEST_METHOD"] in self.methods
                self.remaining -= fail
                self.n_failed += fail
            if self.ignores_conditions:
                environment.pop("HTTP_IF_NONE_MATCH", None)
                environment.pop("HTTP_IF_MATCH", None)
            if fail:
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
            return application(environment, start)

        return answer


def _describe(environment: dict[str, Any]) -> str:
    """The method of a request, and the first name in its query."""
    query = environment.get("QUERY_STRING", "").partition("&")[0].partition("=")[0]
    return f"{environment['REQUEST_METHOD']} {query}".strip()


@contextlib.contextmanager
def serve_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Run a server with an empty bucket `cells`; environment variables point every S3 client at it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    faults = Faults()
    application = faults.wrap(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="cells")
    try:
        yield faults
    finally:
        import fsspec
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.config.conf.clear()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="cells"):
            for item in page.get("Contents", []):
                client.delete_object(Bucket="cells", Key=item["Key"])
        client.delete_bucket(Bucket="cells")
        server.shutdown()
        thread.join()
