"""Mediums: what a family is shown and makes. One module each, found by name; the rest asks its family's.

A medium knows how examples are found on disk, how they are put on a sheet for a person, what a generated one
is given, and how it is written. `Family.medium` names it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid import cutouts, data, media

if TYPE_CHECKING:
    import numpy as np

    from inlaid.families import Family

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Picture:
    """An image that something is made from: its origin, and uint8 (h, w, 3), or a map of numbers (h, w)."""

    name: str
    pixels: np.ndarray


Images = Sequence[str] | data.Window
"""Image files, or the window whose own are taken."""


class Medium(ABC):
    """What differs between kinds of examples. Stateless."""

    one: ClassVar[str]
    """What an example is called."""
    makes: ClassVar[str]
    """What `generate` makes."""
    asks: ClassVar[str]
    """What `inlaid generate` is given, for a line that shows it."""
    columns: ClassVar[tuple[str, str, str]]
    """Heads of the table of shapes: length, size, and how many."""

    @abstractmethod
    def plan(
        self,
        config: recipe.Config,
        family: Family,
        progress: Progress | None = None,
        probe: Callable[[Path], media.Probe] = media.probe,
        look: Callable[[Path, Path | None], cutouts.Look] = cutouts.look,
    ) -> data.Plan:
        """Looks at every example and decides what a run sees; collects what is wrong."""

    @abstractmethod
    def task(self, family: Family) -> str:
        """What the Hub calls the purpose of what was trained."""

    @abstractmethod
    def sheet(self, rows: Sequence[tuple[data.Window, Any]], path: Path, title: str) -> None:
        """Draws windows and what `Window.read` gave of each into a PNG."""

    @abstractmethod
    def texts(self, prompts: Sequence[str], images: Sequence[Sequence[str]]) -> list[str]:
        """What each of those that are asked for is called.

        Raises:
            ValueError: when there are none, or of a kind that this medium does not take.
        """

    @abstractmethod
    def read(self, family: Family, source: Images, sample: recipe.Sample) -> list[Picture]:
        """The images that one is made from."""

    def asked(self, sample: recipe.Sample) -> dict[str, Any]:
        """What `Family.sample` is told besides steps and size."""
        return {}

    @abstractmethod
    def settings(self, sample: recipe.Sample, fps: float) -> dict[str, Any]:
        """What is written beside each, of how it was made."""

    @abstractmethod
    def write(self, stem: Path, made: Any, sample: recipe.Sample, fps: float) -> tuple[Path, dict[str, Any]]:
        """Writes what `Family.sample` gave, under a name without suffix.

        Returns:
            The main file, and what is written beside it of how it came out.
        """


def of(name: str) -> Medium:
    """A medium by its name."""
    return importlib.import_module(f"{__name__}.{name}").MEDIUM
