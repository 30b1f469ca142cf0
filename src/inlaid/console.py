"""Terminal output: the shared console (stderr), messages, and progress bars."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from inlaid.text import printable


class _SafeConsole(Console):
    """Console that escapes control characters in all printed text.

    File names, captions and tensor names come from users' files and could otherwise control the terminal.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments, with control characters in the text escaped.

        Segments with the console's own control codes are unchanged.
        """
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console = _SafeConsole(stderr=True, highlight=False)

_said: set[str] = set()


class _Speed(ProgressColumn):
    """Progress column for the speed: items per second, or seconds per item below one item per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        if not speed:
            return Text("")
        return Text(f"{speed:.2f} {self.unit}/s" if speed >= 1 else f"{1 / speed:.2f} s/{self.unit}")


@contextmanager
def progress(
    title: str, total: int, unit: str, *, show: bool = True, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Show a progress bar, and yield a function that updates it.

    The function advances the bar by `n` (default 1), or sets the position to `done`. It can also set `total`,
    and the text `note` after the bar.
    """
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not show) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(
            n: int = 1, *, done: int | None = None, total: int | None = None, note: str | None = None
        ) -> None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            bar.update(task, advance=n if done is None else None, completed=done, total=total, **fields)

        yield advance


def say(text: str, *, show: bool = True) -> None:
    """Print a message to stderr, with control characters escaped."""
    if show:
        console.print(printable(text), markup=False)


def once(text: str) -> None:
    """Print a message, unless `once` printed the same message before."""
    if text not in _said:
        _said.add(text)
        say(text)


def quiet() -> None:
    """Silence the warnings that libraries such as diffusers and transformers print on import and loading."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="Image size")  # of Pillow; `limits.PIXELS` applies
    libraries = ("diffusers", "transformers", "peft", "bitsandbytes", "torchao", "torch.distributed")
    for name in (*libraries, "torch.utils._pytree", "huggingface_hub"):
        if logging.getLogger(name).level != logging.ERROR:  # setting a level clears the caches of all loggers
            logging.getLogger(name).setLevel(logging.ERROR)


def quiet_bars() -> None:
    """Disable the loading progress bars and warnings of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for module in (diffusers_logging, transformers_logging):
        if module.get_verbosity() != module.ERROR:
            module.set_verbosity_error()
        module.disable_progress_bar()
