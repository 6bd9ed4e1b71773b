"""Pictures of sequence tasks. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .config import SequenceConfig
from .files import replacing
from .plots import Colours, _figure, _marker, draw_steps, plot_loss, slot_panels
from .sequences import SequenceTrace, SizeResult, task_of


def unit(config: SequenceConfig) -> str:
    """What an error counts."""
    return "wrong bits per answer" if task_of(config).binary else "squared error"


def plot_sequence_curve(
    path: str | os.PathLike, records: Sequence[dict[str, Any]], config: SequenceConfig, title: str
) -> None:
    """Errors on sequences of every size, and training loss, over steps; from the lines of metrics.jsonl."""
    steps = [record["step"] for record in records]
    figure = _figure(8.5, 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name in records[-1]["test_error"]:
        values = [record["test_error"][name] for record in records]
        top.plot(steps, values, label=name, marker=_marker(steps))
    top.set(title=f"{title}: new sequences", ylabel=unit(config), ylim=(0, None))
    top.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    plot_loss(bottom, records, "loss (nats per bit)" if task_of(config).binary else "squared error")
    bottom.set(yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_answers(
    path: str | os.PathLike, results: Sequence[SizeResult], config: SequenceConfig, title: str
) -> None:
    """Errors at the 1st, 2nd, ... answer, a line for each size; where it is known beside the best possible."""
    figure = _figure(8.0, 4.4)
    axes = figure.subplots()
    for result in results:
        axes.plot(range(1, result.answers + 1), result.by_answer, label=result.name, linewidth=1.4)
        if result.ideal is not None:
            best = {"color": "black", "linestyle": ":", "label": "the Gaussian process itself"}
            axes.plot(range(1, result.answers + 1), result.ideal, **best)
    axes.axhline(results[0].guess, color="#9aa5b1", linewidth=1, label="a guess")
    axes.set(title=f"{title}: errors on new sequences", xlabel="answer", ylabel=unit(config))
    if task_of(config).binary:
        axes.set(ylim=(0, None))
    else:
        axes.set(yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_sequence(path: str | os.PathLike, trace: SequenceTrace, title: str) -> None:
    """One sequence step by step: inputs, what is wanted, what the model answers, and weights of writing and reading of every
    slot (as figure 6 of Graves et al. 2014 shows them), of a DNC coloured by kind."""
    panels: list[tuple[str, Tensor, Colours]] = [
        ("input", trace.inputs, "Greys"),
        ("wanted", trace.targets, "Greys"),
        ("answered", trace.outputs * trace.answered.unsqueeze(1), "Greys"),
    ]
    if trace.slots is not None:
        panels += [(f"slot {name}", *drawn) for name, *drawn in slot_panels(trace.slots)]
    heights = [0.5 + 0.1 * values.shape[1] if values.shape[1] <= 16 else 2.6 for _, values, _ in panels]
    figure = _figure(max(7.0, 0.09 * len(trace.inputs) + 3), sum(heights) + 1.6)
    rows = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    figure.suptitle(title)
    for axes, (label, values, colours) in zip(rows, panels, strict=True):
        draw_steps(axes, values, colours)
        axes.set_ylabel(label)
        if values.shape[1] <= 16:
            axes.set_yticks([])
    rows[-1].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
