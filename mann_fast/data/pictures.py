"""Pictures in memory: arrays, tensors, PIL images and paths as a model reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ops._checks import check_dense
from .images import UNREADABLE, read_image, reason, to_square


def as_pixels(images: Any, image_size: int, colour: bool = False) -> np.ndarray:
    """uint8 [M, S, S], or [M, 3, S, S] in colour, of what :class:`mann_fast.FewShotLearner` calls images.

    Raises TypeError for what is no image, ValueError for one that cannot be read, FileNotFoundError for a path that leads
    nowhere; the message names it.
    """
    images = as_images(images)
    shape = (*((3,) if colour else ()), image_size, image_size)
    found = np.empty((len(images), *shape), np.uint8)
    for at, image in enumerate(images):
        found[at] = to_pixels(image, f"images[{at}]", image_size, colour)
    return found


def as_images(images: Any) -> np.ndarray | list[Any]:
    """An array of numbers, whose first axis is that of the images, or a list of images of whatever kind; raises as
    :func:`as_pixels`."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise TypeError(f"images must be a sequence of images, got one {type(images).__name__}: give [image]")
    if hasattr(images, "to_numpy"):  # of pandas
        images = images.to_numpy()
    if isinstance(images, Tensor):
        images = _numbers(images, "images")
    if isinstance(images, np.ndarray) and images.dtype == object and images.shape[1:] == (1,):
        images = images[:, 0]  # a table of one column
    if not (
        isinstance(images, np.ndarray) and images.dtype.kind in "biufc"
    ):  # of numbers it is images itself
        return as_items(images, "images", "of images")
    if images.ndim < 2 or (images.ndim == 2 and not _is_square(images.shape[1])):
        raise ValueError(
            "images must be an array [M, H, W], [M, H, W, C], [M, C, H, W], or of flat squares [M, S * S], "
            f"got {list(images.shape)}; a single image is given as [image]"
        )
    if images.ndim == 3 and images.shape[2] in (3, 4) and min(images.shape[:2]) > 4:
        raise ValueError(
            f"images must be an array [M, H, W], [M, H, W, C] or [M, C, H, W], got {list(images.shape)}, which looks like a "
            "single image in colour: give [image]"
        )
    return images


Forms = set[tuple[str, int]]


def forms_of(images: np.ndarray | list[Any]) -> Forms:
    """In which forms without colours the numbers of images come: ("flat", how many) and ("grey", 0)."""
    shapes = (image.shape for image in images if isinstance(image, (np.ndarray, Tensor)))
    return {("flat", shape[0]) if len(shape) == 1 else ("grey", 0) for shape in shapes if len(shape) < 3}


def require_several(images: np.ndarray | list[Any], forms: Forms) -> None:
    """ValueError where an array may be meant as one image, and other images came in none of the forms that it would have as
    several: [H, W] as H flat ones, or a picture's colours [3, H, W] as three grey ones."""
    may_be_one = isinstance(images, np.ndarray) and (
        images.ndim == 2 or (images.ndim == 3 and len(images) in (3, 4))
    )
    if may_be_one and not forms_of(images) <= forms:
        raise ValueError(
            f"images must be in a form that was learned, and {list(images.shape)} would be {len(images)} "
            f"{'flat' if images.ndim == 2 else 'grey'} ones; a single image is given as [image], several also as a list"
        )


def as_items(values: Any, name: str, kind: str) -> list[Any]:
    """The items of a sequence ``name``; TypeError for what has none, or none in an order. kind: what it is a sequence of."""
    unordered = isinstance(values, (str, bytes, Mapping, Set))
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a sequence {kind}, got {type(values).__name__}")
    return list(values)


def plain_label(label: Any, name: str) -> Any:
    """A label as Python has it: of a number or string of NumPy or torch, [] or [1], what it holds.

    Raises TypeError for what cannot be hashed, or holds several, ValueError for what is not even equal to itself (NaN): as a
    label it would never be found again.
    """
    if hasattr(label, "item"):
        try:
            label = label.item()
        except (ValueError, RuntimeError):
            came = f"{type(label).__name__} {list(label.shape)}"
            raise TypeError(f"{name} must be a single label, got {came}") from None
    try:
        hash(label)
    except TypeError:
        raise TypeError(f"{name} must be hashable, got {type(label).__name__}") from None
    try:
        known = bool(label == label)
    except TypeError:  # pandas' NA
        known = False
    if not known:
        raise ValueError(f"{name} must be a label, got {label!r}")
    return label


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
        image = _numbers(image, name)
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "biuf":
        came = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"{name} must be a path, a PIL image, or an array or tensor of numbers, got {came}")
    shape = list(image.shape)
    if image.ndim == 1 and _is_square(image.size):
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


def _numbers(tensor: Tensor, name: str) -> np.ndarray:
    check_dense(name, tensor)
    if tensor.is_meta:
        raise TypeError(f"{name} must have values, got a tensor of device meta")
    tensor = tensor.detach().cpu()
    of_torch_alone = tensor.is_floating_point() and tensor.dtype not in (
        torch.float16,
        torch.float32,
        torch.float64,
    )
    return (tensor.float() if of_torch_alone else tensor).numpy()  # NumPy has no bfloat16, nor float8


def _is_square(size: int) -> bool:
    return round(size**0.5) ** 2 == size
