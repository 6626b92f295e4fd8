"""Work on real clusters: workers that are killed, and everything that can be missing."""

import functools
import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from cytosae_cache.errors import ChecksumError
from cytosae_pipeline.runtime.cluster import (
    ClusterError,
    SchedulerLostError,
    connect,
    count_workers,
    iter_ranges,
    keep_connected,
    map_ranges,
    plan_ranges,
)
from cytosae_pipeline.runtime.cluster_worker import find_versions, number_of, require_versions
from tests.support import cluster as there
from tests.support.patience import wait_until

N = 23
RANGES = plan_ranges(N, 1)
EXPECTED = there.squares(range(N))


@pytest.fixture(scope="module")
def client():
    with connect("local:2") as client:
        yield client


@pytest.mark.parametrize(("n_shards", "n_workers"), [(0, 4), (1, 4), (7, 1), (64, 2), (1000, 2), (10**6, 100)])
def test_ranges_are_all_shards_in_order_and_some_for_each_worker(n_shards, n_workers):
    ranges = plan_ranges(n_shards, n_workers)
    assert [shard for part in ranges for shard in part] == list(range(n_shards))
    assert 1 <= len(ranges) <= max(1, 32 * n_workers)
    assert len(ranges) >= min(max(1, n_shards), 8 * n_workers)
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", [1, 2, 4, 5, 17, 23])
def test_every_range_counts_once_and_is_told_once(client, n):
    ranges, told = plan_ranges(N, 1)[:n] if n <= 16 else [range(number, number + 1) for number in range(n)], []
    found = map_ranges(client, there.squares, ranges, there.join, told.append)
    assert sorted(found) == there.squares(range(ranges[-1].stop))
    assert sorted(told, key=lambda part: part.start) == ranges


def test_two_processes_work_with_the_threads_of_the_machine_divided_among_them(client):
    assert count_workers(client) == 2
    found = map_ranges(client, there.describe_process, RANGES, there.join)
    assert {number for number, _ in found}.isdisjoint({os.getpid()})
    assert {n_threads for _, n_threads in found} == {max(1, (os.cpu_count() or 1) // 2)}


def test_a_function_that_workers_cannot_import_is_one_message(client, monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("def function(part): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(ClusterError, match=r"cannot import what it needs: .*No module named.*only_here.*\. Start"):
        map_ranges(client, only_here.function, RANGES, there.join)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the nanny sets this on Linux alone")
def test_workers_use_memory_again(client):
    """The nanny has the allocator return buffers at once, which costs a page fault for each of their 2,048 pages."""
    found = map_ranges(client, there.count_page_faults, RANGES[:4], there.join)
    assert max(found) < 20 * 2048


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("again", range(2))
def test_a_worker_killed_in_a_range_changes_nothing(client, tmp_path, again):
    told = []
    function = functools.partial(there.squares_once_killed, tmp_path / "killed")
    assert sorted(map_ranges(client, function, RANGES, there.join, told.append)) == EXPECTED
    assert (tmp_path / "killed").exists()
    assert sorted(told, key=lambda part: part.start) == RANGES


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_worker_killed_while_it_merges_changes_nothing(client, tmp_path):
    merge = functools.partial(there.join_once_killed, tmp_path / "killed")
    assert sorted(map_ranges(client, there.squares, RANGES, merge)) == EXPECTED
    assert (tmp_path / "killed").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_results_in_the_order_of_their_ranges(client, tmp_path):
    function = functools.partial(there.squares_once_killed, tmp_path / "killed")
    assert list(iter_ranges(client, function, RANGES)) == [there.squares(part) for part in RANGES]
    assert list(iter_ranges(client, function, [])) == []
    some = iter_ranges(client, function, RANGES)
    assert next(some) == there.squares(RANGES[0])
    some.close()
    with pytest.raises(ChecksumError, match="row 7 fails"):
        list(iter_ranges(client, functools.partial(there.fail, ChecksumError("row 7 fails")), RANGES))


def test_an_error_of_ours_is_raised_as_it_is_at_once(client):
    with pytest.raises(ChecksumError, match="row 7 fails"):
        map_ranges(client, functools.partial(there.fail, ChecksumError("row 7 fails")), RANGES, there.join)
    assert sorted(map_ranges(client, there.squares, RANGES, there.join)) == EXPECTED, "the cluster is still usable"


def test_a_disk_that_fails_twice_is_asked_again(client, tmp_path):
    found = map_ranges(client, functools.partial(there.fail_twice, tmp_path), RANGES[:4], there.join)
    assert sorted(found) == EXPECTED[: RANGES[3].stop]


def test_a_disk_that_fails_always_is_an_error(client):
    with pytest.raises(TimeoutError, match="no answer"):
        map_ranges(client, functools.partial(there.fail, TimeoutError("no answer")), RANGES, there.join)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_range_that_ends_every_worker_is_named(client):
    with pytest.raises(ClusterError, match=r"4 workers died one after another .* shards 2 to 4\. .*too little memory"):
        map_ranges(client, there.kill_worker, [range(2, 5)], there.join)


def test_a_connection_is_kept_while_it_is_asked_for_again_and_again():
    with keep_connected():
        with connect("local:1") as client:
            pass
        with keep_connected(), connect("local:1") as other:
            assert other is client
        assert client.status == "running"
    assert client.status == "closed"
    with connect("local:1") as other:
        assert other is not client
    assert other.status == "closed"


def test_a_kept_connection_that_was_lost_is_made_again(tmp_path):
    with keep_connected():
        with there.scheduler(tmp_path) as (_, file), connect(str(file)) as lost:
            pass
        wait_until(lambda: lost.status != "running", "the client did not notice")
        file.unlink()
        with there.scheduler(tmp_path) as (_, file), connect(str(file)) as found:
            assert found is not lost
            assert found.status == "running"


def test_a_lost_scheduler_is_one_message(tmp_path):
    with there.scheduler(tmp_path) as (process, file), there.worker(file), connect(str(file)) as client:
        with pytest.raises(SchedulerLostError, match=r"scheduler at tcp://127.0.0.1:\d+ no longer answers: it ended"):
            map_ranges(client, functools.partial(there.kill, process.pid), RANGES, there.join)


def test_a_scheduler_that_is_lost_before_any_worker_came_is_one_message(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cytosae_pipeline")
    with there.scheduler(tmp_path) as (process, file), connect(str(file)) as client:
        ending = threading.Thread(target=lambda: (wait_until(lambda: "no workers yet" in caplog.text), process.kill()))
        ending.start()
        with pytest.raises(SchedulerLostError, match="no longer answers"):
            map_ranges(client, there.squares, RANGES, there.join)
        ending.join()


def test_other_versions_of_the_scheduler_are_refused(tmp_path):
    older = (
        "import distributed.versions as own; found = own._version_cached; "
        "own._version_cached = lambda name: '2024.12.0' if name == 'distributed' else found(name)"
    )
    expected = r"the scheduler at tcp://\S+ has other versions than this program: distributed 2024.12.0 \(here 20"
    with there.scheduler(tmp_path, before=older) as (_, file), pytest.raises(ClusterError, match=expected):
        with connect(str(file)):
            pass


def test_other_versions_of_a_worker_are_refused():
    with pytest.raises(
        ClusterError, match=r"worker on node7 has other versions .*: torch 1.0 \(here .*Start scheduler"
    ):
        require_versions({**find_versions(), "torch": "1.0"}, find_versions(), "worker on node7")
    require_versions(find_versions(), find_versions(), "worker on node7")


def test_gpus_are_given_out_by_the_number_of_the_worker():
    found = [number_of(name) for name in (0, 3, "1", "SLURMCluster-3-12", "tcp://10.0.0.1:8786", "gpu", "")]
    assert found == [0, 3, 1, 12, 0, 0, 0]


def test_an_address_where_nothing_answers_is_one_message():
    with pytest.raises(
        ClusterError, match=r"no dask scheduler answers at tcp://127.0.0.1:1\. Start one with `dask sch"
    ):
        with connect("tcp://127.0.0.1:1"):
            pass


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, r"cannot be read \(.*No such file"),
        ("{", r"cannot be read \("),
        (json.dumps({"address": 3}), "must contain the address of a scheduler, found '3'"),
        (json.dumps({"address": "x.json"}), "found 'x.json'"),
        (json.dumps(["\x1b[31m"]), "found 'None'"),
        ('{"address": "\\u001b[31m"}', r"found .\\x1b\[31m."),
    ],
)
def test_a_scheduler_file_without_an_address_is_one_message(tmp_path, content, found):
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ClusterError, match=found), connect(str(file)):
        pass


def test_a_missing_package_is_one_message():
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from cytosae_pipeline.runtime.cluster import connect\n"
        "with connect('local:2'): pass"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    last = ended.stderr.strip().splitlines()[-1]
    assert 'ClusterError: --dask needs the package distributed: pip install ".[cluster]" in your clone' in last


def test_a_script_that_workers_would_run_again_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from cytosae_pipeline.runtime.cluster import connect\nwith connect('local:1') as client: print(client)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Put what it does below the line `if __name__ == '__main__':`" in ended.stderr
