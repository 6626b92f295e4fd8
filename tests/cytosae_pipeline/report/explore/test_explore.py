"""`explore`: a real server in a child process; which requests it serves, with what, and what it stores."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.config import ExploreConfig
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.report.data.report_data import open_report_data
from cytosae_pipeline.report.explore.app import make_app
from cytosae_pipeline.report.explore.byte_cache import ByteCache
from cytosae_pipeline.report.explore.http_server import ExploreServer, bind
from cytosae_pipeline.report.explore.service import ExploreService
from cytosae_pipeline.report.measures.extras import find_extras
from cytosae_pipeline.report.measures.sample_size import profile_images
from cytosae_pipeline.report.records.images import make_image_book
from cytosae_pipeline.report.records.page_files import read_policy
from cytosae_pipeline.statistics.notes import read_notes, save_note
from tests.conftest import Workplace
from tests.support.browser import PAINTED, Visit, browser_or_skip
from tests.support.nursery import ROOT, SOURCES
from tests.support.patience import patience
from tests.support.pictures import BROKEN, HEARING_MAIN, write_vit
from tests.support.reports import read_script, unpack

N_LATENTS = 96


class Server:
    """`cytosae-cache explore` in a child process; ends with the context, and no response may contain a local path."""

    def __init__(self, place: Workplace, *arguments: object) -> None:
        self.place = place
        command = ["explore", "--root_dir", place.root, "--dataset_name", "toy", "--sae_path", place.sae(), *arguments]
        self._child = subprocess.Popen(
            [sys.executable, "-c", HEARING_MAIN, *map(str, command)],
            env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._child.stdout is not None
        self.said = [self._child.stdout.readline() for _ in range(3)]
        found = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/index\.html", "".join(self.said))
        if found is None:
            raise AssertionError(self._child.communicate(timeout=patience()))
        self.url, self.port, self.token = found[0], int(found[1]), found[2]

    def ask(self, path: str, method="GET", body=None, *, headers=None, raw=False):
        """Status, headers and body; below the token unless `raw`, and as a page of this server would ask."""
        own = {"Host": f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}", **(headers or {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience())
        connection.putrequest(method, path if raw else f"/{self.token}/{path}", skip_host=True)
        if body is not None:
            own["Content-Length"] = str(len(body))
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        assert str(self.place.root).encode() not in data
        assert b"Traceback" not in data
        return response.status, response.headers, data

    def get(self, name: str):
        """A data file's value."""
        status, _, body = self.ask(f"data/{name}.js")
        assert status == 200, body
        return read_script(body.decode(), name)

    def put(self, latent: object, value: object) -> int:
        return self.ask(f"notes/{latent}", "PUT", json.dumps(value).encode())[0]

    def peak_bytes(self) -> int:
        """Largest resident memory of the server so far."""
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Exit code, and the rest of stdout and stderr."""
        self._child.send_signal(number)
        out, error = self._child.communicate(timeout=patience())
        return self._child.returncode, out, error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._child:
            self._child.kill()  # a failed test has not ended it


def assert_alike(found, expected, tolerance=1e-4) -> None:
    """Equal up to rounding: a relative tolerance for numbers, one step for bytes of maps."""
    if isinstance(expected, dict) and "dtype" in expected:
        assert found["dtype"] == expected["dtype"]
        np.testing.assert_allclose(unpack(found).astype(float), unpack(expected).astype(float), rtol=tolerance, atol=1)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name], tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, tolerance)
    else:
        assert found == (pytest.approx(expected, rel=tolerance) if isinstance(expected, float) else expected)


@pytest.fixture(scope="module")
def place(_pristine, tmp_path_factory) -> Workplace:
    root = tmp_path_factory.mktemp("explore") / "root"
    shutil.copytree(_pristine["sae"], root)
    groups = ["patient,group", "p0,sick", "p1,well", "p2,sick", "p3,well"]
    (root / "groups.csv").write_text("\n".join(groups) + "\n")
    return Workplace(root)


@pytest.fixture(scope="module")
def server(place):
    options = ("--model_path", place.vit, "--n_latents", 3, "--groups", place.root / "groups.csv")
    with Server(place, *options) as server:
        yield server
        code, out, error = server.end()
    assert code == 0, error
    assert str(place.features() / "latent_notes.json") in out
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def report(place) -> Path:
    place.run(
        "report", "--dataset_name", "toy", "--sae_path", place.sae(), "--latents", f"0-{N_LATENTS - 1}",
        "--masking_images", 0, "--groups", place.root / "groups.csv",
    )  # fmt: skip
    return place.features() / "report"


def _written(report: Path, name: str):
    return read_script((report / "data" / f"{name}.js").read_text(), name)


def test_requests_without_the_token_get_404(server):
    token = server.token
    paths = ["/", "/index.html", "/data/overview.js", "//index.html", "/%00/x", "/%C3%A9/index.html", "/%FF/index.html"]
    wrong = [token[:-1], f"{token}x", f"x/{token}", token.swapcase(), f"%20{token}", f"..%2f{token}"]
    for path in [*paths, *(f"/{start}/index.html" for start in wrong), f"/{token}"]:
        status, _, body = server.ask(path, raw=True)
        assert (status, body) == (404, b"Not Found"), path
    assert server.ask(f"/{token}/upload", "POST", b"x", raw=True)[0] == 400
    assert server.ask("/wrong/upload", "POST", b"x", raw=True)[0] == 404
    assert len(token) >= 32


def test_another_host_name_is_refused(server):
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port + 1}", None,
                 f"127.0.0.1:{server.port}.evil.example", f"127.0.0.2:{server.port}", f"[::1]:{server.port}", "",
                 f"127.0.0.1:{server.port}, evil.example", '"<x>'):  # fmt: skip
        status, _, body = server.ask("index.html", headers={"Host": host})
        assert (status, body) == (403, b"Forbidden"), host
    assert server.ask("index.html", headers={"Host": f"localhost:{server.port}", "Origin": None})[0] == 200


def test_only_pages_of_this_server_may_write(server):
    body = b'{"name": "", "note": ""}'
    port = server.port
    for headers in (
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "https://evil.example"},
        {"Origin": f"https://127.0.0.1:{port}"},
        {"Origin": f"http://localhost:{port}"},
        {"Origin": f"http://127.0.0.1:{port}.evil.example"},
        {"Origin": None, "Sec-Fetch-Site": "cross-site"},
        {"Origin": None, "Sec-Fetch-Site": "same-site"},
        {"Origin": None, "Sec-Fetch-Site": "none"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"},
    ):
        assert server.ask("notes/1", "PUT", body, headers=headers)[0] == 403, headers
        assert server.ask("upload", "POST", b"x", headers=headers)[0] == 403, headers
    assert server.ask("notes/1", "PUT", body, headers={"Origin": None, "Sec-Fetch-Site": "same-origin"})[0] == 200
    there = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert server.ask("notes/1", "PUT", body, headers=there)[0] == 200


def test_every_response_has_the_same_security_headers(server):
    asked = [
        server.ask("index.html"),
        server.ask("data/latents/3.js"),
        server.ask("thumbnails/0.jpg"),
        server.ask("nothing"),
        server.ask("/wrong/index.html", raw=True),
        server.ask("index.html", headers={"Host": "evil.example"}),
        server.ask("index.html", "DELETE"),
        server.ask("upload", "POST", b"garbage"),
    ]
    assert [status for status, _, _ in asked] == [200, 200, 200, 404, 404, 403, 405, 400]
    page = (ROOT / "pipeline/cytosae_pipeline/report/page/index.html").read_text()
    for _, headers, _ in asked:
        assert headers["Content-Security-Policy"] in " ".join(page.split())
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Server"] is None
        assert headers["Access-Control-Allow-Origin"] is None
    kinds = [headers["Content-Type"] for _, headers, _ in asked]
    assert kinds[:3] == ["text/html; charset=utf-8", "text/javascript; charset=utf-8", "image/jpeg"]
    assert set(kinds[3:]) == {"text/plain; charset=utf-8"}
    assert "script-src 'self'" in read_policy()


def test_methods(server):
    for path in ("index.html", "page/core/data.js", "data/overview.js", "data/latents/0.js", "thumbnails/0.jpg"):
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            assert server.ask(path, method)[0] == 405, (path, method)
        status, headers, body = server.ask(path, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 0
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        assert server.ask("notes/0", method)[0] == 405
        assert method == "POST" or server.ask("upload", method)[0] == 405


def test_only_the_pages_own_files_are_served(server):
    folder = ROOT / "pipeline/cytosae_pipeline/report/page"
    for path in filter(Path.is_file, folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        address = name if name == "index.html" else f"page/{name}"
        assert server.ask(address)[2] == path.read_bytes()
    for name in ("..", "../static.py", "%2e%2e/static.py", "..%2fstatic.py", "%2e%2e%2f%2e%2e%2ferrors.py", "", ".",
                 "app.js/", "app.js%00", "/etc/passwd", "%2fetc%2fpasswd", "..\\static.py", "APP.JS", "index.html",
                 "app.js/../../static.py", "./app.js", "//app.js", "core", "core/", "core/../app.js",
                 "core/%2e%2e/app.js", "core//data.js", "/core/data.js", "core/../../static.py", "core%5cdata.js",
                 "views/data.js"):  # fmt: skip
        assert server.ask(f"page/{name}")[0] == 404, name
    for path in (
        "",
        "latent_notes.json",
        "notes/0/..",
        "data/../index.html",
        "data",
        "data/overview.json",
        "thumbnails",
    ):
        assert server.ask(path)[0] in (404, 405), path


def test_invalid_numbers_get_404(server):
    for number in (N_LATENTS, -1, "+1", "01", "1e1", "1.0", "", "x", "%201", "1%0a", "1%20", "%D9%A1", 10**9,
                   "9" * 5000, "0x1", "1_0", "1.js"):  # fmt: skip
        assert server.ask(f"data/latents/{number}.js")[0] in (404, 400), number
        assert server.put(number, {"name": "x", "note": ""}) in (404, 400), number
    n_images = server.get("overview")["store"]["images"]
    broken = next(row for row in range(n_images) if server.ask(f"data/images/{row}.js")[0] == 404)
    assert ActivationStore.open(server.place.store).images.path[broken] == BROKEN
    for row in (n_images, -1, broken, "00"):
        assert server.ask(f"data/images/{row}.js")[0] == 404
        assert server.ask(f"thumbnails/{row}.jpg")[0] == 404
    assert server.ask("data/comparisons/7.js")[0] == 404
    assert server.ask("data/comparisons/all.js")[0] == 404, "there are two groups"
    assert server.ask("data/latents/1")[0] == 404
    assert server.ask("thumbnails/1.png")[0] == 404


def test_every_latent_and_image_equals_the_reports(server, report):
    overview = server.get("overview")
    assert len(overview["featured"]) == 3
    for latent in range(N_LATENTS):
        assert_alike(server.get(f"latents/{latent}"), _written(report, f"latents/{latent}"))
    rows = _written(report, "overview")["images"]["rows"]
    assert len(rows) > 10
    for row in rows:
        assert server.get(f"images/{row}") == _written(report, f"images/{row}")
        assert server.ask(f"thumbnails/{row}.jpg")[2] == (report / "thumbnails" / f"{row}.jpg").read_bytes()
    rows = set(ActivationStore.open(server.place.store).valid_rows.tolist()) - set(overview["images"]["rows"])
    for row in rows:
        assert server.get(f"images/{row}")["row"] == row


def test_overview_and_patients_equal_the_reports(server, report):
    found, expected = server.get("overview"), _written(report, "overview")
    for name in ("latents", "store", "sae", "training", "counts", "labels", "patients", "thumbnails", "version"):
        assert found[name] == expected[name], name
    assert (found["explore"], found["can_upload"], found["messages"]) == (True, True, [])
    assert found["featured_reason"].startswith("The cards show 3 of")
    found, expected = server.get("patients"), _written(report, "patients")
    for name in ("names", "groups", "group_names", "correlation", "comparisons"):
        assert found[name] == expected[name], name
    assert len(found["comparisons"]) == 1
    assert server.get("comparisons/0") == _written(report, "comparisons/0")


def test_images_and_the_map_are_those_of_the_report(server, report):
    for name in ("rows/0", "listings/label-0", "listings/patient-0"):
        assert server.get(name) == _written(report, name)
    found, expected = server.get("map"), _written(report, "map")
    assert found["axes"] == expected["axes"]
    np.testing.assert_allclose(unpack(found["x"]), unpack(expected["x"]), rtol=1e-5, atol=1e-6)
    assert server.get("mapped/0")["levels"]["shape"] == [64, len(unpack(found["x"]))]
    for name in ("rows/1", "listings/label-1", "listings/patient-9", "listings/group-0", "mapped/99", "rows/-1"):
        assert server.ask(f"data/{name}.js")[0] == 404


def test_an_uploaded_image_gives_the_record_of_the_stored_one(server):
    store = ActivationStore.open(server.place.store)
    for row in (0, 5, 11):
        data = (server.place.images / store.images.path[row]).read_bytes()
        status, headers, body = server.ask("upload", "POST", data)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        found, expected = json.loads(body), server.get(f"images/{row}")
        picture = Image.open(io.BytesIO(base64.b64decode(found.pop("picture"))))
        assert (picture.size, picture.getexif()) == ((224, 224), {})
        assert (found["row"], found["label"], found["patient"], found["path"]) == (None, -1, -1, None)
        nearest = found.pop("nearest")
        assert len(nearest) == 8
        assert nearest[0]["row"] == row, "the nearest cell is the same picture"
        assert nearest[0]["similarity"] == pytest.approx(1, abs=1e-3)
        assert (nearest[0]["label"], nearest[0]["patient"]) == (expected["label"], expected["patient"])
        same = {name: value for name, value in expected.items() if name not in ("row", "label", "patient", "path")}
        values, steps = found.pop("token_values"), [found.pop("value_step"), same.pop("value_step")]
        theirs = same.pop("token_values")
        np.testing.assert_allclose(unpack(values) * steps[0], unpack(theirs) * steps[1], rtol=5e-3, atol=1e-4)
        np.testing.assert_array_equal(unpack(found["token_latents"]), unpack(same["token_latents"]))
        assert [item["latent"] for item in found["latents"]] == [item["latent"] for item in same["latents"]]
        for one, other in zip(found["latents"], same["latents"], strict=True):
            assert one["score"] == pytest.approx(other["score"], rel=5e-3)
            assert np.abs(unpack(one["map"]).astype(int) - unpack(other["map"])).max() <= 2


def test_uploads_that_are_not_images_are_refused(server):
    real = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 10)).save(real, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    for data, text in (
        (b"", b"the file is empty"),
        (b"garbage", b"not a JPEG, PNG, BMP, TIFF, WebP or JPEG 2000 image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"not a JPEG"),
        (real.getvalue()[:-30], b"broken image"),
        (bomb.getvalue(), b"900000000|too many pixels|30000 x 30000"),
    ):
        status, _, body = server.ask("upload", "POST", data)
        assert status == 400, body
        assert re.search(text, body), body
    status, _, body = server.ask("upload", "POST", bytes((64 << 20) + 1))
    assert (status, body) == (413, b"The file is larger than 64 MB")
    assert server.ask("upload", "POST", real.getvalue())[0] == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    for origin, status in ((f"http://127.0.0.1:{server.port}", 413), ("https://evil.example", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=patience())
        connection.putrequest("POST", f"/{server.token}/upload")
        connection.putheader("Origin", origin)
        connection.putheader("Content-Length", str(1 << 40))
        connection.endheaders(b"x")
        assert connection.getresponse().status == status
        connection.close()
    assert server.ask("index.html")[0] == 200


@pytest.mark.parametrize("length", [{"Content-Length": str(1 << 28)}, {"Transfer-Encoding": "chunked"}])
def test_a_refused_body_takes_no_memory(server, length):
    before = server.peak_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=patience())
    connection.putrequest("POST", "/wrong/upload")
    for name, value in length.items():
        connection.putheader(name, value)
    connection.endheaders()
    piece = bytes(1 << 20)
    with contextlib.suppress(ConnectionError):
        for _ in range(256):
            connection.send(piece if "Content-Length" in length else b"100000\r\n" + piece + b"\r\n")
    connection.close()
    assert server.peak_bytes() - before < 64 << 20
    assert server.ask("index.html")[0] == 200


def test_notes_are_checked(server):
    longest = {"name": "\U0001f9ec" * 200, "note": "\U0001f9ec" * 10_000}
    assert server.put(7, longest) == 200
    assert server.get("overview")["notes"]["7"] == longest
    for body, text in (
        (b"", b"JSON"),
        (b"{", b"JSON"),
        (b"[" * 100_000, b"JSON"),
        (b"\xff\xfe", b"JSON"),
        (b"[]", b"an object"),
        (b'"x"', b"an object"),
        (b'{"name": 1}', b"must be text"),
        (json.dumps({"name": "x" * 201, "note": ""}).encode(), b"at most 200"),
        (json.dumps({"name": "", "note": "x" * 10_001}).encode(), b"at most 200 and 10,000"),
        (b'{"name": "\\ud800", "note": ""}', b"surrogate"),
    ):
        status, _, answer = server.ask("notes/7", "PUT", body)
        assert status == 400, body[:40]
        assert text in answer
    assert server.ask("notes/7", "PUT", b" " * (1 << 19))[0] == 413
    assert server.get("overview")["notes"]["7"] == longest
    hostile = {"name": "</script><script>alert(1)</script>\u2028", "note": "=1+1\n\x00"}
    assert server.put(8, hostile) == 200
    assert b"<" not in server.ask("data/overview.js")[2]
    assert server.get("overview")["notes"]["8"] == hostile
    for latent in (7, 8):
        assert server.put(latent, {"name": "", "note": ""}) == 200
    assert not {"7", "8"} & server.get("overview")["notes"].keys()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
def test_notes_that_cannot_be_written_are_refused_with_a_reason(place):
    with Server(place, "--n_latents", 1) as server:
        assert server.put(5, {"name": "kept", "note": ""}) == 200
        resource.prlimit(server._child.pid, resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        status, _, answer = server.ask("notes/5", "PUT", b'{"name": "lost", "note": ""}')
        assert (status, answer[:39]) == (503, b"The notes cannot be written now. See th")
        assert server.get("overview")["notes"]["5"]["name"] == "kept"
        error = server.end(signal.SIGTERM)[2]
    assert "latent_notes.json' cannot be written: File too large" in error
    assert "Traceback" not in error
    assert [path.name for path in place.features().glob("latent_notes*")] == ["latent_notes.json"]
    (place.features() / "latent_notes.json").unlink()


def test_a_stale_tab_never_overwrites_newer_notes(server, place):
    nothing, first, second = ({"name": name, "note": note} for name, note in (("", ""), ("a", "b"), ("c", "")))

    def put(wanted, before):
        status, _, answer = server.ask("notes/9", "PUT", json.dumps({**wanted, "before": before}).encode())
        return status, answer

    def kept():
        return json.loads(server.ask("data/notes/9.json")[2])

    assert kept() == nothing
    assert put(first, nothing)[0] == 200
    status, answer = put(second, nothing)
    assert (status, json.loads(answer)) == (409, first)
    assert kept() == first == read_notes(place.features() / "latent_notes.json", N_LATENTS)[9]
    assert put(first, nothing)[0] == 200, "what exists already is no conflict"
    assert put(second, first)[0] == 200
    assert kept() == second
    assert put(second, {"name": 1})[0] == 400
    assert put(nothing, second)[0] == 200
    assert server.ask(f"data/notes/{N_LATENTS}.json")[0] == 404


def test_a_refused_request_is_answered_before_its_body_is_sent(server):
    """It is refused once its headers are read, even if its body never ends."""
    for host, token, status in (
        ("evil.example", server.token, 403),
        (f"127.0.0.1:{server.port}", "wrong", 404),
        (f"127.0.0.1:{server.port}", "", 404),
    ):
        for length in ({"Content-Length": str(60 << 20)}, {"Transfer-Encoding": "chunked"}):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=patience())
            connection.putrequest("POST", f"/{token}/upload", skip_host=True)
            for name, value in {"Host": host, "Expect": "100-continue", **length}.items():
                connection.putheader(name, value)
            connection.endheaders(b"GET /%s/index.html HTTP/1.1\r\n\r\n" % server.token.encode())
            response = connection.getresponse()
            assert response.status == status
            assert response.headers["Connection"] == "close"
            assert b"<html" not in response.read()
            connection.close()


def test_idle_connections_do_not_block_others(server):
    with ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=patience()))
        assert server.ask("index.html")[0] == 200


def test_ctrl_c_stops_within_seconds_despite_open_connections(place):
    with Server(place, "--n_latents", 1) as server, ExitStack() as stack:
        for _ in range(5):
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=patience()))
            idle.sendall(b"POST / HTTP/1.1\r\n")
        begun = time.monotonic()
        code, _, error = server.end()
        assert code == 0
        assert "Traceback" not in error
        assert "Exception" not in error
        assert time.monotonic() - begun < patience()


def test_two_servers_and_many_tabs_lose_no_note_and_a_restart_keeps_them(server, place):
    with Server(place, "--n_latents", 1) as other:
        latents = range(40, 80)
        with ThreadPoolExecutor(8) as pool:
            jobs = [
                pool.submit((server, other)[latent % 2].put, latent, {"name": f"n{latent}", "note": "x"})
                for latent in latents
            ] + [pool.submit((server, other)[i % 2].put, 39, {"name": f"tab {i}", "note": ""}) for i in range(10)]
            assert {job.result() for job in jobs} == {200}
        for one in (server, other):
            notes = one.get("overview")["notes"]
            assert {str(latent): f"n{latent}" for latent in latents}.items() <= {
                latent: note["name"] for latent, note in notes.items()
            }.items()
            assert re.fullmatch(r"tab \d", notes["39"]["name"])
        code, out, error = other.end(signal.SIGTERM)
        assert (code, error.replace(f"checkpoint: '{place.vit}', as when the store was built\n", "")) == (0, "")
        assert "names and notes of 41 latents" in out
    with Server(place, "--n_latents", 1) as again:
        assert again.url != other.url
        assert again.token != other.token
        assert again.get("overview")["notes"]["40"] == {"name": "n40", "note": "x"}
        assert again.end()[0] == 0
    assert not list(place.features().glob("*.partial"))


def test_without_a_vision_transformer_and_without_images(with_sae):
    shutil.rmtree(with_sae.images)
    with_sae.vit.unlink()
    with Server(with_sae) as server:
        overview = server.get("overview")
        assert (overview["can_upload"], overview["thumbnails"]) == (False, False)
        assert "--images" in overview["messages"][0]
        status, _, body = server.ask("upload", "POST", b"x")
        assert status == 400
        assert b"--model_path CHECKPOINT" in body
        assert server.ask("thumbnails/0.jpg")[0] == 404
        assert server.get("images/0")["row"] == 0
        path = with_sae.features() / "latent_notes.json"
        path.write_text("no notes")
        for status, _, body in (
            server.ask("data/overview.js"),
            server.ask("notes/1", "PUT", b'{"name": "x", "note": ""}'),
        ):
            assert status == 500
            assert body.startswith(b"This failed. See the terminal")
        assert path.read_text() == "no notes"
        path.unlink()
        assert server.put(1, {"name": "x", "note": ""}) == 200
        code, _, error = server.end()
        assert code == 0
        assert f"'{path}' is not a file of latent notes" in error


def test_a_checkpoint_that_was_replaced_since_is_not_used(with_sae):
    write_vit(with_sae.vit, seed=1)
    with Server(with_sae) as server:
        assert not server.get("overview")["can_upload"]
        _, _, error = server.end()
    assert (
        f"new images cannot be analysed: '{with_sae.vit}' is not what store '{with_sae.store}' was built with" in error
    )


def test_a_changed_image_has_no_picture(with_sae):
    page = _open_page(with_sae)
    path = with_sae.images / ActivationStore.open(with_sae.store).images.path[0]
    with page:
        assert page.thumbnail(1).startswith(b"\xff\xd8")
        Image.new("RGB", (32, 32)).save(path)
        with pytest.raises(LookupError):
            page.thumbnail(0)


def _open_page(place: Workplace, **options) -> ExploreService:
    config = ExploreConfig(root_dir=place.root, dataset_name="toy", sae_path=place.sae(), **options)
    report_data = open_report_data(config)
    images = list_stored_images(report_data.store, config)
    book, extras = make_image_book(report_data), find_extras(report_data)
    return ExploreService(report_data, np.array([1]), {}, images, None, book, extras)


def test_slow_computations_do_not_block_other_requests(with_sae):
    page = _open_page(with_sae)
    with page, bind(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        port = listener.getsockname()[1]
        server = ExploreServer(make_app(page, port=port, token="token"), listener)
        thread = threading.Thread(target=server.run)
        thread.start()

        def get(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience())
            connection.request("GET", f"/token/{path}")
            status = connection.getresponse().status
            connection.close()
            return status

        with ThreadPoolExecutor(12) as pool:
            with page.computing:
                waiting = [pool.submit(get, f"data/latents/{latent % 6}.js") for latent in range(12)]
                for path in (
                    "index.html",
                    "page/core/data.js",
                    "data/overview.js",
                    "thumbnails/1.jpg",
                    "thumbnails/2.jpg",
                ):
                    assert get(path) == 200
                assert not any(job.done() for job in waiting)
            assert {job.result() for job in waiting} == {200}
        server.shutdown()
        thread.join(20)
        assert not thread.is_alive()


def test_other_addresses_of_this_machine_are_closed(server):
    with pytest.raises(OSError, match=r"refused|timed out|assign"):
        socket.create_connection(("127.0.0.2", server.port), timeout=2)
    others = {item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(OSError, match=r"refused|timed out|assign|reach"):
            socket.create_connection((address, server.port), timeout=2)


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_architectures_that_need_whole_rows(with_store, arch):
    with_store.train("--run_name", "r", "--arch", arch, "--k", 4)
    with _open_page(with_store) as page:
        record = read_script(page.latent(3).decode(), "latents/3")
        assert record["n_images"] == ActivationStore.open(with_store.store).valid.sum()
        assert page.latent(3) is page.latent(3)


def test_profiles_use_fewer_images_for_larger_encoders():
    assert profile_images(5, 24 * 96) == 1000
    assert 24 < profile_images(257, 768 * 64 * 768) < 100
    assert profile_images(257, 1536 * 64 * 1536) == 24


def test_the_cache_keeps_the_most_recently_used_within_its_limit():
    cache = ByteCache(10)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"1234", None, b"1234")
    cache.put("a", b"12")
    cache.put("d", b"1234")
    assert [cache.get(name) for name in "acd"] == [b"12", b"1234", b"1234"]
    cache.put("e", bytes(11))
    assert [cache.get(name) for name in "acde"] == [None] * 4


def test_saving_a_note_never_overwrites_another_file(tmp_path):
    path = tmp_path / "latent_notes.json"
    path.write_text('{"format": 1, "notes": {"99": {"name": "x", "note": ""}}}')
    with pytest.raises(ValueError, match=r"latents must lie in 0\.\.9"):
        save_note(path, 10, 1, {"name": "y", "note": ""})
    assert "99" in path.read_text()
    path.unlink()
    save_note(path, 10, 1, {"name": "y", "note": ""})
    save_note(path, 10, 2, {"name": "z", "note": ""})
    save_note(path, 10, 1, {"name": "", "note": ""})
    assert read_notes(path, 10) == {2: {"name": "z", "note": ""}}


def _refusal(place: Workplace, *arguments: object) -> str:
    result = place.run("explore", "--dataset_name", "toy", "--sae_path", place.sae(), *arguments, code=1)
    assert "Traceback" not in result.output
    return result.output


def test_errors_before_the_server_starts(with_sae, monkeypatch):
    write_vit(with_sae.root / "other.pth", seed=1)
    text = _refusal(with_sae, "--store", with_sae.store, "--model_path", with_sae.root / "other.pth")
    assert "is not what store" in text
    assert "weights_sha256" in text
    assert "no activation store" in _refusal(with_sae, "--model_path", with_sae.root / "other.pth")
    assert "no vision transformer at" in _refusal(with_sae, "--model_path", with_sae.root / "none.pth")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is already in use." in _refusal(with_sae, "--port", port)
    assert with_sae.run("explore", "--port", 65536, code=2)
    monkeypatch.setitem(sys.modules, "flask", None)
    assert 'pip install ".[explore]"' in CliRunner().invoke(cli, ["explore"]).output


def test_the_help_text_names_options_and_examples():
    text = CliRunner().invoke(cli, ["explore", "--help"]).output
    for word in ("--port", "--model-path", "ssh -L", "cytosae-cache explore --dataset_name", "Ctrl-C"):
        assert word in text


def test_json_output_contains_the_address(with_sae):
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING_MAIN, "explore", "--root_dir", str(with_sae.root), "--dataset_name", "toy",
         "--sae_path", str(with_sae.sae()), "--json"],
        env={**os.environ, "PYTHONPATH": SOURCES}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    said = json.loads(process.stdout.readline())
    assert said["url"].startswith("http://127.0.0.1:")
    assert (said["n_latents"], said["can_upload"]) == (N_LATENTS, True)
    assert said["notes"].endswith("latent_notes.json")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=patience())
    assert (process.returncode, out) == (0, "")
    assert ": 23 of 23 images" in error


@pytest.mark.slow
def test_in_a_browser(server, place):
    with browser_or_skip() as browser:
        visit = Visit(browser, server.url)
        page, overview = visit.page, server.get("overview")
        sparsity = unpack(overview["latents"]["sparsity"])
        latent = next(n for n in range(N_LATENTS) if n not in overview["featured"] and sparsity[n] > 0)
        visit.go("latents")
        assert page.locator(".card").count() == 3
        assert "Latents with a card" in page.inner_text("#view")
        page.fill("#search", str(latent))
        page.keyboard.press("Enter")
        page.wait_for_selector(".top-image img")
        expected = [item["row"] for item in server.get(f"latents/{latent}")["top"]]
        rows = page.locator(".grid .top-image").evaluate_all("all => all.map(one => Number(one.dataset.row))")
        assert rows == expected
        page.fill("input[aria-label='Name of this latent']", "nucleoli <b>")
        page.fill("textarea", "seen twice")
        page.click("text=Save")
        page.wait_for_selector("text=Saved.")
        page.reload()
        page.wait_for_selector("textarea")
        assert page.inner_text("h1") == f"Latent {latent}: nucleoli <b>"
        assert page.input_value("textarea") == "seen twice"
        # Leaving without a click on Save loses nothing, and the next latent keeps its own title.
        page.fill("textarea", "seen again")
        with page.expect_response(lambda response: response.request.method == "PUT"):
            page.locator(".columns table a").first.click()
        page.wait_for_function("latent => !location.hash.endsWith(`/${latent}`)", arg=latent)
        assert server.get("overview")["notes"][str(latent)]["note"] == "seen again"
        page.wait_for_selector(".top-image img")
        assert page.inner_text("h1") == f"Latent {page.evaluate('() => location.hash').rsplit('/')[-1]}"
        page.go_back()
        page.wait_for_function(
            "name => document.querySelector('h1').textContent === name", arg=f"Latent {latent}: nucleoli <b>"
        )
        # A stale tab never overwrites newer notes, and its user learns of it even in another view.
        theirs = {"name": "theirs", "note": ""}
        assert server.put(latent, theirs) == 200
        page.fill("textarea", "mine")
        page.click("text=Save")
        page.wait_for_selector("text=Not saved: another window has saved “theirs” since. Save again to replace it.")
        assert server.get("overview")["notes"][str(latent)] == theirs
        page.click("text=Save")
        page.wait_for_selector("text=Saved.")
        assert server.get("overview")["notes"][str(latent)]["note"] == "mine"
        assert server.put(latent, theirs) == 200
        page.fill("textarea", "mine again")
        page.locator(".columns table a").first.click()
        page.wait_for_selector("[role=alert] >> text=mine again")
        assert "Not saved: another window has saved “theirs” since" in page.inner_text("[role=alert]")
        assert server.get("overview")["notes"][str(latent)] == theirs
        visit.complaints = [text for text in visit.complaints if "409" not in text]
        page.go_back()
        page.wait_for_function(f"document.querySelector('h1').textContent === 'Latent {latent}: theirs'")
        page.wait_for_selector(".top-image img")
        page.locator(".grid .top-image").last.click()
        page.wait_for_selector(".large-cell .patch")
        assert f"Image {expected[-1]}" in page.inner_text("h1")

        visit.go("upload")
        page.set_input_files("input[type=file]", place.images / ActivationStore.open(place.store).images.path[2])
        page.wait_for_selector(".large-cell .patch")
        page.wait_for_selector("text=Read 1 image.")
        near = page.locator(".panel .top-image").evaluate_all("all => all.map(one => Number(one.dataset.row))")
        assert near[0] == 2
        assert "cosine 1.00" in page.locator(".panel .top-image").first.inner_text()
        page.wait_for_function("() => document.querySelector('.large-cell img').naturalWidth === 224")
        page.locator(".patch").nth(3).click()
        assert page.inner_text(".patch-list h3") == "Patch in row 2, column 2"
        assert page.locator(".patch-list .latent-row").count() > 0
        assert page.locator(".large-cell canvas").evaluate(PAINTED) > 0
        for view in ("patients", "patients/compare", "patients/correlation", "patients/classification"):
            visit.go(view)
        assert visit.complaints == []
        visit.go("upload")
        page.set_input_files("input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": b"garbage"})
        page.wait_for_selector("text=x.png: not read: not a JPEG")
        # What was there stays, and several at once are read one after another, also when they are dropped.
        assert page.locator(".large-cell .patch").count() > 0
        paths = ActivationStore.open(place.store).images.path
        files = [(place.images / paths[row]).read_bytes() for row in (3, 4)]
        page.evaluate(
            """files => {
                const dropped = new DataTransfer();
                for (const [i, text] of files.entries()) {
                    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
                    dropped.items.add(new File([bytes], `dropped ${i}.png`));
                }
                const about = { bubbles: true, cancelable: true, dataTransfer: dropped };
                document.querySelector(".drop").dispatchEvent(new DragEvent("drop", about));
            }""",
            [base64.b64encode(data).decode() for data in files],
        )
        page.wait_for_selector("text=Read 2 images.")
        assert page.locator(".uploads button").count() == 3
        assert page.locator(".uploads button[aria-pressed=true]").inner_text() == "dropped 1.png"
        page.locator(".uploads button").first.click()
        assert page.locator(".panel .top-image").first.get_attribute("data-row") == "2"
        # The browser itself logs the refusal.
        assert [text for text in visit.complaints if "400" not in text] == []
        visit.complaints.clear()
        visit.close()
    assert server.put(latent, {"name": "", "note": ""}) == 200
