"""Faults at single system calls: a command is killed, or one of its calls fails, and is then typed again.

strace counts the calls of each thread and injects the fault into the n-th. What must hold afterwards: the old results
are whole until the new ones are, a failure is one message that names the place, and the same command again ends with
the files of a run without a fault, byte for byte, and no others.
"""

import csv
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.nursery import Ended, Nursery

KILLED_AT = (
    "write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir",
    "mkdirat", "rmdir", "ftruncate", "link",
)  # fmt: skip
"""Calls at which a process is killed."""

FAILURES = {
    "write": ("ENOSPC", "EIO"), "pwrite64": ("ENOSPC", "EIO"), "openat": ("EACCES", "ENOSPC"), "fsync": ("EIO",),
    "fdatasync": ("EIO",), "rename": ("EACCES", "EIO"), "renameat2": ("EACCES",), "mkdir": ("EACCES", "ENOSPC"),
    "ftruncate": ("EIO",),
}  # fmt: skip
"""Calls that fail, and how."""

_PACE = ("details/images_per_s", "details/data_wait_share")
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")

Snapshot = dict[str, str]
"""Digest of every file below a folder, by its name."""


def find_strace() -> str:
    """Why strace cannot be used here; '' if it can."""
    if shutil.which("strace") is None:
        return "needs strace (Debian's package of that name)"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "strace may not watch processes here"


@dataclass(frozen=True)
class Instant:
    """One system call of a command."""

    call: str
    """Name of the call."""
    number: int
    """Its number among the calls of that name of a thread, from 1."""


@dataclass(frozen=True)
class Stage:
    """A command, and the workspace in which it is tried."""

    name: str
    """Name in the table."""
    prepare: Callable[[Path, Nursery], None]
    """Fills a root folder."""
    command: Callable[[Path], Sequence[object]]
    """The command, given the root folder."""
    results: tuple[str, ...] = ()
    """Patterns below the root folder of files that are old or new as a whole."""


@dataclass
class Outcome:
    """What a trial found."""

    stage: str
    """Name of the stage."""
    fault: str
    """`kill` or the name of an error."""
    instant: Instant
    """When."""
    problems: list[str] = field(default_factory=list)
    """What was wrong; empty if nothing."""
    reached: bool = True
    """Whether the command came to that instant."""


class Trials:
    """Tries a stage's command with one fault at a time.

    Args:
        stage: The stage.
        folder: An empty folder; all trials happen in the same place below it, which some files name.
        nursery: Runs the commands.
    """

    def __init__(self, stage: Stage, folder: Path, nursery: Nursery) -> None:
        self._stage, self._nursery = stage, nursery
        self._root, self._pristine, self._log = folder / "root", folder / "pristine", folder / "calls.log"
        self._root.mkdir(parents=True)
        stage.prepare(self._root, nursery)
        shutil.copytree(self._root, self._pristine, symlinks=True)
        self._old = self._whole()
        calls = ",".join({*KILLED_AT, *FAILURES})
        self._require_ok(self._run("-y", "-s", "512", "-e", f"trace={calls}", "-o", str(self._log)))
        self._new, self._wanted = self._whole(), snapshot(self._root)
        self._calls = list(_read_calls(self._log, self._root))

    def kills(self, n: int, seed: int) -> Iterator[Outcome]:
        """Kill the command at n instants, spread over all of its calls."""
        instants = sorted({(call, number) for _, call, number, here in self._calls if here and call in KILLED_AT})
        for call, number in _choose(instants, n, seed):
            yield self._kill(Instant(call, number))

    def failures(self, n: int, seed: int) -> Iterator[Outcome]:
        """Let n calls fail, one at a time."""
        elsewhere = {(call, number) for _, call, number, here in self._calls if not here}
        instants = sorted(
            {(call, number) for _, call, number, here in self._calls if here and call in FAILURES} - elsewhere
        )
        for at, (call, number) in enumerate(_choose(instants, n, seed)):
            yield self._fail(Instant(call, number), FAILURES[call][at % len(FAILURES[call])])

    def _kill(self, instant: Instant) -> Outcome:
        outcome = Outcome(self._stage.name, "kill", instant)
        self._reset()
        ended = self._inject(instant, "signal=KILL")
        outcome.reached = ended.code == -9
        if ended.code not in (-9, 0):
            outcome.problems.append(f"exit code {ended.code}: {ended.output[-500:]}")
        if ended.left_over:
            outcome.problems.append(f"processes are left: {ended.left_over}")
        # While a set of files gets its names a journal says so, and the next command puts them in order.
        if self._old and self._whole() not in (self._old, self._new) and not list(self._root.rglob("*.journal")):
            outcome.problems.append("the old results were not whole")
        self._try_again(outcome)
        return outcome

    def _fail(self, instant: Instant, error: str) -> Outcome:
        outcome = Outcome(self._stage.name, error, instant)
        self._reset()
        ended = self._inject(instant, f"error={error}")
        messages = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
        if ended.code == 0:
            outcome.problems += self._compare("succeeded nevertheless, but ")
            return outcome
        if ended.code != 1 or "Traceback" in ended.output or len(messages) != 1:
            outcome.problems.append(f"no single message: exit code {ended.code}: {ended.output[-1500:]}")
        elif str(self._root) not in messages[0]:
            outcome.problems.append(f"the message names no place: {messages[0]}")
        if self._old and self._whole() not in (self._old, self._new):
            outcome.problems.append("the old results were not whole")
        self._try_again(outcome)
        return outcome

    def _try_again(self, outcome: Outcome) -> None:
        """Type the command again."""
        ended = self._nursery.run(*self._stage.command(self._root))
        if ended.code != 0 and "exists already" not in ended.output:
            outcome.problems.append(f"again: exit code {ended.code}: {ended.output[-1500:]}")
        outcome.problems += self._compare("again: ")

    def _compare(self, prefix: str) -> list[str]:
        found = snapshot(self._root)
        names = sorted(name for name in {*found, *self._wanted} if found.get(name) != self._wanted.get(name))
        words = [
            f"{name} {'is left' if name not in self._wanted else 'differs' if name in found else 'is missing'}"
            for name in names
        ]
        return [prefix + "; ".join(words[:5])] if words else []

    def _reset(self) -> None:
        shutil.rmtree(self._root)
        shutil.copytree(self._pristine, self._root, symlinks=True)

    def _whole(self) -> Snapshot:
        every = snapshot(self._root)
        wanted = [
            path.relative_to(self._root).as_posix() for name in self._stage.results for path in self._root.glob(name)
        ]
        return {
            name: digest
            for name, digest in every.items()
            if any(_is_below(name, place) for place in wanted) and not name.endswith((".lock", ".partial", ".journal"))
        }

    def _inject(self, instant: Instant, what: str) -> Ended:
        call = instant.call
        return self._run("-e", f"trace={call}", "-e", f"inject={call}:{what}:when={instant.number}", "-o", "/dev/null")

    def _run(self, *strace: str) -> Ended:
        return self._nursery.run(*self._stage.command(self._root), strace=("-e", "signal=none", *strace))

    def _require_ok(self, ended: Ended) -> None:
        if ended.code != 0:
            raise RuntimeError(f"{self._stage.name} does not even work: {ended.output[-2000:]}")


def snapshot(root: Path) -> Snapshot:
    """Digests of all files, without what differs from run to run: the pace in metrics, and what a sweep had to do."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in data.splitlines()]
                data = json.dumps(
                    [{name: value for name, value in line.items() if name not in _PACE} for line in lines]
                ).encode()
            elif path.name == "sweep.csv":
                rows = list(csv.DictReader(io.StringIO(data.decode())))
                data = json.dumps([{**row, "step_s": "", "status": ""} for row in rows]).encode()
            found[path.relative_to(root).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def _is_below(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}/")


def _read_calls(log: Path, root: Path) -> Iterator[tuple[int, str, int, bool]]:
    """Thread, name, number and whether it concerns the root folder, of every call."""
    counts: dict[tuple[int, str], int] = {}
    for line in log.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        thread, call, rest = int(found[1]), found[2], found[3]
        number = counts[thread, call] = counts.get((thread, call), 0) + 1
        # Of an open file its path stands before the data, in which any path may occur.
        place = rest.partition(">")[0] if rest[:1].isdigit() else rest
        yield thread, call, number, str(root) in place and (call != "openat" or "O_CREAT" in rest)


def _choose(instants: Sequence[tuple[str, int]], n: int, seed: int) -> list[tuple[str, int]]:
    """At most n instants; of each call a share."""
    order = list(instants)
    random.Random(seed).shuffle(order)
    by_call: dict[str, list[tuple[str, int]]] = {}
    for instant in order:
        by_call.setdefault(instant[0], []).append(instant)
    chosen: list[tuple[str, int]] = []
    while len(chosen) < n and any(by_call.values()):
        for some in by_call.values():
            if some and len(chosen) < n:
                chosen.append(some.pop())
    return chosen
