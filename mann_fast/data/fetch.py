"""Fetches Omniglot from its official repository into a cache folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .._cache import cache_folder
from .images import counted, expand_user

OFFICIAL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
CHECKSUMS = {  # MD5, of the official archives
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}

_CHUNK = 1 << 16
_TIMEOUT = 30  # seconds without a byte

Report = Callable[[str, int, int | None], None]


class FetchError(OSError):
    """A file could not be fetched, or is not the file that was expected."""


def fetch_omniglot(
    cache_dir: str | Path | None = None,
    *,
    base_url: str = OFFICIAL,
    checksums: dict[str, str] = CHECKSUMS,
    progress: bool | Report = True,
) -> Path:
    """Fetches the two official archives (15 MB) into ``cache_dir`` and returns the folder they lie in.

    The default folder is ``cache_folder()``/omniglot. An archive that is there already is only checked. A
    transfer that was broken off goes on where it stopped; an archive gets its name only once its MD5 is
    right. ``progress``: True for a bar on a terminal, or a function called with (file name, bytes so far,
    bytes in all or None).

    Raises FetchError, which says what to do, where there is no connection, the server refuses, or a checksum
    is wrong.
    """
    folder = expand_user(cache_dir) if cache_dir is not None else cache_folder() / "omniglot"
    folder.mkdir(parents=True, exist_ok=True)
    missing = {
        name: checksum for name, checksum in checksums.items() if not _is_whole(folder / name, checksum)
    }
    if missing:
        with _reporting(progress) as report:
            for name, checksum in missing.items():
                fetch(f"{base_url.rstrip('/')}/{name}", folder / name, checksum, report)
    return folder


def fetch(url: str, target: Path, md5: str, report: Report | None = None) -> None:
    """Fetches one file by way of ``target``.part, which is resumed if it is there.

    Raises FetchError; the part is kept to go on from where the connection broke, and removed where it is
    wrong.
    """
    part = target.with_name(target.name + ".part")
    try:
        _transfer(url, part, target.name, report)
    except urllib.error.HTTPError as error:
        raise FetchError(
            f"{url} could not be fetched: the server answered {error.code} {error.reason}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        have = part.stat().st_size if part.exists() else 0
        kept = (
            f"; {counted(have, 'byte is', 'bytes are')} kept, and the next try goes on from there"
            if have
            else ""
        )
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise FetchError(
            f"{url} could not be fetched ({reason}){kept}. Without a connection, put {target.name} into "
            f"{target.parent} by hand, or use the built-in glyphs"
        ) from error
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise FetchError(f"{url} has MD5 {found}, expected {md5}; the file was removed, try again")
    os.replace(part, target)


def _transfer(url: str, part: Path, name: str, report: Report | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mann_fast"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": the part is whole, or longer than the file
            raise
        error.close()
        return
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        ):
            have = 0  # the server sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if report:
                    report(name, have, total)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke after {have} of {counted(total, 'byte')}")


def _is_whole(file: Path, md5: str) -> bool:
    return file.exists() and _md5(file) == md5


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _reporting(progress: bool | Report) -> AbstractContextManager[Report | None]:
    if callable(progress):
        return nullcontext(progress)
    return _Bar() if progress else nullcontext(None)


class _Bar:
    """A bar per file on standard error, where that is a terminal."""

    def __enter__(self) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, name: str, have: int, total: int | None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._tasks[name], completed=have, total=total)
