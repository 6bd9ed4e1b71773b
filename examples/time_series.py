"""Forecasts and anomalies of several series with one MemoryLayer.

    python examples/time_series.py --out series.png            # made-up series
    python examples/time_series.py data.csv --out series.png   # your own

A CSV has a line of names, then a line for each step and a column for each series. Columns of text, such as dates, are left
out, and a series that is shorter than others ends with empty cells. One model learns from the first part of every series
(``--share``), from windows of any length side by side: ``lengths``. What follows is predicted step by step, and a value is an
anomaly where it lies further from its prediction, in predicted standard deviations, than all but one in 500 of those learned
from. A forecast is made from the end of the first part, on predictions alone.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor, nn

from mann_fast import MemoryLayer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402, after the backend is chosen


class Series(NamedTuple):
    """One column: its name, values [T], and where anomalies were put, bool [T], of made-up series."""

    name: str
    values: Tensor
    strange: Tensor | None = None


def made_up(count: int = 6, steps: int = 640, seed: int = 0) -> list[Series]:
    """Two cycles of each series' own lengths, a trend and noise; in the last quarter three values that are far off."""
    generator = torch.Generator().manual_seed(seed)
    series = []
    for i in range(count):
        draw = torch.rand(6, generator=generator)
        length = steps - int(draw[0] * steps / 8)
        t = torch.arange(length)
        fast, slow = 12 + int(draw[1] * 14), 48 + int(draw[2] * 40)
        wave = torch.sin(2 * math.pi * (t / fast + draw[3])) + 0.7 * torch.sin(
            2 * math.pi * (t / slow + draw[4])
        )
        values = wave + (draw[5] - 0.5) * t / steps + 0.12 * torch.randn(length, generator=generator)
        strange = torch.zeros(length, dtype=torch.bool)
        late = length * 3 // 4 + 10
        for at in late + torch.randperm(length - late, generator=generator)[:3]:
            values[at] += (1.3 + torch.rand((), generator=generator)) * (1 if values[at] < 0 else -1)
            strange[at] = True
        scale = 10.0 ** (i % 3)
        series.append(Series(f"series {i + 1} (cycles of {fast} and {slow})", scale * (values + 2), strange))
    return series


def read(path: Path) -> list[Series]:
    """The columns of numbers of a CSV. Raises ValueError for a file without any, or a gap within one."""
    with path.open(newline="", encoding="utf-8") as file:
        names, *lines = [line for line in csv.reader(file) if line] or [[]]
    series = []
    for i, name in enumerate(names):
        cells = [line[i].strip() if i < len(line) else "" for line in lines]
        while cells and not cells[-1]:
            cells.pop()
        try:
            values = [float(cell) for cell in cells if cell]
        except ValueError:
            continue
        if len(values) != len(cells):
            raise ValueError(
                f"{path}: {name} must have a number in every line to its end, but line {cells.index('') + 2} is empty"
            )
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{path}: {name} must have finite numbers, but one is nan or infinite")
        if values:
            series.append(Series(name, torch.tensor(values)))
    if not series:
        raise ValueError(f"{path} must have a column of numbers, but has none")
    return series


class Model(nn.Module):
    """Of the values so far, the mean and the logarithm of the standard deviation of the next."""

    def __init__(self, size: int = 48):
        super().__init__()
        self.memory = MemoryLayer(1, size, num_slots=32, slot_size=16, num_heads=2, output_size=size)
        self.head = nn.Linear(size, 2)

    def forward(self, values, state=None, lengths=None):
        """values [T, B]; mean and logarithm [T, B], and the state after the last of each."""
        output, state = self.memory(values.unsqueeze(-1), state, lengths=lengths)
        change, log_scale = self.head(output).unbind(-1)
        return values + change, log_scale.clamp(-6, 3), state


def train(model: Model, series: list[Tensor], steps: int, longest: int, batch: int = 16) -> None:
    """On windows of 2 to ``longest`` values (fewer of a short series), drawn anew for each step."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        windows = []
        for i in torch.randint(len(series), (batch,)).tolist():
            length = int(torch.randint(longest // 2, longest + 1, ()).clamp(2, len(series[i])))
            start = int(torch.randint(len(series[i]) - length + 1, ()))
            windows.append(series[i][start : start + length])
        lengths = torch.tensor([len(window) - 1 for window in windows])
        padded = nn.utils.rnn.pad_sequence(windows)  # [T, B]
        mean, log_scale, _ = model(padded[:-1], lengths=lengths)
        surprise = 0.5 * ((padded[1:] - mean) / log_scale.exp()).square() + log_scale
        counts = torch.arange(len(padded) - 1).unsqueeze(1) < lengths
        loss = surprise[counts].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


class Prediction(NamedTuple):
    """Of the steps after the first part: mean and scale of each from what came before it, which are anomalies, and the forecast
    of all of them from the end of the first part; [T'] each."""

    mean: Tensor
    scale: Tensor
    anomalies: Tensor
    forecast: Tensor


@torch.no_grad()
def predict(model: Model, values: Tensor, cut: int, longest: int) -> Prediction:
    """What follows ``values[:cut]``, in units of a normalised series."""
    before = values[max(0, cut - longest) : cut].unsqueeze(1)
    mean, log_scale, state = model(before)
    scores = ((before[1:] - mean[:-1]).abs() / log_scale[:-1].exp())[len(before) // 4 :]
    threshold = max(4.0, float(scores.quantile(0.998)))
    seen, dreamt = (mean[-1:], log_scale[-1:], state), (mean[-1:], log_scale[-1:], state)
    means, scales, anomalies, forecast = [], [], [], []
    for value in values[cut:]:
        mean, log_scale, state = seen
        means.append(mean.item())
        scales.append(log_scale.exp().item())
        anomalies.append(abs(value.item() - means[-1]) > threshold * scales[-1])
        seen = model(mean if anomalies[-1] else value.view(1, 1), state)  # an anomaly is not learned from
        forecast.append(dreamt[0].item())
        dreamt = model(dreamt[0], dreamt[2])
    return Prediction(
        torch.tensor(means), torch.tensor(scales), torch.tensor(anomalies), torch.tensor(forecast)
    )


def plot(path: Path, rows: list[tuple[Series, int, Prediction]], ahead: int) -> None:
    """Each series in an axis of its own, from a while before the first part ends."""
    columns = min(2, len(rows))
    height = -(-len(rows) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(6.5 * columns, 2.4 * height), squeeze=False)
    for axis, (series, cut, found) in zip(axes.flat, rows, strict=False):
        values, start = series.values, max(0, cut - 80)
        after = torch.arange(cut, len(values))
        axis.plot(range(start, len(values)), values[start:], color="0.35", lw=0.9, label="values")
        low, high = found.mean - 2 * found.scale, found.mean + 2 * found.scale
        axis.fill_between(after, low, high, color="tab:blue", alpha=0.3, lw=0, label="next value, predicted")
        axis.plot(
            after[:ahead],
            found.forecast[:ahead],
            color="tab:orange",
            lw=1.3,
            label=f"forecast, {ahead} steps",
        )
        if series.strange is not None:
            at = series.strange.nonzero().squeeze(1)
            axis.plot(at, values[at], "o", mfc="none", color="0.1", ms=9, label="put in")
        at = cut + found.anomalies.nonzero().squeeze(1)
        axis.plot(at, values[at], "x", color="tab:red", ms=6, label="found")
        axis.axvline(cut - 0.5, color="0.6", lw=0.8, ls=":")
        axis.set_title(series.name, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="?", type=Path, help="your series; made-up ones without")
    parser.add_argument("--out", type=Path, default=Path("series.png"), help="the picture (series.png)")
    parser.add_argument(
        "--share", type=float, default=0.75, help="of each series that is learned from (0.75)"
    )
    parser.add_argument("--steps", type=int, default=250, help="of training (250)")
    parser.add_argument("--longest", type=int, default=160, help="of the windows (160)")
    parser.add_argument("--ahead", type=int, default=48, help="steps of the forecast (48)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    try:
        columns = made_up(seed=args.seed) if args.csv is None else read(args.csv)
        cuts = [int(len(series.values) * args.share) for series in columns]
        if min(cuts) < 8 or any(cut >= len(series.values) for cut, series in zip(cuts, columns, strict=True)):
            raise ValueError("every series must have 8 values in its first part, and one after it")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    centres = [series.values[:cut].mean() for series, cut in zip(columns, cuts, strict=True)]
    spreads = [series.values[:cut].std().clamp(min=1e-12) for series, cut in zip(columns, cuts, strict=True)]
    normal = [(series.values - a) / b for series, a, b in zip(columns, centres, spreads, strict=True)]
    model = Model()
    train(model, [values[:cut] for values, cut in zip(normal, cuts, strict=True)], args.steps, args.longest)

    rows, hits, strange, found = [], 0, 0, 0
    print(f"{'mean absolute error of':40} next value  (the last)  {args.ahead} steps  (the last)")
    for series, values, cut, centre, spread in zip(columns, normal, cuts, centres, spreads, strict=True):
        result = predict(model, values, cut, args.longest)
        rest, last = values[cut:], values[cut - 1 : -1]
        far = slice(0, args.ahead)
        errors = [
            (result.mean - rest).abs().mean(),
            (last - rest).abs().mean(),
            (result.forecast - rest)[far].abs().mean(),
            (values[cut - 1] - rest)[far].abs().mean(),
        ]
        print(f"{series.name[:40]:40}" + "".join(f"{error * spread:12.4g}" for error in errors))
        if series.strange is not None:
            hits += int((result.anomalies & series.strange[cut:]).sum())
            strange += int(series.strange[cut:].sum())
        found += int(result.anomalies.sum())
        back = Prediction(
            result.mean * spread + centre,
            result.scale * spread,
            result.anomalies,
            result.forecast * spread + centre,
        )
        rows.append((series, cut, back))
    print(
        f"{found} anomalies found"
        + (f", {hits} of the {strange} that were put in" if args.csv is None else "")
    )
    plot(args.out, rows, args.ahead)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
