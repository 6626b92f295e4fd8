"""The command line in child processes that start at once, because their parent has imported everything already.

A child is forked from a parent that runs no threads, is the head of a session of its own, and runs the same `main` as
the installed command. Starting an interpreter for each of some sixty builds would take minutes.
"""

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.patience import patience

ROOT = Path(__file__).parents[2]
SOURCES = os.pathsep.join(map(str, (ROOT, ROOT / "cache", ROOT / "pipeline")))


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code; minus the signal's number if one ended it."""
    output: str
    """What it wrote, stdout and stderr together."""
    seconds: float
    """How long it ran."""
    left_over: list[str]
    """Its processes that were still there some seconds later."""
    peak_bytes: int = 0
    """Most memory of it or one of its processes, above what its parent had."""
    cpu_s: float = 0
    """Seconds of computing, its processes included."""


class Nursery:
    """Runs children one after another; use as a context manager.

    Args:
        prefix: Command that the parent runs under, for example `unshare`.
        imports: Further modules that the parent imports.
        environment: Further environment variables.
    """

    def __init__(self, *, prefix: tuple[str, ...] = (), imports: tuple[str, ...] = (), **environment: str) -> None:
        self._parent = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.support.nursery", *imports],
            env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(
        self, *arguments: object, kill_after_s: float | None = None,
        kill_at_marks: tuple[Path, int] | None = None, number: int = signal.SIGKILL, group: bool = False,
        worker: bool = False, before: str = "", after: str = "", file_bytes: int | None = None,
        strace: tuple[str, ...] = (),
    ) -> Ended:  # fmt: skip
        """Run the command line once.

        Args:
            *arguments: After `cytosae-cache`; or `-c` and Python code.
            kill_after_s: When to send a signal, if at all.
            kill_at_marks: The same: when a root folder's builds have finished so many shards.
            number: Which.
            group: Whether all its processes get it, or the first alone.
            worker: Send it to one of its workers, as soon as there is one.
            before: Shell commands run before, where the parent's mounts are seen.
            after: The same afterwards.
            file_bytes: Length at which its files stop growing.
            strace: Options of an strace that watches it from its first instruction on.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        task = {
            "arguments": list(map(str, arguments)), "after_s": kill_after_s,
            "marks": kill_at_marks and (str(kill_at_marks[0]), kill_at_marks[1]), "number": int(number), "group": group,
            "worker": worker, "before": before, "after": after, "file_bytes": file_bytes, "strace": strace,
        }  # fmt: skip
        self._parent.stdin.write(json.dumps(task) + "\n")
        self._parent.stdin.flush()
        line = self._parent.stdout.readline()
        if not line:
            raise RuntimeError(f"the parent ended with {self._parent.wait()}")
        return Ended(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._parent.communicate(timeout=patience())


def _serve() -> None:
    """The parent: a child for every line of stdin, a line of stdout for every child."""
    import importlib

    import torch  # noqa: F401
    import zarr.codecs  # noqa: F401

    import cytosae_pipeline.building.build  # noqa: F401
    from cytosae_pipeline.cli.app import main

    for name in sys.argv[1:]:
        importlib.import_module(name)
    log = Path(f"/tmp/cytosae-nursery-{os.getpid()}.log")
    inherited = _peak_of_an_idle_child()
    for line in sys.stdin:
        task = json.loads(line)
        subprocess.run(["sh", "-ec", task["before"]], check=True)
        started = time.monotonic()
        child = os.fork()
        if not child:
            _be_child(main, task, log)
        tracer = _attach(child, task["strace"]) if task["strace"] else None
        if task["worker"]:
            os.kill(_find_worker(child), task["number"])
        elif task["after_s"] is not None or task["marks"]:
            _wait(child, task["after_s"], task["marks"])
            while os.getpgid(child) != child:  # it has just been forked
                time.sleep(0.001)
            (os.killpg if task["group"] else os.kill)(child, task["number"])
        status, usage = _reap(child)
        if tracer is not None:
            tracer.wait()
        ended = Ended(
            os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), time.monotonic() - started,
            _wait_for_session(child), max(0, usage.ru_maxrss - inherited) * 1024, usage.ru_utime + usage.ru_stime,
        )  # fmt: skip
        subprocess.run(["sh", "-ec", task["after"]], check=True)
        sys.stdout.write(json.dumps(vars(ended)) + "\n")
        sys.stdout.flush()
    log.unlink(missing_ok=True)


def _be_child(main, task, log: Path) -> None:
    os.setsid()
    if task["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(file=2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["cytosae-cache", *task["arguments"]]
    if task["strace"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = 70
    try:
        if sys.argv[1] == "-c":
            exec(sys.argv[2], {})
        else:
            main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would do
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _attach(child: int, options: list[str]) -> "subprocess.Popen[bytes]":
    """Let strace watch a child that has stopped itself, then let it go on."""
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
    tracer = subprocess.Popen(
        ["strace", "-f", *options, "-p", str(child)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    status = Path(f"/proc/{child}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None:
            raise RuntimeError(f"strace cannot watch a process here: it ended with {tracer.returncode}")
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    return tracer


def _peak_of_an_idle_child() -> int:
    """KiB that a child has from its parent."""
    child = os.fork()
    if not child:
        os._exit(0)
    return os.wait4(child, 0)[2].ru_maxrss


def _reap(child: int, timeout_s: float = patience(600)) -> tuple[int, resource.struct_rusage]:
    """Wait for a child's end; one that hangs says where its threads are and is ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        number, status, usage = os.wait4(child, os.WNOHANG)
        if number:
            return status, usage
        time.sleep(0.002)
    os.kill(child, signal.SIGABRT)
    return os.wait4(child, 0)[1:]


def _wait(child: int, seconds: float | None, marks: tuple[str, int] | None) -> None:
    """Wait for the instant, or until the child has ended by itself; it is not reaped here, so its number stays its."""
    started = time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if marks and len(list(Path(marks[0]).glob("out/activations/*/*.zarr/progress/*.json"))) >= marks[1]:
            return
        left = started + seconds - time.monotonic() if seconds is not None else 0.005
        if left <= 0:
            return
        time.sleep(min(left, 0.005))


def _find_worker(session: int, timeout_s: float = patience()) -> int:
    """The first decoding process."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        processes = _session(session)
        workers = [process for process, parent in processes.items() if parent == session]
        if workers:
            return workers[0]
        time.sleep(0.002)
    raise RuntimeError("no worker came")


def _wait_for_session(session: int, timeout_s: float = patience(60)) -> list[str]:
    """Wait until a session has no process left; what is left after the time is ended and named."""
    deadline = time.monotonic() + timeout_s
    while left := _session(session):
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            return [str(process) for process in left]
        time.sleep(0.01)
    return []


def _session(session: int) -> dict[int, int]:
    """Processes of a session and their parents, without those that have ended."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, number, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found[int(folder.name)] = int(parent)
    return found


if __name__ == "__main__":
    _serve()
