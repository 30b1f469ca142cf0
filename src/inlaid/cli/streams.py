"""Output streams of a command that outlive their terminal or pipe."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class LastingStream:
    """Output stream that goes on when its terminal or pipe is closed: what is written is then dropped."""

    def __init__(self, stream: Any, errors: Collection[int] | None = None) -> None:
        """Wrap a stream; `errors` are the numbers of the errors to drop, None drops all."""
        self.stream, self._errors = stream, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text; see `LastingStream`."""
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; see `LastingStream`."""
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
"""Numbers of the errors of a closed pipe or terminal."""


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Keep a command running when its output is closed (`| head`, a lost connection).

    Standard error carries messages and progress: all its errors are dropped. Standard output carries results:
    only a closed pipe or terminal is dropped, a full disk is an error.
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
