"""Pictures of sequence tasks. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .config import BabiConfig, RunConfig, SequenceConfig
from .files import replacing
from .plots import (
    WRONG,
    Colours,
    axes_of_curve,
    draw_band,
    draw_curriculum,
    draw_legend,
    draw_steps,
    marker_of,
    new_figure,
    plot_loss,
    readable_log,
    slot_panels,
)
from .sequences import SequenceTrace, SizeResult, task_of

MOST_WIDE = 30.0  # inches of a picture of one sequence; steps of a longer one share columns of pixels


def unit(config: RunConfig) -> str:
    """What an error counts."""
    if isinstance(config, BabiConfig):
        return "share of wrong answers"
    return "wrong bits per answer" if task_of(config).binary else "squared error"


def loss_unit(config: RunConfig) -> str:
    """What the loss of training is."""
    if isinstance(config, BabiConfig):
        return "loss (nats per answer)"
    return "loss (nats per bit)" if task_of(config).binary else "squared error"


def plot_sequence_curve(
    path: str | os.PathLike, records: Sequence[dict[str, Any]], config: RunConfig, title: str
) -> None:
    """Errors on sequences of every size with their 95% interval, or of all bAbI tasks, training loss, and with a curriculum how
    long its sequences were, over steps; from the lines of metrics.jsonl.
    """
    steps = [record["step"] for record in records]
    top, bottom, *rest = axes_of_curve(any("length" in record for record in records))
    figure = top.figure
    for name in records[-1]["test_error"]:
        values = [record["test_error"][name] for record in records]
        (line,) = top.plot(steps, values, label=name, marker=marker_of(steps))
        draw_band(
            top, steps, [record.get("test_interval", {}).get(name) for record in records], line.get_color()
        )
    kind = "stories" if isinstance(config, BabiConfig) else "sequences"
    top.set_title(f"{title}:\nnew {kind}", wrap=True)
    top.set(ylabel=unit(config), ylim=(0, None))
    draw_legend(top, None if isinstance(config, BabiConfig) else "shaded: 95% interval")
    plot_loss(bottom, records, loss_unit(config))
    readable_log(bottom)
    for axes in rest:
        draw_curriculum(axes, bottom, records, "length", "longest drawn")
    for axes in (top, bottom, *rest):
        axes.grid(alpha=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_answers(
    path: str | os.PathLike, results: Sequence[SizeResult], config: SequenceConfig, title: str
) -> None:
    """Errors at the 1st, 2nd, ... answer, a line for each size; where it is known beside the best possible."""
    figure = new_figure(8.0, 4.4)
    axes = figure.subplots()
    for result in results:
        axes.plot(range(1, result.answers + 1), result.by_answer, label=result.name, linewidth=1.4)
        if result.ideal is not None:
            best = {"color": "black", "linestyle": ":", "label": "the Gaussian process itself"}
            axes.plot(range(1, result.answers + 1), result.ideal, **best)
    axes.axhline(results[0].guess, color="#9aa5b1", linewidth=1, label="a guess")
    axes.set_title(f"{title}:\nerrors on new sequences", wrap=True)
    axes.set(xlabel="answer", ylabel=unit(config))
    if task_of(config).binary:
        axes.set(ylim=(0, None))
    else:
        readable_log(axes)
    axes.grid(alpha=0.25)
    draw_legend(axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_sequence(path: str | os.PathLike, trace: SequenceTrace, config: SequenceConfig, title: str) -> None:
    """One sequence step by step: inputs, what is wanted, what the model answers (with its wrong bits crossed), and weights of
    writing and reading of every slot (as figure 6 of Graves et al. 2014 shows them), of a DNC coloured by kind."""
    task = task_of(config)
    known, guessed = ("bit", "probability of a 1") if task.binary else ("value", "value")
    output_marks: tuple[str, ...] = getattr(task, "output_marks", ())
    panels: list[tuple[str, Tensor, Colours, str, tuple[str, ...]]] = [
        ("input", trace.inputs, "Greys", known, task.marks),
        ("wanted", trace.targets, "Greys", known, output_marks),
        ("answered", trace.outputs * trace.answered.unsqueeze(1), "Greys", guessed, output_marks),
    ]
    if trace.slots is not None:
        panels += [
            ("memory slot", drawn, colours, f"weight {name}", ())
            for name, drawn, colours in slot_panels(trace.slots)
        ]
    heights = [0.7 + 0.1 * values.shape[1] if values.shape[1] <= 16 else 2.6 for _, values, *_ in panels]
    figure = new_figure(min(max(7.0, 0.09 * len(trace.inputs) + 3), MOST_WIDE), sum(heights) + 1.6)
    rows = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    figure.suptitle(f"{title}\n{trace.name}: {trace.error:.3g} {unit(config)}", wrap=True)
    wanted = (trace.targets, trace.outputs * trace.answered.unsqueeze(1))
    for axes, (label, values, colours, of_bar, marks) in zip(rows, panels, strict=True):
        draw_steps(axes, values, colours, of_bar, wanted if label in ("wanted", "answered") else ())
        axes.set_ylabel(label)
        if label != "memory slot":
            size = values.shape[1]
            axes.set_yticks(range(size - len(marks), size), marks, fontsize=7)
    if task.binary:
        wrong = ((trace.outputs > 0.5) != (trace.targets > 0.5)) & trace.answered.unsqueeze(1)
        if wrong.any():
            rows[2].scatter(*wrong.nonzero().T, marker="x", s=14, linewidths=1, color=WRONG, label="wrong")
            rows[2].legend(loc="upper left", fontsize=7)
    rows[-1].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
