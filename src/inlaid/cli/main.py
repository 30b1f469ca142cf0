"""Entry point: run a command, and report a user's mistake as one message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from inlaid.cli import prepare_commands, run_commands, share_commands  # noqa: F401 - register commands
from inlaid.cli.app import INTERRUPTED, app, echo, quiet_libraries
from inlaid.cli.streams import lasting_streams

ClickException: Any = typer.BadParameter.__mro__[2]
"""Base class of typer's usage errors; the package that defines it depends on the version of typer."""


def main() -> None:
    """Run a command and exit.

    The exit code is 2 after a user's mistake, 130 after Ctrl-C, SIGTERM or SIGHUP, and 1 if another process
    of the run is lost. A user's mistake prints one message without a traceback, unless the environment
    variable INLAID_TRACEBACK is set.
    """
    _brief_spinning()
    with lasting_streams():
        sys.exit(_run())


def _brief_spinning() -> None:
    """Limit the busy-waiting of OpenMP threads; effective only before torch is loaded.

    With GNU OpenMP, a thread that waits for other threads keeps its core busy for milliseconds. If another
    program uses the processor, the waiting thread blocks the core that the other threads need. On two cores,
    one busy process slowed a step down by a factor of 3.4 without the limit, and 1.8 with it
    (`benchmarks/busy.py`). Results are bit-identical. If the user sets GOMP_SPINCOUNT or OMP_WAIT_POLICY,
    nothing is changed.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _run() -> int:
    """Run the command-line program and return its exit code."""
    try:
        with _stop_signals():
            code = app(standalone_mode=False) or 0  # the code of a typer.Exit, or None
        if code == 130:  # some versions of typer return this for Ctrl-C
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, typer.Abort):
        echo(f"\n{INTERRUPTED}")
        return 130
    except ValueError as error:
        if os.environ.get("INLAID_TRACEBACK"):
            raise
        echo(f"error: {error}")
        return 2
    except ClickException as error:
        error.show()
        return error.exit_code
    except OSError as error:
        if error.errno is None:  # a library's own error, not one of the system
            raise
        full = ": free disk space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        echo(f"error: {error.filename or 'a file could not be written'}: {error.strerror}{full}")
        return 2
    except RuntimeError as error:
        kind = type(error).__name__  # of torch, which is not imported here
        if kind == "RankLostError":
            echo(f"error: {error}")
            return 1
        memory = ("can't allocate memory", "Storage size calculation overflowed", "not enough memory")
        if kind != "OutOfMemoryError" and not any(text in str(error) for text in memory):
            raise
        echo(f"error: {str(error).split('.')[0]}: lower data.size, data.frames or train.batch, and run again")
        return 2


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Context manager in which SIGTERM and SIGHUP act as Ctrl-C, so that temporary files are deleted.

    A signal that is ignored, such as SIGHUP under `nohup`, stays ignored.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    ours = [n for n in numbers if n is not None and signal.getsignal(n) is signal.SIG_DFL]
    with suppress(ValueError):  # not in the main thread: the caller handles signals
        for number in ours:
            signal.signal(number, stop)
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in ours:
                signal.signal(number, signal.SIG_DFL)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder. Default: `runs/demo`, `runs/demo-midi`, ..."),
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Train a DoRA instead of a LoRA.")] = False,
    family: Annotated[str, typer.Option(help="`wan` (video) or `midi` (3D scenes).")] = "wan",
    alpha: Annotated[
        str,
        typer.Option(help="`opaque`; `merged` (color and alpha in one latent) or `joint` (as two clips)."),
    ] = "opaque",
) -> None:
    """Run the whole workflow on a tiny model: no download, no GPU.

    The demo takes minutes. It creates training data, then checks, caches, trains, generates and evaluates.
    The data is 16 clips of a subject that is new to the model. With `--alpha joint`, it is 96 RGBA clips of
    shapes that the model already generates; with `--family midi`, it is 24 scenes with a new kind of object.
    """
    quiet_libraries()
    from inlaid.cli import demo_scenes
    from inlaid.cli.demo import run_demo
    from inlaid.cli.demo_rgba import joint, merged

    demos = {
        ("wan", "opaque"): ("runs/demo", run_demo),
        ("wan", "merged"): ("runs/demo-merged", merged),
        ("wan", "joint"): ("runs/demo-joint", joint),
        ("midi", "opaque"): ("runs/demo-midi", demo_scenes.run_demo),
    }
    if (family, alpha) not in demos:
        there = ", ".join(f"--family {f} --alpha {a}" for f, a in demos)
        raise ValueError(f"--family {family} --alpha {alpha}: no such demo; choose from: {there}")
    usual, run = demos[family, alpha]
    run(folder or Path(usual), dora=dora)
