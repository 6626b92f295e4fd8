"""Ctrl-C at any instruction of the caller leaves no thread that waits forever."""

import subprocess
import sys

from cytosae_cache.creation import create_store
from tests.support.patience import patience
from tests.support.stores import PROVENANCE, make_spec, make_table

HEAD = """
import sys
import threading


def interrupt(function, at):
    '''Call a function and raise KeyboardInterrupt at an instruction; returns whether it came so far.'''
    left = at

    def trace(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes = True
        if event == 'opcode':
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

"""

PREFETCHER = """
from cytosae_cache.reading.prefetch import Prefetcher

at = 0
while True:
    at += 1
    stream = iter(Prefetcher(range(6), lambda plan, buffer: plan, list, depth=2))
    next(stream)
    came = interrupt(lambda: [next(stream) for _ in range(3)], at)
    stream.close()
    if not came:
        break
print(at > 20, threading.active_count())
"""

WRITER = """
from pathlib import Path

import numpy as np

from cytosae_cache.store import ActivationStore
from cytosae_cache.shard_data import ShardData
from cytosae_cache.writer import StoreWriter

store = ActivationStore(Path(sys.argv[1]))


def submit(writer, shard):
    writer.submit(ShardData(shard, np.zeros((1, 5, 8), np.float16), [b'0' * 32], ['']))


at = 0
while True:
    at += 1
    with StoreWriter(store) as writer:
        submit(writer, 0)
        came = interrupt(lambda: [submit(writer, shard) for shard in (1, 2)], at)
    if not came:
        break
print(at > 20, threading.active_count())
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", HEAD + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience())
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_stream_of_batches_ends():
    assert run(PREFETCHER) == "True 1\n"


def test_a_writer_ends(tmp_path):
    create_store(tmp_path / "s.zarr", make_spec(), make_table(3), PROVENANCE, shard_images=1)
    assert run(WRITER, tmp_path / "s.zarr") == "True 1\n"
