"""One run per folder."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from . import processes

if sys.platform != "win32":
    import fcntl

LOCK = ".run.lock"

_held: set[Path] = set()  # the folders that this process has entered


@contextmanager
def only_run(out: str | os.PathLike) -> Iterator[None]:
    """While entered, no other process enters with the folder `out`, which is made if it does not exist, and removed again if
    nothing comes into it. The process itself may enter again. Of the processes of a group, all of which enter, the first locks
    the folder.

    The system takes the lock back when the process ends, however it ends. Where there is none to have (Windows; a file system
    without, which gets a warning), nothing keeps others out. Raises BlockingIOError where another process is in it.
    """
    folder = Path(out).resolve()
    if folder in _held:
        yield
        return
    unlocked = processes.rank() or sys.platform == "win32"
    with nullcontext(True) if unlocked else _locked(folder) as free:
        if processes.any_of(not free):
            raise BlockingIOError(
                f"another process is training in {out}: wait for it or stop it, or choose another --out"
            )
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the lock was free; while entered, this process has it then."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file, descriptor = folder / LOCK, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(file)
        yield descriptor is not None
    finally:
        with suppress(OSError):
            if descriptor is not None:
                file.unlink()  # before others can have it: they see that the file has no name any more
        if descriptor is not None:
            os.close(descriptor)
        with suppress(OSError):
            for path in made:
                path.rmdir()  # fails where something has come into it


def _lock(file: Path) -> int | None:
    """The open, locked file; None where another process has locked it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                os.close(descriptor)
                raise
            warnings.warn(
                f"the file system of {file.parent} has no locks: do not start another run there", stacklevel=2
            )
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # who had it has removed the file in the meantime; lock a new one
