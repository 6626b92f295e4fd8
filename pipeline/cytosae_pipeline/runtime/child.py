"""What a child process does first: it makes sure that it ends with its parent. Imports nothing heavy."""

import ctypes
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1
_INTERVAL_S = 1.0


def main(file: int, parent: int) -> None:
    """Run the function that the parent sends, with the connection to the parent as its first argument.

    Ctrl-C and SIGTERM reach the whole group of processes, and the parent decides what happens.

    Args:
        file: Descriptor of the connection.
        parent: Number of the parent process.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    end_with_parent(parent)
    connection = Connection(file)
    try:
        function, arguments = connection.recv()
    except (EOFError, OSError):
        return
    function(connection, *arguments)


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, however that happens.

    End of file on the connection is not enough: a copy of its other end may be open in any process that was forked from
    the parent. Linux kills this process with the thread that started it; other systems are asked once a second.

    Args:
        parent: Number of the parent process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_INTERVAL_S)
    os._exit(1)
