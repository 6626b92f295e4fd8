"""Real ranks: the command line started by torchrun."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.patience import patience, wait_until

_ROOT = Path(__file__).parents[2]
_NOT_OURS = re.compile(
    r".*torch[/.]distributed|.*<frozen runpy>|Traceback|  |=+$|-+$|[A-Za-z/._]* FAILED|Failures|Root Cause"
)
"""Lines of torchrun itself."""


class Torchrun:
    """A run of `torchrun -m cytosae_pipeline`, in a group of processes of its own.

    Args:
        arguments: Verb and options.
        n_ranks: Processes.
        options: Further options of torchrun.
    """

    def __init__(self, *arguments: object, n_ranks: int = 2, options: Sequence[str] = ()) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_ranks, *options,
            "-m", "cytosae_pipeline", *arguments,
        ]  # fmt: skip
        path = os.pathsep.join(str(_ROOT / name) for name in (".", "cache", "pipeline"))
        self.process = subprocess.Popen(
            [*map(str, command)], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def ranks(self) -> list[int]:
        """Processes of the ranks that run, in the order in which they were started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"cytosae_pipeline" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def wait_for(self, path: Path) -> None:
        """Wait until something was written into a file."""
        wait_until(lambda: (path.exists() and path.stat().st_size) or self.process.poll() is not None)

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to all processes."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> tuple[int, str]:
        """Exit code, and what our program printed, without torchrun's own lines."""
        try:
            output, _ = self.process.communicate(timeout=patience(240))
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.output = output
        return self.process.returncode, "\n".join(line for line in output.splitlines() if not _NOT_OURS.match(line))
