"""Where nobody reads what commands say: closed standard files, a pipe whose reader has gone, a terminal that was closed."""

from __future__ import annotations

import os
from typing import Any, TextIO


def open_standard_files() -> None:
    """Open what of the descriptors 0 to 2 is closed, as by ``2>&-``: else a file of ours gets the number, and what libraries
    say on it is written into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the system gives the lowest that is free
        pass
    os.close(descriptor)


def discard(stream: TextIO) -> None:
    """From now on what is written to the stream is lost, what it still holds included."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


class ForgivingStream:
    """A stream for messages, which are no reason to fail: when one cannot be written, this and all others are lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
