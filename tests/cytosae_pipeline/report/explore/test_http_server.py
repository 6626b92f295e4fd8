"""Connections of the explorer where few files may be open."""

import threading
import urllib.request

from cytosae_pipeline.report.explore import http_server
from cytosae_pipeline.report.explore.http_server import ExploreServer, bind
from tests.support.patience import patience


def test_connections_wait_for_room(monkeypatch):
    monkeypatch.setattr(http_server, "free_files", lambda: 6)
    at_once, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(2)

    def app(environ, start_response):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        both.wait(patience())
        with lock:
            at_once[0] -= 1
        start_response("200 OK", [("Content-Length", "2"), ("Connection", "close")])
        return [b"ok"]

    listener = bind(0)
    server = ExploreServer(app, listener)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    answers: list[bytes] = []

    def ask() -> None:
        with urllib.request.urlopen(address, timeout=patience()) as response:
            answers.append(response.read())

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(patience())
    server.shutdown()
    server.server_close()
    listener.close()
    assert answers == [b"ok"] * 8
    assert most == [2]
