"""mann-fast predict: classify images of new classes from a few examples of each, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import load_images
from ..data.folder import class_files, class_names, other_files
from ..data.images import counted, expand_user
from ..learner import FewShotLearner
from ._options import add_checkpoint, say_which_model

EXAMPLE = """\
examples:
  mann-fast predict --support examples new1.png new2.png
  mann-fast predict --checkpoint runs/mine/checkpoint.pt --support examples new1.png

where examples/ holds one folder per class with one or more images of it, such as examples/cat/1.png and
examples/dog/1.png. The classes need not be among those that the model was trained on.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "predict",
        help="classify images of new classes from a few examples",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--support",
        metavar="DIR",
        required=True,
        type=expand_user,
        help="folder with one sub-folder of examples per class, or of such folders (ALPHABET/character01)",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", type=expand_user, help="image files to classify"
    )
    parser.add_argument(
        "--orders",
        metavar="N",
        type=int,
        default=32,
        help="random orders of the examples to average over (default: 32)",
    )
    parser.add_argument(
        "--views",
        metavar="N",
        type=int,
        default=8,
        help="of a model with an encoder: views of an image, each distorted a little otherwise, to average its features over "
        "(default: 8)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the orders (default: 0)")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, to stdout"
    )
    return parser


@dataclass(frozen=True)
class Prediction:
    """names: C classes; examples: how many each had; images: Q paths; probabilities: float64 [Q, C]; deviations: their standard
    deviations over the orders, 0 of a single one.
    """

    names: list[str]
    examples: list[int]
    images: list[Path]
    probabilities: Tensor
    deviations: Tensor

    def to_dict(self) -> dict:
        return {
            "classes": {
                name: {"examples": count} for name, count in zip(self.names, self.examples, strict=True)
            },
            "predictions": [
                {
                    "image": str(image),
                    "class": self.names[max(range(len(row)), key=row.__getitem__)],
                    "probabilities": dict(zip(self.names, row, strict=True)),
                    "deviations": dict(zip(self.names, deviations, strict=True)),
                }
                for image, row, deviations in self.rows()
            ],
        }

    def rows(self) -> Iterator[tuple[Path, list[float], list[float]]]:
        """Each image with its probabilities and their deviations."""
        return zip(self.images, self.probabilities.tolist(), self.deviations.tolist(), strict=True)


def classify(
    checkpoint: Path,
    support: Path,
    images: list[Path],
    *,
    orders: int = 32,
    views: int = 8,
    seed: int = 0,
    encoder: nn.Module | None = None,
) -> Prediction:
    """Classify image files by the examples in the sub-folders of `support`.

    Raises FileNotFoundError and ValueError, naming the file or folder, where one is missing or cannot be
    read.
    """
    options: dict[str, Any] = {"orders": orders, "views": views, "random_state": seed, "encoder": encoder}
    learner = FewShotLearner.load(checkpoint, **options)
    groups = example_files(support)
    files = [file for group in groups.values() for file in group]
    for image in images:
        if not image.is_file():
            raise FileNotFoundError(
                f"{image} is {'a folder' if image.is_dir() else 'missing'}; give image files to classify"
            )

    config = learner.config
    # As they are: the learner decides whether drawings have to be inverted.
    pixels, readable, _ = load_images(
        [*files, *images], image_size=config.image_size, colour=config.colour, invert=False
    )
    pixel = dict(zip(readable, pixels, strict=True))
    for image in images:
        if image not in pixel:
            raise ValueError(f"{image} is not an image that can be read")
    groups = {name: [file for file in group if file in pixel] for name, group in groups.items()}
    for name, group in groups.items():
        if not group:
            raise ValueError(
                f"class {name!r} of --support {support} has no readable image; put at least one example there"
            )

    learner.learn(
        torch.stack([pixel[file] for group in groups.values() for file in group]),
        [name for name, group in groups.items() for _ in group],
    )
    answers = learner.predict_proba(torch.stack([pixel[image] for image in images]), return_std=True)
    counts = [len(group) for group in groups.values()]
    return Prediction(list(groups), counts, list(images), *map(torch.from_numpy, answers))


def example_files(support: Path) -> dict[str, list[Path]]:
    """The files of each class, by its name, as ``train`` finds them in a folder of images; both sorted, so that the result does
    not depend on the file system.
    """
    if not support.is_dir():
        raise FileNotFoundError(
            f"--support {support} is not a folder; it must hold one sub-folder of examples per class"
        )
    try:
        found = class_files(support)
    except ValueError as error:
        raise ValueError(f"--support {error}") from None
    if len(found) < 2:
        raise ValueError(
            f"--support {support} has {counted(len(found), 'class', 'classes')}; it must hold a sub-folder of examples for "
            "each, and at least 2"
        )
    for folder, files in found.items():
        if not files:
            others = other_files([folder])
            there = f", only {others}" if others else ""
            raise ValueError(
                f"class {folder.name!r} has no readable image in {folder}{there}; put at least one example there"
            )
    return dict(zip(class_names(support, found), found.values(), strict=True))


def run(args: argparse.Namespace) -> int:
    say_which_model(args.checkpoint)
    options: dict[str, Any] = {name: getattr(args, name) for name in ("orders", "views", "seed", "encoder")}
    prediction = classify(args.checkpoint, args.support, args.images, **options)
    if args.json:
        print(json.dumps(prediction.to_dict(), indent=2))
    else:
        print_prediction(prediction)
    return 0


def print_prediction(prediction: Prediction) -> None:
    from rich.table import Table

    from ._report import print_table

    table = Table()
    table.add_column("image", no_wrap=True)
    for name, count in zip(prediction.names, prediction.examples, strict=True):
        table.add_column(f"{name}\n({counted(count, 'example')})", justify="right", no_wrap=True)
    names = [image.name for image in prediction.images]
    if len(set(names)) < len(names):  # then only the whole path tells them apart
        names = list(map(str, prediction.images))
    several = bool(prediction.deviations.any())  # orders
    for name, (_, row, deviations) in zip(names, prediction.rows(), strict=True):
        best = max(row)
        cells = [
            f"{p:.0%}{f' ± {100 * d:.0f}' if several else ''}{'*' if p == best else ' '}"
            for p, d in zip(row, deviations, strict=True)
        ]
        table.add_row(name, *cells)
    of_orders = " ± its deviation over the orders of the examples" if several else ""
    print(f"Probability of each class{of_orders}, the largest marked *")
    print_table(table)
