"""Environments of other programs, made once in a folder: pinned versions, and the torch that our own tests use."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
"""The repository."""


class Rival(NamedTuple):
    """A program that trains sparse autoencoders."""

    package: str
    """Its distribution in the package index."""
    requirements: tuple[str, ...]
    """What is installed beside torch."""
    archs: tuple[str, ...]
    """Architectures that it trains towards a given number of active latents."""
    missing: str
    """Why the others are left out."""
    can_scale: bool = False
    """Whether its trainer has an option that scales activations."""
    removed: tuple[str, ...] = ()
    """Distributions that are uninstalled again."""


RIVALS = {
    "saelens": Rival(
        "sae-lens", ("sae-lens==6.54.12",), ("batchtopk", "topk", "jumprelu", "matryoshka"), "", can_scale=True
    ),
    "dictionary_learning": Rival(
        "dictionary-learning",
        ("dictionary-learning==0.1.0",),
        ("batchtopk", "topk", "jumprelu", "matryoshka"),
        "",
        can_scale=True,
        # It is for another build of torch, and transformers fails to import with it.
        removed=("torchvision",),
    ),
    "sparsify": Rival(
        "eai-sparsify",
        ("eai-sparsify==1.3.3",),
        ("topk",),
        "its activations are topk and groupmax",
    ),
    "overcomplete": Rival(
        "overcomplete",
        # It calls matplotlib.cm.get_cmap, which 3.9 removed.
        ("overcomplete==0.3.0", "matplotlib<3.9"),
        ("batchtopk", "topk"),
        "it has no matryoshka, and its jumprelu has no target for the number of active latents",
    ),
}
"""By the name of their adapter in `benchmarks/rivals`."""


class EnvironmentFailedError(RuntimeError):
    """A program cannot be installed."""


def default_folder() -> Path:
    """Where environments are made unless told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cytosae-cache" / "peers"


def torch_pin() -> str:
    """The requirement of torch in constraints.txt."""
    found = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[0]


def environment_dir(name: str, folder: Path) -> Path:
    """Where a program's environment is or will be: other requirements have another place.

    Args:
        name: The program, one of `RIVALS`.
        folder: Folder of all environments.
    """
    rival = RIVALS[name]
    digest = hashlib.sha256("\n".join([torch_pin(), *rival.requirements, *rival.removed]).encode()).hexdigest()[:8]
    return folder / f"{name}-{digest}"


def make_environment(name: str, folder: Path) -> Path:
    """The Python of a program's environment, which is made if it is not there.

    Args:
        name: The program, one of `RIVALS`.
        folder: Folder of all environments.

    Raises:
        EnvironmentFailedError: If a package cannot be installed.
    """
    rival = RIVALS[name]
    requirements = [torch_pin(), *rival.requirements]
    place = environment_dir(name, folder)
    python, made = place / "bin" / "python", place / "made"
    if not made.exists():
        print(f"make an environment of {', '.join(requirements)} in '{place}'", file=sys.stderr)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        steps = [[sys.executable, "-m", "venv", "--clear", place], [*pip, "install", "--quiet", *requirements]]
        if rival.removed:
            steps.append([*pip, "uninstall", "--quiet", "--yes", *rival.removed])
        for step in steps:
            if subprocess.run(step, check=False, stdout=sys.stderr).returncode:
                raise EnvironmentFailedError(
                    f"cannot install {name} in '{place}'; the reason is above. Leave it out with --programs, or give "
                    "another folder with --environments"
                )
        made.touch()
    return python
