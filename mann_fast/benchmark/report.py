"""Figures as a table, as one self-contained page, and over a sweep of sizes as curves."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.files import replacing

COLUMNS = (
    "op",
    "direction",
    "what",
    "median ms (quartiles)",
    "times mann_fast",
    "of ceiling",
    "kept KiB",
    "first call s",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    if not row["verified"]:
        shown = "unverified"
    elif "median_ms" not in row:
        shown = "verified, not timed"
    else:
        low, high = row["quartiles_ms"]
        shown = f"{row['median_ms']:.3g} ({low:.3g}-{high:.3g})"
    ratio, share, kept = row.get("times_mann_fast"), row.get("share_of_ceiling"), row["saved_bytes"]
    return [
        row["op"], row["direction"], row["what"], shown, "" if ratio is None else f"{ratio:.2f}",
        "" if share is None else f"{share:.0%} {row['ceiling']}", "" if kept is None else f"{kept / 1024:,.0f}",
        f"{row['first_call_s']:.2f}",
    ]  # fmt: skip


def titles(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by shape and dtype, in the order in which they came."""
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(f"{row['shape']}, {row['dtype']}", []).append(row)
    return list(groups.items())


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Benchmarks of mann_fast", "", _environment(report), ""]
    for title, rows in titles(report["rows"]):
        lines += [f"## {title}", "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _environment(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in report["environment"].items() if value is not None)


def page(report: dict[str, Any]) -> str:
    """One HTML file with everything in it."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Benchmarks of mann_fast</title>",
        "<style>body{font:15px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}img{max-width:100%}</style>",
        f"<h1>Benchmarks of mann_fast</h1><p>{html.escape(_environment(report))}</p>",
    ]
    for picture in (sweep_picture(report["rows"]),):
        if picture:
            data = base64.b64encode(picture).decode()
            parts.append(f"<img alt='how the time grows with each size' src='data:image/png;base64,{data}'>")
    for title, rows in titles(report["rows"]):
        heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{heads}</tr>")
        for row in rows:
            parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """A page or, where the name ends in .md, Markdown."""
    with replacing(path) as temporary:
        temporary.write_text(markdown(report) if path.suffix == ".md" else page(report), encoding="utf-8")


def sweep_picture(rows: Sequence[dict[str, Any]]) -> bytes | None:
    """How the time grows with each size of a sweep, on log axes beside the line of a time that grows as the size does; PNG.
    None where nothing was swept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    swept = [row for row in rows if "axis" in row and "median_ms" in row]
    if not swept:
        return None
    axes_names = list(dict.fromkeys(row["axis"] for row in swept))
    directions = list(dict.fromkeys(row["direction"] for row in swept))
    figure = Figure(figsize=(3.4 * len(axes_names), 3.1 * len(directions)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(directions), len(axes_names), squeeze=False)
    for line, direction in zip(grid, directions, strict=True):
        for axes, name in zip(line, axes_names, strict=True):
            here = [row for row in swept if row["axis"] == name and row["direction"] == direction]
            for what in dict.fromkeys(row["what"] for row in here):
                points = sorted((row["value"], row["median_ms"]) for row in here if row["what"] == what)
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=what)
                if what == "mann_fast":
                    last, time = points[-1]
                    ideal = [time * value / last for value, _ in points]
                    axes.plot([value for value, _ in points], ideal, color="black", linestyle=":", linewidth=1,
                              label="as the size grows")  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=name, title=f"{direction}")
            sizes = sorted({row["value"] for row in here})
            axes.set_xticks(sizes, list(map(str, sizes)))
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("ms")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, title=here[0]["op"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
