"""Modalities `video` and `scene`: the kinds of media that model families are trained on and generate.

A modality defines how training examples are found on disk and shown on a contact sheet, how conditioning
images are read, and how generated media are written. Each modality is a module `modality_NAME` of this
package, where NAME is `Family.modality`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid.data.clips import Window
from inlaid.data.plan import Plan
from inlaid.data.probes import Probes

if TYPE_CHECKING:
    import numpy as np

    from inlaid.families import Family


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NamedImage:
    """Conditioning image with a name: uint8 pixels (h, w, 3), or a segmentation (h, w) with object IDs."""

    name: str
    pixels: np.ndarray
    objects: Mapping[int, str] = field(default_factory=dict)
    """Names of the segmented objects by ID, in the order in which the objects are generated."""


ImageSource = Sequence[str] | Window
"""Paths of image files, or a window from which the images are taken."""


class Modality(ABC):
    """Interface of a modality, such as video. Implementations keep no state."""

    one: ClassVar[str]
    """Word for a training example in messages, such as `clip`."""
    makes: ClassVar[str]
    """Word for an output of `inlaid generate`, such as `video`."""
    asks: ClassVar[str]
    """Arguments of `inlaid generate` in printed example commands."""
    columns: ClassVar[tuple[str, str, str]]
    """Column headings for length, size and number of windows, for the printed table of training shapes."""

    @abstractmethod
    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probes: Probes | None = None,
    ) -> Plan:
        """Probe every training example, select the parts of clips to train on, and collect problems.

        Args:
            config: the recipe.
            family: model family of the run.
            progress: called with (done, total) while examples are probed.
            probes: reader of file properties, such as `CachedProbes`. Default: a reader without a cache.
        """

    @abstractmethod
    def task(self, family: Family) -> str:
        """Return the `pipeline_tag` for the Hugging Face Hub, such as `text-to-video`."""

    @abstractmethod
    def sheet(self, rows: Sequence[tuple[Window, Any]], path: Path, title: str) -> None:
        """Write a contact sheet of training examples as PNG.

        Args:
            rows: pairs of a window and its data, as returned by `Window.read`.
            path: output file.
            title: heading of the contact sheet.
        """

    @abstractmethod
    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Return one text for each output: its prompt or, for scenes, the file name of its input image.

        Raises:
            ValueError: if prompts or images are missing, or if the modality does not accept prompts.
        """

    @abstractmethod
    def read(self, family: Family, source: ImageSource, sample: recipe.Sample) -> list[NamedImage]:
        """Read the conditioning images from which one output is generated."""

    def asked(self, sample: recipe.Sample, images: Sequence[NamedImage]) -> dict[str, Any]:
        """Return the arguments of `Family.sample` that only this modality uses."""
        return {}

    @abstractmethod
    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """Return the sampling settings to record beside each generated file."""

    @abstractmethod
    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Write the output of `Family.sample` to files whose names are `stem` plus a suffix.

        Returns:
            The path of the main file, and metadata to record beside this file.
        """


def modality_of(name: str) -> Modality:
    """Return the modality with this name."""
    return importlib.import_module(f"{__name__}_{name}").MODALITY
