"""Commands in messages repeat the options that say what is meant, quoted for a shell."""

import shlex
from pathlib import Path

from cytosae_pipeline.config import BuildConfig, StatisticsConfig, TrainConfig
from cytosae_pipeline.config.commands import WHICH_IMAGES, WHICH_RESULTS, WHICH_STORE, command


def test_options_with_their_default_are_left_out_and_paths_are_quoted():
    config = StatisticsConfig(root_dir="my files", dataset_name="a", sae_path="it's.pt", batch_size=3)
    text = command("report", config)
    assert text == """cytosae-cache report --root_dir 'my files' --dataset_name a --sae_path 'it'"'"'s.pt'"""
    assert shlex.split(text)[-1] == "it's.pt"


def test_everything_that_says_what_is_meant_is_repeated():
    which = {
        "root_dir": Path("w"), "dataset_name": "a", "store": "s3://b/c.zarr", "model_name": "dinov2_vits14",
        "block_layer": 3, "model_path": Path("v.pth"), "images": Path("d"), "layout": "class", "vit_type": "mine",
        "sae_path": Path("s.pt"), "sae_arch": "batchtopk", "sae_k": 4, "sae_threshold": 0.5, "allow_mismatch": True,
        "image_size": 448, "image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "image_resample": "box",
        "white_level": 4095, "with_dataset": ("b", "c"), "joined_patients": "same",
    }  # fmt: skip
    words = shlex.split(command("features", StatisticsConfig(**which)))
    assert set(which) == set(WHICH_RESULTS) - {"module_name"}
    for name, value in which.items():
        at = words.index(f"--{name}")
        shown = [*map(str, value)] if isinstance(value, tuple) else [str(value)]
        if name == "with_dataset":
            shown = ["b", "--with_dataset", "c"]
        assert value is True or words[at + 1 : at + 1 + len(shown)] == shown


def test_only_options_of_the_record_and_of_the_choice_are_repeated():
    config = BuildConfig(root_dir="w", dataset_name="a", images="d", model_path="v.pth", overwrite=True)
    assert command("list", config, ("root_dir",)) == "cytosae-cache list --root_dir w"
    assert command("build", config, (*WHICH_STORE, *WHICH_IMAGES)) == (
        "cytosae-cache build --root_dir w --dataset_name a --model_path v.pth --images d"
    )


def test_further_options_replace_those_of_the_record():
    config = TrainConfig(dataset_name="a", store="s")
    text = command("patients", config, dataset_name=None, sae_path=Path("x y"), threshold=(0.1, 0.5), pretty=False)
    assert text == "cytosae-cache patients --store s --sae_path 'x y' --threshold 0.1 --threshold 0.5"


def test_without_options_there_is_only_the_verb():
    assert command("list") == "cytosae-cache list"
