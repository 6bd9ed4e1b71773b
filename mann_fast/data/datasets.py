"""Training and test classes from any source, never overlapping."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .fetch import fetch_omniglot
from .folder import class_folders, load_folder, part_of
from .glyphs import generate_glyphs
from .images import ClassImages, counted, expand_user, shortened
from .npz import load_npz
from .omniglot import ALPHABETS, find_part, load_omniglot
from .tables import load_csv, load_pairs

GLYPH_CLASSES = (3000, 200)  # to train on, to test on
FEW_CLASSES = 30


class TooFewClasses(ValueError):
    """Too few to split into training and test classes: ``classes``."""

    def __init__(self, message: str, classes: ClassImages):
        super().__init__(message)
        self.classes = classes


class Dataset(NamedTuple):
    """Classes to train on and other classes to test on; kind: "glyphs", "omniglot" or "folder". features: where they stand in
    place of images, what made them (:meth:`mann_fast.training.features.FeatureEncoder.to_dict`).
    """

    train: ClassImages
    test: ClassImages
    kind: str
    features: dict[str, Any] | None = None


def load_dataset(
    source: Any,
    *,
    image_size: int = 20,
    colour: bool = False,
    seed: int = 0,
    ways: int = 5,
    shots: int = 10,
    invert: bool | None = None,
) -> Dataset:
    """The classes of ``source``, split so that no class is in both parts, in the same way on every machine.

    "glyphs": 3,000 and 200 invented characters (``seed`` makes others). "omniglot": the official background
    and evaluation parts, fetched into the cache folder if they are not there. A path: Omniglot's archives or
    folders, split likewise; or a folder with one sub-folder of images per class, of which a fifth, but at
    least ``ways``, are set aside to test on: the same ones for the same ``seed``, so evaluate with the seed
    of the training. Of a folder that holds such folders as train/ and test/ (or val/, where there is no test/), which
    have no class in common, the split is theirs; where they have, the images of a class are put together and the classes split
    as above; so of a folder that holds such files as train.csv and test.csv (``load_csv``). A .csv file alone, or an .npz file
    of MedMNIST (``load_npz``): its classes, split as above. A map-style data set of images and labels in Python
    (``load_pairs``): likewise. ``colour`` and ``invert`` as in ``load_folder``.

    Names of parts may also be training, valid, validation or testing, in any case. Of train.csv alone, beside no folders of
    classes, the classes are split as above.

    Warns where fewer than 30 classes are to train on. Raises ValueError where a part has too few classes for episodes of
    ``ways``, or a class too few images for ``shots``; FileNotFoundError for a path that does not exist; FetchError.
    """
    if not isinstance(source, (str, os.PathLike)):
        options = {"image_size": image_size, "colour": colour}
        parts = split_classes(load_pairs(source, **options, invert=invert), ways=ways, seed=seed)
        kind = "folder"
    elif source == "glyphs":
        train, test = GLYPH_CLASSES
        classes = _glyphs(train + test, image_size, colour, seed, shots)
        parts = classes.select(range(train)), classes.select(range(train, train + test))
        kind = "glyphs"
    elif source == "omniglot" or any(find_part(source, part) for part in ALPHABETS):
        path = fetch_omniglot() if source == "omniglot" else source
        parts = tuple(
            load_omniglot(path, part, image_size=image_size, colour=colour)
            for part in ("background", "evaluation")
        )
        kind = "omniglot"
    else:
        path = expand_user(source)
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist; expected 'glyphs', 'omniglot' or a path")
        suffix = "" if path.is_dir() else path.suffix.lower()
        options = {"image_size": image_size, "colour": colour}
        folders = _parts(class_folders(path)) if path.is_dir() else {}
        tables = _parts(path.glob("*.[cC][sS][vV]"))
        if len(tables) == 1 and not {folder.name for folder in class_folders(path)} <= {"images", "train"}:
            tables = {}  # a list beside folders of classes
        if len(folders) >= 2 and not (tables and not any(map(class_folders, folders["train"]))):
            parts = _split_before(load_folder, folders, options, invert, ways)
        elif tables:
            parts = _split_before(load_csv, tables, options, invert, ways)
        elif suffix == ".csv":
            parts = (load_csv(path, **options, invert=invert),)
        elif suffix == ".npz":
            parts = (load_npz(path, **options),)
        elif path.is_dir():
            parts = (load_folder(path, **options, min_images=shots, invert=invert),)
            lists = sorted(file.name for file in path.glob("*.[cC][sS][vV]"))
            if parts[0].num_classes == 1 and lists:
                raise ValueError(
                    f"{path} has all images in one folder, {parts[0].names[0]}, and {shortened(lists)} beside it: where that "
                    "says the class of each, give the file itself"
                )
        else:
            raise NotADirectoryError(
                f"{source} is a file; expected a folder with one sub-folder of images per class, a .csv, or an .npz of MedMNIST"
            )
        if len(parts) == 1:
            parts = split_classes(parts[0], ways=ways, seed=seed)
        kind = "folder"
    for part in parts:
        part.require(shots, "lower shots (--shots)")
    return Dataset(*parts, kind)


def heldout_glyphs(*, image_size: int, colour: bool, shots: int) -> ClassImages:
    """The classes to test on of ``load_dataset("glyphs")``, without drawing those to train on."""
    train, test = GLYPH_CLASSES
    return _glyphs(test, image_size, colour, 0, shots, first=train)


def _glyphs(count: int, image_size: int, colour: bool, seed: int, shots: int, first: int = 0) -> ClassImages:
    if colour:
        raise ValueError("colour must be False for glyphs, which are black and white (--no-colour)")
    return generate_glyphs(count, max(20, shots), image_size=image_size, seed=seed, first=first)


def _parts(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Those that are a part of data which others have split, by the part; none without a part to train on."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(paths):
        if part := part_of(path):
            parts.setdefault(part, []).append(path)
    return parts if "train" in parts else {}


def _split_before(
    load: Callable[..., ClassImages],
    paths: dict[str, list[Path]],
    options: dict[str, Any],
    invert: bool | None,
    ways: int,
) -> tuple[ClassImages, ...]:
    """(train, test) where no class is in two of the parts, else all classes in one; so where there is but one part. Warns where
    few classes are to train on; raises TooFewClasses where a part has fewer than ``ways``.
    """
    parts: dict[str, ClassImages] = {}
    for part in ("train", "val", "test"):
        if part in paths:
            parts[part] = ClassImages.merged([load(path, **options, invert=invert) for path in paths[part]])
            invert = parts["train"].inverted  # as the training images
    whole = ClassImages.merged([*parts.values()])
    if len(parts) == 1 or whole.num_classes < sum(part.num_classes for part in parts.values()):
        return (whole,)
    chosen = {name: parts[name] for name in ("train", "test" if "test" in parts else "val")}
    smallest, count = min(
        ((name, part.num_classes) for name, part in chosen.items()), key=lambda found: found[1]
    )
    if count < ways:
        lower = f", or lower it to {count}" if count > 1 else ""
        raise TooFewClasses(
            f"{shortened([str(path) for path in paths[smallest]])} has {counted(count, 'class', 'classes')}, too few for "
            f"episodes of {ways} (--ways): add classes there{lower}",
            ClassImages.merged([*chosen.values()]),
        )
    _warn_of_few(parts["train"])
    return tuple(chosen.values())


def split_classes(classes: ClassImages, *, ways: int = 5, seed: int = 0) -> tuple[ClassImages, ClassImages]:
    """(train, test): a fifth of the classes, but at least ``ways``, are set aside to test on.

    The choice follows a hash of seed and class name, so it is the same on every machine and adding a class
    moves few others. Warns where few classes are left to train on. Raises ValueError for fewer than 2 *
    ``ways`` classes.
    """
    count = classes.num_classes
    if count < 2 * ways:
        raise TooFewClasses(_too_few(count, ways, classes.inverted), classes)
    hashes = [
        hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in classes.names
    ]
    order = sorted(range(count), key=hashes.__getitem__)
    held_out = max(ways, round(count / 5))
    train, test = (classes.select(sorted(part)) for part in (order[held_out:], order[:held_out]))
    _warn_of_few(train)
    return train, test


def _warn_of_few(train: ClassImages) -> None:
    if train.num_classes < FEW_CLASSES:
        warnings.warn(
            f"only {counted(train.num_classes, 'class', 'classes')} to train on: a model then learns these "
            f"classes rather than how to learn new ones, which takes {FEW_CLASSES} at the very least and better "
            f"hundreds. Consider training on {better_source(train.inverted)}, and showing your classes to that model "
            "(mann-fast predict --support)",
            stacklevel=3,
        )


def better_source(drawn: bool) -> str:
    """What to train on, where one's own classes are too few; of drawings or of photographs."""
    if drawn:
        return "Omniglot or the glyphs"
    return (
        "hundreds of classes of other photographs, by a pretrained network "
        "(mann-fast train --encoder torchvision/resnet18)"
    )


FOR_PHOTOGRAPHS = f"for photographs train a model on {better_source(drawn=False)}, and show yours to that one"


def _too_few(count: int, ways: int, drawn: bool) -> str:
    at_all = f" (--ways {count // 2} would run, and learn little)" if count >= 4 else ""
    return (
        f"{counted(count, 'class is', 'classes are')} too few to train with episodes of {ways} (--ways): that takes {ways} to "
        f"train on and {ways} others to test on, {2 * ways} in all{at_all}. With so few, train on {better_source(drawn)}, and "
        "show yours to that model (mann-fast predict --support)"
    )
