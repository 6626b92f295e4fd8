"""The training step against a plain one and against its limit. Prints JSON lines.

    python -m benchmarks.train_step --arch ALL --tokens 4112

Baseline and ours take the same steps (docs/definitions.md, section 5, and docs/training.md) in turn, on a GPU several
in a row, as in training, where the host prepares a step while the device computes the one before; the baseline is the
architecture's own loss in float32 with autograd and default Adam. A density is the share of latents active on a
token, for `relu` and `gated`: 0.5 is a new autoencoder, a trained one has 0.01 and less. The others have `--k`.

`limit` is the time of the least products that the step needs (the encoder's of all latents once, everything else of
active ones; of all latents at a density of 0.25 and more) at the fastest rate of products that was measured in the
same rounds; `limit_share` is that time divided by ours. `memory` is the peak of a step in a process of its own, above
the interpreter with torch loaded: weights, gradients, Adam's moments and everything the step makes. `loaded` is what a
tiny step of the same kind takes: modules that it imports, such as torch's compiler for its Adam; `ratio_tensors` is the
ratio without them.

`kernels` says whether sparse products ran as kernels of our own, on a GPU; `--no-kernels` measures without them.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import compare, print_line
from cytosae.sae.base import Sae
from cytosae.sae.kernels import has_kernels, without_kernels
from cytosae.sae.loss import LossInputs, LossWeights
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from cytosae_pipeline.runtime.devices import DTYPES, choose_device
from cytosae_pipeline.training.matmul import Products, choose_matmul, choose_products

DENSITIES = (0.5, 0.1, 0.01, 0.001)
CROSSOVER = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.01)
OF_DENSITY = ("relu", "gated")
"""Architectures whose share of active latents nothing but the loss decides."""
DENSE_OR_SPARSE = ("relu", "jumprelu", "gated")
"""Architectures whose products are of all latents where many are active."""
WEIGHTS = LossWeights(l1_coefficient=8e-5)
TINY = {"d_in": 64, "latents": 256, "tokens": 64}
"""Sizes of a step that loads everything and takes no memory."""
DENSE = 0.25
"""Density from which the least products are those of all latents."""
N_PRODUCTS = {"gated": (6, 1), "jumprelu": (4, 1)}
"""Products over active latents, and over all: of `gated` two are decoded and get gradients."""


class PlainStep:
    """The same step in float32, by autograd and default Adam.

    Args:
        sae: The autoencoder.
        n_dead: Latents that are dead.
    """

    def __init__(self, sae: Sae, n_dead: int) -> None:
        self.sae = sae
        self._dead = torch.arange(len(sae.b_enc), device=sae.b_enc.device) < n_dead
        self._optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999))

    def step(self, x: torch.Tensor) -> None:
        """Take a step on activations of shape `(B, T, D)`."""
        sae, tokens = self.sae, x.flatten(0, 1)
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        variance = (tokens - tokens.mean(dim=0)).square().sum()
        ghosts = bool(self._dead.any()) and sae.architecture == "relu"
        inputs = LossInputs(variance, WEIGHTS, tokens.dtype, self._dead, use_ghost_grads=ghosts)
        self._optimizer.zero_grad()
        sae.training_loss(tokens, inputs).terms.loss.backward()
        gradient = sae.W_dec.grad
        with torch.no_grad():
            gradient -= (gradient * sae.W_dec).sum(dim=1, keepdim=True) * sae.W_dec
        self._optimizer.step()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["relu"], choices=(*ARCHITECTURES, "ALL"))
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24_576)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--density", type=float, action="append", help="share of active latents; repeatable")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ghost-share", type=float, default=0.0, help="share of latents that are dead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-a-row", type=int, help="steps of a turn; 5 on a GPU and 1 on a CPU by default")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--no-kernels", action="store_true", help="torch's own sparse products on a GPU, too")
    parser.add_argument("--crossover", action="store_true", help="dense products against sparse ones instead")
    parser.add_argument("--peak-of", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with without_kernels() if options.no_kernels else contextlib.nullcontext():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Measure what was asked for."""
    device = choose_device(options.device)
    options.in_a_row = options.in_a_row or (5 if device.type == "cuda" else 1)
    products = choose_products(options.precision, device, options.d_in)
    if options.peak_of:
        print(*measure_peak(options, device, products))
        return
    if options.crossover:
        compare_products(options, device, products)
        return
    for arch in ARCHITECTURES if "ALL" in options.arch else options.arch:
        for density in (options.density or DENSITIES) if arch in OF_DENSITY else (options.k / options.latents,):
            run(options, device, products, arch, density)


def run(options: argparse.Namespace, device: torch.device, products: Products, arch: str, density: float) -> None:
    """Compare the steps of an architecture."""
    sizes = {
        "arch": arch, "d_in": options.d_in, "latents": options.latents, "tokens": options.tokens,
        "density": round(density, 5), "precision": products.precision, "device": device.type,
        "threads": torch.get_num_threads(), "ghost_share": options.ghost_share, "kernels": has_kernels(device),
        "in_a_row": options.in_a_row,
    }  # fmt: skip
    x = make_batch(options, device)
    plain = make_step(options, device, arch, density, None)
    ours = make_step(options, device, arch, density, choose_matmul(products, device, None))
    rates: dict[str, list[float]] = {name: [] for name in ("fp32", "bf16")}
    times: list[float] = []

    def run_ours() -> None:
        start = time.perf_counter()
        run_steps(ours, x, options.in_a_row)
        times.append((time.perf_counter() - start) / options.in_a_row)

    def measure_rates() -> None:
        for name, found in rates.items():
            found.append(product_rate(ours, x, DTYPES[name]))

    compare(
        "train_step", lambda: run_steps(plain, x, options.in_a_row), run_ours,
        between=measure_rates, rounds=options.rounds, repeats=options.in_a_row, **sizes,
    )  # fmt: skip
    best = {name: statistics.median(found[1:]) for name, found in rates.items()}
    limit = operations(options, arch, density) / max(best.values())
    median = statistics.median(times[1:])
    print_line(
        {
            "name": "limit", "limit_share": round(limit / median, 3), "limit_s": round(limit, 6),
            "ours_s": round(median, 6), **{f"{name}_gflops": round(rate / 1e9) for name, rate in best.items()}, **sizes,
        }
    )  # fmt: skip
    if options.no_memory:
        return
    plain, own = (run_peak(options, arch, density, products.precision, which) for which in ("plain", "ours"))
    print_line(
        {
            "name": "memory", "ratio": round(plain.peak / own.peak, 3), "baseline_bytes": plain.peak,
            "ours_bytes": own.peak, "baseline_loaded_bytes": plain.loaded, "ours_loaded_bytes": own.loaded,
            "ratio_tensors": round((plain.peak - plain.loaded) / max(1, own.peak - own.loaded), 3), **sizes,
        }
    )  # fmt: skip


def operations(options: argparse.Namespace, arch: str, density: float) -> float:
    """Floating-point operations of the least products that a step needs."""
    n_active, n_all = N_PRODUCTS.get(arch, (4, 1))
    density = 1.0 if density >= DENSE else density
    return 2 * options.tokens * options.d_in * options.latents * (n_all + n_active * density)


def product_rate(step: TrainStep | PlainStep, x: torch.Tensor, dtype: torch.dtype) -> float:
    """Operations per second of the encoder's product, by whichever way is faster: whole, or in our blocks."""
    sae, tokens = step.sae, x.flatten(0, 1).to(dtype)
    weights, bias = sae.W_enc.detach().to(dtype), sae.b_enc.detach().to(dtype)
    product = EncoderProduct(sae, tokens.to(weights.dtype), MatmulConfig(dtype))
    out = torch.empty(len(tokens), len(bias), dtype=dtype, device=tokens.device)
    spent = []
    for way in (lambda: torch.addmm(bias, tokens, weights, out=out), lambda: [None for _ in product]):
        start = time.perf_counter()
        way()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return 2 * len(tokens) * tokens.shape[1] * len(bias) / min(spent)


def make_batch(options: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Tokens with the norms of a vision transformer's, float32, shape `(1, N, D)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, options.tokens, options.d_in, generator=generator).to(device)


def make_step(
    options: argparse.Namespace, device: torch.device, arch: str, density: float, matmul: MatmulConfig | None
) -> TrainStep | PlainStep:
    """A step whose latents are active as often as asked; the plain one without a configuration of products."""
    sae = make_sae(arch, options.d_in, options.latents, device=device, k=options.k)
    x = make_batch(options, device)[0, :64]
    sae.tie_()
    sae.fit_to_tokens_(x)
    if arch in OF_DENSITY:
        with torch.no_grad():
            pre = sae.pre_activations(x).flatten()
            sae.b_enc.sub_(pre.float().sort().values[min(len(pre) - 1, int((1 - density) * len(pre)))])
    n_dead = int(options.ghost_share * options.latents)
    if matmul is None:
        return PlainStep(sae, n_dead)
    step = TrainStep(
        sae, lr=0.0, weights=WEIGHTS, use_ghost_grads=n_dead > 0 and arch == "relu", dead_feature_window=1 << 40,
        matmul=matmul,
    )  # fmt: skip
    step.tracker.n_steps_since_fired[:n_dead] = 1 << 60
    return step


def run_steps(step: TrainStep | PlainStep, x: torch.Tensor, n: int = 1) -> None:
    """Steps that change nothing, so that the density stays."""
    for _ in range(n):
        kept = step.tracker.n_steps_since_fired.clone() if isinstance(step, TrainStep) else None
        step.step(x)
        if isinstance(step, TrainStep) and kept is not None:
            step.tracker.n_steps_since_fired.copy_(kept)
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def compare_products(options: argparse.Namespace, device: torch.device, products: Products) -> None:
    """Where sparse products become faster than dense ones: a ratio above 1 says that they are."""
    x = make_batch(options, device)
    dtype = choose_matmul(products, device, None).dtype
    wanted = DENSE_OR_SPARSE if "ALL" in options.arch else options.arch
    if foreign := [arch for arch in wanted if arch not in DENSE_OR_SPARSE]:
        sys.exit(f"--crossover is for {', '.join(DENSE_OR_SPARSE)}: products of {foreign[0]} are always sparse")
    for arch, density in itertools.product(wanted, options.density or CROSSOVER):
        sizes = argparse.Namespace(**{**vars(options), "k": max(1, round(density * options.latents))})
        dense = make_step(sizes, device, arch, density, MatmulConfig(dtype, sparse_below=0.0))
        sparse = make_step(sizes, device, arch, density, MatmulConfig(dtype, sparse_below=1.1))
        compare(
            "crossover",
            lambda: run_steps(dense, x, options.in_a_row),  # noqa: B023 - called at once
            lambda: run_steps(sparse, x, options.in_a_row),  # noqa: B023
            rounds=options.rounds, repeats=options.in_a_row, in_a_row=options.in_a_row,
            arch=arch, d_in=options.d_in, latents=options.latents, tokens=options.tokens,
            density=density, precision=products.precision, kernels=has_kernels(device),
        )  # fmt: skip


class Peak(NamedTuple):
    """Memory of a process, in bytes."""

    peak: int
    """The most that its steps take, `loaded` included."""
    loaded: int
    """What a tiny step leaves behind."""


def run_peak(options: argparse.Namespace, arch: str, density: float, precision: str, which: str) -> Peak:
    """Peak memory of a step in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.train_step", "--arch", arch, "--k", options.k,
        "--d-in", options.d_in, "--latents", options.latents,
        "--tokens", options.tokens, "--density", density, "--precision", precision, "--device", options.device,
        "--ghost-share", options.ghost_share, "--peak-of", which, *(["--no-kernels"] if options.no_kernels else []),
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return Peak(*map(int, done.stdout.split()))


def measure_peak(options: argparse.Namespace, device: torch.device, products: Products) -> Peak:
    """Peak memory of this process's steps above what it had before."""
    matmul = None if options.peak_of == "plain" else choose_matmul(products, device, None)
    (arch,), (density,) = options.arch, options.density
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # loads the libraries
    before = _allocated(device)
    tiny = argparse.Namespace(**{**vars(options), **TINY})
    run_steps(make_step(tiny, device, arch, density, matmul), make_batch(tiny, device))
    loaded = _allocated(device) - before
    step, x = make_step(options, device, arch, density, matmul), make_batch(options, device)
    run_steps(step, x)  # makes the moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run_steps(step, x)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    return Peak(peak - before, loaded)


def _allocated(device: torch.device) -> int:
    """Memory that the process has on a device, in bytes."""
    return _resident() if device.type == "cpu" else torch.cuda.memory_allocated()


def _resident(name: str = "VmRSS") -> int:
    """Resident memory, in bytes; Linux says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
