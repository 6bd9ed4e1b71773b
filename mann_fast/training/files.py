"""Writing files so that a reader never meets a half-written one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well it takes the place of `path`, else
    it is removed.

    The content is on the disk before it gets its name, so a crash leaves the old file or the new one. An OSError names `path`,
    not the temporary one.
    """
    path = Path(path)
    temporary = _temporary(path, str(os.getpid()))
    try:
        with _naming(path, temporary):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # where the folder is gone or closed to us; the error that led here says so
            temporary.unlink()
        raise


def _temporary(path: Path, process: str) -> Path:
    return path.with_name(f".{path.stem}.{process}{path.suffix}")  # writers choose the format by the suffix


def remove_temporaries(path: str | os.PathLike) -> None:
    """Remove what processes that were killed in `replacing` left of a file that no other process writes now."""
    path = Path(path)
    for left in path.parent.glob(_temporary(path, "[0-9]*").name):
        left.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """An OSError that names no file, as where the disk is full, or the temporary one, names `path` instead."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        if error.strerror is None:  # a library's own message
            raise OSError(f"{error}: {path}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def append_json_line(path: str | os.PathLike, value: Any) -> None:
    path = Path(path)
    with _naming(path, path), open(path, "a", encoding="utf-8") as file:
        print(json.dumps(value), file=file)


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
