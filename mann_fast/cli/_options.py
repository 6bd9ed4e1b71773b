"""What several commands do with their options."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data import ClassImages, Dataset, Episodes, load_dataset
from ..data.datasets import FOR_PHOTOGRAPHS, TooFewClasses, heldout_glyphs
from ..models.encoders import make_own
from ..training import TrainConfig
from ..training.checkpoint import PRETRAINED, SHIPPED, checkpoint_path
from ..training.features import encode_classes, encoder_of
from ..training.support import images_of_class, make_episodes, measured_ways
from ..training.trainer import fingerprint

LAYOUTS_OF_DATA = (
    "a path: a folder with a sub-folder of images per class, or with train/, val/ and test/ of such, or with lists of files "
    "and labels, train.csv, val.csv and test.csv; a .csv alone; an .npz of MedMNIST; Omniglot's own folder"
)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        default=PRETRAINED,
        type=checkpoint_path,
        help="checkpoint.pt of a training run, or the folder it is in (default: the model that comes with "
        "mann_fast, trained to tell 2 to 20 drawn characters apart; omniglot-stream: the one that came with 0.1)",
    )

    parser.add_argument(
        "--encoder",
        metavar="MODULE:FACTORY",
        type=encoder_named,
        help="only where the model was trained with an encoder of your own: the same again",
    )


def encoder_named(text: str) -> nn.Module:
    """A new encoder of the user's own."""
    import_from_here()
    return make_own(text)


def import_from_here() -> None:
    """Let modules of the current folder be imported, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def add_heldout_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DATA",
        help=f"glyphs, omniglot, or {LAYOUTS_OF_DATA} (default: what the model was trained on). Of the data that it was "
        "trained on, of glyphs and of omniglot the held-out classes are taken, of other data all",
    )


def heldout_episodes(
    content: dict[str, Any], source: str | None, seed: int, *, encoded: bool = True
) -> Episodes:
    """Episodes of the configured kind from classes that the model of a checkpoint was not trained on: the held-out ones of
    its data; of another folder of images all. Of what the model reads, so of features where it was trained with a backbone,
    unless ``encoded`` is False. Where there are fewer classes than the model's ways, and it can be measured on fewer, of all.
    """
    config = content["config"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "only .* to train on")  # nothing is trained
        classes = unseen_classes(content, source)
    if encoded and (encoder := encoder_of(content)):
        classes = encode_classes(classes, encoder)
    return make_episodes(config, classes, seed=seed, ways=measured_ways(config, classes))


def as_measured(config: TrainConfig, episodes: Episodes) -> TrainConfig:
    """The settings with the ways of the episodes, for titles and chance; fewer than the model's are said."""
    if episodes.ways == config.ways:
        return config
    print(
        f"mann-fast: {episodes.ways}-way: the data has {episodes.classes.num_classes} classes, and the model was trained to "
        f"tell up to {config.ways} apart",
        file=sys.stderr,
    )
    return replace(config, ways=episodes.ways, curriculum=0)


def unseen_classes(content: dict[str, Any], source: str | None) -> ClassImages:
    config = content["config"]
    if (source or config.data) == "glyphs":
        return heldout_glyphs(
            image_size=config.image_size, colour=config.colour, shots=images_of_class(config)
        )
    try:
        data = load_data(config, source)
    except TooFewClasses as error:
        if source is None:
            raise
        return error.classes
    if source is None or data.kind != "folder" or fingerprint(data) == content["data"].get("fingerprint"):
        return data.test
    return ClassImages.merged([data.train, data.test])


def say_which_model(checkpoint: Path) -> None:
    if checkpoint in SHIPPED.values():
        print(
            "mann-fast: a model that comes with mann_fast, trained on drawn characters (Omniglot) and on nothing else; "
            f"{FOR_PHOTOGRAPHS}",
            file=sys.stderr,
        )


def load_data(config: TrainConfig, source: str | None = None) -> Dataset:
    """The dataset of a configuration, or another `source` prepared in the same way.

    The split into training and held-out classes does not depend on the run's seed, so that `evaluate` finds
    the classes that training held out.
    """
    return load_dataset(
        source or config.data,
        image_size=config.image_size,
        colour=config.colour,
        ways=config.ways,
        shots=images_of_class(config),
    )
