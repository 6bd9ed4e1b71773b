"""mann-fast evaluate: measure a trained model on classes that it has never seen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import ClassImages
from ..data.babi import load_babi
from ..data.images import counted, expand_user
from ..training import BabiConfig, SequenceConfig, TrainConfig, load_checkpoint, restore_model
from ..training.babi import measure_babi
from ..training.checkpoint import SHIPPED
from ..training.files import write_json
from ..training.loop import describe
from ..training.prediction import encoded_classes, has_encoder
from ..training.protocol import (
    INSTANCES,
    PROTOCOLS,
    Protocol,
    evaluate_protocol,
    evaluate_streams,
    obstacle,
    obstacle_to_streams,
)
from ..training.sequences import measure
from ..training.support import measure_accuracy
from ._options import add_checkpoint, add_heldout_data, as_measured, heldout_episodes, say_which_model

EXAMPLE = """\
examples:
  mann-fast evaluate                                           (fetches Omniglot first, 15 MB)
  mann-fast evaluate --protocol all                            (also N-way K-shot, as the field measures)
  mann-fast evaluate --streams 5 --orders 8 --views 8          (also by instance, as Santoro et al. 2016 do)
  mann-fast evaluate --checkpoint runs/mine/checkpoint.pt --data my_images

Intervals are computed over episodes, since the answers within one depend on each other.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="measure a model on held-out classes",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    add_heldout_data(parser)
    parser.add_argument(
        "--protocol",
        metavar="N-way-K-shot",
        help="also measure as the field does: K examples of each of N classes, then 15 queries of each; 'all': "
        f"{', '.join(map(str, PROTOCOLS))}, as far as the model can",
    )
    parser.add_argument(
        "--streams",
        metavar="N",
        type=int,
        help=f"also measure by instance, whatever the model was trained on: streams of {INSTANCES} images of each of N "
        "classes, each image asked about from the memory of those before it",
    )
    parser.add_argument(
        "--orders",
        metavar="N",
        type=int,
        default=1,
        help="with --protocol: random orders of the examples to average an answer over, as predict does; with --streams, whose "
        "order is given, so many times that labels are dealt (default: 1)",
    )
    parser.add_argument(
        "--views",
        metavar="N",
        type=int,
        default=1,
        help="with --protocol or --streams: views of an image, each distorted a little otherwise, to average its features "
        "over, or where there is no encoder the answers (default: 1)",
    )
    parser.add_argument(
        "--episodes", metavar="N", type=int, default=1000, help="episodes to average over (default: 1000)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the episodes (default: 0)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=expand_user,
        help="folder for evaluation.png and evaluation.json (default: that of the checkpoint; for the model "
        "that comes with mann_fast, the current folder)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else, to stdout"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from ..training.plots import plot_accuracy

    if args.episodes < 2:
        raise ValueError(f"--episodes must be at least 2 to give confidence intervals, got {args.episodes}")
    for name in ("orders", "views"):
        value = getattr(args, name)
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
        if value > 1 and not (args.protocol or args.streams):
            raise ValueError(f"--{name} {value} needs --protocol or --streams, for which it averages")
    if args.streams is not None and args.streams < 2:
        raise ValueError(f"--streams must be at least 2 classes, got {args.streams}")
    say_which_model(args.checkpoint)
    content = load_checkpoint(args.checkpoint)
    config = content["config"]
    for name in ("protocol", "streams"):
        if getattr(args, name) and not isinstance(config, TrainConfig):
            raise ValueError(f"--{name} does not belong to a model of the task {config.task}")
    if isinstance(config, SequenceConfig):
        return evaluate_task(args, content)
    if isinstance(config, BabiConfig):
        return evaluate_babi(args, content)
    source = args.data or config.data
    episodes = heldout_episodes(content, args.data, args.seed)
    measured = as_measured(config, episodes)
    protocols = chosen_protocols(args.protocol, config, episodes.classes)
    if args.streams and (why := obstacle_to_streams(args.streams, config, episodes.classes)):
        raise ValueError(f"--streams {args.streams} cannot be measured: {why}")
    classes, model = episodes.classes.num_classes, restore_model(content, args.encoder)
    if args.views > 1 and not config.augment:
        raise ValueError(f"--views {args.views} needs a model that was trained on distorted images")
    accuracy = measure_accuracy(model, config, episodes, args.episodes)
    by_protocol, streams = [], None
    if protocols or args.streams:
        of_features, of_answers = (args.views, 1) if has_encoder(model) else (1, args.views)
        answering, encoded = encoded_classes(model, episodes.classes, of_features)
        averaged: dict[str, Any] = {"orders": args.orders, "views": of_answers, "seed": args.seed}
        for protocol in protocols:
            found = evaluate_protocol(answering, config, encoded, protocol, args.episodes, **averaged)
            by_protocol.append({**found, "views": args.views})
        if args.streams:
            by_instance = evaluate_streams(
                answering, config, encoded, args.streams, args.episodes, **averaged
            )
            averages = {"ways": args.streams, "orders": args.orders, "views": args.views}
            streams = {**averages, **by_instance.to_dict()}

    picture = out_folder(args) / "evaluation.png"
    title = describe(measured, source)
    on = (
        f"{counted(classes, 'class', 'classes')} of {name_of(args.data)}" if args.data else "held-out classes"
    )
    plot_accuracy(picture, accuracy, measured, title, on=on, streams=streams, protocols=by_protocol)
    result = {
        "checkpoint": str(args.checkpoint),
        "step": content["step"],
        "data": source,
        "heldout_classes": classes,
        "seed": args.seed,
        "heldout_accuracy": accuracy.to_dict(),
        "ways": measured.ways,
        "chance": measured.chance,
        "protocols": by_protocol,
        "streams": streams,
        "picture": str(picture),
    }
    from ._report import print_accuracy, print_protocols, print_streams

    counts = f"{classes} {'classes' if args.data else 'held-out classes'}, {args.episodes:,} episodes"
    heading = f"{title}, step {content['step']}: {counts}"

    def tables() -> None:
        print_accuracy(accuracy, measured, heading)
        if by_protocol:
            print_protocols(by_protocol, config)
        if streams:
            print_streams(streams, config)

    return report(args, result, tables)


def name_of(source: str) -> str:
    """Data in a word, for a title."""
    return source if source in ("glyphs", "omniglot") else Path(source).resolve().name


def chosen_protocols(text: str | None, config: TrainConfig, classes: ClassImages) -> list[Protocol]:
    """Those that --protocol names; of "all" what cannot be measured is left out, and a line says why."""
    if text is None:
        return []
    if text != "all":
        protocol = Protocol.parse(text)
        if why := obstacle(protocol, config, classes):
            raise ValueError(f"--protocol {protocol} cannot be measured: {why}")
        return [protocol]
    found = []
    for protocol in PROTOCOLS:
        if why := obstacle(protocol, config, classes):
            print(f"mann-fast: {protocol} is left out: {why}", file=sys.stderr)
        else:
            found.append(protocol)
    return found


def out_folder(args: argparse.Namespace) -> Path:
    """Where the results go, made if it does not exist."""
    beside = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    out = args.out or (Path() if args.checkpoint in SHIPPED.values() else beside)
    out.mkdir(parents=True, exist_ok=True)
    return out


def evaluate_task(args: argparse.Namespace, content: dict[str, Any]) -> int:
    """The same for a model of a sequence task."""
    from ..training.sequence_plots import plot_answers
    from ._report import print_errors

    config = content["config"]
    if args.data:
        raise ValueError(f"--data does not belong to a model of the task {config.task}")
    results = measure(restore_model(content, args.encoder), config, args.episodes, seed=args.seed)
    picture = out_folder(args) / "evaluation.png"
    plot_answers(picture, results, config, describe(config))
    result = {
        "checkpoint": str(args.checkpoint),
        "step": content["step"],
        "seed": args.seed,
        "results": [found._asdict() for found in results],
        "picture": str(picture),
    }
    heading = f"{describe(config)}, step {content['step']}: {args.episodes:,} new sequences of each size"
    return report(args, result, lambda: print_errors(result["results"], config, heading))


def evaluate_babi(args: argparse.Namespace, content: dict[str, Any]) -> int:
    """The same for a model of the bAbI tasks; there is no picture."""
    from ._report import print_babi

    config = content["config"]
    source = args.data or config.data
    data = load_babi(source)
    if list(data.vocabulary) != content["vocabulary"]:
        raise ValueError(f"the words of {source} are not those that {args.checkpoint} was trained on")
    results = [
        result._asdict() for result in measure_babi(restore_model(content, args.encoder), data, args.episodes)
    ]
    result = {
        "checkpoint": str(args.checkpoint),
        "step": content["step"],
        "data": source,
        "results": results,
    }
    write_json(out_folder(args) / "evaluation.json", result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_babi(results, f"{describe(config)}, step {content['step']}")
    return 0


def report(args: argparse.Namespace, result: dict[str, Any], print_table: Callable[[], None]) -> int:
    """The result as a file beside its picture, and on stdout as JSON or as a table."""
    picture = Path(result["picture"])
    write_json(picture.with_suffix(".json"), result)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_table()
        print(f"picture: {picture}")
    return 0
