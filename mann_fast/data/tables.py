"""Images and labels that are listed: in a CSV file, or in a map-style data set of Python."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .images import ClassImages, are_drawn, counted, expand_user, load_images, readable_suffixes, shortened
from .pictures import plain_label, to_pixels


def load_csv(
    path: str | Path, *, image_size: int = 20, colour: bool = False, invert: bool | None = None
) -> ClassImages:
    """The images that a CSV file lists, a line each: the file, then its label, which names the class; further columns are
    passed over. Where a first line names the columns, the label is that of ``label`` or ``class``, of two columns the other
    one, and the file may stand in any. Classes are sorted by name. Commas, semicolons or tabs part the columns.

    A file lies where its name leads from the folder of the CSV file, or from the folder ``images`` in it (mini-ImageNet, Ravi
    and Larochelle 2017), or one called as the CSV file is, ``train`` of train.csv. ``image_size``, ``colour`` and
    ``invert`` as in :func:`mann_fast.data.load_folder`.

    Listed files that do not exist or cannot be read are skipped, with a warning that names them. Raises FileNotFoundError for a
    ``path`` that does not exist, or where none of the listed files does, ValueError for a line that has no label, columns of
    which none is known to be the label, a file without lines, or one that is no text in UTF-8.
    """
    path = expand_user(path)
    folders = (path.parent, path.parent / "images", path.with_suffix(""))
    groups: dict[str, list[Path]] = {}
    of_file, of_label = 0, 1
    names: list[str] = []
    missing: list[tuple[int, list[str]]] = []
    for line, cells in _lines(path):
        where = f"line {line} of {path}"
        if not (groups or missing or names) and not any(_is_image_name(cell) for cell in cells):
            if _found(folders, cells[0]) is None:  # names of columns
                names = [cell.strip().lower() for cell in cells]
                continue
        if not groups and names:
            likely = (lambda cell: _found(folders, cell), _is_image_name)
            of_file = next((at for test in likely for at, cell in enumerate(cells) if test(cell)), 0)
            of_label = _label_column(path, names, of_file)
        if len(cells) <= max(of_file, of_label) or not cells[of_file].strip() or not cells[of_label].strip():
            raise ValueError(f"{where} must have a file and its label, got {','.join(cells)}")
        found = _found(folders, cells[of_file])
        if found is None:
            missing.append((line, cells))
        else:
            groups.setdefault(cells[of_label].strip(), []).append(found)
    listed = [f"{cells[of_file][:200]} in line {line}" for line, cells in missing if len(cells) > of_file]
    if missing and not groups:
        others = f", nor do the {len(listed) - 1} others that it lists" if len(listed) > 1 else ""
        raise FileNotFoundError(
            f"{listed[0]} of {path} does not exist, in {path.parent} or its folders images and {path.stem}{others}"
        )
    if not groups:
        raise ValueError(f"{path} lists no images; expected lines of a file and its label")
    if missing:
        warnings.warn(
            f"skipped {counted(len(missing), 'missing image file')} of {path}: {shortened(listed, 20)}",
            stacklevel=2,
        )
        for _, cells in missing:
            if len(cells) > of_label:  # a class that has no others is none to be passed over in silence
                groups.setdefault(cells[of_label].strip(), [])
    classes = sorted(groups)
    order = [image for name in classes for image in groups[name]]
    images, read, inverted = load_images(order, image_size=image_size, colour=colour, invert=invert)
    readable = set(read)
    counts = [sum(image in readable for image in groups[name]) for name in classes]
    return ClassImages(images, torch.tensor([0, *counts]).cumsum(0), tuple(classes), inverted)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line that has any; ValueError for what is no text in UTF-8, or no CSV."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except UnicodeDecodeError:
            raise ValueError(f"{path} must be text in UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path} cannot be read: {error}") from None


def _is_image_name(cell: str) -> bool:
    """Whether it has a suffix of images: such a file may be missing, but is no name of a column."""
    return Path(cell).suffix.lower() in readable_suffixes()


def _found(folders: Iterable[Path], name: str) -> Path | None:
    """The file of that name in the first folder that has it; None where there is none, or can be none."""
    for folder in folders:
        file = folder / expand_user(name)
        try:
            if file.is_file():
                return file
        except (OSError, ValueError):  # too long, or with a character that no name has
            return None
    return None


def _label_column(path: Path, names: list[str], of_file: int) -> int:
    """Which of the named columns is the label. ValueError where that is a guess."""
    known = [at for at, name in enumerate(names) if name in ("label", "class")]
    if known:
        return known[0]
    others = [at for at in range(len(names)) if at != of_file]
    if len(others) != 1:
        raise ValueError(
            f"{path} must have a column label or class, or two columns in all; its columns are {', '.join(names)}"
        )
    return others[0]


def load_pairs(
    dataset: Any, *, image_size: int = 20, colour: bool = False, invert: bool | None = None
) -> ClassImages:
    """The images of a map-style data set, ``len(dataset)`` pairs ``dataset[i]`` of an image and its label: those of
    ``torchvision.datasets``, or any ``torch.utils.data.Dataset``, or a list.

    Image and label are what :class:`mann_fast.FewShotLearner` calls so. A class has the name that ``dataset.classes`` gives its
    number, where there is such a list (of a ``Subset`` that of the whole, of a ``ConcatDataset`` that of its parts); else the
    label is the name, a number as in "label03". ``image_size``, ``colour`` and ``invert`` as in
    :func:`mann_fast.data.load_folder`; all images are held at that size at once.

    Raises TypeError for what is no such data set or pair, ValueError for an image that cannot be read, by its place.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have a length and items, got {type(dataset).__name__}")
    names = _class_names(dataset)
    groups: dict[Hashable, list[np.ndarray]] = {}
    images = []
    for at in range(len(dataset)):
        pair = dataset[at]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"dataset[{at}] must be an image and its label, got {type(pair).__name__}")
        image, label = pair
        label = plain_label(label, f"the label of dataset[{at}]")
        images.append(to_pixels(image, f"dataset[{at}]", image_size, colour))
        groups.setdefault(label, []).append(images[-1])
    if invert is None:
        invert = not colour and are_drawn(
            images, lambda at: to_pixels(dataset[at][0], f"dataset[{at}]", image_size, colour=True)
        )
    ordered = sorted(groups.items(), key=lambda item: _order(item[0]))
    named = {
        _name(label, names): [255 - image for image in group] if invert else group for label, group in ordered
    }
    if len(named) < len(groups):
        raise ValueError("dataset must give each label a name of its own, in dataset.classes")
    return ClassImages.from_groups(named, image_size, invert)


def _class_names(dataset: Any) -> Any:
    """Those that it has, or that it is a part of, as ``torch.utils.data.Subset`` is of its ``dataset``, or that all its parts
    have, as of a ``ConcatDataset`` its ``datasets``; else None. ValueError where its parts have different ones: a number then
    means several classes.
    """
    if hasattr(dataset, "classes"):
        return dataset.classes
    if hasattr(dataset, "dataset"):
        return _class_names(dataset.dataset)
    every = [_class_names(part) for part in getattr(dataset, "datasets", ())]
    if not every or any(names is None for names in every):
        return None
    if any(list(names) != list(every[0]) for names in every):
        raise ValueError(
            "dataset must have parts of the same classes: the parts of this one number different ones"
        )
    return every[0]


def _order(label: Hashable) -> tuple[int, float, str]:
    """Numbers first, then strings, then what else there is."""
    if isinstance(label, (int, float)):
        return 0, label, ""
    return (1 if isinstance(label, str) else 2), 0, str(label)


def _name(label: Any, names: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int):
        return str(label)
    if isinstance(names, (list, tuple, np.ndarray)) and 0 <= label < len(names):
        return str(names[label])
    return f"label{label:02d}"
