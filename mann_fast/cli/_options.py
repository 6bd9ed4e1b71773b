"""What several commands do with their options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..data import Dataset, Episodes, load_dataset
from ..data.images import expand_user
from ..training import TrainConfig
from ..training.checkpoint import PRETRAINED


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        default=PRETRAINED,
        type=expand_user,
        help="checkpoint.pt of a training run, or the folder it is in (default: the model that comes with "
        "mann_fast, trained to tell 2 to 5 drawn characters apart)",
    )


def add_heldout_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="glyphs, omniglot, or a folder (default: what the model was trained on); "
        "only its held-out classes are used",
    )


def heldout_episodes(config: TrainConfig, source: str, seed: int) -> Episodes:
    """Episodes of the configured kind from the held-out classes of a dataset."""
    classes = load_data(config, source).test
    return Episodes(classes, ways=config.ways, shots=config.shots, labels=config.labels, seed=seed)


def say_which_model(checkpoint: Path) -> None:
    if checkpoint == PRETRAINED:
        print(
            "mann-fast: the model that comes with mann_fast, trained on drawn characters (Omniglot) and on nothing else; "
            "for photographs train one of your own (mann-fast train --data FOLDER) and name it with --checkpoint",
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
        shots=config.shots,
    )
