"""The fuzzer for a bounded time: no traceback, no hang, bounded memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.untraced
def test_changed_files_are_refused_or_read() -> None:
    spec = importlib.util.spec_from_file_location("inlaid_fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec and spec.loader
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["inlaid_fuzz"] = fuzz  # for the worker processes
    spec.loader.exec_module(fuzz)
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import fuzz as runner
    finally:
        sys.path.pop(0)
    totals = runner.run(3000, 60)
    assert totals.cases > 50
    assert totals.tracebacks == [] and totals.hangs == []
    assert totals.peak < 2_000_000, "kB"
