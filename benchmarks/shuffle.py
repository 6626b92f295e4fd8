"""How well each training order mixes a store sorted by class: `python -m benchmarks.shuffle`.

Pure arithmetic on row numbers: no store, no disk. Each line compares an order with the global shuffle of the same
images. `rank_correlation` is the absolute Spearman correlation between file order and stream order, averaged over
epochs (0 is perfect). `class_distance` is the total variation distance between the labels of a batch and those of the
store, averaged over batches; that of the global shuffle is due to chance. `ratio` is the class distance of the global
shuffle over this one's.
"""

import argparse
import json

import numpy as np

from cytosae_cache.reading.sampler import RowLayout, Sampler


def make_layout(n_images: int, shard_images: int) -> RowLayout:
    """Layout of one store without unreadable images."""
    bounds = np.append(np.arange(0, n_images, shard_images), n_images)
    return RowLayout(bounds, np.array([0, n_images]))


def rank_correlation(rows: np.ndarray) -> float:
    """Spearman's correlation between the rows of an epoch, in the order served, and their positions in the file."""
    return float(np.corrcoef(rows, np.arange(len(rows)))[0, 1])


def class_distance(labels: np.ndarray, n_classes: int, store: np.ndarray) -> float:
    """Total variation distance between the labels of a batch and those of the store; between 0 and 1."""
    return 0.5 * float(np.abs(np.bincount(labels, minlength=n_classes) / len(labels) - store).sum())


def measure(sampler: Sampler, labels: np.ndarray, epochs: int) -> dict[str, float]:
    """Measure how well one order mixes, averaged over epochs."""
    store = np.bincount(labels) / len(labels)
    correlations, distances, n_present = [], [], []
    for epoch in range(epochs):
        first = epoch * sampler.n_rows
        batches = list(sampler.iter_batches(samples_seen=first, stop=first + sampler.n_rows))
        rows = [parts // sampler.parts_per_row for parts in batches]
        correlations.append(abs(rank_correlation(np.concatenate(rows))))
        distances += [class_distance(labels[part], len(store), store) for part in rows]
        n_present += [len(np.unique(labels[part])) for part in rows]
    return {
        "rank_correlation": float(np.mean(correlations)),
        "class_distance": float(np.mean(distances)),
        "classes_per_batch": float(np.mean(n_present)),
    }


def run(options: argparse.Namespace) -> None:
    layout = make_layout(options.images, options.shard_images)
    labels = np.arange(options.images) * options.classes // options.images
    orders = [("global", None), *(("windowed", window) for window in options.windows)]
    for batch_of, n_tokens in (("images", 1), ("tokens", options.tokens)):
        global_distance = None
        for shuffle, window in orders:
            more = {} if window is None else {"window_shards": window}
            sampler = Sampler(layout, n_tokens, options.batch, 0, shuffle, batch_of, **more)
            found = measure(sampler, labels, options.epochs)
            global_distance = global_distance or found["class_distance"]
            line = {
                "name": "shuffle",
                "shuffle": shuffle,
                "batch_of": batch_of,
                "window_shards": window,
                "ratio": round(global_distance / found["class_distance"], 3),
                **{name: round(value, 4) for name, value in found.items()},
                "images": options.images,
                "classes": options.classes,
                "shard_images": options.shard_images,
                "batch": options.batch,
                "epochs": options.epochs,
            }
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=41_621)
    parser.add_argument("--classes", type=int, default=18)
    parser.add_argument("--shard-images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--windows", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    run(parser.parse_args())


if __name__ == "__main__":
    main()
