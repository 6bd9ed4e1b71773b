"""Writing files so that a reader never meets a half-written one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well it takes the place of `path`, else
    it is removed.

    The content is on the disk before it gets its name, so a crash leaves the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.stem}.{os.getpid()}{path.suffix}"
    )  # same suffix: writers choose the format by it
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a full disk, say: writing to an open file does not name it
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All complete lines of a JSON-lines file; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
