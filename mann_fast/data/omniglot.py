"""Omniglot (Lake et al. 2015), read in place from the official zip archives or their folders."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ..ops._checks import check_choice
from .archives import check_entry
from .images import UNREADABLE, ClassImages, counted, expand_user, read_image, reason, shortened

# Characters per alphabet of the official release: 964 and 659 classes, 20 images each.
ALPHABETS = {
    "background": {
        "Alphabet_of_the_Magi": 20, "Anglo-Saxon_Futhorc": 29, "Arcadian": 26, "Armenian": 41,
        "Asomtavruli_(Georgian)": 40, "Balinese": 24, "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14, "Braille": 26, "Burmese_(Myanmar)": 34,
        "Cyrillic": 33, "Early_Aramaic": 22, "Futurama": 26, "Grantha": 43, "Greek": 24, "Gujarati": 48,
        "Hebrew": 22, "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16, "Japanese_(hiragana)": 52,
        "Japanese_(katakana)": 47, "Korean": 40, "Latin": 26, "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41, "N_Ko": 33, "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42, "Syriac_(Estrangelo)": 23, "Tagalog": 17, "Tifinagh": 55,
    },
    "evaluation": {
        "Angelic": 20, "Atemayar_Qelisayer": 26, "Atlantean": 26, "Aurek-Besh": 26, "Avesta": 26,
        "Ge_ez": 26, "Glagolitic": 45, "Gurmukhi": 45, "Kannada": 41, "Keble": 26, "Malayalam": 47,
        "Manipuri": 40, "Mongolian": 30, "Old_Church_Slavonic_(Cyrillic)": 45, "Oriya": 46, "Sylheti": 28,
        "Syriac_(Serto)": 23, "Tengwar": 25, "Tibetan": 42, "ULOG": 26,
    },
}  # fmt: skip
IMAGES_PER_CLASS = 20

# What zipfile may raise; among UNREADABLE is its NotImplementedError, for archives newer than it is
_BROKEN_ZIP = (*UNREADABLE, zipfile.BadZipFile, zlib.error)
_LARGEST = 1 << 20  # bytes of a file in an archive; Omniglot's have some hundreds

_ENTRY = re.compile(r"(?:^|.*/)([^/]+)/(character\d+)/([^/.][^/]*\.png)$", re.IGNORECASE)


def load_omniglot(path: str | Path, part: str, *, image_size: int = 20, colour: bool = False) -> ClassImages:
    """One part of Omniglot, "background" or "evaluation", as classes ALPHABET/characterNN sorted by name.

    ``path`` is a folder that holds images_PART.zip or images_PART/ (or such a thing under python/ or
    omniglot-py/), or the archive or folder itself; an archive named images_PART*.zip is taken where there is
    no complete one. Ink, 0 in the files, becomes 255, in ``colour`` of all three. What is missing of the official
    release is named in a
    warning.

    Raises FileNotFoundError where nothing of this part is there, ValueError for an archive or image that is
    damaged, encrypted, compressed in another way than zip's usual one, or far too large.
    """
    check_choice("part", part, tuple(ALPHABETS))
    place = find_part(path, part)
    if place is None:
        raise FileNotFoundError(
            f"no images_{part}.zip and no folder images_{part} in {path}; both parts of Omniglot are needed, "
            "images_background and images_evaluation (--data omniglot fetches them)"
        )
    groups: dict[str, list[np.ndarray]] = {}
    with ExitStack() as stack:
        for name, opened in sorted(_entries(place, stack), key=lambda entry: entry[0]):
            alphabet, character, _ = name
            try:
                with opened() as file:
                    pixels = read_image(file, image_size, colour)
            except _BROKEN_ZIP as error:
                raise ValueError(
                    f"{'/'.join(name)} in {place} is damaged: {reason(error, '.png')}"
                ) from error
            groups.setdefault(f"{alphabet}/{character}", []).append(255 - pixels)
    if not groups:
        raise ValueError(f"{place} holds no ALPHABET/characterNN/*.png, as Omniglot does")
    missing = _missing(groups, part)
    if missing:
        warnings.warn(f"{place} is not all of Omniglot's {part} part; missing: {missing}", stacklevel=2)
    return ClassImages.from_groups(groups, image_size, inverted=True)


def find_part(path: str | Path, part: str) -> Path | None:
    """The archive or folder of this part at or in ``path``, or None."""
    path, stem = expand_user(path), f"images_{part}"
    if path.name.startswith("images_"):  # the archive or folder itself: nothing else can be meant
        return path if path.name.startswith(stem) and path.exists() else None
    for folder in (path, path / "python", path / "omniglot-py"):
        for candidate in (folder / f"{stem}.zip", folder / stem, *sorted(folder.glob(f"{stem}*.zip"))):
            if candidate.exists():
                return candidate
    return None


def _entries(place: Path, stack: ExitStack) -> Iterator[tuple[tuple[str, ...], Callable[[], IO[bytes]]]]:
    """((alphabet, character, file), a function that opens it) of every image in an archive or folder."""
    if place.is_dir():
        for file in place.glob("*/character*/*"):
            match = _ENTRY.match(file.as_posix())
            if match:
                yield match.groups(), partial(open, file, "rb")
        return
    file = stack.enter_context(open(place, "rb"))
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
    except _BROKEN_ZIP as error:
        raise ValueError(
            f"{place} is not a complete zip archive ({reason(error, '.zip')}); fetch it again"
        ) from error
    for entry in archive.infolist():
        match = _ENTRY.match(entry.filename)
        if match and not entry.filename.startswith("__MACOSX"):
            yield match.groups(), partial(_open_entry, archive, entry)


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    """Raises one of ``_BROKEN_ZIP`` before more than ``_LARGEST`` bytes are inflated, whatever the entry says of itself."""
    check_entry(entry)
    if entry.file_size > _LARGEST:
        raise ValueError(f"{entry.file_size:,} bytes; an image of Omniglot may have up to {_LARGEST:,}")
    with archive.open(entry) as file:
        return io.BytesIO(file.read(_LARGEST))


def _missing(groups: dict[str, list[np.ndarray]], part: str) -> str:
    found: dict[str, int] = {}
    for name in groups:
        alphabet = name.split("/")[0]
        found[alphabet] = found.get(alphabet, 0) + 1
    alphabets = [name for name in ALPHABETS[part] if name not in found]
    characters = [
        f"{count - found[name]} of {count} characters of {name}"
        for name, count in ALPHABETS[part].items()
        if 0 < found.get(name, 0) < count
    ]
    short = [
        f"{counted(IMAGES_PER_CLASS - len(images), 'image')} of {name}"
        for name, images in groups.items()
        if len(images) < IMAGES_PER_CLASS
    ]
    named = [f"{counted(len(alphabets), 'alphabet')} ({', '.join(alphabets)})"] if alphabets else []
    return shortened(named + characters + short)
