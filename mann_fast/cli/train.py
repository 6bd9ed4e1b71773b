"""mann-fast train: train a model on episodes, and measure it on classes that it has never seen."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..training import (
    InstanceAccuracy,
    Interrupted,
    TrainConfig,
    load_checkpoint,
    resume_run,
    start_run,
    summarise,
)
from ..training import train as train_loop
from ..training.config import LABELS, MODELS
from ..training.loop import CHECKPOINT, describe, require_no_run
from ._options import load_data
from ._signals import StopSignals

EXAMPLE = """\
examples:
  mann-fast train --data glyphs --out runs/glyphs --steps 2000
  mann-fast train --data omniglot --out runs/omniglot          (fetches Omniglot first, 15 MB)
  mann-fast train --data my_images --out runs/mine --ways 2    (one folder of images per class)
  mann-fast train --out runs/omniglot --resume                 (goes on after Ctrl-C)

DIR then holds checkpoint.pt, metrics.jsonl, curve.png and summary.json. See docs/cli.md.
"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    default = TrainConfig()
    parser = commands.add_parser(
        "train",
        help="train a model",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # No defaults here: what is left out comes from the checkpoint on --resume, else from TrainConfig.
    setting = parser.add_argument
    setting(
        "--data",
        metavar="DATA",
        help="glyphs (built in), omniglot (fetched once), or a folder: Omniglot's, or one with a "
        "sub-folder of images per class; needed except with --resume",
    )
    setting(
        "--out",
        metavar="DIR",
        required=True,
        type=Path,
        help="folder for the results; made if it does not exist",
    )
    setting(
        "--model", choices=MODELS, help=f"mann, or the baseline without memory (default: {default.model})"
    )
    setting("--ways", type=int, metavar="N", help=f"classes per episode (default: {default.ways})")
    setting(
        "--shots", type=int, metavar="N", help=f"images of each class per episode (default: {default.shots})"
    )
    setting(
        "--labels", choices=LABELS, help=f"one of N, or five letters per class (default: {default.labels})"
    )
    setting(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="shift and turn images a little, and take characters turned by 90, 180, 270 degrees as further "
        "classes (default: yes)",
    )
    setting(
        "--image-size",
        type=int,
        metavar="N",
        help=f"pixels; images are resized to N x N (default: {default.image_size})",
    )
    setting(
        "--hidden-size", type=int, metavar="N", help=f"units of the LSTM (default: {default.hidden_size})"
    )
    setting("--slots", type=int, metavar="N", help=f"rows of the memory (default: {default.slots})")
    setting("--slot-size", type=int, metavar="N", help=f"numbers per row (default: {default.slot_size})")
    setting(
        "--heads",
        type=int,
        metavar="N",
        help=f"heads that read and write the memory (default: {default.heads})",
    )
    setting("--steps", type=int, metavar="N", help=f"training steps (default: {default.steps})")
    setting("--batch", type=int, metavar="N", help=f"episodes per step (default: {default.batch})")
    setting("--lr", type=float, metavar="X", help=f"learning rate of AdamW (default: {default.lr})")
    setting(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed, data and settings give the same model (default: 0)",
    )
    setting(
        "--eval-episodes",
        type=int,
        metavar="N",
        help=f"held-out episodes for the final table (default: {default.eval_episodes})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR where it stopped, bit for bit"
    )
    parser.add_argument(
        "--require-learning",
        action="store_true",
        help="exit with status 1 if the 2nd image of a class is not recognised better than by guessing",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON, and nothing else, to stdout"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    given = {
        name: getattr(args, name) for name in TrainConfig().to_dict() if getattr(args, name, None) is not None
    }
    if args.resume:
        before = load_checkpoint(args.out / CHECKPOINT)["config"].to_dict()
        config = TrainConfig.from_dict({**before, **given})
    elif "data" not in given:
        raise ValueError("--data is needed: glyphs, omniglot, or the path of a folder of images")
    else:
        config = TrainConfig(**given)
    status, summary = train_and_report(config, args.out, resume=args.resume, quiet=args.json)
    if summary is None:
        return status
    if args.json:
        print(json.dumps(summary, indent=2))
    return 0 if summary["learned"] or not args.require_learning else 1


def train_and_report(
    config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> tuple[int, dict[str, Any] | None]:
    """Train with progress on stderr and, unless `quiet`, a table on stdout; the exit status, and the summary
    if it finished.
    """
    from ._report import TrainingProgress

    if not (resume or overwrite):
        require_no_run(out)  # before the data are loaded, which can take a while
    dataset = load_data(config)
    trainer = (
        resume_run(config, dataset, out) if resume else start_run(config, dataset, out, overwrite=overwrite)
    )
    with StopSignals() as stop:
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(
            f"{describe(config)}: "
            f"{trainer.num_classes} classes to train on, {dataset.test.num_classes} held out, "
            f"{parameters:,} parameters" + (f", from step {trainer.step}" if resume else ""),
            file=sys.stderr,
        )
        with TrainingProgress(config, trainer.step) as progress:
            finished = train_loop(trainer, out, stop=stop, on_step=progress.update)
        try:
            summary = summarise(trainer, dataset, out, stop=stop) if finished else None
        except Interrupted:
            summary = None
        if summary is None:
            print(
                f"stopped at step {trainer.step} of {config.steps}; "
                f"to go on: mann-fast train --out {out} --resume",
                file=sys.stderr,
            )
            return stop.status, None
    if not quiet:
        print_summary(config, summary)
    if not summary["learned"]:
        accuracy = summary["heldout_accuracy"]["mean"][1]
        print(
            "mann-fast: warning: learning did not start: the 2nd image of a class is right "
            f"{accuracy:.1%} of the time, where {1 / config.ways:.0%} is guessing; "
            "give it more --steps, or another --lr or --seed",
            file=sys.stderr,
        )
    return 0, summary


def print_summary(config: TrainConfig, summary: dict[str, Any]) -> None:
    from ._report import duration, print_accuracy

    accuracy = InstanceAccuracy(**summary["heldout_accuracy"])
    title = (
        f"{describe(config)}: {summary['heldout_classes']} held-out classes, {accuracy.episodes:,} episodes"
    )
    print_accuracy(accuracy, config, title)
    print(f"{summary['step']} steps in {duration(summary['training_seconds'])}")
    for name, path in summary["files"].items():
        print(f"{name + ':':12}{path}")
