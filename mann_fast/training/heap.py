"""Memory of the C library, for processes that train."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Has this process keep the memory that tensors give back, for those of the next step.

    The GNU C library takes every large block anew from the kernel and returns it at once, so that all its pages are cleared and
    mapped again in each step: with the encoder conv4 and 256 images that took as long as all of the arithmetic. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
