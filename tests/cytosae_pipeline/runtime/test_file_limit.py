"""Few open files: fewer workers, and the whole limit that the system permits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patience

ROOT = Path(__file__).parents[3]
PATH = os.pathsep.join(str(ROOT / name) for name in ("", "cache", "pipeline"))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")


def _run(code: str, *arguments: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True, text=True, check=True, timeout=patience(),
    ).stdout.strip()  # fmt: skip


@pytest.mark.parametrize(("soft", "hard", "raised"), [(40, 300, 300), (300, 300, 300), (64, 9000, 8192)])
def test_the_soft_limit_is_raised_to_the_hard_one(soft, hard, raised):
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("this process may not open so many files")
    code = (
        "import resource, sys\n"
        "from cytosae_pipeline.runtime.file_limit import raise_file_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))\n"
        "raise_file_limit()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert _run(code, soft, hard) == f"{raised} {hard}"


def test_workers_for_which_there_are_descriptors():
    code = (
        "import resource\n"
        "from cytosae_pipeline.runtime.file_limit import affordable_workers\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "print(affordable_workers(0), affordable_workers(8), 8 < affordable_workers(100) < 64)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))\n"
        "print(affordable_workers(8))"
    )
    assert _run(code) == "0 8 True\n1"


@pytest.mark.parametrize("n_workers", [0, 8, 100])
def test_a_build_under_a_limit_of_64_files(with_images, n_workers):
    place = with_images
    command = [
        sys.executable, "-m", "cytosae_pipeline", "build", "--root_dir", place.root, "--dataset_name", "toy",
        "--model_path", place.vit, "--layout", "class/patient", "--shard_images", 2, "--workers", n_workers,
    ]  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *map(str, command)], env={**os.environ, "PYTHONPATH": PATH},
        capture_output=True, text=True, check=False, timeout=patience(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("of 100 processes: `ulimit -n` allows no more open files" in done.stderr) == (n_workers == 100)
