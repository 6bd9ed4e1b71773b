"""What commands print: progress while training, and tables."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..training import InstanceAccuracy, SequenceConfig, TrainConfig
from ..training.babi import MEANS, PUBLISHED, REPEATED
from ..training.config import ENCODER_SHARE, NO_ENCODER, RunConfig
from ..training.plots import name_of_answer, ordinal, shown_instances
from ..training.protocol import QUERIES
from ..training.sequence_plots import unit
from ..training.sequences import SequenceStep
from ..training.support import QUERIES as QUERIES_OF_TRAINING
from ..training.trainer import StepResult

SMOOTHING = 0.95  # of the averages in the progress bar
QUIET_SECONDS = 30  # between progress lines where the output is no terminal


class TrainingProgress:
    """Loss, accuracy by instance or error, and time left: a bar on a terminal, a line now and then elsewhere. Goes to
    stderr.
    """

    def __init__(self, config: RunConfig, step: int):
        self.config = config
        self.console = Console(stderr=True)
        self.loss: float | None = None  # an average over ``averaged`` steps
        self.averaged = 0
        self._encoder_steps = config.encoder_steps if isinstance(config, TrainConfig) else 0
        self.values: Sequence[float] = ()
        # With a curriculum, the length of sequences or the classes of an episode.
        self.size: int | None = None
        self.first_step, self.started = step, time.monotonic()
        self.next_line = self.started + QUIET_SECONDS
        self.progress = Progress(
            TextColumn(f"{{task.fields[step]}}/{config.steps}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes what the numbers leave
            TextColumn("{task.fields[numbers]}", table_column=Column()),  # may break into lines
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=4,
            expand=True,
        )
        self.task = self.progress.add_task(
            "train", total=self._work(config.steps), completed=self._work(step), numbers="", step=step
        )

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, result: StepResult | SequenceStep) -> None:
        if isinstance(result, SequenceStep):
            values, self.size = [result.error], result.length
        else:
            values, self.size = result.accuracy.tolist(), result.ways
        if self.loss is None or result.step == self._encoder_steps + 1:
            self.loss, self.values, self.averaged = result.loss, values, 0
        self.averaged += 1
        # A plain mean over the first steps, then an exponential one.
        weight = max(1 - SMOOTHING, 1 / self.averaged)
        self.loss += weight * (result.loss - self.loss)
        self.values = [_smoothed(old, new, weight) for old, new in zip(self.values, values, strict=True)]
        if self.console.is_terminal:
            done = self._work(result.step)
            self.progress.update(self.task, completed=done, numbers=self._numbers(), step=result.step)
        elif time.monotonic() >= self.next_line or result.step == self.config.steps:
            self.next_line = time.monotonic() + QUIET_SECONDS
            print(
                f"step {result.step}/{self.config.steps}  {self._numbers()}  {self._left(result.step)}",
                file=sys.stderr,
            )
        if result.step == self._encoder_steps:
            self.console.print(
                "the encoder has learned; now its features of every image are made", highlight=False
            )

    def _numbers(self) -> str:
        if not isinstance(self.config, TrainConfig):
            longest = f" up to length {self.size}" if getattr(self.config, "curriculum", 0) else ""
            return f"loss {self.loss:.4f} {unit(self.config)} {self.values[0]:.3f}{longest}"
        shown = " ".join(
            f"{name_of_answer(self.config, k).removesuffix(' image')} {self.values[k - 1]:.0%}"
            for k in shown_instances(self.config.shots)
            if not math.isnan(self.values[k - 1])
        )
        ways = f" of {self.size} classes" if self.config.curriculum and self.size else ""
        return f"loss {self.loss:.3f} {shown}{ways}"

    def _left(self, step: int) -> str:
        done, left = (
            self._work(step) - self._work(self.first_step),
            self._work(self.config.steps) - self._work(step),
        )
        return f"{duration((time.monotonic() - self.started) / done * left)} left"

    def _work(self, step: int) -> int:
        """How long the steps up to this one take, in steps of the memory."""
        return step + (ENCODER_SHARE - 1) * min(step, self._encoder_steps)


def _smoothed(old: float, new: float, weight: float) -> float:
    """Of a number that not every step has: NaN where it has not come yet."""
    if math.isnan(new):
        return old
    return new if math.isnan(old) else old + weight * (new - old)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def accuracy_table(accuracy: dict[str, Any], stream: bool) -> Table:
    """Mean and 95% interval, low and high, by instance of a stream or by the examples of each class; the first ten."""
    table = Table()
    table.add_column("image of a class" if stream else "examples of each class", justify="right")
    table.add_column("right", justify="right")
    table.add_column("95% interval", justify="center")
    rows = zip(accuracy["mean"], accuracy["low"], accuracy["high"], strict=True)
    for k, (mean, low, high) in enumerate(list(rows)[:10], start=1):
        table.add_row(ordinal(k) if stream else str(k), f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
    return table


def print_accuracy(accuracy: InstanceAccuracy, config: TrainConfig, title: str) -> None:
    """Accuracy by instance, 1st to 10th, or by shots, with its confidence intervals, as a table on stdout."""
    stream = config.layout == "stream"
    print(title)
    print_table(accuracy_table(accuracy.to_dict(), stream))
    print(
        explain_first(config)
        if stream
        else f"{QUERIES_OF_TRAINING} queries of each of {config.ways} classes, each judged apart."
    )


def print_streams(streams: dict[str, Any], config: TrainConfig) -> None:
    """Accuracy by instance on streams of images, with its confidence intervals, as a table on stdout."""
    print(
        f"Streams of {len(streams['mean'])} images of each of {streams['ways']} classes, {streams['episodes']:,} of them; "
        "every image is asked about from the memory of those before it. "
        + averages(streams, "deals of the labels", config)
        + (
            "The model was trained on streams, and answers as it reads."
            if config.layout == "stream"
            else "The model was trained on support and queries: it is asked apart, and then shown the image with its label."
        )
    )
    print_table(accuracy_table(streams, stream=True))


def averages(result: dict[str, Any], orders: str, config: TrainConfig) -> str:
    """What an answer is the mean over."""
    over, features = [], ""
    if result["orders"] > 1:
        over.append(f"{result['orders']} {orders}")
    if result["views"] > 1 and config.encoder == NO_ENCODER:
        over.append(f"{result['views']} views of the images")
    elif result["views"] > 1:
        features = f"The features of an image are the mean over {result['views']} views of it. "
    return (f"An answer is the mean over {', each of '.join(over)}. " if over else "") + features


def print_protocols(results: Sequence[dict[str, Any]], config: TrainConfig) -> None:
    """Accuracy by the field's protocol, with its confidence intervals, as a table on stdout."""
    table = Table()
    table.add_column("protocol")
    table.add_column("right", justify="right")
    table.add_column("95% interval", justify="center")
    for result in results:
        interval = f"{result['low']:.1%} to {result['high']:.1%}"
        table.add_row(result["protocol"], f"{result['mean']:.1%}", interval)
    print(
        f"N-way K-shot, {QUERIES} queries of each class, judged apart; {results[0]['episodes']:,} episodes. "
        + averages(results[0], "orders of the examples", config)
        + (
            "The model was trained with labels one step late, and sees those of the examples so."
            if config.layout == "stream"
            else "The model was trained so."
        )
    )
    print_table(table)


def print_errors(results: Sequence[dict[str, Any]], config: SequenceConfig, title: str) -> None:
    """Errors of every size, as a table on stdout; where the best possible answers are known, at some of the answers."""
    print(title)
    table = Table()
    if results[0]["ideal"] is None:
        for name in ("size", unit(config), "95% interval", "without an error", "a guess"):
            table.add_column(name, justify="left" if name == "size" else "right")
        for result in results:
            interval = f"{result['low']:.3f} to {result['high']:.3f}"
            figures = f"{result['mean']:.3f}", interval, f"{result['solved']:.0%}", f"{result['guess']:.1f}"
            table.add_row(result["name"], *figures)
    else:
        (result,) = results
        for name in ("point", unit(config), "the Gaussian process itself", "a guess"):
            table.add_column(name, justify="right")
        for k in (1, 2, 5, 10, 20, 50, 100, 200):
            if k <= result["answers"]:
                values = (result["by_answer"][k - 1], result["ideal"][k - 1], result["guess"])
                table.add_row(ordinal(k), *(f"{value:.3f}" for value in values))
    print_table(table)


def print_babi(results: Sequence[dict[str, Any]], title: str) -> None:
    """The error of every task beside the papers', as a table on stdout."""
    print(title)
    table = Table("task")
    for name in ("wrong answers", "the commonest answer", *PUBLISHED):
        table.add_column(name, justify="right")
    for result in results:
        papers = (column[result["task"] - 1] for column in PUBLISHED.values())
        figures = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in papers)
        here = f"{100 * result['error']:.1f}%", f"{100 * result['guess']:.1f}%"
        table.add_row(f"{result['task']}: {result['name']}", *here, *figures)
    means = (100 * sum(result[name] for result in results) / len(results) for name in ("error", "guess"))
    papers = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in MEANS.values())
    table.add_row("mean", *(f"{mean:.1f}%" for mean in means), *papers)
    failed = sum(result["error"] > 0.05 for result in results)
    print_table(table)
    print(
        f"{failed} of {len(results)} tasks with more than 5% wrong. The DNC of Graves et al. as Csordas and Schmidhuber ran "
        f"it: mean {REPEATED[0]} ± {REPEATED[1]}."
    )


def print_table(table: Table) -> None:
    """On stdout, as wide as it needs to be: a narrower terminal breaks lines, but no number is cut."""
    console = Console(highlight=False)
    unbounded = console.options.update(max_width=sys.maxsize)  # else the terminal bounds what is measured
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def explain_first(config: TrainConfig) -> str:
    """Why the first row of the table is what it is."""
    if config.labels == "string":
        return "The 1st image of a class comes before its label, so the five letters can only be guessed."
    return (
        f"The 1st image of a class comes before its label: a guess, right {config.chance:.0%} of the time, "
        "or more often by ruling out the labels that other classes of the episode have taken."
    )
