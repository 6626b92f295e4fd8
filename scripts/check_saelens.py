"""Check exports against the real SAELens, which wants an environment of its own.

    python3 -m venv .venv-saelens
    .venv-saelens/bin/pip install -c constraints.txt sae-lens click zarr numcodecs dask fsspec
    PYTHONPATH=.:cache:pipeline .venv-saelens/bin/python scripts/check_saelens.py

Makes an autoencoder of every architecture with random weights, exports it, opens it with `SAE.load_from_disk` and
compares activations and reconstructions of random tokens. A line each; exit code 1 if any differs.
"""

import sys
import tempfile
from pathlib import Path

import torch
from sae_lens import SAE, __version__

from cytosae.formats.interop import write_saelens
from cytosae.sae.registry import ARCHITECTURES, make_sae

D, S, K = 48, 256, 8


def main() -> None:
    """Check every architecture."""
    generator = torch.Generator().manual_seed(0)
    differing = 0
    for name in ARCHITECTURES:
        sae = make_sae(name, D, S, k=K)
        for key, tensor in sae.state_dict().items():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            if key == "threshold":
                tensor.abs_()
        sae.normalise_decoder_()
        x = 2 * torch.randn(500, D, generator=generator)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            write_saelens(Path(folder), sae, {"model_name": "dinov2_vitb14", "block_layer": -2})
            theirs = SAE.load_from_disk(folder)
            acts, found = sae.encode(x), theirs.encode(x)
            found = found.to_dense() if found.is_sparse else found
            distance = (found - acts).abs().max() / acts.abs().max()
            distance = max(distance, (theirs.decode(found) - sae.decode(acts)).abs().max() / x.abs().max())
        l0 = (acts > 0).float().sum(dim=1).mean()
        same = float(distance) < 1e-5 and torch.equal(found > 0, acts > 0)
        differing += not same
        verdict = "same" if same else "DIFFERENT"
        print(f"{name}: {verdict} as {theirs.cfg.architecture()}, largest difference {distance:.1e}, L0 {l0:.1f}")
    print(f"sae-lens {__version__}, torch {torch.__version__}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
