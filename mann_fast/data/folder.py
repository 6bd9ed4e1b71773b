"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from .images import (
    ClassImages,
    counted,
    expand_user,
    load_images,
    readable_suffixes,
    reader_of,
    shortened,
)

# Folders of classes, or lists, in data that others have split: what part each is, by its name in lower case.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def load_folder(
    path: str | Path,
    *,
    image_size: int = 20,
    colour: bool = False,
    min_images: int = 1,
    invert: bool | None = None,
) -> ClassImages:
    """Every sub-folder of ``path`` is a class, named like it, of the images that lie in it; sorted by name. Where all images
    lie a folder deeper, as in ALPHABET/characterNN, the classes are those, named by both, or where all have the same second
    name, as in CLASS/images, by the first. :func:`class_files` has the rest.

    A file is an image by its suffix in any case (PNG, JPEG, WebP, GIF, BMP, TIFF, PGM and its kin, AVIF; HEIC
    where pillow-heif is installed) or because it begins as PNG and JPEG files do. Other files are passed over,
    with a warning that counts them by suffix; hidden ones, and folders whose names begin with "." or "__",
    without. Images may have any size and colour: see ``read_image`` for how they become S x S grey values,
    or with ``colour`` red, green and blue.
    ``invert``: True for dark ink on light paper, False to keep grey values as they are, None to decide for
    the whole folder by whether borders are light.

    Files that look like images and cannot be read are skipped, with a warning that names them. Raises
    FileNotFoundError or NotADirectoryError for a bad ``path``, ValueError where there is no class or where a
    class has fewer than ``min_images`` images (all such classes are named).
    """
    path = expand_user(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file; expected a folder with one sub-folder of images per class"
        )
    files = class_files(path, min_images)
    images, read, inverted = load_images(
        [file for group in files.values() for file in group],
        image_size=image_size,
        colour=colour,
        invert=invert,
    )
    counts = dict.fromkeys(files, 0)
    for file in read:
        counts[file.parent] += 1
    starts = torch.tensor([0, *counts.values()]).cumsum(0)
    classes = ClassImages(images, starts, class_names(path, files), inverted)
    classes.require(min_images, f"add images in {path}, remove these folders, or lower the number (--shots)")
    return classes


def class_files(path: Path, min_images: int = 1) -> dict[Path, list[Path]]:
    """The folders under ``path`` that are classes, sorted by name, each with its images: its sub-folders, or those of its
    sub-folders where the images lie there. Images beside folders of classes, fewer than lie in these and fewer than
    ``min_images`` in one of the places, are passed over with a warning; other files with another.

    Raises ValueError where there are no images in any.
    """
    folders = class_folders(path)
    files = {folder: image_files(folder) for folder in folders}
    lacking = [folder for folder in folders if len(files[folder]) < max(1, min_images)]
    if lacking and not any(part_of(folder) for folder in folders):
        deeper = {folder: inner for folder in folders if (inner := _inner(folder))}
        fewer = all(len(files[folder]) < sum(map(len, inner.values())) for folder, inner in deeper.items())
        if fewer and any(folder in deeper for folder in lacking):
            beside = [str(file.relative_to(path)) for folder in deeper for file in files[folder]]
            classes = {folder: files[folder] for folder in folders if files[folder] and folder not in deeper}
            for inner in deeper.values():
                classes |= inner
            files = {folder: classes[folder] for folder in sorted(classes, key=lambda folder: folder.parts)}
            if beside:
                lie = "lies" if len(beside) == 1 else "lie"
                warnings.warn(
                    f"passed over {shortened(beside)}, which {lie} beside folders of classes", stacklevel=3
                )
    if not any(files.values()):
        raise ValueError(f"{path} has no sub-folder with images in it; {_what_is_there(path, folders)}")
    warn_of_others(files)
    return files


def _inner(folder: Path) -> dict[Path, list[Path]]:
    """The sub-folders with their images, none where there are no images in any."""
    files = {inner: image_files(inner) for inner in class_folders(folder)}
    return files if any(files.values()) else {}


def class_names(path: Path, folders: Iterable[Path]) -> tuple[str, ...]:
    """What classes are called whose images lie in these folders of ``path``."""
    parts = [folder.relative_to(path).parts for folder in folders]
    if all(len(names) > 1 for names in parts) and len({names[-1] for names in parts}) == 1:
        parts = [names[:-1] for names in parts]  # CLASS/images says no more than CLASS
    return tuple("/".join(names) for names in parts)


def part_of(path: Path) -> str | None:
    """Which part of data that others have split a folder or list is by its name: "train", "val", "test" or none."""
    return PARTS.get(path.stem.lower() if path.is_file() else path.name.lower())


def image_files(folder: str | Path) -> list[Path]:
    """The image files that lie in ``folder``, sorted by name; hidden ones are passed over."""
    return sorted(filter(_is_image, _files(folder)), key=lambda file: file.name)


def class_folders(path: Path) -> list[Path]:
    """The sub-folders that are classes, sorted by name."""
    folders = (f for f in path.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    return sorted(folders, key=lambda folder: folder.name)  # paths themselves sort otherwise on other systems


def warn_of_others(folders: Iterable[Path]) -> None:
    """One warning about all files of these folders that are not read as images, if there are any."""
    others = other_files(folders)
    if others:
        warnings.warn(f"passed over {others}", stacklevel=4)


def other_files(folders: Iterable[Path]) -> str:
    """How many files are not read as images, by suffix, and what would read them; empty where there are none."""
    files = (file for folder in folders for file in _files(folder) if not _is_image(file))
    counts = Counter(file.suffix.lower() for file in files)
    if not counts:
        return ""
    kinds = []
    for suffix, count in counts.most_common():
        reader = reader_of(suffix)
        kinds.append(f"{count} {suffix or 'without a suffix'}{f', which needs {reader}' if reader else ''}")
    return f"{counted(counts.total(), 'file')} that cannot be read as images ({shortened(kinds, 10)})"


def _files(folder: str | Path) -> list[Path]:
    return [f for f in expand_user(folder).iterdir() if f.is_file() and not f.name.startswith(".")]


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in readable_suffixes():
        return True
    try:
        with open(file, "rb") as start:
            return start.read(8).startswith(_SIGNATURES)
    except OSError:
        return False


def _what_is_there(path: Path, folders: list[Path]) -> str:
    deeper = [inner.parent.name for folder in folders for inner in folder.iterdir() if inner.is_dir()]
    if deeper:
        return (
            f"its folders hold further folders: give one of these instead ({shortened(sorted(set(deeper)))})"
        )
    if image_files(path):
        return "the images lie in the folder itself: put those of each class into a folder of its own"
    if files := [file.name for file in _files(path) if file.suffix.lower() in (".npz", ".csv")]:
        return f"give the file itself ({shortened(sorted(files))})"
    others = other_files([path, *folders])
    found = f"; found {others}" if others else ""
    return f"expected one sub-folder of PNG or JPEG images per class{found}"
