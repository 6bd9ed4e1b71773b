"""Pictures in memory: arrays, tensors, PIL images and paths as a model reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .images import UNREADABLE, read_image, reason, to_square


def as_pixels(images: Any, image_size: int, colour: bool = False) -> np.ndarray:
    """uint8 [M, S, S], or [M, 3, S, S] in colour, of what :class:`mann_fast.FewShotLearner` calls images.

    Raises TypeError for what is no image, ValueError for one that cannot be read, FileNotFoundError for a path that leads
    nowhere; the message names it.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise TypeError(f"images must be a sequence of images, got one {type(images).__name__}: give [image]")
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray) and images.ndim < 2:
        raise ValueError(
            f"images must be an array [M, H, W], or of flat squares [M, S * S], got {list(images.shape)}"
        )
    if not isinstance(images, np.ndarray):
        if not isinstance(images, Iterable):
            raise TypeError(f"images must be a sequence of images, got {type(images).__name__}")
        images = list(images)
    shape = (*((3,) if colour else ()), image_size, image_size)
    found = np.empty((len(images), *shape), np.uint8)
    for at, image in enumerate(images):
        found[at] = to_pixels(image, f"images[{at}]", image_size, colour)
    return found


def to_pixels(image: Any, name: str, image_size: int, colour: bool) -> np.ndarray:
    """One of them, called ``name`` in messages; raises as :func:`as_pixels`."""
    is_path = isinstance(image, (str, os.PathLike))
    named = str(image) if is_path else name
    try:
        if is_path:
            return read_image(os.fspath(image), image_size, colour)
        if not isinstance(image, Image.Image):
            image = _picture(image, name)
        return to_square(image, image_size, colour)
    except FileNotFoundError:
        raise FileNotFoundError(f"{named} does not exist; expected an image") from None
    except UNREADABLE as error:
        why = reason(error, Path(named).suffix if is_path else "")
        raise ValueError(f"{named} cannot be read as an image: {why}") from error


def _picture(image: Any, name: str) -> Image.Image:
    """An array or tensor as Pillow has it."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "biuf":
        came = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"{name} must be a path, a PIL image, or an array or tensor of numbers, got {came}")
    shape = list(image.shape)
    if image.ndim == 1 and round(image.size**0.5) ** 2 == image.size:
        image = image.reshape(round(image.size**0.5), -1)
    channels = (1, 3, 4)
    if image.ndim == 3 and image.shape[2] not in channels and image.shape[0] in channels:
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in channels) or not image.size:
        raise ValueError(f"its shape must be [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got {shape}")
    if image.dtype == bool:
        image = image * np.uint8(255)
    if image.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(image))
    if not np.isfinite(image).all():
        raise ValueError("has pixels that are not finite: NaN or inf")
    if image.ndim == 2:
        return Image.fromarray(image.astype(np.float32))  # stretched like any other grey
    most = 1.0 if image.dtype.kind == "f" else 255
    if image.min() < 0 or image.max() > most:
        raise ValueError(f"colours must go from 0 to {most:g}, got {image.min():g} to {image.max():g}")
    return Image.fromarray(np.uint8(np.rint(image * (255 / most))))
