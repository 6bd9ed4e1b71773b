"""Accuracy by instance: how often the 1st, 2nd, ... image of a class is named rightly within an episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .objective import is_right, right_by_instance

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


class Interrupted(Exception):
    """Raised out of a long computation after the caller asked to stop."""


@dataclass(frozen=True)
class InstanceAccuracy:
    """Accuracy by instance with 95% confidence intervals: entry k of each tuple belongs to the (k+1)-th image
    of a class.
    """

    episodes: int
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def from_episodes(cls, accuracy: Tensor) -> InstanceAccuracy:
        """accuracy [E, shots]: each episode's own accuracy, E >= 2.

        The steps of one episode depend on each other, so the episodes, not the steps, are the independent
        trials: the variance of the mean is that between episodes over E. From it comes the number of
        independent answers that would vary as much, and from that Wilson's interval, which stays within 0 and
        1 and does not shrink to a point where all were right.
        """
        accuracy = accuracy.double()
        episodes = len(accuracy)
        if episodes < 2:
            raise ValueError(f"a confidence interval needs at least 2 episodes, got {episodes}")
        mean = accuracy.mean(0)
        variance = accuracy.var(0) / episodes
        trials = torch.where(variance > 0, mean * (1 - mean) / variance, float(episodes))
        centre = (mean + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
        half = Z95 / (1 + Z95**2 / trials) * (mean * (1 - mean) / trials + (Z95 / (2 * trials)) ** 2).sqrt()
        low, high = (centre - half).clamp(min=0), (centre + half).clamp(max=1)
        return cls(episodes, tuple(mean.tolist()), tuple(low.tolist()), tuple(high.tolist()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "episodes": self.episodes,
            "mean": list(self.mean),
            "low": list(self.low),
            "high": list(self.high),
        }


@torch.inference_mode()
def episode_accuracy(
    model: Callable[..., tuple[Tensor, Any]], episode: Any, labels: str, shots: int
) -> Tensor:
    """Each episode's accuracy by instance, float32 [B, shots], of a batch of episodes."""
    logits, _ = model(episode.inputs)
    right = right_by_instance(is_right(logits, episode.targets, labels), episode.instance, shots)
    return right / right_by_instance(
        torch.ones_like(episode.instance, dtype=torch.bool), episode.instance, shots
    )


def evaluate(
    model: nn.Module,
    episodes: Any,
    count: int,
    *,
    labels: str,
    shots: int,
    batch: int = 64,
    stop: Callable[[], bool] = lambda: False,
) -> InstanceAccuracy:
    """Accuracy over `count` new episodes drawn from a `mann_fast.data.Episodes`.

    `stop` is asked between batches; Interrupted is raised where it says yes.
    """
    model.eval()
    parts = []
    for start in range(0, count, batch):
        if stop():
            raise Interrupted
        parts.append(episode_accuracy(model, episodes.sample(min(batch, count - start)), labels, shots))
    return InstanceAccuracy.from_episodes(torch.cat(parts))
