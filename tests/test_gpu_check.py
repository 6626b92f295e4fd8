"""The check for machines with a GPU: the whole path at tiny sizes, what it says without one, and its limits."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from scripts import gpu_check, gpu_table
from tests.support.patience import patience, wait_until

ROOT = Path(__file__).parents[1]


def make_wheels(folder: Path) -> Path:
    """A folder with one wheel of a package that nothing needs."""
    folder.mkdir()
    about = "nothing_at_all-1.0.dist-info"
    with zipfile.ZipFile(folder / "nothing_at_all-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nothing_at_all.py", "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: nothing-at-all\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_path_at_tiny_sizes(tmp_path):
    out = tmp_path / "deep" / "out.json"
    done = check(make_wheels(tmp_path / "wheels"), out, "--cpu")
    result = json.loads(out.read_text())
    assert done.returncode == 0, (done.stdout, done.stderr, result)
    assert (result["device"], result["cpu"], result["torch"]) == ("cpu", True, torch.__version__)
    assert {"driver", "cuda", "python", "numpy", "cores", "platform", "tf32_products"} <= set(result)
    parts = {part["name"]: part for part in result["parts"]}
    names = [part.name for part in gpu_check.ON_CPU if part.name in parts]
    assert {"tests", "train_step", "build", "end_to_end", "memory"} <= set(names)
    assert "passed" in parts["tests"]["summary"]
    assert parts["tests"]["failed"] == []
    assert [line["name"] for line in parts["build"]["lines"]] == ["build", "build_blocks"]
    assert [line["name"] for line in parts["end_to_end"]["lines"]] == ["end_to_end"]
    assert [line["name"] for line in parts["memory"]["lines"]] == ["memory"]
    assert len(parts["train_step"]["lines"]) == 2 * 6
    missing = {part.name for part in gpu_check.ON_CPU} - set(parts)
    assert {one["name"] for one in result["left_out"]} >= missing
    table = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_table.py", out], capture_output=True, text=True, check=True
    ).stdout
    rows = [text for text in table.splitlines() if text.startswith("| `")]
    assert len(rows) == sum(len(part["lines"]) for part in parts.values())
    assert all(text.count("|") == 8 for text in rows)
    assert "- Tests: " in table
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so_in_one_line_and_does_nothing(tmp_path):
    done = check(tmp_path, tmp_path / "out.json")
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device: ")
    assert "--cpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_a_folder_without_wheels_is_refused(tmp_path):
    done = check(tmp_path, tmp_path / "out.json", "--cpu")
    assert done.returncode == 1
    assert f"no wheels in '{tmp_path}': make them with scripts/gpu_wheels.sh {tmp_path}" in done.stderr


def test_all_parts_together_end_within_8_minutes():
    asked = 2 * gpu_check._ASKING_LIMIT_S
    assert gpu_check.INSTALL_LIMIT_S + asked + sum(part.limit_s for part in gpu_check.ON_GPU) < 480
    assert [part.name for part in gpu_check.ON_GPU] == [part.name for part in gpu_check.ON_CPU]


def test_a_part_at_its_limit_is_stopped_with_all_that_it_started_and_its_lines_are_kept(tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        'print(\'{"name": "one"}\\n{"name": "cut\', flush=True)\n'
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    limit = round(patience(10))
    ended = gpu_check.run([sys.executable, "-c", code], limit, dict(os.environ))
    assert ended.exit_code is None
    found = gpu_check.describe_part(gpu_check.Part("build", limit, "benchmarks.build"), ended)
    assert (found["ended"], found["lines"]) == ("stopped", [{"name": "one"}])
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}")
    wait_until(lambda: not is_running(child))


def is_running(process: Path) -> bool:
    """Whether a process, by its folder in /proc, is neither gone nor dead."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_failed_tests_are_named_even_if_the_end_is_missing():
    text = (
        "tests/gpu/test_steps.py::test_a[cuda] PASSED  [ 10%]\n"
        "tests/gpu/test_steps.py::test_b[cuda-x] FAILED [ 20%]\n"
        "tests/gpu/test_steps.py::test_c[cuda] "
    )
    part = gpu_check.Part("tests", 9, "pytest")
    found = gpu_check.describe_part(part, gpu_check.Ended(text, 9.0, None))
    assert found["summary"] == "1 passed, 1 failed, stopped before the end"
    assert found["failed"] == ["tests/gpu/test_steps.py::test_b[cuda-x]"]
    whole = gpu_check.describe_part(part, gpu_check.Ended(f"{text}\n=== 1 failed, 2 passed in 3s ===\n", 3.0, 1))
    assert whole["summary"] == "1 failed, 2 passed in 3s"


def test_a_table_of_a_run_that_failed_says_what_failed():
    part = {
        "name": "build", "command": "python -m benchmarks.build", "ended": "failed", "lines": [],
        "tail": ["RuntimeError: no kernel"],
    }  # fmt: skip
    result = {
        "device": "A GPU", "driver": "1.2", "torch": "2.6", "cuda": "12.4", "python": "3.12", "cores": 4,
        "parts": [part], "left_out": [{"name": "features", "why": "there is no benchmarks.features"}],
    }  # fmt: skip
    table = gpu_table.make_table(result)
    assert "A GPU, driver 1.2, torch 2.6 with CUDA 12.4, Python 3.12, 4 cores." in table
    assert "- `python -m benchmarks.build` failed: RuntimeError: no kernel" in table
    assert "- Left out: features: there is no benchmarks.features." in table


@pytest.mark.parametrize(
    ("used", "text"),
    [([True, True], "as our kernels"), ([False], "as torch's own"), ([True, False], "partly as our kernels")],
)
def test_a_table_says_whether_our_kernels_were_used(used, text):
    lines = [{"name": "train_step", "ratio": 2.0, "kernels": one} for one in used]
    part = {"name": "train_step", "command": "", "ended": "done", "lines": lines}
    result = {"device": "A GPU", "triton": "3.7", "python": "3.12", "cores": 4, "parts": [part], "left_out": []}
    table = gpu_table.make_table(result)
    assert f", Triton 3.7, Python 3.12, 4 cores. Sparse products ran {text}." in table
