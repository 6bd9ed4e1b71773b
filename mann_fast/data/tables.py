"""Images and labels that are listed: in a CSV file, or in a map-style data set of Python."""

from __future__ import annotations

import csv
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .images import ClassImages, expand_user, is_light, load_images
from .pictures import plain_label, to_pixels


def load_csv(
    path: str | Path, *, image_size: int = 20, colour: bool = False, invert: bool | None = None
) -> ClassImages:
    """The images that a CSV file lists, a line each: the file, then its label, which names the class; further columns are
    passed over, and so is a first line that names no file. Classes are sorted by name.

    A file lies where its name leads from the folder of the CSV file, or from the folder ``images`` in it (mini-ImageNet, Ravi
    and Larochelle 2017), or one called as the CSV file is, ``train`` of train.csv. ``image_size``, ``colour`` and
    ``invert`` as in :func:`mann_fast.data.load_folder`.

    Raises FileNotFoundError for a ``path`` or a listed file that does not exist, by its line, ValueError for a line that has no
    label, or a file without lines.
    """
    path = expand_user(path)
    groups: dict[str, list[Path]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, skipinitialspace=True)
        for cells in reader:
            if not cells:
                continue
            where = f"line {reader.line_num} of {path}"
            folders = (path.parent, path.parent / "images", path.with_suffix(""))
            found = next((folder / cells[0] for folder in folders if (folder / cells[0]).is_file()), None)
            if found is None and reader.line_num == 1:
                continue  # names of columns
            if found is None:
                raise FileNotFoundError(
                    f"{cells[0]} in {where} does not exist, in {path.parent} or its folders images and {path.stem}"
                )
            if len(cells) < 2 or not cells[1].strip():
                raise ValueError(f"{where} must have a file and its label, got {','.join(cells)}")
            groups.setdefault(cells[1].strip(), []).append(found)
    if not groups:
        raise ValueError(f"{path} lists no images; expected lines of a file and its label")
    names = sorted(groups)
    order = [image for name in names for image in groups[name]]
    images, read, inverted = load_images(order, image_size=image_size, colour=colour, invert=invert)
    readable = set(read)
    counts = [sum(image in readable for image in groups[name]) for name in names]
    return ClassImages(images, torch.tensor([0, *counts]).cumsum(0), tuple(names), inverted)


def load_pairs(
    dataset: Any, *, image_size: int = 20, colour: bool = False, invert: bool | None = None
) -> ClassImages:
    """The images of a map-style data set, ``len(dataset)`` pairs ``dataset[i]`` of an image and its label: those of
    ``torchvision.datasets``, or any ``torch.utils.data.Dataset``, or a list.

    An image is what :class:`mann_fast.FewShotLearner` calls one. A class has the name that ``dataset.classes`` gives its
    number, where there is such a list; else the label is the name, a number as in "label03". ``image_size``, ``colour`` and
    ``invert`` as in :func:`mann_fast.data.load_folder`; all images are held at that size at once.

    Raises TypeError for what is no such data set or pair, ValueError for an image that cannot be read, by its place.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have a length and items, got {type(dataset).__name__}")
    names = getattr(dataset, "classes", None)
    groups: dict[Hashable, list[np.ndarray]] = {}
    for at in range(len(dataset)):
        pair = dataset[at]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"dataset[{at}] must be an image and its label, got {type(pair).__name__}")
        image, label = pair
        label = plain_label(label, f"the label of dataset[{at}]")
        if not isinstance(label, (int, str)):
            raise TypeError(
                f"the label of dataset[{at}] must be an integer or a string, got {type(label).__name__}"
            )
        groups.setdefault(label, []).append(to_pixels(image, f"dataset[{at}]", image_size, colour))
    if invert is None:
        invert = not colour and is_light([image for group in groups.values() for image in group])
    ordered = sorted(groups.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    named = {
        _name(label, names): [255 - image for image in group] if invert else group for label, group in ordered
    }
    if len(named) < len(groups):
        raise ValueError("dataset must give each label a name of its own, in dataset.classes")
    return ClassImages.from_groups(named, image_size, invert)


def _name(label: Any, names: Any) -> str:
    if isinstance(label, str):
        return label
    if isinstance(names, (list, tuple)) and 0 <= label < len(names):
        return str(names[label])
    return f"label{label:02d}"
