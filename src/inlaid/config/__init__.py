"""Recipes: definition of the sections, loading, and error messages.

A recipe is a YAML file that consists of sections. Values have four sources, in order of precedence:
`key=value` override, YAML file, default of the model family, default of the section. An unknown key is an
error. All errors of a recipe are reported at once.
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
