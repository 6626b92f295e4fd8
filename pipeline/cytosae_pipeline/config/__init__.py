"""What each verb can be told: frozen records whose fields are the command line's options.

Defaults, help texts, choices and ranges are declared once, beside the field, and checked when a record is made, so that
Python and the command line give the same errors. Nothing heavy is imported here: `--help` must answer at once.
"""

from cytosae_pipeline.config.apply import ApplyConfig
from cytosae_pipeline.config.build import BuildConfig
from cytosae_pipeline.config.demo import DemoConfig
from cytosae_pipeline.config.evaluate import (
    CompareConfig,
    CompareOptions,
    EffectOptions,
    EvaluateConfig,
    EvaluateOptions,
)
from cytosae_pipeline.config.export import ExportConfig
from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.config.rating import PassedChoice, RateChoice, RatingRule, RatingsConfig
from cytosae_pipeline.config.report import ExploreConfig, PageConfig, ReportConfig
from cytosae_pipeline.config.statistics import PassOptions, ReadOptions, SaeChoice, StatisticsConfig, StatisticsOptions
from cytosae_pipeline.config.store import StoreChoice, StoreSource, VerifyConfig, WorkspaceChoice
from cytosae_pipeline.config.train import PRESETS, TrainConfig

__all__ = [
    "PRESETS",
    "ApplyConfig",
    "BuildConfig",
    "CompareConfig",
    "CompareOptions",
    "DemoConfig",
    "EffectOptions",
    "EvaluateConfig",
    "EvaluateOptions",
    "ExploreConfig",
    "ExportConfig",
    "ImportConfig",
    "PageConfig",
    "PassOptions",
    "PassedChoice",
    "RateChoice",
    "RatingRule",
    "RatingsConfig",
    "ReadOptions",
    "ReportConfig",
    "SaeChoice",
    "StatisticsConfig",
    "StatisticsOptions",
    "StoreChoice",
    "StoreSource",
    "TrainConfig",
    "VerifyConfig",
    "WorkspaceChoice",
]
