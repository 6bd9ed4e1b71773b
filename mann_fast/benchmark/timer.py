"""Timing of several contestants in one run, one after the other in random order, round by round.

Machines drift and are shared: an absolute time says little, but contestants that were measured in turn saw the same
machine, so their ratios hold.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of all rounds."""

    median: float
    low: float
    high: float
    rounds: int


LEAST = (
    1e-3  # seconds of a round: more calls of what is shorter, so that most find the caches as they left them
)


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    rounds: int = 15,
    seed: int = 0,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every contestant once per round, in random order: at least ``rounds`` rounds, then until ``seconds`` are over.

    Each is called twice before, unmeasured. ``finish`` waits for what calls have only begun, once at the end of a round.
    """
    times = {}
    for name, call in contestants.items():
        call()
        finish()
        times[name] = max(1, math.ceil(LEAST / _seconds(call, 1, finish)))
    order, shuffled = list(contestants), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    while len(samples[order[0]]) < rounds or time.perf_counter() - start < seconds:
        shuffled.shuffle(order)
        for name in order:
            samples[name].append(_seconds(contestants[name], times[name], finish) / times[name])
    timings = {}
    for name in contestants:
        low, median, high = statistics.quantiles(samples[name], n=4)
        timings[name] = Timing(median, low, high, len(samples[name]))
    return timings


def _seconds(call: Callable[[], object], times: int, finish: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    finish()
    return time.perf_counter() - begin
