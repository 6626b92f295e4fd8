"""Benchmarks run and print what they promise; how fast anything is, no test says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_storage_prints_a_line_a_measurement(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.storage", "--folder", str(tmp_path), "--shards", "2", "--shard-images", "4",
        "--d-model", "16", "--batch", "3", "--rounds", "1", "--codecs", "none", "zstd",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["write", "write", *["read", "stream", "random"] * 6]
    found = [(line["codec"], line["verify"], line["cache"]) for line in lines[2::3]]
    raw = [("none", True, "warm"), ("none", False, "warm"), ("none", True, "direct"), ("none", True, "cold")]
    assert found == [*raw, ("zstd", True, "warm"), ("zstd", True, "cold")]
    for line in lines:
        assert line["images"] == 8
        assert line["ratio"] > 0
        assert {"baseline_s", "ours_s", "ratio_best", "ratio_min", "ratio_max", "rounds"} <= set(line)
    assert not list(tmp_path.iterdir())
