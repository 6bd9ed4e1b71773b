"""Images sorted by class, and how one image becomes a small square of grey values or colours."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

# What Pillow may raise on a file that is damaged, cut short, too large, or no image at all
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
    MemoryError,
    RuntimeError,  # of AVIF and HEIC
)

# Pillow's names, and the suffixes of such files. No other: some of Pillow's formats start external programs
_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".pgm", ".ppm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
# What reads those that not every Pillow does
_READERS = {
    "WEBP": "a Pillow built with WebP",
    "AVIF": "Pillow 11.3 or newer",
    "HEIF": "pillow-heif (pip install pillow-heif)",
}
_LONGEST = 65_535  # pixels a side, as in JPEG: on longer ones Pillow needs more memory than the pixels take
_LIGHT = 191  # border brighter than this, of 255: dark ink on light paper
# Of 255, how far red, green and blue of a picture lie apart on average. Coloured ink on paper is less, for most of it is paper.
_COLOURED = 32
_SAMPLE = 100  # pictures of many by which is said whether they are in colour


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images sorted by class: those of class c are ``images[starts[c]:starts[c + 1]]``.

    images: uint8 [M, S, S]; drawn characters have ink 255 on background 0, photographs their grey values. In colour
        [M, 3, S, S], red, green and blue. Or float32 [M, E], what a pretrained backbone has made of them
        (:class:`mann_fast.training.features.FeatureEncoder`).
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
        if not isinstance(self.images, Tensor) or (
            self.images.dtype != torch.uint8 and not self.are_features
        ):
            raise TypeError(f"images must be a uint8 tensor, got {_kind(self.images)}")
        shape = list(self.images.shape)
        of_images = len(shape) in (3, 4) and shape[-1] == shape[-2] and (len(shape) == 3 or shape[1] == 3)
        if not of_images and not self.are_features:
            raise ValueError(f"images must have shape [M, 3, S, S] or [M, S, S], got {shape}")
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
        """From the images of each class, uint8 [S, S] or [3, S, S] arrays; classes keep the order of the mapping."""
        flat = [image for group in groups.values() for image in group]
        images = np.stack(flat) if flat else np.zeros((0, image_size, image_size), np.uint8)
        counts = torch.tensor([0, *map(len, groups.values())])
        return cls(torch.from_numpy(images), counts.cumsum(0), tuple(groups), inverted)

    @classmethod
    def merged(cls, parts: Sequence[ClassImages]) -> ClassImages:
        """The classes of all parts, sorted by name; those of one name are one class."""
        groups: dict[str, list[Tensor]] = {}
        for part in parts:
            for name, start, end in zip(part.names, part.starts[:-1], part.starts[1:], strict=True):
                groups.setdefault(name, []).append(part.images[start:end])
        names = tuple(sorted(groups))
        counts = torch.tensor([0, *(sum(map(len, groups[name])) for name in names)])
        images = torch.cat([images for name in names for images in groups[name]])
        return cls(images, counts.cumsum(0), names, parts[0].inverted)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.names)

    @property
    def are_features(self) -> bool:
        """Whether there are features in place of the images."""
        return self.images.dtype == torch.float32 and self.images.dim() == 2

    @property
    def image_size(self) -> int:
        """S, the width and height of the images in pixels; of features E."""
        return self.images.shape[-1]

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
        turns = [torch.rot90(self.images, quarter, (-2, -1)) for quarter in range(4)]
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
                f"every class needs at least {counted(images, 'image')}: {listed}{'; ' if hint else ''}{hint}"
            )


def read_grey(file: str | Path | IO[bytes], image_size: int) -> np.ndarray:
    """One image file as grey values, uint8 [S, S], stretched to reach from 0 to 255: :func:`read_image`."""
    return read_image(file, image_size)


def read_image(file: str | Path | IO[bytes], image_size: int, colour: bool = False) -> np.ndarray:
    """One image file as grey values, uint8 [S, S], or in colour, [3, S, S].

    Transparency becomes white, a camera's turn (EXIF) is undone. The whole image is fitted into the square without
    stretching it out of shape, and what is left is filled with the grey or colour of its border. Grey values are stretched
    to reach from 0 to 255 (an image of a single grey is all 0), colours stay as they are. Of several frames or pages it is
    the first. Raises one of ``UNREADABLE``, also for sides of more than 65,535 pixels and for more pixels than Pillow takes.
    """
    file = expand_user(file) if isinstance(file, (str, Path)) else file
    # Pillow's warnings name no file, and are about metadata, or sizes that it takes all the same
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        return _read_image(file, image_size, colour)


def _read_image(file: Path | IO[bytes], image_size: int, colour: bool) -> np.ndarray:
    with Image.open(file, formats=readable_formats()) as image:
        if max(image.size) > _LONGEST:
            width, height = image.size
            raise ValueError(f"{width:,} x {height:,} pixels; a side may have up to {_LONGEST:,}")
        # Decodes a large JPEG at a fraction of its size
        image.draft("RGB" if colour else "L", (2 * image_size, 2 * image_size))
        image.load()
        return to_square(image, image_size, colour)


def to_square(image: Image.Image, image_size: int, colour: bool = False) -> np.ndarray:
    """What :func:`read_image` makes of an image; ValueError for pixels that are not finite."""
    image = ImageOps.exif_transpose(image)
    image = _to_colour(image) if colour else _to_grey(image)
    width, height = image.size
    scale = image_size / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if image.size != size:
        # Pillow averages over all the pixels that make up one of the result: antialiased
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    if size[0] != size[1]:
        square = np.empty((image_size, image_size, *pixels.shape[2:]), np.uint8)
        square[:] = border(pixels)
        top, left = (image_size - size[1]) // 2, (image_size - size[0]) // 2
        square[top : top + size[1], left : left + size[0]] = pixels
        pixels = square
    return pixels.transpose(2, 0, 1) if colour else _stretch(pixels)


def load_images(
    paths: Iterable[str | Path], *, image_size: int = 20, colour: bool = False, invert: bool | None = None
) -> tuple[Tensor, list[Path], bool]:
    """Reads image files: (images uint8 [M, S, S], in ``colour`` [M, 3, S, S], the paths that could be read, whether they were
    inverted).

    ``invert``: True for dark ink on light paper, so that ink is 255 as in all drawn data here; False to keep
    the grey values; None decides for all files together, by whether their borders are light and most of them are not in
    colour (never with ``colour``). Files that cannot be read are skipped, with one warning that names them.
    """
    images, read, failed = [], [], []
    for path in map(expand_user, paths):
        try:
            images.append(read_image(path, image_size, colour))
            read.append(path)
        except UNREADABLE as error:
            failed.append(f"{path} ({reason(error, path.suffix)})")
    if failed:
        files = counted(len(failed), "unreadable image file")
        warnings.warn(f"skipped {files}: {shortened(failed, 20)}", stacklevel=2)
    empty = np.zeros((0, *((3,) if colour else ()), image_size, image_size), np.uint8)
    stack = np.stack(images) if images else empty
    if invert is None:
        invert = not colour and are_drawn(images, lambda at: read_image(read[at], image_size, colour=True))
    return torch.from_numpy(255 - stack if invert else stack), read, invert


def are_drawn(images: Sequence[np.ndarray], in_colour: Callable[[int], np.ndarray]) -> bool:
    """Whether grey images are mostly dark ink on light paper, and not photographs of something on a light ground.
    in_colour: of a place the image [3, S, S]; it is asked for a sample of them.
    """
    places = range(0, len(images), -(-len(images) // _SAMPLE) or 1)
    return is_light(images) and not are_coloured(np.stack([in_colour(at) for at in places]))


def are_coloured(images: np.ndarray) -> bool:
    """Whether most of these pictures, uint8 [M, 3, S, S], are in colour: no drawn characters."""
    channels = images.astype(np.int16)
    return bool(np.median((channels.max(1) - channels.min(1)).mean((1, 2))) > _COLOURED)


def is_light(images: Sequence[np.ndarray]) -> bool:
    """Whether grey images are mostly dark ink on light paper, by their borders."""
    return bool(len(images)) and float(np.median([border(image) for image in images])) > _LIGHT


@cache
def readable_formats() -> tuple[str, ...]:
    """Which of ``_FORMATS`` can be read here."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    Image.init()
    # Pillow lists a format among its modules where it may have been built without it
    optional = features.modules
    return tuple(
        name
        for name in _FORMATS
        if name in Image.OPEN and (name.lower() not in optional or features.check_module(name.lower()))
    )


def readable_suffixes() -> set[str]:
    """The suffixes of the files that can be read here, in lower case."""
    return {suffix for name in readable_formats() for suffix in _FORMATS[name]}


def reader_of(suffix: str) -> str:
    """What has to be installed before files with this suffix can be read; empty where nothing is known to help."""
    missing = _READERS.keys() - set(readable_formats())
    return next((_READERS[name] for name in missing if suffix.lower() in _FORMATS[name]), "")


def reason(error: BaseException, suffix: str) -> str:
    """Why a file of this suffix could not be read, without the name of the file."""
    if isinstance(error, Image.UnidentifiedImageError):
        reader = reader_of(suffix)
        return f"needs {reader}" if reader else "not an image"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def expand_user(path: str | Path) -> Path:
    """The path, a ``~`` at its start replaced by the user's home; kept where there is no such user."""
    return Path(os.path.expanduser(path))


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """The number and the noun: "1 image", "2 images"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def shortened(items: Sequence[str], most: int = 5) -> str:
    """The items with commas, the last ones only counted where there are more than ``most``."""
    rest = len(items) - most
    return ", ".join(items) if rest <= 0 else f"{', '.join(items[:most])} and {rest} more"


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode == "1" or image.mode == "L":
        return image.convert("L")
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert("L") would clip
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("has pixels that are not finite")
        low, high = values.min(), values.max()
        return Image.fromarray(np.uint8(255 * (values - low) / max(high - low, 1e-9)))
    return _on_white(image).convert("L")


def _to_colour(image: Image.Image) -> Image.Image:
    if image.mode == "1" or image.mode.startswith(("I", "F")):
        image = _to_grey(image)
    return _on_white(image).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """With white behind what is transparent."""
    if "A" not in image.mode and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def border(pixels: np.ndarray) -> np.ndarray:
    """The median along the border, of [S, S] a number, of [S, S, 3] one for each colour."""
    return np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0).astype(np.uint8)


def _stretch(pixels: np.ndarray) -> np.ndarray:
    low, high = int(pixels.min()), int(pixels.max())
    return np.uint8((pixels.astype(np.int32) - low) * 255 // max(high - low, 1))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
