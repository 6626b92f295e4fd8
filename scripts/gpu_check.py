"""Tests marked `gpu` and the benchmarks on the GPU of this machine, without a network, in under 8 minutes.

    scripts/gpu_wheels.sh WHEELS             # before, where there is a network
    scripts/gpu_check.sh WHEELS OUT.json     # there; then: python scripts/gpu_table.py OUT.json

The torch of this interpreter is used as it is and not changed: wheels are installed into a folder of their own, which
is removed afterwards. Each part is stopped at its limit, and what it has printed until then is kept. OUT.json is
written after every part. `--cpu` runs the same parts at tiny sizes, to try this script.

Exit codes: 0 if all ran and passed, 1 if not, 2 without a CUDA device.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
INSTALL_LIMIT_S, _ASKING_LIMIT_S = 40, 15
_TAIL_LINES = 200


class Part(NamedTuple):
    """A command with a limit."""

    name: str
    """What it is called in the result."""
    limit_s: int
    """Seconds after which it is stopped."""
    command: str
    """After `python -m`."""
    only: str | None = None
    """Name of the only lines that are kept; None for all."""

    @property
    def module(self) -> str:
        """What is run."""
        return self.command.split()[0]


_PYTEST = "pytest -v --tb short -p no:cacheprovider -W default --maxfail 30"
_STEP = "benchmarks.train_step --latents 49152 --tokens 4112"
_TINY_STEP = "benchmarks.train_step --d-in 16 --latents 64 --tokens 40 --density 0.05 --rounds 1 --device cpu"
_TINY_FEATURES = "benchmarks.features --images 4 --d-in 16 --latents 64"
_TINY_BUILD = "benchmarks.build --model-path pipeline/cytosae_pipeline/assets/cytosae_tiny14.pth"

ON_GPU = (
    Part("tests", 110, f"{_PYTEST} -m gpu tests/gpu"),
    Part("train_step", 50, f"{_STEP} --arch ALL --density 0.5 --density 0.01 --rounds 5 --no-memory"),
    Part("build", 75, "benchmarks.build --encoders dinov2_vitb14 --images 1024 --rounds 2 --workers 12"),
    Part("end_to_end", 75, "benchmarks.end_to_end --encoder dinov2_vitb14 --images 512 --epochs 8 --expansion 64"),
    Part("features", 25, "benchmarks.features --images 256 --latents 49152"),
    Part("memory", 65, f"{_STEP} --arch relu topk --density 0.01 --rounds 1", only="memory"),
)
"""Parts on a GPU; 49,152 latents are 64 times the width of a ViT-B."""

ON_CPU = (
    Part("tests", 300, f"{_PYTEST} -m 'not gpu' tests/gpu/test_products.py"),
    Part("train_step", 300, f"{_TINY_STEP} --arch ALL --k 4 --no-memory"),
    Part("build", 300, f"{_TINY_BUILD} --images 3 --batch 2 --rounds 1 --workers 0 --device cpu"),
    Part("end_to_end", 300, "benchmarks.end_to_end --images 24 --epochs 1 --expansion 2 --device cpu"),
    Part("features", 250, f"{_TINY_FEATURES} --k 4 --rounds 1 --device cpu"),
    Part("memory", 300, _TINY_STEP, "memory"),
)
"""The same at tiny sizes."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    output: str
    """Standard output and standard error, as far as it came."""
    seconds: float
    """How long it ran."""
    exit_code: int | None
    """None if it was stopped at its limit."""


def main() -> int:
    """Run all parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, metavar="WHEELS", help="folder of scripts/gpu_wheels.sh")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--cpu", action="store_true", help="the same parts at tiny sizes on the CPU")
    options = parser.parse_args()
    missing = None if options.cpu else find_missing_device()
    if missing:
        print(f"no CUDA device: {missing}. Run this on a machine with one, or try it with --cpu", file=sys.stderr)
        return 2
    wheels = sorted(options.wheels.glob("*.whl"))
    if not wheels:
        print(
            f"no wheels in '{options.wheels}': make them with scripts/gpu_wheels.sh {options.wheels}", file=sys.stderr
        )
        return 1
    with tempfile.TemporaryDirectory() as name:
        site = Path(name) / "site"
        return check(install(wheels, site), site, options)


def check(installed: Ended, site: Path, options: argparse.Namespace) -> int:
    """Run the parts with the installed wheels, and write the result after each; returns the exit code."""
    environment = {
        **os.environ,
        # Products of float32 in the baselines, too; some containers round them to TF32.
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
        "PYTHONPATH": os.pathsep.join(map(str, (site, ROOT, ROOT / "cache", ROOT / "pipeline"))),
    }
    result: dict[str, Any] = {
        **describe_machine(environment), "cpu": options.cpu, "parts": [],
        "left_out": [{"name": "wandb, SciPy, scikit-learn", "why": "large, and no part needs them"}],
    }  # fmt: skip
    if installed.exit_code != 0:
        result["left_out"].append({"name": "everything", "why": f"wheels were not installed: {last_line(installed)}"})
        write(options.out, result)
        print(last_line(installed), file=sys.stderr)
        return 1
    sound = True
    for part in ON_CPU if options.cpu else ON_GPU:
        if part.module != "pytest" and not ROOT.joinpath(*part.module.split(".")).with_suffix(".py").exists():
            result["left_out"].append({"name": part.name, "why": f"there is no {part.module}"})
            print(f"{part.name}: left out, there is no {part.module}", flush=True)
            continue
        ended = run([sys.executable, "-m", *shlex.split(part.command)], part.limit_s, environment)
        found = describe_part(part, ended)
        result["parts"].append(found)
        if ended.exit_code is None:
            result["left_out"].append({"name": f"the rest of {part.name}", "why": f"stopped after {part.limit_s} s"})
        sound = sound and ended.exit_code == 0
        write(options.out, result)
        print(f"{part.name}: {found['ended']} after {ended.seconds:.0f} s, {len(found['lines'])} lines", flush=True)
    write(options.out, result)
    return 0 if sound else 1


def find_missing_device() -> str | None:
    """Why there is no CUDA device; None if there is one."""
    try:
        import torch
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} was built without CUDA" if not torch.version.cuda else "torch finds none"


def install(wheels: list[Path], site: Path) -> Ended:
    """Install wheels into a folder, from these files alone."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return run([*command, *map(str, wheels)], INSTALL_LIMIT_S, environment)


def describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """Device, driver and versions, asked for in a process of its own."""
    code = (
        "import importlib.util, json, numpy, torch\n"
        "there = torch.cuda.is_available()\n"
        "properties = torch.cuda.get_device_properties(0) if there else None\n"
        "print(json.dumps({'device': properties.name if there else 'cpu',"
        " 'device_bytes': properties.total_memory if there else 0, 'n_devices': torch.cuda.device_count(),"
        " 'capability': list(torch.cuda.get_device_capability(0)) if there else None,"
        " 'triton': __import__('triton').__version__ if importlib.util.find_spec('triton') else None,"
        " 'torch': torch.__version__, 'cuda': torch.version.cuda, 'numpy': numpy.__version__,"
        " 'tf32_products': torch.backends.cuda.matmul.allow_tf32}))"
    )
    ended = run([sys.executable, "-c", code], _ASKING_LIMIT_S, environment)
    found = read_lines(ended.output)
    about = found[-1] if found else {"device": f"unknown: {last_line(ended)}"}
    return {
        **about, "driver": find_driver(), "python": platform.python_version(), "platform": platform.platform(),
        "cores": os.cpu_count(),
    }  # fmt: skip


def find_driver() -> str | None:
    """Version of NVIDIA's driver, as its own program tells."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    ended = run([program, "--query-gpu=driver_version", "--format=csv,noheader"], _ASKING_LIMIT_S, dict(os.environ))
    return ended.output.strip().splitlines()[0] if ended.exit_code == 0 and ended.output.strip() else None


def run(command: list[str], limit_s: float, environment: dict[str, str]) -> Ended:
    """Run a command in the repository; at the limit, it and all that it started are stopped."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        file.seek(0)
        return Ended(file.read().decode(errors="replace"), time.monotonic() - started, code)


def describe_part(part: Part, ended: Ended) -> dict[str, Any]:
    """What a part printed, as far as it came."""
    lines = [line for line in read_lines(ended.output) if part.only in (None, line.get("name"))]
    others = [text for text in ended.output.splitlines() if not text.startswith("{")]
    found: dict[str, Any] = {
        "name": part.name, "command": f"python -m {part.command}", "limit_s": part.limit_s,
        "seconds": round(ended.seconds, 1), "exit_code": ended.exit_code, "lines": lines,
        "ended": "stopped" if ended.exit_code is None else "done" if ended.exit_code == 0 else "failed",
    }  # fmt: skip
    if part.name == "tests":
        passed, failed = (
            [text for text in others if re.match(rf"tests/.*::.* {word}\b", text)]
            for word in ("PASSED", "(FAILED|ERROR)")
        )
        counted = f"{len(passed)} passed, {len(failed)} failed, stopped before the end"
        found["summary"] = counted if ended.exit_code is None else last_line(ended).strip("= ")
        found["failed"] = [text.split(" ")[0] for text in failed]
    if part.name == "tests" or ended.exit_code != 0:
        found["tail"] = others[-_TAIL_LINES:]
    return found


def read_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines; one that was cut off is none."""
    found = []
    for text in output.splitlines():
        try:
            value = json.loads(text) if text.startswith("{") else None
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def last_line(ended: Ended) -> str:
    """The last line that is not empty."""
    return next((text for text in reversed(ended.output.splitlines()) if text.strip()), "it printed nothing")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
