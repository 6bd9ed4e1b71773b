"""Two files of figures: what has become faster."""

from __future__ import annotations

from typing import Any

VERDICTS = ("same", "faster", "slower", "ambiguous")
MARGIN = 0.05  # less than this is the same

KEY = ("op", "direction", "shape", "dtype", "threads", "what")


def verdict(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, float, float]:
    """What one row says of another, and the lowest and highest ratio of their times that their quartiles allow.

    Times are in units of the matrix product that was measured beside each, since machines drift and differ. "ambiguous" where
    the quartiles allow more than one answer.
    """
    a = [x / before["sgemm_ms"] for x in before["quartiles_ms"]]
    b = [x / after["sgemm_ms"] for x in after["quartiles_ms"]]
    low, high = b[0] / a[1], b[1] / a[0]
    if 1 - MARGIN <= low and high <= 1 + MARGIN:
        return "same", low, high
    if high < 1 - MARGIN / 2:
        return "faster", low, high
    if low > 1 + MARGIN / 2:
        return "slower", low, high
    return "ambiguous", low, high


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for every row that both have and that was timed in both; ValueError where there is none."""
    known = {tuple(row.get(name) for name in KEY): row for row in before if "median_ms" in row}
    found = []
    for row in after:
        key = tuple(row.get(name) for name in KEY)
        if key in known and "median_ms" in row:
            answer, low, high = verdict(known[key], row)
            found.append({**dict(zip(KEY, key, strict=True)), "verdict": answer, "ratio": [low, high]})
    if not found:
        raise ValueError(
            "the two files have no timed row in common (the same op, direction, shape, dtype and contestant)"
        )
    return found
