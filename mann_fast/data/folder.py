"""A folder with one sub-folder of images per class."""

from __future__ import annotations

from pathlib import Path

import torch

from .images import ClassImages, load_images, shortened

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def load_folder(
    path: str | Path, *, image_size: int = 20, min_images: int = 1, invert: bool | None = None
) -> ClassImages:
    """Every sub-folder of ``path`` is a class, named like it, of the images that lie in it; sorted by name.

    A file is an image by its suffix (.png, .jpg, .jpeg, .webp, .gif, .bmp in any case) or because it begins
    as PNG and JPEG files do; other files are passed over, and so are folders whose names begin with "." or
    "__". Images may have any size and colour: see ``read_grey`` for how they become S x S grey values.
    ``invert``: True for dark ink on light paper, False to keep grey values as they are, None to decide for
    the whole folder by whether borders are light.

    Files that look like images and cannot be read are skipped, with a warning that names them. Raises
    FileNotFoundError or NotADirectoryError for a bad ``path``, ValueError where there is no class or where a
    class has fewer than ``min_images`` images (all such classes are named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file; expected a folder with one sub-folder of images per class"
        )
    folders = [f for f in path.iterdir() if f.is_dir() and not f.name.startswith((".", "__"))]
    folders.sort(key=lambda folder: folder.name)  # paths themselves sort otherwise on other systems
    files = {folder: image_files(folder) for folder in folders}
    if not any(files.values()):
        raise ValueError(f"{path} has no sub-folder with images in it; {_what_is_there(path, folders)}")
    images, read, inverted = load_images(
        [file for group in files.values() for file in group], image_size=image_size, invert=invert
    )
    counts = dict.fromkeys(folders, 0)
    for file in read:
        counts[file.parent] += 1
    starts = torch.tensor([0, *counts.values()]).cumsum(0)
    classes = ClassImages(images, starts, tuple(folder.name for folder in folders), inverted)
    classes.require(min_images, f"add images in {path}, remove these folders, or lower the number (--shots)")
    return classes


def image_files(folder: str | Path) -> list[Path]:
    """The image files that lie in ``folder``, sorted by name; hidden ones are passed over."""
    files = (f for f in Path(folder).iterdir() if f.is_file() and not f.name.startswith("."))
    return sorted(filter(_is_image, files), key=lambda file: file.name)


def _is_image(file: Path) -> bool:
    if file.suffix.lower() in _SUFFIXES:
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
    return "expected one sub-folder of PNG or JPEG images per class"
