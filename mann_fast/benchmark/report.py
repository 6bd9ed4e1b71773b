"""Figures as a table, and as one self-contained page with pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.files import replacing
from .cases import OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "op",
    "direction",
    "what",
    "median ms (quartiles)",
    "times mann_fast",
    "host ms",
    "GPU ms",
    "of ceiling",
    "kept KiB",
    "peak KiB",
    "first call s",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    if "median_ms" in row:
        low, high = row["quartiles_ms"]
        shown = f"{row['median_ms']:.3g} ({low:.3g}-{high:.3g})"
    elif "note" in row:
        shown = f"failed: {row['note'][:60]}"
    else:
        shown = "verified, not timed" if row["verified"] else "unverified"
    ratio, share, first = row.get("times_mann_fast"), row.get("share_of_ceiling"), row.get("first_call_s")
    host, gpu = row.get("host_ms"), row.get("gpu_ms")
    kept, peak = row.get("saved_bytes"), row.get("peak_bytes")
    return [
        row["op"], row["direction"], row["what"], shown, "" if ratio is None else f"{ratio:.2f}",
        "" if host is None else f"{host:.3g}", "" if gpu is None else f"{gpu:.3g}",
        "" if share is None else f"{share:.0%} {row['ceiling']}", "" if kept is None else f"{kept / 1024:,.0f}",
        "" if peak is None else f"{peak / 1024:,.0f}", "" if first is None else f"{first:.2f}",
    ]  # fmt: skip


def filled(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which a row has something, and the rows in these."""
    table = [cells(row) for row in rows]
    at = [i for i in range(len(COLUMNS)) if any(line[i] for line in table)]
    return [COLUMNS[i] for i in at], [[line[i] for i in at] for line in table]


def titles(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by shape, dtype and threads, in the order in which they came."""
    groups: dict[str, list] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        groups.setdefault(f"{row['shape']}, {row['dtype']}, {threads}", []).append(row)
    return list(groups.items())


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Benchmarks of mann_fast", "", _environment(report), ""]
    for title, rows in titles(report["rows"]):
        columns, table = filled(rows)
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in table]
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
    for alt, picture in pictures(report["rows"]):
        data = base64.b64encode(picture).decode()
        parts.append(f"<p><img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>")
    for title, rows in titles(report["rows"]):
        columns, table = filled(rows)
        heads = "".join(f"<th>{name}</th>" for name in columns)
        parts.append(f"<h2>{html.escape(title)}</h2><table><tr>{heads}</tr>")
        for line in table:
            parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """A page or, where the name ends in .md, Markdown."""
    with replacing(path) as temporary:
        temporary.write_text(markdown(report) if path.suffix == ".md" else page(report), encoding="utf-8")


def pictures(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """What each shows, and the PNG: one with the ratios, or one per op that was swept. Rows without a time are left out."""
    rows = [row for row in rows if "median_ms" in row]
    swept = [row for row in rows if row.get("axis", "dtype") != "dtype"]
    for op in dict.fromkeys(row["op"] for row in swept):
        yield f"how the time of {op} grows with each size", _sweep([row for row in swept if row["op"] == op])
    compared = [row for row in rows if "axis" not in row and row["times_mann_fast"] is not None]
    if compared:
        yield "the time of each contestant in that of mann_fast", _ratios(compared)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _sweep(rows: Sequence[dict[str, Any]]) -> bytes:
    """How the time grows with each size, on log axes beside the line of a time that grows as the size does, or falls as the
    threads grow."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    size = (3.2 * len(axes_names), 3.1 * len(directions) + 0.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = figure.subplots(len(directions), len(axes_names), squeeze=False)
    for line, direction in zip(grid, directions, strict=True):
        for axes, name in zip(line, axes_names, strict=True):
            here = [row for row in rows if row["axis"] == name and row["direction"] == direction]
            for what in dict.fromkeys(row["what"] for row in here):
                points = sorted((row["value"], row["median_ms"]) for row in here if row["what"] == what)
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=what)
                if what == OURS:
                    at, time = points[0] if name == "threads" else points[-1]
                    ideal = [time * (at / value if name == "threads" else value / at) for value, _ in points]
                    axes.plot([value for value, _ in points], ideal, color="black", linestyle=":", linewidth=1,
                              label="in proportion")  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=name, title=direction)
            sizes = sorted({row["value"] for row in here})
            axes.set_xticks(sizes, list(map(str, sizes)))
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("ms")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, title=rows[0]["op"])
    return _png(figure)


def _ratios(rows: Sequence[dict[str, Any]]) -> bytes:
    """Bars on a log axis, one group per op, direction and size."""
    from matplotlib.figure import Figure

    labels, ratios, gaps, place = [], [], [], 0.0
    before = None
    for row in rows:
        group = row["op"], row["direction"], row["shape"], row["dtype"], row["threads"]
        place += 1.6 if before not in (None, group) else 1
        before = group
        gaps.append(place)
        ratios.append(row["times_mann_fast"])
        labels.append(f"{row['op']} {row['direction']}: {row['what']}")
    figure = Figure(figsize=(9, 0.24 * place + 0.9), dpi=110, layout="constrained")
    axes = figure.subplots()
    colours = ["#2a6f97" if row["what"] == OURS else "#b0b7bf" for row in rows]
    bars = axes.barh(gaps, ratios, height=0.75, color=colours)
    axes.bar_label(bars, [f" {ratio:.3g}" for ratio in ratios], fontsize=7)
    axes.set_yticks(gaps, labels, fontsize=7)
    axes.set(xscale="log", xlabel="time, that of mann_fast = 1 (log scale)", ylim=(place + 1, 0))
    axes.set_xlim(min([0.5, *ratios]) * 0.9, max(ratios) * 2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
