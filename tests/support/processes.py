"""Processes that tests start, stop and kill."""

from __future__ import annotations

import subprocess


def ended_process() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
