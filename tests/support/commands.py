"""Runs commands as a shell would, in this process, so that a test costs milliseconds and not an import."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import typer

from inlaid.cli.main import main

_get_command = functools.cache(typer.main.get_command)
"""Which reads the signatures of all commands, each time that one is called."""


@dataclass(frozen=True)
class Done:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        """Everything, without the boxes and line breaks that a terminal's width puts into it."""
        return re.sub(r"[\s│╭╮╰╯─━]+", " ", self.out + self.err)


def inlaid(*arguments: object) -> Done:
    """Runs `inlaid ARGUMENTS...` and returns how it ended."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["inlaid", *map(str, arguments)]
    with (
        mock.patch("typer.main.get_command", _get_command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to see what a command has changed."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
