"""`features` against the encoder's product alone and against a plain pass. Prints JSON lines.

    python -m benchmarks.features --images 256

Ours reads a store from the page cache, checks every image's checksum, encodes in float32 and keeps scores, top images,
means, sparsity and counts; where the machine has products of 8 bits, only latents that can be active are computed
(`screened`), unless `--dense` is given. It is compared with the encoder's product of the same tokens, already in
memory, in float32 and in bfloat16 (`against` is `product`), and with a plain pass (`plain`): float32 forward passes
with the decoder of the same images, all latents of a batch kept, as in the reference.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import compare
from benchmarks.storage import make_spec, write_store
from cytosae.sae.base import Sae
from cytosae.sae.int8_weights import has_int8_products
from cytosae.sae.registry import ARCHITECTURES, make_sae
from cytosae.statistics.accumulators import FeatureStatistics
from cytosae.statistics.block_encoder import BlockEncoder, ImageEncoder
from cytosae.statistics.screened_encoder import make_screened_encoder
from cytosae.statistics.screened_images import ScreenedImageEncoder
from cytosae.training.encoder_blocks import EncoderProduct
from cytosae.training.matmul import MatmulConfig
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.reader import StoreReader
from cytosae_pipeline.runtime.devices import choose_device

_BATCH = 64
_TOP_K = 10


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["relu"], choices=tuple(ARCHITECTURES))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense", action="store_true", help="compute all latents")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--folder", type=Path, help="where the store is written; default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        spec = make_spec(options.d_in)
        rng = np.random.default_rng(0)
        shape = (min(64, options.images), *spec.image_shape)
        shards = [
            rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
            for _ in range(-(-options.images // shape[0]))
        ]
        with StoreReader(write_store(Path(folder) / "store.zarr", spec, shards)) as reader:
            for arch in options.arch:
                run(reader, make_trained(arch, options), options)


def make_trained(arch: str, options: argparse.Namespace) -> Sae:
    """An autoencoder of which about k latents of a token are active."""
    sae = make_sae(arch, options.d_in, options.latents, k=options.k, device=choose_device(options.device))
    sae.tie_()
    x = torch.randn(64, options.d_in, generator=torch.Generator().manual_seed(1)).to(sae.b_dec.device)
    sae.fit_to_tokens_(x)
    sae.calibrate_(x)
    if arch in ("relu", "gated"):
        with torch.no_grad():
            sae.b_enc.sub_(sae.pre_activations(x).flatten().topk(options.k * len(x)).values[-1])
    return sae


def run(reader: StoreReader, sae: Sae, options: argparse.Namespace) -> None:
    """Compare a pass over the store with both baselines."""
    device = sae.b_dec.device
    tokens = torch.from_numpy(reader.read(np.arange(reader.store.n_images))).to(device).float()
    encoder = make_encoder(sae, screened=not options.dense and device.type == "cpu" and has_int8_products())
    sizes = {
        "arch": sae.architecture, "screened": isinstance(encoder, ScreenedImageEncoder),
        "images": len(tokens), "tokens": tokens.shape[1], "d_in": options.d_in,
        "latents": options.latents, "threads": torch.get_num_threads(), "device": device.type,
    }  # fmt: skip
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            products = [EncoderProduct(sae, part.flatten(0, 1), MatmulConfig(dtype)) for part in tokens.split(16)]
            compare(
                "features", lambda: multiply(products), lambda: make_features(reader, encoder),  # noqa: B023 - called at once
                against="product", dtype=str(dtype).removeprefix("torch."), rounds=options.rounds, **sizes,
            )  # fmt: skip
        compare(
            "features", lambda: pass_plainly(sae, tokens), lambda: make_features(reader, encoder), against="plain",
            rounds=options.rounds, **sizes,
        )  # fmt: skip


def multiply(products: list[EncoderProduct]) -> None:
    """The encoder's product of all tokens, and nothing else."""
    for product in products:
        for _ in product:
            pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_encoder(sae: Sae, *, screened: bool) -> ImageEncoder:
    """The encoder of `features`."""
    if screened and (encoder := make_screened_encoder(sae)) is not None:
        return ScreenedImageEncoder(sae, encoder, [0.2])
    return BlockEncoder(sae, [0.2])


def make_features(reader: StoreReader, encoder: ImageEncoder) -> None:
    """Feature data from the store, as `features` computes it."""
    statistics = FeatureStatistics(encoder.n_latents, _TOP_K, device=encoder.device)
    for block in iter_row_blocks(reader, block_rows=_BATCH):
        pooled = encoder.reduce(torch.from_numpy(block.activations), block.first)
        statistics.update(torch.arange(block.first, block.first + len(block.valid)), pooled.scores)
    statistics.result()


def pass_plainly(sae: Sae, tokens: torch.Tensor) -> None:
    """Feature data from whole forward passes."""
    scores = torch.cat([sae(part).acts.mean(dim=1) for part in tokens.split(16)])
    scores.topk(min(_TOP_K, len(scores)), dim=0)
    (scores.sum(dim=0) / (scores > 0).sum(dim=0).clamp(min=1)).cpu()


if __name__ == "__main__":
    main()
