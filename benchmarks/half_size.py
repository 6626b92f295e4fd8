"""What an int8 store costs: `python -m benchmarks.half_size --store PATH [--store PATH ...]`.

Quantizes the activations of existing float16 stores in memory. Lines named `error` compare methods of quantization.
Lines named `same_sae` evaluate the autoencoder trained on float16 on both kinds of activations. Lines named `own_sae`
compare it with an autoencoder trained on int8, and with others trained on float16 with another seed or another order of
additions. Explained variance and L0 are measured on the float16 activations of held-out images.
"""

import argparse
import json
import time
from collections.abc import Callable  # noqa: TC003

import numpy as np
import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae
from cytosae.statistics.accumulators import FeatureStatistics
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.training.geometric_median import geometric_median
from cytosae.training.lr_schedule import LearningRateSchedule
from cytosae.training.matmul import MatmulConfig
from cytosae.training.step import TrainStep
from cytosae_cache.format.quantize import SCALE_BYTES, Channels, dequantize, measure_channels, quantize
from cytosae_cache.reading.permutation import iter_batches, spread_rows
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore

SAMPLE_IMAGES = 256


def report(name: str, **values: object) -> None:
    print(json.dumps({"name": name, **values}), flush=True)


def round_trip(images: np.ndarray, channels: Channels) -> np.ndarray:
    out, wide = np.empty_like(images), np.empty(images.shape[1:], np.float32)
    for record, target in zip(encode(images, channels), out, strict=True):
        dequantize(record, channels, target, wide)
    return out


def encode(images: np.ndarray, channels: Channels) -> np.ndarray:
    n, n_tokens, d_model = images.shape
    records = np.empty((n, n_tokens, d_model + SCALE_BYTES), np.int8)
    for image, record in zip(images, records, strict=True):
        quantize(image, channels, record)
    return records


def clip_channels(images: np.ndarray, channels: Channels, sample: np.ndarray) -> np.ndarray:
    """One scale per channel only: 127 is the sample's largest distance from the mean, larger ones are clipped."""
    step = np.abs(sample.astype(np.float32) - channels.mean).max(axis=(0, 1)) / 127
    codes = np.clip(np.rint((images.astype(np.float32) - channels.mean) / step), -127, 127)
    return (codes * step + channels.mean).astype(images.dtype)


def relative_error(images: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference over that of the centred activations."""
    wide = images.astype(np.float64).reshape(-1, images.shape[-1])
    difference = other.astype(np.float64).reshape(wide.shape) - wide
    return float(np.sqrt((difference**2).sum() / ((wide - wide.mean(axis=0)) ** 2).sum()))


def compare_methods(images: np.ndarray, store: str) -> Channels:
    """Print the error of each method; returns the channels of the first images, as a build would measure them."""
    first, d_model = images[:SAMPLE_IMAGES], images.shape[-1]
    spread = images[spread_rows(len(images), SAMPLE_IMAGES)]
    none = Channels(np.zeros(d_model, np.float32), np.ones(d_model, np.float32))
    methods: dict[str, Callable[[], np.ndarray]] = {
        "one scale per token": lambda: round_trip(images, none),
        "one scale per channel, clipped": lambda: clip_channels(images, measure_channels(spread), spread),
        "channels of the first images, then one scale per token": lambda: round_trip(images, measure_channels(first)),
        "channels of images spread over the store, then one scale per token": lambda: round_trip(
            images, measure_channels(spread)
        ),
    }
    for method, function in methods.items():
        report(
            "error",
            store=store,
            method=method,
            images=len(images),
            relative_error=round(relative_error(images, function()), 5),
        )
    return measure_channels(first)


def time_decoding(images: np.ndarray, channels: Channels, store: str, rounds: int = 5) -> None:
    """Print the speed of encoding and decoding on one core, and of copying the float16 numbers."""
    part = images[:64]
    records, out, wide = encode(part, channels), np.empty_like(part), np.empty(part.shape[1:], np.float32)

    def decode() -> None:
        for record, target in zip(records, out, strict=True):
            dequantize(record, channels, target, wide)

    times: dict[str, list[float]] = {"copy": [], "quantize": [], "dequantize": []}
    ways = (
        ("copy", lambda: np.copyto(out, part)),
        ("quantize", lambda: encode(part, channels)),
        ("dequantize", decode),
    )
    for _ in range(rounds):
        for name, function in ways:
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    speeds = {f"{name}_gb_s": round(part.nbytes / min(kept) / 1e9, 2) for name, kept in times.items()}
    report("speed", store=store, bytes_per_image=records[0].nbytes, float16_bytes=part[0].nbytes, **speeds)


def train(images: np.ndarray, options: argparse.Namespace, *, seed: int = 42, order: int = 1) -> Sae:
    """Train with the reference recipe; the order of batches does not depend on the seed of the weights.

    Args:
        images: Activations, shape `(n, T, D)`.
        options: Sizes.
        seed: Seed of the weights.
        order: -1 reverses each batch: the same mathematics, different rounding.
    """
    sae = make_sae(
        "relu", images.shape[-1], options.expansion * images.shape[-1], seed=seed, device=torch.device("cpu")
    )
    tokens = torch.from_numpy(images[spread_rows(len(images), 64)]).float().flatten(0, 1)
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(tokens[spread_rows(len(tokens), 4096)]))
    step = TrainStep(
        sae, lr=0.001, weights=LossWeights(l1_coefficient=options.l1), use_ghost_grads=True, dead_feature_window=64,
        matmul=MatmulConfig(),
    )  # fmt: skip
    schedule = LearningRateSchedule(step.optimizer, "constantwithwarmup", n_steps=1, warm_up_steps=50)
    stop = int(options.epochs * len(images))
    for rows in iter_batches(len(images), batch_rows=16, seed=1, samples_seen=0, stop=stop):
        step.step(torch.from_numpy(images[rows[::order]]).float())
        schedule.step()
    sae.normalise_decoder_()
    return sae


@torch.no_grad()
def evaluate(sae: Sae, images: np.ndarray) -> dict[str, float]:
    """Explained variance (centred, exact), L0 and share of dead latents over all images."""
    width = images.shape[-1]
    error, total, squares, n_tokens, n_active = 0.0, np.zeros(width), 0.0, 0, 0
    fired = torch.zeros(sae.W_enc.shape[1], dtype=torch.bool)
    for start in range(0, len(images), 16):
        x = torch.from_numpy(images[start : start + 16]).float().flatten(0, 1)
        acts = sae.encode(x)
        error += float((sae.decode(acts).double() - x.double()).square().sum())
        total += x.double().sum(dim=0).numpy()
        squares += float(x.double().square().sum())
        n_tokens += len(x)
        n_active += int((acts > 0).sum())
        fired |= (acts > 0).any(dim=0)
    variance = squares - float((total**2).sum()) / n_tokens
    return {"ev": 1 - error / variance, "l0": n_active / n_tokens, "dead": float((~fired).double().mean())}


def top_images(sae: Sae, images: np.ndarray, k: int = 10) -> torch.Tensor:
    """Rows of the k largest scores of each latent, shape `(S, k)`, -1 for empty slots."""
    encoder, statistics = BlockEncoder(sae, (0.2,)), FeatureStatistics(sae.W_enc.shape[1], k)
    for start in range(0, len(images), 64):
        part = torch.from_numpy(images[start : start + 64])
        reduction = encoder.reduce(part, start)
        statistics.update(torch.arange(start, start + len(part)), reduction.scores)
    return statistics.result().indices


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean share of a latent's top images that both have, over latents with full lists in both."""
    alive = (first >= 0).all(dim=1) & (second >= 0).all(dim=1)
    same = (first[alive][:, :, None] == second[alive][:, None, :]).any(dim=2)
    return float(same.double().mean())


def study(path: str, options: argparse.Namespace) -> None:
    store = ActivationStore.open(path)
    with StoreReader(store) as reader:
        images = reader.read(store.valid_rows[spread_rows(len(store.valid_rows), options.images)])
    name = store.spec.model_name
    channels = compare_methods(images, name)
    time_decoding(images, channels, name)
    rounded = round_trip(images, channels)
    held = np.arange(len(images)) % 8 == 0
    sae = train(images[~held], options)
    base = evaluate(sae, images[held])
    tops = top_images(sae, images)

    def line(kind: str, what: str, found: dict[str, float], rows: torch.Tensor) -> None:
        more = {name: round(value, 5) for name, value in found.items()}
        moved = round(100 * (found["ev"] - base["ev"]) / base["ev"], 3)
        report(kind, store=name, what=what, **more, ev_moved_percent=moved, top10_overlap=round(overlap(tops, rows), 4))

    line("same_sae", "float16", base, tops)
    line("same_sae", "int8", evaluate(sae, rounded[held]), top_images(sae, rounded))
    for what, other in (
        ("trained on int8", lambda: train(rounded[~held], options)),
        ("trained on float16, batches reversed", lambda: train(images[~held], options, order=-1)),
        ("trained on float16, another seed", lambda: train(images[~held], options, seed=43)),
    ):
        trained = other()
        line("own_sae", what, evaluate(trained, images[held]), top_images(trained, images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="append", required=True, help="a float16 store; repeatable")
    parser.add_argument("--images", type=int, default=600, help="images used per store, spread over it")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--l1", type=float, default=0.0001)
    options = parser.parse_args()
    for path in options.store:
        study(path, options)


if __name__ == "__main__":
    main()
