"""mann-fast show: a picture of one episode: the images as they come, what the model answers, where it writes and reads."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..data import Episode, Episodes
from ..data.images import expand_user
from ..models.backbones import is_backbone
from ..training import BabiConfig, SequenceConfig, TrainConfig, load_checkpoint, restore_model
from ..training.loop import describe
from ..training.sequences import trace_sequence
from ..training.support import as_stream, sample_support
from ..training.trace import trace
from ._options import add_checkpoint, add_heldout_data, as_measured, heldout_episodes, say_which_model

EXAMPLE = """\
examples:
  mann-fast show                                               (fetches Omniglot first, 15 MB)
  mann-fast show --checkpoint runs/glyphs --episode 3 --out third.png
  mann-fast show --checkpoint runs/copy --length 60            (a model of a sequence task)
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "show",
        help="draw what a model's memory does in one episode",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--episode", metavar="SEED", type=int, default=0, help="which episode, a number (default: 0)"
    )
    add_heldout_data(parser)
    parser.add_argument(
        "--length", metavar="N", type=int, help="of a sequence task (default: the longest of training)"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=expand_user, help="the picture, PNG or SVG (default: episode-SEED.png)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from ..training.plots import plot_episode

    say_which_model(args.checkpoint)
    content = load_checkpoint(args.checkpoint)
    config = content["config"]
    if isinstance(config, BabiConfig):
        raise ValueError(
            f"{args.checkpoint} is a model of the task {config.task}, of which there is no picture"
        )
    if isinstance(config, SequenceConfig):
        return show_sequence(args, content)
    if args.length is not None:
        raise ValueError("--length belongs to a model of a sequence task")
    source = args.data or config.data
    episodes = heldout_episodes(content, args.data, args.episode)
    measured = as_measured(config, episodes)
    episode = one_episode(config, episodes)
    # The same seed draws the same images, of which a model may read features.
    pictures = episode
    if is_backbone(config.encoder):
        pictures = one_episode(config, heldout_episodes(content, args.data, args.episode, encoded=False))
    found = trace(restore_model(content, args.encoder), episode, config.labels)
    images = pictures.inputs[:, 0, : math.prod(config.image_shape)].unflatten(1, config.image_shape)
    out = args.out or Path(f"episode-{args.episode}.png")
    plot_episode(
        out, images, episode.instance[:, 0], found, f"{describe(measured, source)}, episode {args.episode}"
    )
    print(f"{int(found.right.sum())} of {int(found.asked.sum())} right; picture: {out}")
    return 0


def one_episode(config: TrainConfig, episodes: Episodes) -> Episode:
    if config.layout == "stream":
        return episodes.sample(1)
    drawn = sample_support(episodes, 1, ways=episodes.ways, shots=config.shots, queries=1)
    return as_stream(drawn, config)


def show_sequence(args: argparse.Namespace, content: dict[str, Any]) -> int:
    """The same for a model of a sequence task."""
    from ..training.sequence_plots import plot_sequence, unit

    config = content["config"]
    if args.data:
        raise ValueError(f"--data does not belong to a model of the task {config.task}")
    least = SequenceConfig.of_task(config.task).least
    if args.length is not None and args.length < least:
        raise ValueError(f"--length must be at least {least}, got {args.length}")
    found = trace_sequence(restore_model(content, args.encoder), config, args.episode, args.length)
    out = args.out or Path(f"episode-{args.episode}.png")
    plot_sequence(out, found, config, f"{describe(config)}; sequence {args.episode}")
    print(f"{unit(config)}: {found.error:.3f}; picture: {out}")
    return 0
