"""Check that autoencoders of dictionary_learning, sparsify and overcomplete compute here what they compute there.

Each wants an environment of its own:

    python3 -m venv .venv-other
    .venv-other/bin/pip install -c constraints.txt dictionary-learning click zarr numcodecs dask fsspec
    PYTHONPATH=.:cache:pipeline .venv-other/bin/python scripts/check_other_programs.py dictionary_learning

dictionary_learning imports transformers, which fails with a torchvision for another build of torch: uninstall that.
overcomplete 0.3.0 needs `matplotlib<3.9`.
The packages are called `dictionary-learning`, `eai-sparsify` and `overcomplete`. Every class is made with random
weights, saved, read here, and compared on random tokens. A line each; exit code 1 if any differs.
"""

import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cytosae.formats.checkpoint import load_sae
from cytosae.formats.foreign import Activation

D, S, K = 48, 256, 8
GENERATOR = torch.Generator().manual_seed(0)
X = 2 * torch.randn(500, D, generator=GENERATOR)

Made = tuple[str, Path, Activation | None, torch.Tensor, torch.Tensor]
"""Name, path, what must be stated, activations and reconstructions of `X`."""


def main() -> None:
    """Check the program that the command line names."""
    package, make = PROGRAMS[sys.argv[1]]
    same = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, path, activation, acts, rebuilt in make(Path(folder)):
            sae = load_sae(path, activation=activation).sae
            found = sae.encode(X)
            distance = max(distance_of(found, acts), distance_of(sae.decode(found), rebuilt))
            # Rounding alone decides about values at a threshold.
            same.append(float(distance) < 1e-5 and float(((found > 0) != (acts > 0)).float().mean()) < 1e-5)
            verdict, l0 = "same" if same[-1] else "DIFFERENT", (acts > 0).float().sum(dim=1).mean()
            print(f"{name} as {sae.architecture}: {verdict}, largest difference {distance:.1e}, L0 {l0:.1f}")
    print(f"{package} {version(package)}, torch {torch.__version__}")
    sys.exit(0 if same and all(same) else 1)


def make_dictionary_learning(folder: Path) -> Iterator[Made]:
    """Every class that `load_dictionary` opens."""
    from dictionary_learning import dictionary, utils

    topk = {"k": K}
    for name, arguments in (
        ("AutoEncoder", {}), ("AutoEncoderNew", {}), ("GatedAutoEncoder", {}), ("JumpReluAutoEncoder", {}),
        ("AutoEncoderTopK", topk), ("BatchTopKSAE", topk),
        ("MatryoshkaBatchTopKSAE", {**topk, "group_sizes": [64, S - 64]}),
    ):  # fmt: skip
        kind = getattr(dictionary, name, None) or getattr(utils, name)
        made, place = kind(D, S, **arguments), folder / name
        randomise_(made)
        place.mkdir()
        torch.save(made.state_dict(), place / "ae.pt")
        trainer = {"dict_class": name, **({"k": K} if arguments else {})}
        (place / "config.json").write_text(json.dumps({"trainer": trainer}))
        theirs = utils.load_dictionary(str(place), "cpu")[0]
        acts = theirs.encode(X.clone())
        yield name, place, None, acts, theirs.decode(acts)
        if name == "AutoEncoderTopK":
            (place / "config.json").unlink()
            yield f"{name} without config", place / "ae.pt", Activation("topk"), acts, theirs.decode(acts)


def make_sparsify(folder: Path) -> Iterator[Made]:
    """A sparse coder in two precisions."""
    from sparsify import SparseCoder, SparseCoderConfig

    for dtype in (torch.float32, torch.float16):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=S, k=K, multi_topk=True), dtype=dtype)
        randomise_(coder)
        place = folder / str(dtype)
        coder.save_to_disk(place)
        coder = coder.float()
        top_acts, indices, _ = coder.encode(X)
        acts = torch.zeros(len(X), S).scatter(-1, indices, top_acts)
        yield f"SparseCoder saved as {dtype}", place, None, acts, acts @ coder.W_dec + coder.b_dec


def make_overcomplete(folder: Path) -> Iterator[Made]:
    """Classes with a linear encoder, also with batch normalisation, tied, and with an archetypal dictionary."""
    # Its autoencoders do not use torchvision, whose build would have to match that of torch.
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision"].transforms = None  # type: ignore[attr-defined]
    from overcomplete import sae as module

    points = torch.randn(40, D, generator=GENERATOR)
    topk = {"top_k": K}
    variants: list[tuple[str, Callable[[], Any], Activation | None]] = [
        ("SAE", lambda: module.SAE(D, S), Activation("relu")),
        ("SAE mlp_bn_1", lambda: module.SAE(D, S, encoder_module="mlp_bn_1"), Activation("relu")),
        ("TopKSAE", lambda: module.TopKSAE(D, S, **topk), Activation("topk", K)),
        ("TopKSAE mlp_bn_1", lambda: module.TopKSAE(D, S, encoder_module="mlp_bn_1", **topk), Activation("topk", K)),
        ("TopKSAE tied", lambda: module.TopKSAE(D, S, **topk).tied(bias=True), Activation("topk", K)),
        ("TopKSAE untied", lambda: module.TopKSAE(D, S, **topk).untied(), Activation("topk", K)),
        (
            "TopKSAE multiplier",
            lambda: module.TopKSAE(D, S, dictionary_params={"use_multiplier": True}, **topk),
            Activation("topk", K),
        ),
        ("RATopKSAE", lambda: module.RATopKSAE(D, S, points, **topk), Activation("topk", K)),
        ("JumpSAE", lambda: module.JumpSAE(D, S), None),
        ("BatchTopKSAE", lambda: module.BatchTopKSAE(D, S, **topk), Activation("batchtopk", threshold=0.5)),
    ]
    for name, make, activation in variants:
        made = make()
        randomise_(made)
        if name == "BatchTopKSAE":
            made.running_threshold = torch.tensor(0.5)
        made.eval()
        place = folder / f"{name}.pt"
        torch.save(made.state_dict(), place)
        acts = made.encode(X)[1]
        yield name, place, activation, acts, made.decode(acts)


def randomise_(module: torch.nn.Module) -> None:
    """Move every floating-point parameter and buffer; thresholds and variances stay above 0, multipliers near it."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not key.endswith(".C"):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=GENERATOR).to(tensor.dtype))
            if key.endswith(("threshold", "running_var")):
                tensor.abs_()


def distance_of(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Largest difference, in terms of the largest value."""
    return (found - wanted).abs().max() / wanted.abs().max()


PROGRAMS: dict[str, tuple[str, Callable[[Path], Iterator[Made]]]] = {
    "dictionary_learning": ("dictionary-learning", make_dictionary_learning),
    "sparsify": ("eai-sparsify", make_sparsify),
    "overcomplete": ("overcomplete", make_overcomplete),
}


if __name__ == "__main__":
    main()
