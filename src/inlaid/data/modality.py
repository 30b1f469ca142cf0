"""Modalities, `video` and `scene`: the kind of media that a family is trained on and generates.

A modality defines how examples are found on disk and drawn on a contact sheet, and how generated media are
conditioned and written. Each modality is a module of this package; `Family.modality` is its name.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """A conditioning image: a name, and pixels uint8 (h, w, 3) or a segmentation (h, w) of object numbers."""

    name: str
    pixels: np.ndarray


ImageSource = Sequence[str] | Window
"""Image files, or a window whose frames are used."""


class Modality(ABC):
    """Interface of a modality. Stateless."""

    one: ClassVar[str]
    """Name of an example in messages."""
    makes: ClassVar[str]
    """Name of what `generate` makes."""
    asks: ClassVar[str]
    """Arguments of `inlaid generate` in printed example commands."""
    columns: ClassVar[tuple[str, str, str]]
    """Headings of the table of shapes: length, size and count."""

    @abstractmethod
    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probes: Probes | None = None,
    ) -> Plan:
        """Probe every example, select the windows of a run and collect problems.

        Args:
            config: the recipe.
            family: family of the run.
            progress: called with (done, total) while examples are probed.
            probes: probes of files; a cache has a memoized version. Default: read the files.
        """

    @abstractmethod
    def task(self, family: Family) -> str:
        """Return the Hub's `pipeline_tag`, such as `text-to-video`."""

    @abstractmethod
    def sheet(self, rows: Sequence[tuple[Window, Any]], path: Path, title: str) -> None:
        """Draw pairs of a window and the result of `Window.read` as a contact sheet in PNG."""

    @abstractmethod
    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """Return the prompt or name of each requested generation.

        Raises:
            ValueError: if there are none, or if this modality does not accept prompts.
        """

    @abstractmethod
    def read(self, family: Family, source: ImageSource, sample: recipe.Sample) -> list[NamedImage]:
        """Read the conditioning images of one generation."""

    def asked(self, sample: recipe.Sample) -> dict[str, Any]:
        """Return arguments of `Family.sample` besides steps and size."""
        return {}

    @abstractmethod
    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """Return the sampling settings that are recorded beside each generated file."""

    @abstractmethod
    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Write the result of `Family.sample` to `stem` plus suffixes.

        Returns:
            The main file, and facts about the result that are recorded beside it.
        """


def modality_of(name: str) -> Modality:
    """Return a modality by name."""
    return importlib.import_module(f"{__name__}_{name}").MODALITY
