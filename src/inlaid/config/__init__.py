"""Recipes: sections, loading and messages.

A recipe is a YAML file of sections. A value comes from the first of these that sets it: `key=value` override,
YAML file, default of the model family, default of the section. An unknown key is an error, and all errors of
a recipe are reported at once.
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
