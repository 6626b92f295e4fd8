"""Check exports and imports against a real SAELens, which wants an environment of its own.

    python3 -m venv .venv-saelens
    .venv-saelens/bin/pip install -c constraints.txt sae-lens click zarr numcodecs dask fsspec
    PYTHONPATH=.:cache:pipeline .venv-saelens/bin/python scripts/check_saelens.py

Older versions work in the same environment; again with 2.1.3, 3.23.4, 4.4.5, 5.11.0 and 6.0.0:

    .venv-saelens/bin/pip install --no-deps sae-lens==5.11.0

Exports (version 6 only): an autoencoder of every architecture with random weights is opened with `SAE.load_from_disk`.
Imports: SAELens makes and saves one of every kind that it has. Activations and reconstructions of random tokens are
compared. A line each; exit code 1 if any differs.
"""

import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sae_lens
import torch

from cytosae.formats.checkpoint import load_sae
from cytosae.formats.saelens import write_saelens
from cytosae.sae.base import Sae
from cytosae.sae.registry import ARCHITECTURES, make_sae

D, S, K = 48, 256, 8
VERSION = int(sae_lens.__version__.split(".")[0])
GENERATOR = torch.Generator().manual_seed(0)

LEGACY = {
    "d_in": D, "d_sae": S, "dtype": "float32", "device": "cpu", "activation_fn_str": "relu",
    "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 8, "model_name": "m",
    "hook_name": "blocks.0.hook_resid_post", "hook_layer": 0, "hook_head_index": None, "prepend_bos": True,
    "dataset_path": "d", "normalize_activations": "none", "sae_lens_training_version": None,
}  # fmt: skip
"""The config of versions 3 to 5, without what later ones added."""

ADDED = {"architecture": "standard", "dataset_trust_remote_code": True}
"""What they added."""

TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}

Made = tuple[str, Any, Callable[[Path], object]]


def main() -> None:
    """Check every architecture."""
    same = [*check_exports()] if VERSION >= 6 else []
    same += check_imports()
    print(f"sae-lens {sae_lens.__version__}, torch {torch.__version__}")
    sys.exit(0 if all(same) else 1)


def check_exports() -> Iterator[bool]:
    """Exports, opened by SAELens."""
    for name in ARCHITECTURES:
        sae = make_sae(name, D, S, k=K)
        randomise_(sae)
        sae.normalise_decoder_()
        with tempfile.TemporaryDirectory() as folder:
            write_saelens(Path(folder), sae, {"model_name": "dinov2_vitb14", "block_layer": -2})
            theirs = sae_lens.SAE.load_from_disk(folder)
            yield compare(f"export {name} as {theirs.cfg.architecture()}", sae, theirs)


def check_imports() -> Iterator[bool]:
    """What SAELens saves, read here."""
    for name, theirs, save in {2: make_2}.get(VERSION, make_3_to_5 if VERSION < 6 else make_6)():
        with tempfile.TemporaryDirectory() as parent, torch.no_grad():
            folder = Path(parent) / "sae"
            save(folder)
            yield compare(f"import {name}", load_sae(folder).sae, theirs)


def make_2() -> Iterator[Made]:
    """Autoencoders of version 2, whose class needs a training config."""
    from sae_lens.training.sparse_autoencoder import SparseAutoencoder

    more = {
        "l1_coefficient": 1.0, "lp_norm": 1.0, "lr": 1e-3, "lr_scheduler_name": "constant", "lr_warm_up_steps": 0,
        "use_ghost_grads": False, "hook_point": "blocks.0.hook_resid_post", "hook_point_layer": 0, "noise_scale": 0.0,
        "normalize_sae_decoder": True, "activation_fn": "relu", "scale_sparsity_penalty_by_decoder_norm": False,
        "decoder_orthogonal_init": False, "decoder_heuristic_init": False, "init_encoder_as_decoder_transpose": False,
        "normalize_activations": False,
    }  # fmt: skip
    for centred in (True, False):
        config = types.SimpleNamespace(d_in=D, d_sae=S, dtype=torch.float32, device="cpu", **more)
        config.apply_b_dec_to_input = centred
        theirs = SparseAutoencoder(config)
        randomise_(theirs)
        yield (
            f"2 relu apply_b_dec_to_input {centred}, scaling_factor",
            theirs,
            lambda path, sae=theirs: sae.save_model(path),
        )


def make_3_to_5() -> Iterator[Made]:
    """Autoencoders of versions 3 to 5: the architecture came with 3.7, topk as an architecture with 4.0."""
    from sae_lens.sae import SAEConfig

    known = set(SAEConfig.__dataclass_fields__)
    variants: list[tuple[str, dict[str, Any]]] = [
        ("relu", {}),
        ("relu apply_b_dec_to_input False", {"apply_b_dec_to_input": False}),
        ("relu finetuning_scaling_factor", {"finetuning_scaling_factor": True}),
    ]
    if "architecture" in known:
        variants += [("topk as activation", TOPK)]
        variants += [(name, {"architecture": name}) for name in ("gated", "jumprelu")]
        variants += [
            (f"{name} apply_b_dec_to_input False", {"architecture": name, "apply_b_dec_to_input": False})
            for name in ("gated", "jumprelu")
        ]
    if VERSION >= 4:
        variants += [("topk", {**TOPK, "architecture": "topk"})]
    for name, change in variants:
        values = {name: value for name, value in {**LEGACY, **ADDED, **change}.items() if name in known}
        theirs = sae_lens.SAE(SAEConfig.from_dict(values))
        randomise_(theirs)
        yield f"{VERSION} {name}", theirs, lambda path, sae=theirs: sae.save_model(str(path))


def make_6() -> Iterator[Made]:
    """Autoencoders of version 6, and training checkpoints with their inference version."""
    variants: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ("standard", "gated", "jumprelu")]
    variants += [(name, {"apply_b_dec_to_input": False}) for name in ("standard", "gated", "jumprelu")]
    variants += [("topk", {"k": K})]
    kind, config_kind = sae_lens.registry.get_sae_class("topk")
    if "rescale_acts_by_decoder_norm" in config_kind.__dataclass_fields__:
        variants += [("topk", {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False})]
    for name, change in variants:
        kind, config_kind = sae_lens.registry.get_sae_class(name)
        theirs = kind(config_kind(d_in=D, d_sae=S, **change))
        randomise_(theirs)
        yield f"6 {name} {change}", theirs, theirs.save_model
    for name, change in (("batchtopk", {"k": K}), ("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [64, S]})):
        try:
            kind, config_kind = sae_lens.registry.get_sae_training_class(name)
        except KeyError:
            continue
        training = kind(config_kind(d_in=D, d_sae=S, **change))
        randomise_(training)
        with tempfile.TemporaryDirectory() as folder:
            training.save_inference_model(folder)
            theirs = sae_lens.SAE.load_from_disk(folder)
        yield f"6 training checkpoint {name}", theirs, training.save_model


def randomise_(module: torch.nn.Module) -> None:
    """Move every parameter and buffer; thresholds stay above 0."""
    for key, tensor in module.state_dict().items():
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=GENERATOR).to(tensor.dtype))
        if "threshold" in key:
            tensor.abs_()


@torch.no_grad()
def compare(name: str, ours: Sae, theirs: Any) -> bool:  # noqa: ANN401 - of any version
    """Compare activations and reconstructions of random tokens, and print a line."""
    x = 2 * torch.randn(500, D, generator=GENERATOR)
    acts, found = ours.encode(x), theirs.encode(x)
    found = found.to_dense() if found.is_sparse else found
    distance = (found - acts).abs().max() / acts.abs().max()
    rebuilt = theirs.decode(found)
    distance = max(distance, (rebuilt - ours.decode(acts)).abs().max() / rebuilt.abs().max())
    l0 = (acts > 0).float().sum(dim=1).mean()
    # Rounding alone decides about values at a threshold.
    same = float(distance) < 1e-5 and float(((found > 0) != (acts > 0)).float().mean()) < 1e-5
    print(f"{name}: {'same' if same else 'DIFFERENT'}, largest difference {distance:.1e}, L0 {l0:.1f}")
    return same


if __name__ == "__main__":
    main()
