"""Draws docs/speed.png and docs/accuracy.png from the tables of docs/benchmarks.md and docs/omniglot.md.

    python benchmarks/pictures.py

Each picture holds the figures that it shows, as JSON in the text of the PNG: tests/test_docs.py compares them with the tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
OURS, LSTM, OTHERS = "#1f6fb4", "#8a8a8a", "#e0a458"


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under the heading of a page of docs/: its head, then its rows."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, section = text.partition(f"\n## {heading}\n")
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE) if found else None
    if rows is None:
        raise ValueError(f"docs/{page} has no table under {heading!r}")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()]
    return [cells[0], *cells[2:]]


def number(cell: str) -> float:
    return float(re.match(r"[\d.]+", cell)[0])


def speed_figures() -> dict[str, dict[str, float]]:
    """Milliseconds: of a training step at B=16 and 200 hidden units, and of a layer of each memory."""
    head, *step = table("benchmarks.md", "A training step")
    column = head.index("16, 200")
    return {
        "step": {row[0].replace("`", ""): number(row[column]) for row in step if "share" not in row[0]},
        "layers": {
            row[0].replace("`", ""): number(row[1])
            for row in table("benchmarks.md", "A layer of each memory")[1:]
        },
    }


def accuracy_figures() -> dict[str, dict[str, float]]:
    """Percent right at the 1st, 2nd, 5th and 10th time that a class is seen."""

    def columns(heading: str, **names: str) -> dict[str, dict[str, float]]:
        head, *rows = table("omniglot.md", heading)
        rows = [row for row in rows if row[0] in ("1st", "2nd", "5th", "10th")]
        return {
            label: {row[0]: number(row[head.index(name)]) for row in rows} for label, name in names.items()
        }

    short = columns("The default run, three seeds, and without a memory", lstm="LSTM", default="seed 0")
    paper = "Santoro et al. 2016, table 1"
    long = columns("The best table in an hour", shipped="200 units, 100,000 steps, seed 0", paper=paper)
    return {**short, **long}


def draw_speed(figures: dict[str, dict[str, float]]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, bars, title in (
        (axes[0], figures["step"], "Training step of a MANN: forward, backward, Adam"),
        (axes[1], figures["layers"], "A layer of each memory: forward, backward"),
    ):
        names, values = list(bars), list(bars.values())
        ours = [name == "mann_fast" or name in ("lrua", "ntm", "dnc") for name in names]
        colors = [
            LSTM if "nn.LSTM" in x else OURS if mine else OTHERS for x, mine in zip(names, ours, strict=True)
        ]
        drawn = axis.barh(names, values, color=colors)
        axis.bar_label(drawn, [f"{value:g}" for value in values], padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.set_xlim(0, max(values) * 1.12)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("milliseconds")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_accuracy(figures: dict[str, dict[str, float]]) -> plt.Figure:
    labels = {
        "lstm": ("LSTM, 20,000 steps", LSTM),
        "default": ("mann_fast, 20,000 steps", "#7fb2dd"),
        "shipped": ("mann_fast, 100,000 steps", OURS),
        "paper": ("Santoro et al. 2016, table 1", OTHERS),
    }
    figure, axis = plt.subplots(figsize=(11, 3.2))
    width = 0.8 / len(labels)
    for i, (name, (label, color)) in enumerate(labels.items()):
        values = figures[name]
        drawn = axis.bar(
            [x + (i - 1.5) * width for x in range(len(values))], values.values(), width * 0.94, color=color
        )
        drawn.set_label(label)
        axis.bar_label(drawn, [f"{value:.1f}" for value in values.values()], padding=2, fontsize=8)
    axis.set_xticks(range(len(values)), [f"{instance} time" for instance in values])
    axis.set_ylim(0, 108)
    axis.set_ylabel("% right")
    axis.set_title(
        "5-way Omniglot, characters never seen in training, by how often a class has been seen",
        fontsize=10,
        loc="left",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=4, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


PICTURES = {"speed.png": (speed_figures, draw_speed), "accuracy.png": (accuracy_figures, draw_accuracy)}

if __name__ == "__main__":
    for name, (figures, draw) in PICTURES.items():
        # White behind it, whatever the page: GitHub and the site have dark themes.
        draw(figures()).savefig(
            DOCS / name,
            dpi=130,
            bbox_inches="tight",
            facecolor="white",
            metadata={"Description": json.dumps(figures())},
        )
