"""Images and labels in one .npz file, as MedMNIST (Yang et al. 2023, Scientific Data 10, 41) publishes them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from .images import ClassImages, expand_user
from .pictures import as_pixels

PARTS = ("train", "val", "test")


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
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            for part in PARTS:
                if f"{part}_images" in arrays:
                    found = arrays[f"{part}_images"], arrays.get(f"{part}_labels")
                    labels.append(_checked(path, part, *found))
                    images.append(as_pixels(found[0], image_size, colour))
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
