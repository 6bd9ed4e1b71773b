"""What commands print: progress while training, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from ..training import InstanceAccuracy, TrainConfig
from ..training.plots import ordinal, shown_instances
from ..training.trainer import StepResult

SMOOTHING = 0.95  # of the averages in the progress bar
QUIET_SECONDS = 30  # between progress lines where the output is no terminal


class TrainingProgress:
    """Loss, accuracy by instance and time left: a bar on a terminal, a line now and then elsewhere. Goes to
    stderr.
    """

    def __init__(self, config: TrainConfig, step: int):
        self.config = config
        self.console = Console(stderr=True)
        self.loss: float | None = None
        self.accuracy: Sequence[float] = ()
        self.first_step, self.started = step, time.monotonic()
        self.next_line = self.started + QUIET_SECONDS
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes what the numbers leave
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=4,
            expand=True,
        )
        self.task = self.progress.add_task("train", total=config.steps, completed=step, numbers="")

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, result: StepResult) -> None:
        values = result.accuracy.tolist()
        if self.loss is None:
            self.loss, self.accuracy = result.loss, values
        # A plain mean over the first steps, then an exponential one.
        weight = max(1 - SMOOTHING, 1 / (result.step - self.first_step))
        self.loss += weight * (result.loss - self.loss)
        self.accuracy = [old + weight * (new - old) for old, new in zip(self.accuracy, values, strict=True)]
        if self.console.is_terminal:
            self.progress.update(self.task, completed=result.step, numbers=self._numbers())
        elif time.monotonic() >= self.next_line or result.step == self.config.steps:
            self.next_line = time.monotonic() + QUIET_SECONDS
            print(
                f"step {result.step}/{self.config.steps}  {self._numbers()}  {self._left(result.step)}",
                file=sys.stderr,
            )

    def _numbers(self) -> str:
        shown = " ".join(
            f"{ordinal(k)} {self.accuracy[k - 1]:.0%}" for k in shown_instances(self.config.shots)
        )
        return f"loss {self.loss:.3f} {shown}"

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self.started) / (step - self.first_step) * (self.config.steps - step)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def print_accuracy(accuracy: InstanceAccuracy, config: TrainConfig, title: str) -> None:
    """Accuracy by instance, 1st to 10th, with its confidence intervals, as a table on stdout."""
    table = Table()
    table.add_column("image of a class", justify="right")
    table.add_column("right", justify="right")
    table.add_column("95% interval", justify="center")
    rows = zip(accuracy.mean, accuracy.low, accuracy.high, strict=True)
    for k, (mean, low, high) in enumerate(rows, start=1):
        if k <= 10:
            table.add_row(ordinal(k), f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
    print(title)
    print_table(table)
    print(explain_first(config))


def print_table(table: Table) -> None:
    """On stdout, as wide as it needs to be: a narrower terminal breaks lines, but no number is cut."""
    console = Console(highlight=False)
    console.width = max(console.width, console.measure(table).maximum)
    console.print(table)


def explain_first(config: TrainConfig) -> str:
    """Why the first row of the table is what it is."""
    if config.labels == "string":
        return "The 1st image of a class comes before its label, so the five letters can only be guessed."
    return (
        f"The 1st image of a class comes before its label: a guess, right {config.chance:.0%} of the time, "
        "or more often by ruling out the labels that other classes of the episode have taken."
    )
