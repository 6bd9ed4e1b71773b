"""Pictures of training, evaluation and prediction. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TrainConfig
from .evaluation import InstanceAccuracy
from .files import replacing
from .support import QUERIES
from .trace import Slots, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

SHOWN = (1, 2, 5, 10)  # instances with a line of their own in the learning curve
Colours = str | tuple[tuple[str, str], ...]  # a colour map, or of every kind its name and its colour
# Of what a DNC writes and reads, kind by kind.
WRITTEN_BY = (("by allocation", "#e07b39"), ("by content", "#7b4fa3"))
READ_BY = (("backward", "#c0392b"), ("by content", "#2471a3"), ("forward", "#1e8449"))
RIGHT, WRONG = "#1e8449", "#c0392b"
MOST_ROWS = 256  # of a picture of steps
COLOURS = {1: "#9aa5b1", 2: "#e07b39", 5: "#2a9d8f", 10: "#1d3557"}
LAST = "#8e44ad"  # of the last instance where it is none of these


def ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def name_of_answer(config: TrainConfig, k: int) -> str:
    """What the k-th of a model's accuracies is of, counted from 1, in short: "2nd image", or after 2 examples "2-shot"."""
    return f"{k}-shot" if config.layout == "support" else f"{ordinal(k)} image"


def shown_instances(shots: int) -> tuple[int, ...]:
    """Which instances a short report names: 1st, 2nd, 5th and 10th, as far as there are so many, and the last."""
    return (*(k for k in SHOWN if k < shots), shots)


def plot_learning_curve(
    path: str | os.PathLike, records: Sequence[dict[str, Any]], config: TrainConfig, title: str
) -> None:
    """Held-out accuracy by instance with its 95% interval, training loss, and with a curriculum the classes of an episode, over
    steps; from the lines of metrics.jsonl. Of the steps in which an encoder learned alone the loss of its pairs.
    """
    of_encoder = [record for record in records if "pair_loss" in record]
    records = [record for record in records if "pair_loss" not in record]
    steps = [record["step"] for record in records]
    top, bottom, *rest = axes_of_curve(any("ways" in record for record in records))
    figure = top.figure
    of_class = " of a class" if config.layout == "stream" else ""
    for k in shown_instances(config.shots):
        values = [100 * record["heldout_accuracy"][k - 1] for record in records]
        colour = COLOURS.get(k, LAST)
        top.plot(
            steps, values, color=colour, label=name_of_answer(config, k) + of_class, marker=marker_of(steps)
        )
        bounds = [
            [100 * bound[k - 1] for bound in record.get("heldout_interval", ())] or None for record in records
        ]
        draw_band(top, steps, bounds, colour)
    top.axhline(
        100 * config.chance,
        color="black",
        linestyle=":",
        linewidth=1,
        label=f"chance ({_percent(config.chance)})",
    )
    top.set_title(f"{title}:\naccuracy on held-out classes", wrap=True)
    top.set(ylabel="right answers (%)", ylim=(0, 101))
    draw_legend(top, "shaded: 95% interval")
    if of_encoder:
        places = [record["step"] for record in of_encoder]
        losses = [record["pair_loss"] for record in of_encoder]
        bottom.plot(places, losses, color=COLOURS[2], marker=marker_of(places), label="encoder, of its pairs")
    plot_loss(bottom, records, "loss (nats per image)")
    highest = max(record.get("loss", record.get("pair_loss")) for record in [*of_encoder, *records])
    bottom.set(ylim=(0, 1.08 * highest))
    for axes in rest:
        draw_curriculum(axes, bottom, records, "ways", "classes of an episode")
    for axes in (top, bottom, *rest):
        axes.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def axes_of_curve(curriculum: bool) -> list[Axes]:
    """For what is measured, for the loss below it, and for a curriculum where there is one."""
    figure = new_figure(8.5, 7.2 if curriculum else 6.0)
    return list(
        figure.subplots(2 + curriculum, 1, sharex=True, height_ratios=(2, 1, 0.8) if curriculum else (2, 1))
    )


def draw_curriculum(
    axes: Axes, above: Axes, records: Sequence[dict[str, Any]], name: str, label: str
) -> None:
    """How much a run learned at once, over the steps of the axes above."""
    steps, sizes = zip(*((record["step"], record[name]) for record in records), strict=True)
    axes.step(steps, sizes, color="#444444", marker=marker_of(steps), label=label)
    above.set_xlabel("")
    axes.set(xlabel="training step", ylabel=name)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    draw_legend(axes)


def draw_band(
    axes: Axes, steps: Sequence[int], bounds: Sequence[Sequence[float] | None], colour: str
) -> None:
    """Between two bounds at each step; none where a line of metrics.jsonl, of an older release, has no interval."""
    shown = [(step, *bound) for step, bound in zip(steps, bounds, strict=True) if bound is not None]
    if len(shown) == 1:  # which has no width to shade
        axes.vlines(*shown[0], color=colour, alpha=0.3, linewidth=3)
    elif shown:
        axes.fill_between(*zip(*shown, strict=True), color=colour, alpha=0.15, linewidth=0)


def draw_legend(axes: Axes, title: str | None = None) -> None:
    """Beside the axes, where it hides nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, title=title, title_fontsize=9)


def readable_log(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, also between powers of ten where it spans few of them."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """It knows which ticks to label; its own labels of less than 1 are 7e-01 for 0.66."""

        def __call__(self, x, pos=None):
            low, high = sorted(self.axis.get_view_interval())
            digits = max(3, 2 - floor(log10((high - low) / high)))  # as many as tell two ticks apart
            return f"{x:.{digits}g}" if super().__call__(x, pos) else ""

    axes.set(yscale="log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
    axes.tick_params(axis="y", which="minor", labelsize=8)


def whole_ticks(axes: Axes) -> None:
    """At whole numbers of the x axis: there is no half a step."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 5, 10), integer=True))


def plot_loss(axes: Axes, records: Sequence[dict[str, Any]], label: str) -> None:
    """Training loss over steps, the lower part of a learning curve."""
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    axes.plot(steps, losses, color="#444444", marker=marker_of(steps), label="training loss")
    axes.set(xlabel="training step", ylabel=label, xlim=(0, None))
    whole_ticks(axes)
    draw_legend(axes)


def plot_accuracy(
    path: str | os.PathLike,
    accuracy: InstanceAccuracy,
    config: TrainConfig,
    title: str,
    *,
    on: str = "held-out classes",
    streams: Mapping[str, Any] | None = None,
    protocols: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Accuracy by instance or by shots with its 95% confidence intervals, and what else was measured, as in evaluation.json:
    that along ``streams`` in the same axes, that by ``protocols`` beside them. ``on`` which classes, for the title.
    """
    stream, episodes = config.layout == "stream", f"{accuracy.episodes:,} episodes"
    # Of a model that has examples first, the k-th image of a stream comes after k - 1 of its class.
    first = 1 if stream else 0
    figure = new_figure(7.0 + (1.0 + 0.8 * len(protocols) if protocols else 0), 4.4)
    ratios = (6.0, 0.5 + 0.8 * len(protocols)) if protocols else (1,)
    axes, *beside = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False)[0]
    figure.suptitle(f"{title}:\naccuracy on {on}", wrap=True)
    by_instance = {**accuracy.to_dict(), "places": range(1, len(accuracy.mean) + 1)}
    usual = "as in training" if stream else "support and queries"
    measured = "mean and 95% interval" if streams is None else f"{config.ways}-way, {usual}"
    chances = {config.ways: config.chance}
    draw_means(axes, by_instance, COLOURS[10], f"{measured}, {episodes}", below=True)
    ticks = list(by_instance["places"])
    if streams is not None:
        along = {**streams, "places": range(first, first + len(streams["mean"]))}
        label = f"streams of {streams['ways']} classes, {streams['episodes']:,} of them"
        draw_means(axes, along, COLOURS[2], label, below=False)
        chances.setdefault(streams["ways"], 1 / streams["ways"])
        ticks = sorted({*ticks, *along["places"]})
    for ways, chance in chances.items():
        among = f", {ways} classes" if len(chances) > 1 else ""
        colour = "black" if ways == config.ways else COLOURS[2]
        label = f"chance{among} ({_percent(chance)})"
        axes.axhline(100 * chance, color=colour, linestyle=":", linewidth=1, label=label)
    if stream:
        xlabel = "how many times the class has been shown, this image included"
    elif streams is None:
        xlabel = f"examples of each class, before {QUERIES} queries of each"
    else:
        xlabel = "examples of its class before an image"
    axes.set(xlabel=xlabel, ylabel="right answers (%)", ylim=(0, 105), xlim=(ticks[0] - 0.5, ticks[-1] + 0.7))
    if len(ticks) <= 15:
        axes.set_xticks(ticks, [ordinal(k) if stream else str(k) for k in ticks])
    axes.grid(alpha=0.25)
    legend_title = "mean and 95% interval" if streams is not None else None
    axes.legend(loc="best", fontsize=9, title=legend_title, title_fontsize=9)
    for panel in beside:
        draw_protocols(panel, protocols)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_means(axes: Axes, found: Mapping[str, Any], colour: str, label: str, *, below: bool) -> None:
    """A line of means with their 95% intervals at ``places``; of few the numbers, too, below or above it."""
    mean = [100 * value for value in found["mean"]]
    reach = [m - 100 * low for m, low in zip(mean, found["low"], strict=True)]
    above = [100 * high - m for m, high in zip(mean, found["high"], strict=True)]
    style = {"marker": "o", "markersize": 4, "capsize": 3, "color": colour}
    axes.errorbar(found["places"], mean, yerr=(reach, above), label=label, **style)
    if len(mean) <= 15:
        place = {"textcoords": "offset points", "xytext": (13, -13) if below else (-13, 6), "ha": "center"}
        for k, value in zip(found["places"], mean, strict=True):
            axes.annotate(f"{value:.1f}", (k, value), fontsize=8, color=colour, **place)


def draw_protocols(axes: Axes, protocols: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy by each protocol with its 95% interval and, dotted, what guessing comes to."""
    for place, found in enumerate(protocols):
        mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
        style = {"marker": "s", "markersize": 5, "capsize": 3, "color": COLOURS[5], "linestyle": "none"}
        axes.errorbar([place], [mean], yerr=([mean - low], [high - mean]), **style)
        axes.annotate(
            f"{mean:.1f}", (place, mean), textcoords="offset points", xytext=(6, 0), va="center", fontsize=8
        )
        guess = 100 / int(found["protocol"].split("-")[0])
        axes.hlines(guess, place - 0.3, place + 0.3, color="black", linestyle=":", linewidth=1)
    names = [found["protocol"].replace("-way-", "-way\n") for found in protocols]
    axes.set_xticks(range(len(protocols)), names, fontsize=8)
    axes.set(xlim=(-0.6, len(protocols) - 0.4))
    axes.set_title(f"by protocol,\n{protocols[0]['episodes']:,} episodes", fontsize=9)
    axes.grid(alpha=0.25, axis="y")


def plot_predictions(
    path: str | os.PathLike,
    examples: Mapping[str, Sequence[Path]],
    images: Sequence[Path],
    probabilities: Sequence[Sequence[float]],
    truth: Sequence[str],
) -> None:
    """The examples of each class in a column of its own, and below them each image with the probability of each class. The
    answer is framed by whether it is ``truth``, the image's class.
    """
    from PIL import Image

    shown = max(map(len, examples.values()))
    figure = new_figure(1.1 * (len(examples) + 1), 0.75 * (shown + len(images)) + 0.8)
    cells = figure.subplots(shown + len(images), len(examples) + 1, squeeze=False)
    figure.suptitle(
        "above: the examples; below: the probability of each class\nframed: the answer, green where right, red where wrong",
        fontsize=10,
    )
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
        answer = max(range(len(values)), key=values.__getitem__)
        colour = RIGHT if [*examples][answer] == truth[row - shown] else WRONG
        for spine in cells[row, 1 + answer].spines.values():
            spine.set(visible=True, linewidth=2.5, color=colour)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_episode(path: str | os.PathLike, images: Tensor, instance: Tensor, trace: Trace, title: str) -> None:
    """One episode step by step: images [T, C, S, S] with how often their class has come, instance [T]; the probability of each
    class; weights of writing and reading of every slot (of a DNC coloured by kind), and its usage where the memory counts it.
    """
    steps, channels, size = images.shape[:3]
    classes = len(trace.names)
    panels: list[tuple[str, Tensor, Colours]] = [("probability", trace.probabilities, "Greens")]
    panels += [(f"weight {name}\n(sum over heads)", *drawn) for name, *drawn in slot_panels(trace.slots)]
    if trace.slots.usage is not None:
        panels.append(("usage", trace.slots.usage, "Purples"))
    width = max(7.0, 0.27 * steps + 2)
    heights = (
        (width - 2.2) / steps,
        0.7 + 0.17 * classes,
        *[2.6] * (len(panels) - 1),
    )  # inches; images are squares
    figure = new_figure(width, sum(heights) + 0.3 * len(heights) + 1)
    rows = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(f"{title}: {int(trace.right.sum())} of {int(trace.asked.sum())} right", wrap=True)
    strip = images.permute(2, 0, 3, 1).reshape(size, steps * size, channels).squeeze(2)
    rows[0].imshow(strip, cmap="gray", aspect="auto", extent=(-0.5, steps - 0.5, 0, 1), vmin=0, vmax=1)
    rows[0].set(yticks=[])
    rows[0].set_ylabel("image", rotation=0, ha="right", va="center")
    if trace.asked.all():  # else examples come first, as many of each class
        for t in range(steps):
            rows[0].text(t, 1.06, int(instance[t]), ha="center", fontsize=7)
        rows[0].text(-0.7, 1.06, "time its class is seen:", ha="right", fontsize=7)
    for axes, (label, values, colours) in zip(rows[1:], panels, strict=True):
        bar = draw_steps(axes, values, colours, label)
        axes.set(ylabel="memory slot")
    figure.colorbar(bar.mappable, ax=rows[0], pad=0.01).ax.set_visible(False)  # as wide as the rows below
    wrong = trace.asked & ~trace.right
    marks = (
        (trace.right, "black", "none", "o", "the image's class, answered right"),
        (wrong, None, WRONG, "x", "the image's class, answered wrong"),
        (~trace.asked, "grey", "grey", ".", "an example, with its label"),
    )
    for among, edge, face, mark, name in marks:
        at = among.nonzero().flatten().tolist()
        if at:  # the legend names what is drawn
            rows[1].scatter(
                at, trace.classes[at], marker=mark, s=22, facecolors=face, edgecolors=edge, label=name
            )
    rows[1].set(yticks=range(classes), yticklabels=trace.names, ylabel="")
    rows[1].legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        fontsize=7,
        frameon=False,
        columnspacing=1,
        handletextpad=0.1,
    )
    rows[-1].set(xlabel="step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def slot_panels(slots: Slots) -> list[tuple[str, Tensor, Colours]]:
    """What was written and read: name, values and colours as :func:`draw_steps` takes them."""
    written: tuple[Tensor, Colours] = (slots.written, "Oranges")
    read: tuple[Tensor, Colours] = (slots.read, "Blues")
    if slots.written_by is not None:
        written = slots.written_by, WRITTEN_BY
    if slots.read_by is not None:
        read = slots.read_by, READ_BY
    return [("written", *written), ("read", *read)]


def draw_steps(
    axes: Axes, values: Tensor, colours: Colours, label: str, beside: Sequence[Tensor] = ()
) -> Colorbar:
    """Step by step values [T, K] in a colour map; or of several kinds, [T, K, kinds], all of them at least 0: the more in all
    the darker, in a mixture of their colours. From 0 to 1, further only where a value is, of these or of those ``beside``, so
    that pictures compare. Of more rows than a picture shows apart, the greatest of those that share one."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb
    from matplotlib.patches import Patch

    steps, rows = values.shape[:2]
    extent = (-0.5, steps - 0.5, rows - 0.5, -0.5)
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    if rows > MOST_ROWS:
        share = -(-rows // MOST_ROWS)
        values = torch.stack([part.amax(1) for part in values.split(share, 1)], 1)
        options["extent"] = (*extent[:2], share * values.shape[1] - 0.5, -0.5)
    in_all = values if isinstance(colours, str) else values.sum(2)
    least = min(0.0, *(x.min().item() for x in (in_all, *beside)))
    most = max(1.0, *(x.max().item() for x in (in_all, *beside)))
    whole_ticks(axes)
    if isinstance(colours, str):
        drawn: ScalarMappable = axes.imshow(values.T, cmap=colours, vmin=least, vmax=most, **options)
    else:
        darkening = 1 - torch.tensor([to_rgb(colour) for _, colour in colours])
        image = 1 - values.float() / most @ darkening
        axes.imshow(image.transpose(0, 1).clamp(0, 1), **options)
        drawn = ScalarMappable(Normalize(0, most), "Greys")
        axes.legend(
            handles=[Patch(color=colour, label=name) for name, colour in colours],
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(colours), fontsize=8, frameon=False, borderaxespad=0,
        )  # fmt: skip
    return axes.figure.colorbar(drawn, ax=axes, pad=0.01, label=label)


def new_figure(width: float, height: float):
    """A figure of its own, apart from pyplot's global state and from any display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def marker_of(steps: Sequence[int]) -> str:
    return "." if len(steps) < 30 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
