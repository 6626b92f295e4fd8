"""Options that only some architectures have: refused elsewhere, and filled in by the architecture at one place."""

from dataclasses import replace

import pytest

from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.config.train import OF_ARCHITECTURES, PRESETS
from cytosae_pipeline.errors import UserError

OWN = {
    "relu": {"l1_coefficient"},
    "gated": {"l1_coefficient"},
    "topk": {"k", "aux_coefficient"},
    "batchtopk": {"k", "aux_coefficient"},
    "matryoshka": {"k", "aux_coefficient"},
    "jumprelu": {"k", "l0_coefficient", "bandwidth"},
}


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize("name", OF_ARCHITECTURES)
def test_an_option_of_another_architecture_is_refused(arch, name):
    value = OF_ARCHITECTURES[name]
    if name in OWN[arch]:
        assert getattr(TrainConfig(arch=arch, **{name: value}), name) == value
        return
    owners = ", ".join(
        other for other in ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka") if name in OWN[other]
    )
    with pytest.raises(UserError, match=f"^{name} is an option of arch {owners}, found arch {arch}: leave it out, or"):
        TrainConfig(arch=arch, **{name: value})


@pytest.mark.parametrize("arch", OWN)
def test_options_are_filled_in_by_the_architecture(arch):
    config = TrainConfig(arch=arch)
    filled = config.filled()
    for name, value in OF_ARCHITECTURES.items():
        assert getattr(config, name) is None
        assert getattr(filled, name) == (value if name in OWN[arch] else None)
    assert replace(filled, seed=1).filled() == replace(filled, seed=1)


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_every_architecture(preset, arch):
    config = TrainConfig(preset=preset, arch=arch)
    for name, value in PRESETS[preset].items():
        if name not in {*OF_ARCHITECTURES, "use_ghost_grads", "arch"}:
            assert getattr(config, name) == value
    assert config.use_ghost_grads == (preset == "cytosae" and arch == "relu")
    assert replace(config, seed=3).filled().arch == arch
