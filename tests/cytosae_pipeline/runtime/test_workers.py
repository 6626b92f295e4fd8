"""Worker processes that die at awkward moments."""

import os
import signal
import sys
import time

import pytest

from cytosae_pipeline.runtime.workers import WorkerDiedError, WorkerPool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
LONG = 400_000_000
"""Bytes of a result that takes some tenths of a second to send."""


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.shutdown()
    assert not any(process.is_alive() for process in pool.processes)


def test_results_and_errors_come_back(pool):
    futures = [pool.submit(divmod, number, 7) for number in range(100)]
    assert [future.result() for future in futures] == [divmod(number, 7) for number in range(100)]
    with pytest.raises(ZeroDivisionError, match="zero"):
        pool.submit(divmod, 1, 0).result()
    assert pool.submit(divmod, 9, 7).result() == (1, 2), "an error ends no worker"


def test_both_workers_work_at_once(pool):
    both = [pool.submit(_own_number, 0.5) for _ in range(2)]
    assert len({future.result() for future in both}) == 2


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_a_worker_killed_while_it_sends_a_long_result_blocks_no_other(pool, delay_s):
    sending = pool.submit(bytes, LONG)
    time.sleep(delay_s)
    for process in pool.processes:
        process.kill()
    with pytest.raises(WorkerDiedError):
        sending.result(timeout=30)
    with pytest.raises(WorkerDiedError):
        pool.submit(divmod, 1, 1).result(timeout=30)


def test_a_worker_killed_at_work_blocks_no_other(pool):
    with pytest.raises(WorkerDiedError):
        pool.submit(_kill_oneself).result(timeout=30)
    results = [pool.submit(divmod, 1, 1) for _ in range(20)]
    assert any(future.exception(timeout=30) is None for future in results)


def test_shutdown_ends_what_is_at_work_and_cancels_the_rest():
    pool = WorkerPool(1)
    long = pool.submit(time.sleep, 600)
    waiting = pool.submit(time.sleep, 600)
    time.sleep(0.1)
    pool.shutdown()
    assert isinstance(long.exception(), WorkerDiedError)
    assert waiting.cancelled()
    assert [process.exitcode for process in pool.processes] == [-signal.SIGKILL]


def _own_number(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
