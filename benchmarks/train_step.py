"""The training step against a plain one: float32, autograd, default Adam. Prints JSON lines.

    python -m benchmarks.train_step --d-in 768 --latents 24576 --tokens 1024

Baseline and ours take the same steps (docs/definitions.md, section 5) in turn. A density is the share of latents active
on a token:
0.5 is a new autoencoder, a trained one has 0.01 and less. `memory` is the peak of a step in a process of its own, above
the interpreter with torch loaded: weights, gradients, Adam's moments and everything the step makes.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import compare, print_line
from cytosae.sae.loss import LossWeights
from cytosae.sae.relu import ReluSae
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.training.matmul import TrainingPrecision, choose_matmul, choose_training_precision

DENSITIES = (0.5, 0.1, 0.01, 0.001)
CROSSOVER = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.01)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24_576)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--density", type=float, action="append", help="share of active latents; repeatable")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ghost-share", type=float, default=0.0, help="share of latents that get ghost gradients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--crossover", action="store_true", help="dense products against sparse ones instead")
    parser.add_argument("--peak-of", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = choose_device(options.device)
    precision = choose_training_precision(options.precision, device)
    if options.peak_of:
        print(measure_peak(options, device, precision))
        return
    if options.crossover:
        compare_products(options, device, precision)
        return
    for density in options.density or DENSITIES:
        sizes = {
            "d_in": options.d_in, "latents": options.latents, "tokens": options.tokens, "density": density,
            "precision": precision, "device": device.type, "threads": torch.get_num_threads(),
            "ghost_share": options.ghost_share,
        }  # fmt: skip
        x = make_batch(options, device)
        plain = make_step(options, device, density, None)
        ours = make_step(options, device, density, choose_matmul(precision, device, None))
        compare(
            "train_step",
            lambda: run_step(plain, x),  # noqa: B023 - called at once
            lambda: run_step(ours, x),  # noqa: B023
            rounds=options.rounds,
            **sizes,
        )
        baseline, found = (run_peak(options, density, precision, which) for which in ("plain", "ours"))
        state = 4 * 4 * 2 * options.d_in * options.latents
        print_line(
            {
                "name": "memory", "ratio": round(baseline / found, 3), "baseline_bytes": baseline, "ours_bytes": found,
                "ratio_beyond_state": round((baseline - state) / max(1, found - state), 3), **sizes,
            }
        )  # fmt: skip


def make_batch(options: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Tokens with the norms of a vision transformer's, float32, shape `(1, N, D)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, options.tokens, options.d_in, generator=generator).to(device)


def make_step(
    options: argparse.Namespace, device: torch.device, density: float, products: MatmulConfig | None
) -> TrainStep:
    """A step whose latents are active as often as asked; the plain one with default Adam."""
    sae = ReluSae(options.d_in, options.latents, device=device)
    x = make_batch(options, device)[0, :64]
    with torch.no_grad():
        pre = sae.pre_activations(x).flatten()
        sae.b_enc.sub_(pre.float().sort().values[min(len(pre) - 1, int((1 - density) * len(pre)))])
    step = TrainStep(
        sae, lr=0.0, weights=LossWeights(l1_coefficient=8e-5), use_ghost_grads=options.ghost_share > 0,
        dead_feature_window=1 << 40, matmul=products,
    )  # fmt: skip
    step.tracker.n_steps_since_fired[: int(options.ghost_share * options.latents)] = 1 << 60
    if products is None:
        step.optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999))
    return step


def run_step(step: TrainStep, x: torch.Tensor) -> None:
    """One step that changes nothing, so that the density stays."""
    kept = step.tracker.n_steps_since_fired.clone()
    step.step(x)
    step.tracker.n_steps_since_fired.copy_(kept)
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def compare_products(options: argparse.Namespace, device: torch.device, precision: TrainingPrecision) -> None:
    """Where sparse products become faster than dense ones: a ratio above 1 says that they are."""
    x = make_batch(options, device)
    dtype = choose_matmul(precision, device, None).dtype
    for density in options.density or CROSSOVER:
        dense = make_step(options, device, density, MatmulConfig(dtype, sparse_below=0.0))
        sparse = make_step(options, device, density, MatmulConfig(dtype, sparse_below=1.1))
        compare(
            "crossover",
            lambda: run_step(dense, x),  # noqa: B023 - called at once
            lambda: run_step(sparse, x),  # noqa: B023
            rounds=options.rounds, d_in=options.d_in, latents=options.latents, tokens=options.tokens, density=density,
            precision=precision,
        )  # fmt: skip


def run_peak(options: argparse.Namespace, density: float, precision: str, which: str) -> int:
    """Peak memory of a step in a process of its own, in bytes."""
    command = [
        sys.executable, "-m", "benchmarks.train_step", "--d-in", options.d_in, "--latents", options.latents,
        "--tokens", options.tokens, "--density", density, "--precision", precision, "--device", options.device,
        "--ghost-share", options.ghost_share, "--peak-of", which,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def measure_peak(options: argparse.Namespace, device: torch.device, precision: TrainingPrecision) -> int:
    """Peak memory of this process's steps above what it had before, in bytes."""
    products = None if options.peak_of == "plain" else choose_matmul(precision, device, None)
    (density,) = options.density
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # loads the libraries
    before = _resident() if device.type == "cpu" else torch.cuda.memory_allocated()
    step, x = make_step(options, device, density, products), make_batch(options, device)
    run_step(step, x)  # makes the moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run_step(step, x)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    return peak - before


def _resident(name: str = "VmRSS") -> int:
    """Resident memory, in bytes; Linux says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
