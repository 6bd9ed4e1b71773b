"""Pictures of training, evaluation and prediction. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .evaluation import InstanceAccuracy
from .files import replacing

SHOWN = (1, 2, 5, 10)  # instances with a line of their own in the learning curve
COLOURS = {1: "#9aa5b1", 2: "#e07b39", 5: "#2a9d8f", 10: "#1d3557"}


def ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def shown_instances(shots: int) -> tuple[int, ...]:
    """Which instances a short report names: 1st, 2nd, 5th and 10th, as far as there are so many."""
    return tuple(k for k in SHOWN if k <= shots)


def plot_learning_curve(
    path: str | os.PathLike, records: Sequence[dict[str, Any]], config: TrainConfig, title: str
) -> None:
    """Held-out accuracy by instance, and training loss, over steps; from the lines of metrics.jsonl."""
    steps = [record["step"] for record in records]
    figure = _figure(8.5, 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for k in shown_instances(config.shots):
        values = [100 * record["heldout_accuracy"][k - 1] for record in records]
        top.plot(
            steps, values, color=COLOURS[k], label=f"{ordinal(k)} image of a class", marker=_marker(steps)
        )
    top.axhline(
        100 * config.chance,
        color="black",
        linestyle=":",
        linewidth=1,
        label=f"chance ({_percent(config.chance)})",
    )
    top.set(title=f"{title}: accuracy on held-out classes", ylabel="right answers (%)", ylim=(0, 101))
    top.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    bottom.plot(
        steps,
        [record["loss"] for record in records],
        color="#444444",
        marker=_marker(steps),
        label="training loss",
    )
    highest = max(record["loss"] for record in records)
    bottom.set(
        xlabel="training step", ylabel="loss (nats per image)", ylim=(0, 1.08 * highest), xlim=(0, None)
    )
    bottom.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_accuracy(path: str | os.PathLike, accuracy: InstanceAccuracy, chance: float, title: str) -> None:
    """Accuracy by instance with its 95% confidence intervals."""
    instances = range(1, len(accuracy.mean) + 1)
    mean = [100 * value for value in accuracy.mean]
    below = [m - 100 * low for m, low in zip(mean, accuracy.low, strict=True)]
    above = [100 * high - m for m, high in zip(mean, accuracy.high, strict=True)]
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    axes.errorbar(
        instances,
        mean,
        yerr=(below, above),
        color=COLOURS[10],
        marker="o",
        markersize=4,
        capsize=3,
        label=f"mean and 95% interval, {accuracy.episodes:,} episodes",
    )
    for k, value in zip(instances, mean, strict=True):
        if len(mean) <= 15:
            axes.annotate(
                f"{value:.1f}",
                (k, value),
                textcoords="offset points",
                xytext=(13, -13),
                ha="center",
                fontsize=8,
            )
    axes.axhline(
        100 * chance, color="black", linestyle=":", linewidth=1, label=f"chance ({_percent(chance)})"
    )
    axes.set(
        title=f"{title}: accuracy on held-out classes",
        xlabel="how many times the class has been shown, this image included",
        ylabel="right answers (%)",
        ylim=(0, 105),
        xlim=(0.5, len(mean) + 0.7),
    )
    if len(mean) <= 15:
        axes.set_xticks(list(instances), [ordinal(k) for k in instances])
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_predictions(
    path: str | os.PathLike,
    examples: Mapping[str, Sequence[Path]],
    images: Sequence[Path],
    probabilities: Sequence[Sequence[float]],
) -> None:
    """The examples of each class in a column of its own, and below them each image with the probability of
    each class.
    """
    from PIL import Image

    shown = max(map(len, examples.values()))
    figure = _figure(1.1 * (len(examples) + 1), 0.75 * (shown + len(images)) + 0.8)
    cells = figure.subplots(shown + len(images), len(examples) + 1, squeeze=False)
    figure.suptitle("above: the examples; below: the probability of each class", fontsize=10)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    for column, (name, files) in enumerate(examples.items(), start=1):
        cells[0, column].set_title(name)
        for row, file in enumerate(files):
            cells[row, column].imshow(Image.open(file).convert("L"), cmap="gray", vmin=0, vmax=255)
    for row, (image, values) in enumerate(zip(images, probabilities, strict=True), start=shown):
        cells[row, 0].imshow(Image.open(image).convert("L"), cmap="gray", vmin=0, vmax=255)
        cells[row, 0].set_ylabel(image.stem, rotation=0, ha="right", va="center")
        for column, value in enumerate(values, start=1):
            cells[row, column].set_facecolor((0.16, 0.61, 0.56, value))
            cells[row, column].text(
                0.5, 0.5, f"{value:.0%}", ha="center", va="center", transform=cells[row, column].transAxes
            )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _figure(width: float, height: float):
    """A figure of its own, apart from pyplot's global state and from any display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _marker(steps: Sequence[int]) -> str:
    return "." if len(steps) < 30 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
