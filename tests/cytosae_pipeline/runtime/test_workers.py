"""Worker processes that die at awkward moments."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cytosae_pipeline.runtime.workers import Child, WorkerDiedError, WorkerPool
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
    for process in list(pool.processes):
        process.kill()
    with contextlib.suppress(WorkerDiedError):
        assert len(sending.result(timeout=patience())) == LONG, "it was sent before the workers died"
    with pytest.raises(WorkerDiedError):
        pool.submit(divmod, 1, 1).result(timeout=patience())


def test_a_worker_killed_at_work_blocks_no_other(pool):
    with pytest.raises(WorkerDiedError) as caught:
        pool.submit(_kill_oneself).result(timeout=patience())
    assert caught.value.exit_code == -signal.SIGKILL
    results = [pool.submit(divmod, 1, 1) for _ in range(20)]
    assert {future.result(timeout=patience()) for future in results} == {(1, 0)}
    assert len(pool.processes) == 2, "the worker was replaced"


def test_shutdown_ends_what_is_at_work_and_cancels_the_rest():
    pool = WorkerPool(1)
    long = pool.submit(time.sleep, 600)
    waiting = pool.submit(time.sleep, 600)
    wait_until(long.running)
    pool.shutdown()
    assert isinstance(long.exception(), WorkerDiedError)
    assert waiting.cancelled()
    assert [process.end() for process in pool.processes] == [-signal.SIGKILL]


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


@pytest.mark.parametrize("length", [10, 200], ids=["short", "too-long-for-a-socket"])
def test_a_script_without_a_guard_works_wherever_temporary_files_are(tmp_path, length):
    temporary = tmp_path / ("t" * length)
    temporary.mkdir()
    done = _run_script(tmp_path, temporary)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script runs\nanswers: [(1, 2), (1, 2)]\n", "it ran once"
    assert list(temporary.iterdir()) == []


# No child outlives its parent

MARK = "CYTOSAE_TEST_MARK"
FORKED = """
import multiprocessing, os, sys, time
from cytosae_pipeline.runtime.workers import WorkerPool

def work(where):
    open(where, "w").close()
    pool = WorkerPool(3)
    futures = [pool.submit(time.sleep, 600) for _ in range(3)]
    if sys.argv[2] == "forks":
        os.fork()  # a copy of every descriptor, which stays open
    time.sleep(600)

if __name__ == "__main__":
    if sys.argv[2] == "plain" or sys.argv[2] == "forks":
        work(sys.argv[1])
    elif sys.argv[2] == "forked":
        if not os.fork():
            work(sys.argv[1])
        time.sleep(600)
    else:
        child = multiprocessing.get_context(sys.argv[2]).Process(target=work, args=(sys.argv[1],))
        child.start()
        time.sleep(600)
"""


def _marked(mark: str) -> dict[int, str]:
    """Processes with a mark in their environment, and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_gone = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_gone and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def _workers(mark: str) -> set[int]:
    return {number for number, command in _marked(mark).items() if "cytosae_pipeline.runtime.child" in command}


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("how", ["plain", "forks", "forked", "fork", "spawn"])
@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2, None])
def test_no_worker_outlives_a_killed_parent(tmp_path, how, delay_s):
    mark = f"{how}-{delay_s}-{os.getpid()}"
    (tmp_path / "script.py").write_text(FORKED)
    path = os.pathsep.join(str(ROOT / name) for name in ("", "cache", "pipeline"))
    with subprocess.Popen(
        [sys.executable, "script.py", tmp_path / "began", how], cwd=tmp_path, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, MARK: mark},
    ) as first:  # fmt: skip
        wait_until((tmp_path / "began").exists)
        if delay_s is None:
            wait_until(lambda: len(_workers(mark)) == 3)
        else:
            time.sleep(delay_s)
        workers = _workers(mark)
        parents = {_parent(number) for number in workers} - {0}
        for number in parents or set(_marked(mark)) - workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        wait_until(lambda: not _workers(mark), "workers are left")
        for number in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        first.kill()
    wait_until(lambda: not _marked(mark), "processes are left")


def _parent(number: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def test_a_child_whose_parent_ended_before_it_asked_ends():
    code = "from cytosae_pipeline.runtime.child import end_with_parent; end_with_parent(1 << 22); print('still here')"
    path = os.pathsep.join(str(ROOT / name) for name in ("", "cache", "pipeline"))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_what_a_child_cannot_import_is_an_error_of_the_call(pool):
    with pytest.raises(ZeroDivisionError):
        pool.submit(_Unloadable()).result(timeout=patience())
    assert pool.submit(divmod, 9, 7).result() == (1, 2)


class _Unloadable:
    def __call__(self) -> None: ...

    def __reduce__(self):
        return divmod, (1, 0)


def test_the_end_of_a_child_is_seen_though_its_connection_stays_open():
    child = Child(_leave_open, os.getpid())
    assert child.receive() == "ready"
    other = child.receive()
    try:
        child.kill()
        with pytest.raises(WorkerDiedError):
            child.receive()
    finally:
        os.kill(other, signal.SIGKILL)


def _leave_open(connection, parent: int) -> None:
    """Give a copy of the connection to a process that stays."""
    connection.send("ready")
    other = os.fork()
    if not other:
        signal.pause()
    connection.send(other)
    signal.pause()
