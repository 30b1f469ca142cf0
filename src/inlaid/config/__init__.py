"""Recipes: sections, loading and messages.

A recipe is a YAML file of sections. A value comes from, in increasing priority: section default, family
default, YAML file, `key=value` override. An unknown key is an error, and all errors of a recipe are reported
at once.
"""

from inlaid.config.loading import build, load, merge, save
from inlaid.config.messages import explain
from inlaid.config.sections import (
    CARRIERS,
    Alpha,
    Config,
    Data,
    Full,
    Joint,
    LowRank,
    Matte,
    Memory,
    Merged,
    Model,
    Objective,
    Opaque,
    Optim,
    RgbaVae,
    Runtime,
    Sample,
    Section,
    Source,
    Train,
    Tuner,
)

__all__ = [
    "CARRIERS",
    "Alpha",
    "Config",
    "Data",
    "Full",
    "Joint",
    "LowRank",
    "Matte",
    "Memory",
    "Merged",
    "Model",
    "Objective",
    "Opaque",
    "Optim",
    "RgbaVae",
    "Runtime",
    "Sample",
    "Section",
    "Source",
    "Train",
    "Tuner",
    "build",
    "explain",
    "load",
    "merge",
    "save",
]
