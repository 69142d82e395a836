"""Typed configuration: schema, TOML files, overrides. Unknown keys are errors that name the nearest key."""

from ridgeline.config.load import load_config, parse_config
from ridgeline.config.schema import (
    DataSection,
    FilterSection,
    JobConfig,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    TokenizerSection,
    TrainSection,
)

__all__ = [
    "DataSection",
    "FilterSection",
    "JobConfig",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "TokenizerSection",
    "TrainSection",
    "load_config",
    "parse_config",
]
