"""Printing that cannot end a run: on a full disk, or into a pipe that nobody reads any more."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class LossyStream:
    """A text stream that drops what cannot be written. In all else it is the stream that it wraps.

    Args:
        stream: the stream.
        name: its name in the one warning about a full disk. None for no warning.
    """

    def __init__(self, stream: IO[str], name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def close_quietly(self) -> None:
        """Write what is left, or drop it. Python would report it as an error when the program exits."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)
            self._discard()

    def _drop(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:  # as with `| head`: the reader has all that it wants
            self._discard()
        elif self._name:
            name, self._name = self._name, None
            print(f"warning: {name}: {error.strerror or error}; what is printed there is lost", file=sys.stderr)

    def _discard(self) -> None:
        """Send all output to the null device from now on, also that which is still in a buffer."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


@contextlib.contextmanager
def lossy_output() -> Iterator[None]:
    """Let nothing that is printed in the block fail, to stdout or to stderr. Either may be closed."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        null = opened.enter_context(open(os.devnull, "w"))
        out, err = LossyStream(before[0] or null, "stdout"), LossyStream(before[1] or null)
        sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
        try:
            yield
        finally:
            out.close_quietly()
            err.close_quietly()
            sys.stdout, sys.stderr = before
