"""Description of a metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Display name, unit and meaning of a metric."""

    name: str
    brief: str
    """Short name for narrow tables; empty to omit the metric from them."""
    unit: str
    digits: int
    better: str
    """`lower`, `higher`, or empty if neither direction is better."""
    meaning: str
