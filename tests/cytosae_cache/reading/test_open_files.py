"""All readers of a process share one budget of descriptors, which follows the limit of the system."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cytosae_cache.reading import open_files
from cytosae_cache.reading.open_files import OpenFiles
from cytosae_cache.reading.reader import StoreReader
from tests.support.stores import make_activations, make_store

HEAD = """
import os, resource, sys, threading, numpy as np
from cytosae_cache import ActivationStore
from cytosae_cache.reading.reader import StoreReader
stores = [ActivationStore.open(path) for path in sys.argv[1:]]

def limit(n):
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))

def n_open():
    return len(os.listdir('/proc/self/fd')) - 1

def read_all(reader):
    for row in range(40):
        assert reader.read(np.array([row, (row + 7) % 40])).shape == (2, 5, 8)
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")


class FakeFile(NamedTuple):
    name: int
    n_descriptors: int = 1


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str], str]:
    """Runs code in a process that has opened two stores of 40 shards each; returns what it prints."""
    folder = tmp_path_factory.mktemp("stores")
    stores = [make_store(folder / f"{n}.zarr", make_activations(40, seed=n), shard_images=1) for n in range(2)]

    def run(code: str) -> str:
        command = [sys.executable, "-c", HEAD + code, *(str(store.path) for store in stores)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        return done.stdout

    return run


def test_the_files_used_last_stay_open():
    made = []

    def make(number):
        def open_one():
            made.append(number)
            return FakeFile(number)

        return open_one

    files = OpenFiles(2)
    for number in (0, 1, 0, 2, 0, 1):
        assert files.get((0, number), make(number)).name == number
    assert made == [0, 1, 2, 1]
    files.release(0)
    assert len(files) == 0


def test_descriptors_are_counted_not_files():
    files = OpenFiles(4)
    for number, n_descriptors, left in [(0, 2, 1), (1, 2, 2), (2, 1, 2), (3, 0, 3), (4, 2, 3), (5, 9, 1), (6, 1, 1)]:
        files.get((0, number), lambda: FakeFile(number, n_descriptors))  # noqa: B023 - called immediately
        assert len(files) == left


def test_other_errors_than_too_many_files_pass():
    files = OpenFiles(2)

    def fail():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        files.get((0, 9), fail)

    def none_left():
        raise OSError(errno.EMFILE, "too many open files")

    files.get((1, 0), lambda: FakeFile(5))
    with pytest.raises(OSError, match="too many"):
        files.get((0, 9), none_left)


def test_a_reader_may_be_collected_while_a_file_is_opened():
    """Python collects a reader wherever memory is allocated, also in the thread that holds the lock."""
    files = OpenFiles(4)
    files.get((0, 0), lambda: FakeFile(0))

    def open_one():
        files.release(0)
        return FakeFile(1)

    assert files.get((1, 1), open_one).name == 1
    assert len(files) == 1


@needs_proc
@pytest.mark.parametrize("direct", [False, True])
def test_readers_hold_half_of_the_descriptors_that_the_system_allows(run, direct):
    printed = run(
        "limit(100)\n"
        f"readers = [StoreReader(store, n_threads=1, direct={direct}) for store in stores]\n"
        "before = n_open()\n"
        "for _ in range(2):\n"
        "    for reader in readers: read_all(reader)\n"
        "print(n_open() - before)\n"
        "for reader in readers: reader.close()\n"
        "print(n_open() - before)\n",
    )
    assert printed == "34\n0\n"


@needs_proc
def test_the_limit_may_be_lowered_while_files_are_open(run):
    printed = run(
        "reader, other = map(StoreReader, stores)\n"
        "before = n_open()\n"
        "read_all(reader)\n"
        "print(n_open() - before)\n"
        "limit(80)\n"
        "read_all(other)\n"
        "print(n_open() - before)\n",
    )
    assert printed == "40\n24\n"


@needs_proc
def test_reading_goes_on_where_others_leave_few_descriptors(run):
    printed = run(
        "readers = [StoreReader(store, n_threads=2, direct=True) for store in stores]\n"
        "limit(n_open() + 12)\n"
        "for _ in range(2):\n"
        "    for reader in readers: read_all(reader)\n"
        "print('read')\n",
    )
    assert printed == "read\n"


@needs_proc
def test_many_readers_at_once_share_the_budget(run):
    printed = run(
        "limit(120)\n"
        "readers = [StoreReader(store, n_threads=2) for store in stores * 4]\n"
        "before, failures = n_open(), []\n"
        "def work(reader):\n"
        "    try: read_all(reader)\n"
        "    except BaseException as error: failures.append(error)\n"
        "threads = [threading.Thread(target=work, args=(reader,)) for reader in readers]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(failures, n_open() - before)\n",
    )
    assert printed == "[] 44\n"


def test_threads_of_several_readers_get_the_right_numbers_while_files_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "_of_process", OpenFiles(3))
    activations = [make_activations(20, seed=seed) for seed in range(3)]
    stores = [make_store(tmp_path / f"{n}.zarr", one, shard_images=1) for n, one in enumerate(activations)]
    start = threading.Barrier(6)
    with ExitStack() as stack:
        readers = [stack.enter_context(StoreReader(store, n_threads=2)) for store in stores * 2]

        def read(number):
            rows = np.random.default_rng(number).integers(0, 20, size=(30, 5))
            start.wait()
            return all(np.array_equal(readers[number].read(part), activations[number % 3][part]) for part in rows)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read, range(6)))


@needs_proc
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_files_of_its_parent_open(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(20), shard_images=1)
    before = len(os.listdir("/proc/self/fd"))
    with StoreReader(store) as reader:
        reader.read(np.arange(20))
        assert len(os.listdir("/proc/self/fd")) == before + 20
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(len(os.listdir("/proc/self/fd")) - before)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(os.listdir("/proc/self/fd")) == before + 20
