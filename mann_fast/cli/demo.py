"""mann-fast demo: train on built-in glyphs for a few minutes, then classify new ones from a few examples."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data import generate_glyphs
from ..data.images import expand_user
from ..training import TrainConfig
from ..training.lock import only_run
from ..training.loop import CHECKPOINT
from ..training.plots import ordinal, plot_predictions
from .predict import classify, example_files, print_prediction
from .train import train_and_report

EXAMPLE = """\
example:
  mann-fast demo --out demo

Exits with status 1 if the model has not plainly learned to learn.
"""

# Half the slots are enough for 50 images, and unseen glyphs come neither turned nor shifted: both save the user's time.
CONFIG = TrainConfig(data="glyphs", steps=2500, lr=3e-3, decay=0.3, slots=64, augment=False)
TARGETS = {2: 0.70, 10: 0.90}  # accuracy by instance that the demo must exceed

NEW_CLASSES = 4  # fewer than the model's ways, as users will often have
EXAMPLES = 3
QUERIES = 2
PICTURE_SIZE = 64
NEW_SEED = 20_160_519  # other glyphs than those of training, whose seed is 0


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="train on built-in glyphs and classify new ones, in a few minutes",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=expand_user,
        default=Path("demo"),
        help="folder for the results, replacing those of an earlier demo (default: demo)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    # A step of 16 episodes, which the kernels take in two blocks, needs 0.62 of its time on two threads.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    with only_run(args.out):
        return demonstrate(args.out)


def demonstrate(out: Path) -> int:
    """The demo in folder `out`; its exit status."""
    print(f"Training on invented characters; every episode teaches {CONFIG.ways} of them anew.\n", flush=True)
    status, summary = train_and_report(CONFIG, out, overwrite=True)
    if summary is None:
        return status

    support, queries = draw_new_glyphs(out / "new_glyphs")
    checkpoint, images = out / CHECKPOINT, queries[0].parent
    print(f"\nNow {NEW_CLASSES} characters that it has never seen, from {EXAMPLES} examples of each:\n")
    print(f"mann-fast predict --checkpoint {checkpoint} --support {support} {images}/*.png\n")
    prediction = classify(checkpoint, support, queries)
    print_prediction(prediction)
    picture = out / "predictions.png"
    truth = [query.name[0] for query in queries]
    plot_predictions(picture, example_files(support), queries, prediction.probabilities.tolist(), truth)
    print(f"examples:   {support}\nimages:     {images}\noverview:   {picture}")
    return judge(summary["heldout_accuracy"]["mean"])


def draw_new_glyphs(folder: Path) -> tuple[Path, list[Path]]:
    """Draw glyphs, black on white: the folder of examples, and the files to classify, named after their
    class.
    """
    glyphs = generate_glyphs(NEW_CLASSES, EXAMPLES + QUERIES, image_size=PICTURE_SIZE, seed=NEW_SEED)
    if folder.exists():
        shutil.rmtree(folder)
    queries = []
    for index, name in enumerate("ABCDEFGH"[:NEW_CLASSES]):
        (folder / "examples" / name).mkdir(parents=True)
        (folder / "images").mkdir(exist_ok=True)
        pictures = glyphs.images[glyphs.starts[index] : glyphs.starts[index + 1]]
        for number, picture in enumerate(pictures.numpy(), start=1):
            file = folder / "examples" / name / f"{number}.png"
            if number > EXAMPLES:
                file = folder / "images" / f"{name}{number - EXAMPLES}.png"
                queries.append(file)
            Image.fromarray(255 - picture).save(file)
    return folder / "examples", queries


def judge(accuracy: Sequence[float]) -> int:
    """Exit status: 1, with a line that says why, where the model has not plainly learned to learn."""
    missed = [
        f"the {ordinal(k)} image of a class is right {accuracy[k - 1]:.1%} of the time, not over {target:.0%}"
        for k, target in TARGETS.items()
        if not accuracy[k - 1] > target
    ]
    if missed:
        print(f"mann-fast: error: the demo has not learned: {'; '.join(missed)}", file=sys.stderr)
        return 1
    return 0
