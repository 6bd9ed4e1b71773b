"""Stopping at the next good moment on Ctrl-C, a polite kill, or when the terminal goes."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP set `received` instead of ending the process; the second SIGINT
    raises KeyboardInterrupt. A SIGHUP that is ignored, as under nohup, stays so.

    Must be entered in the main thread.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)  # Windows has none
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def status(self) -> int:
        """The exit status of a process that was stopped by the signal received, or by that of another process of its run."""
        return 128 + (self.received or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
