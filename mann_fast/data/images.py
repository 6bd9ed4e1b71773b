"""Images sorted by class, and how one image file becomes a small square of grey values."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# What Pillow may raise on a file that is damaged, cut short, or no image at all
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)

# And no other: some of Pillow's formats start external programs
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_LIGHT = 191  # border brighter than this, of 255: dark ink on light paper


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images sorted by class: those of class c are ``images[starts[c]:starts[c + 1]]``.

    images: uint8 [M, S, S]; drawn characters have ink 255 on background 0, photographs their grey values.
    starts: int64 [C + 1], from 0 to M, never falling.
    names: the C names of the classes, all different.
    inverted: whether the files were dark on light and have been inverted, so that further files can be read
        alike.

    Raises TypeError or ValueError where a field does not fit.
    """

    images: Tensor
    starts: Tensor
    names: tuple[str, ...]
    inverted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8:
            raise TypeError(f"images must be a uint8 tensor, got {_kind(self.images)}")
        if self.images.dim() != 3 or self.images.shape[1] != self.images.shape[2]:
            raise ValueError(f"images must have shape [M, S, S], got {list(self.images.shape)}")
        if not isinstance(self.starts, Tensor) or self.starts.dtype != torch.int64:
            raise TypeError(f"starts must be an int64 tensor, got {_kind(self.starts)}")
        if self.starts.shape != (len(self.names) + 1,):
            raise ValueError(
                f"starts must have shape [{len(self.names) + 1}], one more than there are names, "
                f"got {list(self.starts.shape)}"
            )
        if self.starts[0] != 0 or self.starts[-1] != len(self.images) or (self.counts < 0).any():
            raise ValueError(
                f"starts must go from 0 to {len(self.images)}, the number of images, and never fall"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must all be different")

    @classmethod
    def from_groups(
        cls, groups: Mapping[str, Sequence[np.ndarray]], image_size: int, inverted: bool = False
    ) -> ClassImages:
        """From the images of each class, uint8 [S, S] arrays; classes keep the order of the mapping."""
        flat = [image for group in groups.values() for image in group]
        images = np.stack(flat) if flat else np.zeros((0, image_size, image_size), np.uint8)
        counts = torch.tensor([0, *map(len, groups.values())])
        return cls(torch.from_numpy(images), counts.cumsum(0), tuple(groups), inverted)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.names)

    @property
    def image_size(self) -> int:
        """S, the width and height of the images in pixels."""
        return self.images.shape[1]

    @property
    def counts(self) -> Tensor:
        """How many images each class has, int64 [C]."""
        return self.starts.diff()

    def select(self, indices: Iterable[int]) -> ClassImages:
        """The classes at ``indices``, in that order. Raises IndexError for an index outside [0, C)."""
        chosen = [int(index) for index in indices]
        for index in chosen:
            if not 0 <= index < self.num_classes:
                raise IndexError(f"indices must lie in [0, {self.num_classes}), got {index}")
        starts = self.starts.tolist()
        rows = torch.cat([torch.arange(0), *(torch.arange(starts[i], starts[i + 1]) for i in chosen)])
        counts = torch.tensor([0, *(starts[i + 1] - starts[i] for i in chosen)])
        return ClassImages(
            self.images[rows], counts.cumsum(0), tuple(self.names[i] for i in chosen), self.inverted
        )

    def rotated(self) -> ClassImages:
        """4C classes: every class turned by 0, 90, 180 and 270 degrees, each a class of its own.

        Only one byte a pixel is stored, so Omniglot's background set takes 31 MB at 20 x 20.
        """
        turns = [torch.rot90(self.images, quarter, (1, 2)) for quarter in range(4)]
        starts = [self.starts[:-1] + quarter * len(self.images) for quarter in range(4)]
        names = [
            name if quarter == 0 else f"{name}@{90 * quarter}" for quarter in range(4) for name in self.names
        ]
        last = self.starts.new_tensor([4 * len(self.images)])
        return ClassImages(torch.cat(turns), torch.cat([*starts, last]), tuple(names), self.inverted)

    def require(self, images: int, hint: str = "") -> None:
        """Raises ValueError, naming the classes, where any has fewer than ``images`` images."""
        short = [(n, c) for n, c in zip(self.names, self.counts.tolist(), strict=True) if c < images]
        if short:
            listed = shortened([f"{name!r} has {count}" for name, count in short])
            raise ValueError(
                f"every class needs at least {images} images: {listed}{'; ' if hint else ''}{hint}"
            )


def read_grey(file: str | Path | IO[bytes], image_size: int) -> np.ndarray:
    """One image file as grey values, uint8 [S, S], stretched to reach from 0 to 255.

    Colour becomes grey, transparency white, a camera's turn (EXIF) is undone. The whole image is fitted into
    the square without stretching it out of shape, and what is left is filled with the grey of its border. An
    image of a single grey is all 0. Raises one of ``UNREADABLE``.
    """
    with Image.open(file, formats=_FORMATS) as image:
        # Decodes a large JPEG at a fraction of its size
        image.draft("L", (2 * image_size, 2 * image_size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        grey = _to_grey(image)
    width, height = grey.size
    scale = image_size / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if grey.size != size:
        # Pillow averages over all the pixels that make up one of the result: antialiased
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(grey)
    if size[0] != size[1]:
        square = np.full((image_size, image_size), _border(pixels), np.uint8)
        top, left = (image_size - size[1]) // 2, (image_size - size[0]) // 2
        square[top : top + size[1], left : left + size[0]] = pixels
        pixels = square
    return _stretch(pixels)


def load_images(
    paths: Iterable[str | Path], *, image_size: int = 20, invert: bool | None = None
) -> tuple[Tensor, list[Path], bool]:
    """Reads image files: (images uint8 [M, S, S], the paths that could be read, whether they were inverted).

    ``invert``: True for dark ink on light paper, so that ink is 255 as in all drawn data here; False to keep
    the grey values; None decides for all files together, by whether their borders are light. Files that
    cannot be read are skipped, with one warning that names them.
    """
    images, read, failed = [], [], []
    for path in map(Path, paths):
        try:
            images.append(read_grey(path, image_size))
            read.append(path)
        except UNREADABLE as error:
            failed.append(f"{path} ({_reason(error)})")
    if failed:
        warnings.warn(f"skipped {len(failed)} unreadable image files: {shortened(failed, 20)}", stacklevel=2)
    stack = np.stack(images) if images else np.zeros((0, image_size, image_size), np.uint8)
    if invert is None:
        invert = bool(images) and float(np.median([_border(image) for image in images])) > _LIGHT
    return torch.from_numpy(255 - stack if invert else stack), read, invert


def shortened(items: Sequence[str], most: int = 5) -> str:
    """The items with commas, the last ones only counted where there are more than ``most``."""
    rest = len(items) - most
    return ", ".join(items) if rest <= 0 else f"{', '.join(items[:most])} and {rest} more"


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode == "1" or image.mode == "L":
        return image.convert("L")
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert("L") would clip
        values = np.asarray(image, np.float64)
        low, high = values.min(), values.max()
        return Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-9)))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


def _border(pixels: np.ndarray) -> int:
    return int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))


def _stretch(pixels: np.ndarray) -> np.ndarray:
    low, high = int(pixels.min()), int(pixels.max())
    return np.uint8((pixels.astype(np.int32) - low) * 255 // max(high - low, 1))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
