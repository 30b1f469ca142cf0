"""Output streams that keep a command running after their terminal or pipe is closed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class LastingStream:
    """Output stream that silently discards its output after its terminal or pipe is closed."""

    def __init__(self, stream: Any, errors: Collection[int] | None = None) -> None:
        """Wrap a stream and set which errors of the stream are ignored.

        Args:
            stream: stream to wrap.
            errors: error numbers (errno) to ignore; None ignores every `OSError`. The errors of a closed pipe
                or terminal are always ignored.
        """
        self.stream, self._errors = stream, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text and return its length.

        The text is discarded if the terminal or pipe is closed. Errors chosen in the constructor are ignored.
        """
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; errors are ignored as in `write`."""
        with self._dropping():
            self.stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in CLOSED:  # what is buffered goes there too
                with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())
            elif self._errors is not None and error.errno not in self._errors:
                raise


CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Error numbers (errno) of a closed pipe or terminal."""


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Context manager that lets a command continue after its output is closed (`| head`, a lost connection).

    Standard error contains messages and progress, so all its errors are ignored. Standard output contains
    results, so only errors of a closed pipe or terminal are ignored. A full disk raises an error.
    """
    for number in range(3):  # a file opened next would get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    old = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = LastingStream(sys.stdout, CLOSED)
    if sys.stderr is not None:
        sys.stderr = LastingStream(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, LastingStream):
                stream.flush()
        sys.stdout, sys.stderr = old
