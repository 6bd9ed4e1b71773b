"""Images and labels in one .npz file, as MedMNIST (Yang et al. 2023, Scientific Data 10, 41) publishes them."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .archives import check_entry
from .images import ClassImages, expand_user
from .pictures import as_pixels

PARTS = ("train", "val", "test")
# An array may be so many times as large as its part of the file, and so many bytes whatever that is: pictures do not compress
# as a file made to fill memory does.
MOST_TIMES, SMALL = 100, 1 << 26


def load_npz(path: str | Path, *, image_size: int = 20, colour: bool = False) -> ClassImages:
    """The images of all parts by their labels: a class is named after its number, such as "label03".

    ``path`` holds PART_images, [M, H, W] or [M, H, W, 3], and PART_labels, integers [M] or [M, 1], for one or more of the parts
    train, val and test, which have classes in common. Images become S x S grey values, or with ``colour`` red, green and
    blue, as :func:`mann_fast.data.read_image` says.

    Raises FileNotFoundError without such a file, ValueError where it is damaged, or an array is missing or has another shape or
    dtype, by its name.
    """
    path = expand_user(path)
    images, labels = [], []
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise EOFError("it has no directory at its end")
        with zipfile.ZipFile(path) as archive:
            for part in PARTS:
                if f"{part}_images.npy" in archive.namelist():
                    found, of_part = (
                        _read(path, archive, f"{part}_{kind}.npy") for kind in ("images", "labels")
                    )
                    labels.append(_checked(path, part, found, of_part))
                    images.append(as_pixels(found, image_size, colour))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no complete .npz file: {error}") from error
    if not images:
        raise ValueError(f"{path} has none of the arrays {', '.join(f'{part}_images' for part in PARTS)}")
    every = np.concatenate(labels)
    order = every.argsort(kind="stable")
    numbers, counts = np.unique(every, return_counts=True)
    names = tuple(f"label{number:02d}" for number in numbers.tolist())
    starts = torch.tensor([0, *counts.tolist()]).cumsum(0)
    return ClassImages(torch.from_numpy(np.concatenate(images)[order]), starts, names)


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    """The array of that name, None where there is none. Nothing is inflated of what is not what it says of itself."""
    if name not in archive.namelist():
        return None
    entry = archive.getinfo(name)
    try:
        check_entry(entry)
        if entry.file_size > max(SMALL, MOST_TIMES * entry.compress_size):
            raise ValueError(f"{entry.compress_size:,} bytes that are to become {entry.file_size:,}")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in header:
                raise ValueError(f"version {version[0]}.{version[1]} of the format")
            shape, _, dtype = header[version](file)
            if dtype.hasobject:
                raise ValueError("an array of Python objects")
            numbers = math.prod(shape) * dtype.itemsize
            if numbers != entry.file_size - file.tell():
                raise ValueError(
                    f"{dtype} {list(shape)} takes {numbers:,} bytes, and there are {entry.file_size - file.tell():,}"
                )
        with archive.open(entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name} in {path} cannot be read: {error}") from error


def _checked(path: Path, part: str, images: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """The labels, [M]."""
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or (images.ndim == 4 and images.shape[3] != 3):
        came = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{part}_images in {path} must be uint8 [M, H, W] or [M, H, W, 3], got {came}")
    shapes = ((len(images),), (len(images), 1))
    if labels is None or labels.dtype.kind not in "iu" or labels.shape not in shapes:
        came = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(
            f"{part}_labels in {path} must be integers [{len(images)}] or [{len(images)}, 1], got {came}"
        )
    return labels.reshape(-1).astype(np.int64)
