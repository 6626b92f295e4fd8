"""Locks of local stores: one build at a time, and none survives a crash."""

import os
import subprocess
import sys
import threading

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage.open import open_storage


def test_one_build_at_a_time(tmp_path):
    path = tmp_path / "s.zarr"
    with open_storage(path).lock():
        answers = []

        def other():
            try:
                with open_storage(path).lock():
                    answers.append("held")
            except StoreBusyError as error:
                answers.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"another process (process {os.getpid()} on" in answers[0]
    assert f"is writing '{path}'" in answers[0]
    with open_storage(path).lock():
        pass


def test_a_crashed_build_leaves_no_lock(tmp_path):
    code = (
        "import os,sys; from pathlib import Path; from cytosae_cache.storage.open import open_storage\n"
        "with open_storage(Path(sys.argv[1])).lock(): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": "cache"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.zarr")], env=environment, check=False)
    with open_storage(tmp_path / "s.zarr").lock():
        pass
