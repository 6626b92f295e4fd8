"""Free memory is what the machine and every control group above the process leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cytosae_pipeline.runtime import memory
from cytosae_pipeline.runtime.memory import available_ram, exceeds_page_cache, limit_primitive_cache

GIB = 1 << 30


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  33554432 kB\nMemFree:  1 kB\nMemAvailable:  8388608 kB\n"}


def _group(folder, limit, used, cache):
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": cache}


def test_a_machine_without_control_groups(tmp_path):
    assert available_ram(_write(tmp_path, MEMINFO)) == 8 * GIB


def test_a_limit_of_a_container_counts_without_its_page_cache(tmp_path):
    group = _group("sys/fs/cgroup", str(4 * GIB), 3 * GIB, f"anon 5\ninactive_file {2 * GIB}\n")
    assert available_ram(_write(tmp_path, {**MEMINFO, "proc/self/cgroup": "0::/\n", **group})) == 3 * GIB


def test_a_limit_above_counts(tmp_path):
    outer = _group("sys/fs/cgroup/user", str(2 * GIB), GIB, "inactive_file 0\n")
    inner = _group("sys/fs/cgroup/user/job", "max", GIB, "inactive_file 0\n")
    files = {**MEMINFO, "proc/self/cgroup": "0::/user/job\n", **outer, **inner}
    assert available_ram(_write(tmp_path, files)) == GIB


def test_control_groups_of_version_1(tmp_path):
    files = {
        "proc/self/cgroup": "5:cpu:/a\n4:memory,hugetlb:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(6 * GIB),
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/a/memory.stat": f"total_inactive_file {GIB}\n",
    }
    assert available_ram(_write(tmp_path, {**MEMINFO, **files})) == 5 * GIB


def test_a_full_group_leaves_nothing(tmp_path):
    group = _group("sys/fs/cgroup", str(GIB), 2 * GIB, "inactive_file 0\n")
    assert available_ram(_write(tmp_path, {**MEMINFO, "proc/self/cgroup": "0::/\n", **group})) == 0


def test_another_system_is_asked_in_its_own_way(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.__getitem__, raising=False)
    assert available_ram(tmp_path) == 40960
    monkeypatch.delattr(os, "sysconf")
    assert available_ram(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_this_machine():
    assert available_ram() > 1 << 20


@pytest.mark.parametrize(("ram", "expected"), [(99, True), (100, False), (None, False)])
def test_more_than_free_memory_exceeds_the_page_cache(monkeypatch, ram, expected):
    monkeypatch.setattr(memory, "available_ram", lambda: ram)
    assert exceeds_page_cache(100) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_the_process_count(limit):
    code = (
        "import resource; from cytosae_pipeline.runtime.memory import available_ram\n"
        f"before = available_ram(); resource.setrlimit(resource.{limit}, (1 << 29, -1)); print(before, available_ram())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before > 1 << 29
    assert 0 < after < 1 << 29


_PRODUCTS = """
import os, sys
import torch
from cytosae_pipeline.runtime.memory import limit_primitive_cache
torch.set_num_threads(1)
weights = torch.randn(384, 3072).bfloat16()
if sys.argv[1] == "limited":
    limit_primitive_cache()
torch.zeros(1, 384, dtype=torch.bfloat16) @ weights
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
for n in range(1, 500):
    torch.zeros(n, 384, dtype=torch.bfloat16) @ weights
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_products_of_many_shapes_do_not_fill_the_memory():
    environment = {name: value for name, value in os.environ.items() if "PRIMITIVE_CACHE" not in name}

    def grown(how):
        output = subprocess.run(
            [sys.executable, "-c", _PRODUCTS, how], env=environment, check=True, capture_output=True, text=True
        )
        return int(output.stdout)

    unlimited = grown("unlimited")
    if unlimited < 200e6:
        pytest.skip(f"this processor's products of 500 shapes take {unlimited / 1e6:.0f} MB")
    assert grown("limited") < unlimited - 60e6


def test_the_environment_decides_how_many_products_are_kept(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    limit_primitive_cache()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "32"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    limit_primitive_cache()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
