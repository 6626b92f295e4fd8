"""Locks on S3: one owner at a time, by conditions that the server checks; expired ones are taken over."""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage import lease as leases
from cytosae_cache.storage.lease import Lease
from cytosae_cache.storage.open import open_storage
from tests.support.patience import wait_until
from tests.support.s3 import serve_s3

URL, PATH = "s3://cells/toy.zarr", "cells/toy.zarr.lock"


@pytest.fixture
def s3(monkeypatch):
    with serve_s3(monkeypatch) as faults:
        yield faults


@pytest.fixture
def system(s3):
    return fsspec.filesystem("s3", use_listings_cache=False)


def _stated(system) -> dict:
    return json.loads(system.cat_file(PATH))


def _change(system, **changed) -> None:
    system.pipe_file(PATH, json.dumps({**_stated(system), **changed}).encode())


def test_of_many_at_once_one_holds_it(system):
    def take(_):
        try:
            return Lease(system, PATH, URL)
        except StoreBusyError:
            return None

    with ThreadPoolExecutor(16) as pool:
        held = [lease for lease in pool.map(take, range(16)) if lease is not None]
    assert len(held) == 1
    assert held[0].is_exclusive
    held[0].release()
    assert not system.exists(PATH)


def test_the_second_build_names_the_first(system):
    with open_storage(URL).lock():
        with pytest.raises(
            StoreBusyError, match=r"another process \(process \d+ on .*\) is writing 's3://cells/toy.zarr'"
        ):
            with open_storage(URL).lock():
                pass
    with open_storage(URL).lock():
        assert _stated(system)["mark"] == "cytosae-cache lease"


def test_that_of_a_process_that_has_ended_is_taken_over(system):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first = Lease(system, PATH, URL)
    _change(system, pid=ended.pid, token="another")
    second = Lease(system, PATH, URL)
    assert _stated(system)["token"] != "another"
    second.release()
    first.release()


def test_that_of_another_machine_is_taken_over_once_it_has_expired(system, monkeypatch):
    first = Lease(system, PATH, URL)
    _change(system, host="elsewhere", token="another")
    with pytest.raises(StoreBusyError, match=r"on elsewhere.*If it was killed, its right ends \d+ s from now"):
        Lease(system, PATH, URL)
    monkeypatch.setattr(leases, "EXPIRY_S", -1.0)
    Lease(system, PATH, URL).release()
    assert not system.exists(PATH)
    first.release()


def test_who_was_taken_over_writes_nothing_more(system, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_SIGNS", 0.01)
    storage = open_storage(URL)
    with pytest.raises(StoreBusyError, match="has taken over"):
        _lose_it(storage, system)
    assert _stated(system)["token"] == "another", "nor does it remove the other's"
    assert storage.read("a") in (b"1", b"2")


def _lose_it(storage, system) -> None:
    with storage.lock():
        storage.write("a", [b"1"])
        _change(system, token="another")
        wait_until(lambda: _is_refused(storage))


def _is_refused(storage) -> bool:
    try:
        storage.write("a", [b"2"])
    except StoreBusyError:
        return True
    return False


def test_it_is_renewed(system, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_SIGNS", 0.01)
    held = Lease(system, PATH, URL)
    wait_until(lambda: _stated(system)["signs"] > 4)
    held.require()
    held.release()
    assert not system.exists(PATH)


def test_an_answer_that_was_lost_is_no_other_owner(system, monkeypatch):
    """The request succeeded, and its repetition finds an object of that name: its own."""
    plain, lost = Lease._put, []

    def put(self, **condition):
        etag = plain(self, **condition)
        if not lost:
            lost.append(etag)
            return None
        return etag

    monkeypatch.setattr(Lease, "_put", put)
    held = Lease(system, PATH, URL)
    assert lost[0] is not None
    held.release()


def test_an_object_of_another_program_is_left_alone(system):
    system.pipe_file(PATH, b"mine")
    with pytest.raises(StoreBusyError, match="is not an object of cytosae-cache"):
        Lease(system, PATH, URL)
    assert system.cat_file(PATH) == b"mine"


def test_a_server_without_conditions_is_named(s3, system, caplog):
    s3.ignores_conditions = True
    with caplog.at_level(logging.WARNING), open_storage(URL).lock():
        pass
    assert "does not honour the condition `If-None-Match`" in caplog.text
    held = Lease(system, PATH, URL)
    assert not held.is_exclusive
    held.release()
