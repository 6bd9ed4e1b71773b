"""mann-fast train: train a model on episodes of images, and measure it on classes that it has never seen; or on sequences."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from .._cache import cache_folder
from ..data import Dataset
from ..data.babi import load_babi
from ..data.datasets import FEW_CLASSES, better_source
from ..data.images import counted, expand_user
from ..data.sequences import TASKS
from ..layers import MEMORIES
from ..models.backbones import Backbone, is_backbone
from ..models.encoders import is_own
from ..reference.cell import CONTROLLERS
from ..training import (
    BabiConfig,
    InstanceAccuracy,
    Interrupted,
    SequenceConfig,
    TrainConfig,
    load_checkpoint,
    processes,
    resume_run,
    start_run,
    summarise,
    summarise_babi,
    summarise_task,
)
from ..training import train as train_loop
from ..training.checkpoint import load_encoder, own_encoder
from ..training.config import (
    BABI,
    ENCODER_DEFAULTS,
    ENCODER_SHARE,
    LABELS,
    LATE,
    LAYOUT_DEFAULTS,
    LAYOUTS,
    MODELS,
    NO_ENCODER,
    RunConfig,
    config_kind,
)
from ..training.features import encode_dataset
from ..training.heap import keep_freed_memory
from ..training.lock import only_run
from ..training.loop import CHECKPOINT, describe, read_metrics, require_no_run
from ..training.plots import ordinal
from ..training.tensorboard import TensorBoardWriter, summary_writer
from ._options import LAYOUTS_OF_DATA, import_from_here, load_data
from ._signals import StopSignals

EXAMPLE = """\
examples:
  mann-fast train --data glyphs --out runs/glyphs --steps 2000
  mann-fast train --data omniglot --out runs/omniglot          (fetches Omniglot first, 15 MB)
  mann-fast train --data my_images --out runs/mine --ways 2    (one folder of images per class)
  mann-fast train --task copy --out runs/copy                  (a Neural Turing Machine learns to copy, in minutes)
  mann-fast train --task babi --data tasks_1-20_v1-2.tar.gz --out runs/babi
  mann-fast train --out runs/omniglot --resume                 (goes on after Ctrl-C)
  torchrun --nproc-per-node 4 -m mann_fast train --data omniglot --out runs/omniglot     (four processes share every batch)

DIR then holds checkpoint.pt, metrics.jsonl, curve.png and summary.json, of a sequence task also answers.png and memory.png.
See docs/cli.md and docs/tasks.md.
"""

ONE_SHOT = "one-shot"


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
        "--task",
        choices=(ONE_SHOT, *TASKS, BABI),
        help=f"classes of images from a few examples, a sequence task, or questions about stories (default: {ONE_SHOT})",
    )
    setting(
        "--data",
        metavar="DATA",
        help=f"glyphs (built in), omniglot (fetched once), or {LAYOUTS_OF_DATA}; of --task babi the folder or archive of its "
        "files; needed except with --resume or a sequence task",
    )
    setting(
        "--out",
        metavar="DIR",
        required=True,
        type=expand_user,
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
        "--layout",
        choices=LAYOUTS,
        help="of an episode: stream: every image is asked about and its label follows a step late, as in the paper; support: "
        f"labelled examples first, up to --shots of each class, then queries, each judged apart (default: {default.layout})",
    )
    setting(
        "--late",
        choices=LATE,
        help="of a stream, what follows a step late: the label alone, as in the paper, or the pair, the image once more beside "
        f"its label (default: {default.late})",
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
        help=f"pixels; images are resized to N x N (default: {default.image_size}; with an encoder "
        f"conv4 {ENCODER_DEFAULTS['conv4']['image_size']}, with a pretrained one its own)",
    )
    setting(
        "--colour",
        action=argparse.BooleanOptionalAction,
        help="images in red, green and blue (default: grey)",
    )
    setting(
        "--encoder",
        metavar="NAME",
        help="what every image goes through before the memory's controller: conv4, the Conv-4 of Snell et al. 2017; "
        "torchvision/NAME or timm/NAME, a pretrained network such as torchvision/resnet18, which is not trained; or "
        "MODULE:FACTORY, your own, which without arguments gives a module that takes images [M, C, H, W] (default: "
        f"{default.encoder}: the controller sees the pixels)",
    )
    setting(
        "--encoder-steps",
        type=int,
        metavar="N",
        help="how many of the steps, the first, train the encoder alone; it stays as it is in the others, 0: as it comes "
        f"(default: 1 of {ENCODER_SHARE} with conv4 or your own, 0 with --encoder-from)",
    )
    setting(
        "--encoder-from",
        metavar="RUN",
        help="take the encoder that another run has trained: its folder, its checkpoint, or omniglot for that of the model "
        "that comes with mann_fast; image size and colour are that run's",
    )
    setting(
        "--length",
        type=int,
        metavar="N",
        help="of a sequence task, the longest of training: vectors to copy, items to recall, pairs of a round, pairs, points "
        f"of a function (default: {', '.join(f'{SequenceConfig.of_task(task).length} for {task}' for task in TASKS)})",
    )
    setting(
        "--curriculum",
        type=int,
        metavar="N",
        help="begin with episodes of so many classes, or of a sequence task with sequences of at most this length, and double "
        f"it, up to --ways or --length, each time that they are learned; 0: none (default: "
        f"{SequenceConfig.of_task('pairs').curriculum} for pairs, else 0)",
    )
    setting(
        "--addressing",
        choices=tuple(MEMORIES),
        help=f"of the memory (default: {default.addressing} for {ONE_SHOT}, "
        f"{', '.join(f'{SequenceConfig.of_task(task).addressing} for {task}' for task in TASKS)}, dnc for babi)",
    )
    setting(
        "--memory",
        metavar="NAME=VALUE",
        nargs="*",
        help="options of the memory, as MemoryLayer names them (docs/layers.md), such as max_shift=2 or masks=true "
        "deallocate=true; none where nothing follows (default: what was measured to suit the task, docs/cli.md)",
    )
    setting(
        "--controller",
        choices=tuple(CONTROLLERS),
        help=f"what drives the memory (default: {default.controller}; "
        f"with --layout support or --late pair {LAYOUT_DEFAULTS['support']['controller']})",
    )
    setting(
        "--hidden-size",
        type=int,
        metavar="N",
        help=f"units of the controller (default: {default.hidden_size})",
    )
    setting("--slots", type=int, metavar="N", help=f"rows of the memory (default: {default.slots})")
    setting("--slot-size", type=int, metavar="N", help=f"numbers per row (default: {default.slot_size})")
    setting(
        "--heads",
        type=int,
        metavar="N",
        help=f"heads that read and write the memory (default: {default.heads}); a sequence task has sizes of its own, "
        "see docs/tasks.md",
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
        help="exit with status 1 if an image after one of its class is not recognised better than by guessing, or a sequence "
        "task or babi has more than half the errors of a guess",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the lines of metrics.jsonl for TensorBoard too, into DIR/tensorboard "
        "(needs pip install 'mann_fast[tensorboard]')",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON, and nothing else, to stdout"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    with processes.joined():
        if processes.rank():
            warnings.simplefilter("ignore")  # the first process prints them
        config = configured(args)
        with only_run(args.out):
            status, summary = train_and_report(
                config, args.out, resume=args.resume, quiet=args.json, tensorboard=args.tensorboard
            )
    if summary is None:
        return status
    if args.json:
        print(json.dumps(summary, indent=2))
    return 0 if summary["learned"] or not args.require_learning else 1


def configured(args: argparse.Namespace) -> RunConfig:
    """The settings of the command line, for what is left out those of the run to go on with, else the task's own.

    Raises ValueError for an option that the task does not have.
    """
    before = load_checkpoint(args.out / CHECKPOINT)["config"] if args.resume else None
    if args.encoder is not None and is_own(args.encoder):
        import_from_here()  # not otherwise: a file of this folder may have the name of a module that Python looks for
    if before is not None and own_encoder(before) and args.encoder is None:
        raise ValueError(
            f"the run in {args.out} was started with --encoder {before.encoder}, code of your own: name it again"
        )
    task = args.task or getattr(before, "task", ONE_SHOT)
    kind = config_kind(None if task == ONE_SHOT else task)
    if before is not None and task != getattr(before, "task", ONE_SHOT):
        raise ValueError(f"the run in {args.out} is not one of --task {task}; leave the option out")
    every = {field.name for known in (TrainConfig, SequenceConfig, BabiConfig) for field in fields(known)}
    given = {name: getattr(args, name) for name in every if getattr(args, name, None) is not None}
    if "memory" in given:
        given["memory"] = " ".join(given["memory"])
    if kind is TrainConfig:
        given.pop("task", None)
    for name in given:
        if name not in {field.name for field in fields(kind)}:
            raise ValueError(f"--{name.replace('_', '-')} does not belong to --task {task}")
    if before is not None:
        return kind.from_dict({**before.to_dict(), **given})
    if kind is SequenceConfig:
        return SequenceConfig.of_task(**given)
    if kind is BabiConfig:
        if "data" not in given:
            raise ValueError("--data is needed: the path of the bAbI files, a folder or an archive")
        return BabiConfig.of(**given)
    if "data" not in given:
        raise ValueError("--data is needed: glyphs, omniglot, or the path of images (mann-fast train --help)")
    defaults: dict[str, Any] = {"encoder": NO_ENCODER, "layout": "stream"}
    if "encoder_from" in given:
        other, _ = load_encoder(given["encoder_from"])
        defaults |= {"encoder": other.encoder, "image_size": other.image_size, "colour": other.colour}
    return TrainConfig.of(**{**defaults, **given})


def train_and_report(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    tensorboard: bool = False,
) -> tuple[int, dict[str, Any] | None]:
    """Train with progress on stderr and, unless `quiet`, a table on stdout; the exit status, and the summary
    if it finished. Of several processes the first alone prints, and has the summary.
    """
    from ._report import TrainingProgress

    if tensorboard:
        summary_writer()  # raises before anything is loaded or written
    if not (resume or overwrite):
        require_no_run(out)  # before the data are loaded, which can take a while
    of_images = isinstance(config, TrainConfig)
    dataset = None
    if of_images:
        with processes.one_ahead():
            dataset = images_or_features(config)
    elif isinstance(config, BabiConfig):
        dataset = load_babi(config.data)
    trainer = (
        resume_run(config, dataset, out) if resume else start_run(config, dataset, out, overwrite=overwrite)
    )
    with StopSignals() as stop:
        if processes.rank():
            return 0 if train_loop(trainer, out, stop=stop) else stop.status, None
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        classes = ""
        if of_images:
            count, turned = dataset.train.num_classes, trainer.num_classes
            with_turned = f" ({turned:,} with those turned)" if turned > count else ""
            classes = f"{count:,} classes to train on{with_turned}, {dataset.test.num_classes:,} held out, "
        print(
            f"{describe(config)}: {classes}{parameters:,} parameters"
            + (f", from step {trainer.step}" if resume else ""),
            file=sys.stderr,
        )
        with ExitStack() as stack:
            hooks: dict[str, Any] = {}
            if tensorboard:
                writer = TensorBoardWriter(out / "tensorboard", config, read_metrics(out))
                hooks["on_metrics"] = stack.enter_context(closing(writer))
            progress = stack.enter_context(TrainingProgress(config, trainer.step))
            finished = train_loop(trainer, out, stop=stop, on_step=progress.update, **hooks)
        try:
            summary = None
            if finished and of_images:
                summary = summarise(trainer, dataset, out, stop=stop)
            elif finished and isinstance(config, BabiConfig):
                summary = summarise_babi(trainer, out, stop=stop)
            elif finished:
                summary = summarise_task(trainer, out, stop=stop)
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
        said = advice(config, summary, read_metrics(out)[-1])
        print(f"mann-fast: warning: {said}", file=sys.stderr)
    return 0, summary


def images_or_features(config: TrainConfig) -> Dataset:
    """What a run trains on: the images of its data, or what a pretrained backbone makes of them."""
    if not is_backbone(config.encoder):
        return load_data(config)
    backbone = Backbone(config.encoder)  # before the data: it may fail at once
    dataset = load_data(config)
    if processes.rank() == 0:
        print(
            f"mann-fast: features of {len(dataset.train.images) + len(dataset.test.images):,} images by {config.encoder}, "
            f"computed once and kept in {cache_folder() / 'features'}",
            file=sys.stderr,
        )
    return encode_dataset(dataset, backbone)


PHOTOGRAPHS = 84  # pixels: the field's size, of mini-ImageNet
BETTER = 0.9  # of a guess's errors, or of its loss: learning has started


def advice(config: RunConfig, summary: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What a run that has not learned lacks: a start, or only steps. metrics: the last of the run."""
    if isinstance(config, TrainConfig):
        mean = summary["heldout_accuracy"]["mean"]
        low = summary["heldout_accuracy"]["low"][config.first_known :]
        guess = math.log(metrics.get("ways", config.ways))
        started = max(low) > config.blind or metrics.get("loss", guess) < BETTER * guess
    else:
        # Of bAbI, thousands of answers; of other tasks few sequences, whose interval says how sure that is.
        errors = [(result.get("high", result.get("error")), result["guess"]) for result in summary["results"]]
        started = any(error < BETTER * guess for error, guess in errors)
    lacks = lacking(config, summary) if isinstance(config, TrainConfig) else ""
    if not started:
        remedy = lacks or "give it more --steps, or another --lr or --seed"
        return f"learning did not start: {unlearned(config, summary)}; {remedy}"
    best = ""
    if isinstance(config, TrainConfig):
        at = max(range(len(mean)), key=mean.__getitem__)
        best = f", {_asked(config, at + 1)} {mean[at]:.1%}"
    remedy = lacks or "give it more --steps"
    return f"learning has started but is not far: {unlearned(config, summary)}{best}; {remedy}"


def lacking(config: TrainConfig, summary: dict[str, Any]) -> str:
    """What more steps would not mend: too few classes, or photographs that the model sees too little of."""
    turned = 4 if config.augment and summary["drawn"] else 1
    classes = summary["train_classes"] // turned
    if classes < FEW_CLASSES:
        return (
            f"{counted(classes, 'class', 'classes')} to train on are too few to learn how to learn: train on "
            f"{better_source(summary['drawn'])}, and show yours to that model (mann-fast predict --support)"
        )
    if summary["drawn"]:
        return ""
    if config.encoder == NO_ENCODER:
        return (
            f"photographs take an encoder: --encoder conv4 --colour --image-size {PHOTOGRAPHS}, or a pretrained one, "
            "--encoder torchvision/resnet18"
        )
    if config.image_size < PHOTOGRAPHS:
        colour = "" if config.colour else ", and --colour where they are in colour"
        return f"{config.image_size} x {config.image_size} shows little of a photograph: --image-size {PHOTOGRAPHS}{colour}"
    return ""


def unlearned(config: RunConfig, summary: dict[str, Any]) -> str:
    """The figure that is no better than a guess."""
    if isinstance(config, SequenceConfig):
        return "a sequence of the longest length of training has more than half the errors of a guess"
    if isinstance(config, BabiConfig):
        return "more than half the answers are wrong that the commonest ones get wrong"
    accuracy = summary["heldout_accuracy"]["mean"][config.first_known]
    asked = _asked(config, config.first_known + 1)
    return f"{asked} is right {accuracy:.1%} of the time, where {1 / config.ways:.0%} is guessing"


def _asked(config: TrainConfig, k: int) -> str:
    """What the k-th of a model's accuracies is of, counted from 1."""
    if config.layout == "stream":
        return f"the {ordinal(k)} image of a class"
    return f"an image after {counted(k, 'example')} of each class"


def print_summary(config: RunConfig, summary: dict[str, Any]) -> None:
    from ._report import duration, print_accuracy, print_babi, print_errors

    if isinstance(config, BabiConfig):
        print_babi(summary["results"], describe(config))
    elif isinstance(config, SequenceConfig):
        print_errors(
            summary["results"],
            config,
            f"{describe(config)}: {config.eval_episodes:,} new sequences of each size",
        )
    else:
        accuracy = InstanceAccuracy(**summary["heldout_accuracy"])
        classes = f"{summary['heldout_classes']} held-out classes, {accuracy.episodes:,} episodes"
        print_accuracy(accuracy, config, f"{describe(config)}: {classes}")
    print(f"{counted(summary['step'], 'step')} in {duration(summary['training_seconds'])}")
    for name, path in summary["files"].items():
        print(f"{name + ':':12}{path}")
