"""What only `make test-all` runs: of cases that are alike, `make test` runs some."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of `parametrize` that takes too long for every run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(cases: Iterable[Any], keep: Callable[[Any], bool]) -> list[Any]:
    """All cases, of which only those that are to `keep` run every time."""
    return [case if keep(case) else slow(case) for case in cases]
