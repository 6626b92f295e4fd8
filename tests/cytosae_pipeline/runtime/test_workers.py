"""Worker processes that die at awkward moments."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cytosae_pipeline.runtime import workers
from cytosae_pipeline.runtime.workers import WorkerDiedError, WorkerPool, process_context, start_process
from tests.support.patience import patience, wait_until

ROOT = Path(__file__).parents[3]

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
    with contextlib.suppress(WorkerDiedError):
        assert len(sending.result(timeout=patience())) == LONG, "it was sent before the workers died"
    with pytest.raises(WorkerDiedError):
        pool.submit(divmod, 1, 1).result(timeout=patience())


def test_a_worker_killed_at_work_blocks_no_other(pool):
    with pytest.raises(WorkerDiedError):
        pool.submit(_kill_oneself).result(timeout=patience())
    results = [pool.submit(divmod, 1, 1) for _ in range(20)]
    assert any(future.exception(timeout=patience()) is None for future in results)


def test_shutdown_ends_what_is_at_work_and_cancels_the_rest():
    pool = WorkerPool(1)
    long = pool.submit(time.sleep, 600)
    waiting = pool.submit(time.sleep, 600)
    wait_until(long.running)
    pool.shutdown()
    assert isinstance(long.exception(), WorkerDiedError)
    assert waiting.cancelled()
    assert [process.exitcode for process in pool.processes] == [-signal.SIGKILL]


def _own_number(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Where children are started from

SCRIPT = """
from cytosae_pipeline.runtime.workers import WorkerPool
print("the script runs")
pool = WorkerPool(2)
print("answers:", [pool.submit(divmod, 9, 7).result() for _ in range(2)])
pool.shutdown()
"""


def _run_script(tmp_path: Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join(str(ROOT / name) for name in ("", "cache", "pipeline"))
    return subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=patience(), check=False,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
    )  # fmt: skip


@pytest.mark.parametrize("length", [10, 80, 200], ids=["short", "too-long-for-a-socket", "very-long"])
def test_a_script_without_a_guard_works_wherever_temporary_files_are(tmp_path, length):
    temporary = tmp_path / ("t" * length)
    temporary.mkdir()
    done = _run_script(tmp_path, temporary)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script runs\nanswers: [(1, 2), (1, 2)]\n", "it ran once"
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no fork server")
def test_children_are_forked_by_a_server_while_its_socket_fits(monkeypatch):
    for length, method in ((75, "forkserver"), (76, "spawn")):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        assert process_context().get_start_method() == method
    assert len("/" + "t" * 74 + workers._SOCKET_NAME) == 107


def test_starting_a_process_keeps_the_main_module():
    main = sys.modules["__main__"]

    class Refused:
        def start(self) -> None:
            assert sys.modules["__main__"] is not main
            raise OSError("no more processes")

    with pytest.raises(OSError, match="no more"):
        start_process(Refused())
    assert sys.modules["__main__"] is main
