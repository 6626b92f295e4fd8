"""Config records: the same checks from Python as on the command line, nearest names, and types that are accepted."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner

from cytosae_pipeline.cli.app import cli
from cytosae_pipeline.config import (
    BuildConfig,
    DemoConfig,
    ExploreConfig,
    ExportConfig,
    RatingsConfig,
    ReportConfig,
    StatisticsConfig,
    StoreSource,
    TrainConfig,
)
from cytosae_pipeline.config.fields import check_field, parse_hint
from cytosae_pipeline.errors import UserError
from tests.support.patience import patience

RECORDS = [
    StoreSource,
    BuildConfig,
    TrainConfig,
    StatisticsConfig,
    ExportConfig,
    RatingsConfig,
    ReportConfig,
    ExploreConfig,
    DemoConfig,
]


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (TrainConfig, {"b_dec_init_method": "median"}, "b_dec_init_method must be geometric_median, mean or zeros"),
        (
            TrainConfig,
            {"tokens": "patch"},
            "tokens must be all, patches or cls, found 'patch'. Did you mean 'patches'?",
        ),
        (TrainConfig, {"shuffle": "globall"}, "Did you mean 'global'?"),
        (TrainConfig, {"held_out_by": "cell"}, "held_out_by must be image, patient or subject, found 'cell'"),
        (TrainConfig, {"resident": "disk"}, "resident must be auto, none, ram or gpu, found 'disk'"),
        (TrainConfig, {"precision": "fp64"}, "precision must be auto, fp32 or bf16, found 'fp64'"),
        (StatisticsConfig, {"precision": "fp64"}, "precision must be auto, fp32, bf16 or fp16, found 'fp64'"),
        (TrainConfig, {"k": 2.5}, "k must be a whole number, found 2.5"),
        (TrainConfig, {"k": True}, "k must be a whole number, found True"),
        (TrainConfig, {"lr": "fast"}, "lr must be a number, found 'fast'"),
        (TrainConfig, {"lr": float("nan")}, "lr must be at least 0, found nan"),
        (TrainConfig, {"lr": float("inf")}, "lr must be at least 0, found inf"),
        (TrainConfig, {"seed": 2**64}, "seed must be at most 9223372036854775807"),
        (TrainConfig, {"standardise": 1}, "standardise must be true or false, found 1"),
        (TrainConfig, {"root_dir": 3}, "root_dir must be a path, found 3"),
        (TrainConfig, {"root_dir": None}, "root_dir must be a path, found None"),
        (TrainConfig, {"run_name": 3}, "run_name must be text, found 3"),
        (TrainConfig, {"max_memory": 0}, "max_memory must be above 0, found 0"),
        (StatisticsConfig, {"threshold": ()}, "threshold must be given at least once"),
        (StatisticsConfig, {"threshold": (0.2, 0.2)}, "threshold must not repeat a value, found 0.2, 0.2"),
        (StatisticsConfig, {"threshold": -1}, "threshold must be at least 0, found -1"),
        (TrainConfig, {"clip_dim": -5}, "clip_dim must be at least 1, found -5"),
        (TrainConfig, {"resume": "a", "run_name": "b"}, "resume names the run 'a', and run_name another"),
        (TrainConfig, {"preset": "moderm"}, "preset must be cytosae or modern, found 'moderm'. Did you mean 'modern'?"),
        (DemoConfig, {"seed": 2**64}, "seed must be at most 9223372036854775807, found 18446744073709551616"),
        (DemoConfig, {"seed": -1}, "seed must be at least 0, found -1"),
        (TrainConfig, {"seed": -1}, "seed must be at least 0, found -1"),
        (StatisticsConfig, {"sae_arch": "topkk"}, "sae_arch must be relu, topk, batchtopk, "),
        (StatisticsConfig, {"sae_k": 3}, "sae_k needs sae_arch topk or batchtopk, found none"),
        (StatisticsConfig, {"sae_arch": "relu", "sae_k": 3}, "sae_k needs sae_arch topk or batchtopk, found relu"),
        (
            StatisticsConfig,
            {"sae_arch": "topk", "sae_threshold": 1.0},
            "sae_threshold needs sae_arch batchtopk, found t",
        ),
        (ReportConfig, {"seed": 2**32}, "seed must be at most 4294967295, found 4294967296"),
        (ExploreConfig, {"port": 65536}, "port must be at most 65535, found 65536"),
    ],
)
def test_python_gets_the_errors_of_the_command_line(record, values, message):
    with pytest.raises(UserError) as caught:
        record(**values)
    assert message in str(caught.value)


def test_the_command_line_suggests_the_nearest_choice():
    result = CliRunner().invoke(cli, ["train", "--shuffle", "globall"])
    assert result.exit_code == 2
    assert "'globall' is not one of 'global', 'windowed'. Did you mean 'global'?" in result.output
    result = CliRunner().invoke(cli, ["train", "--shuffle", "xyz"])
    assert "is not one of 'global', 'windowed'.\n" in result.output


def test_paths_may_be_text_and_numbers_of_other_kinds():
    config = StatisticsConfig(
        root_dir="ws", images="a/b", sae_path="x.pt", store=Path("s.zarr"), top_k=np.int64(3), threshold=[0, 1]
    )
    assert (config.root_dir, config.images, config.sae_path) == (Path("ws"), Path("a/b"), Path("x.pt"))
    assert config.store == "s.zarr"
    assert config.top_k == 3
    assert type(config.top_k) is int
    assert config.threshold == (0.0, 1.0)
    assert [type(value) for value in config.threshold] == [float, float]


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_is_checked_and_every_default_passes(record):
    hints = typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        assert check_field(record, field.name, field.default) == field.default
        hint, is_optional, _ = parse_hint(hints[field.name])
        assert hint in (bool, int, float, str, Path) or typing.get_origin(hint) is Literal, field.name
        if not is_optional:
            with pytest.raises(UserError, match=field.name):
                check_field(record, field.name, None)
        with pytest.raises(UserError, match=field.name):
            check_field(record, field.name, object())


def test_both_spellings_of_standardise():
    for name in ("--standardise", "--standardize"):
        result = CliRunner().invoke(cli, ["train", name, "--dataset_name", "none_here"])
        assert "No such option" not in result.output
        assert result.exit_code == 1


def test_config_and_help_import_nothing_heavy():
    code = (
        "import sys, cytosae_pipeline.config, cytosae_pipeline.cli.app; "
        "assert not {'torch', 'numpy', 'zarr', 'dask', 'transformers', 'wandb', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=patience())
