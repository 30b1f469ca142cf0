"""Description of a metric for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Description of a metric for tables: its name, unit and explanation."""

    name: str
    brief: str
    """Short name for narrow tables. If it is empty, these tables omit the metric."""
    unit: str
    digits: int
    better: str
    """Direction that is better, `lower` or `higher`; empty if neither is better."""
    meaning: str
