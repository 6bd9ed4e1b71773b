"""The field's protocol: N-way K-shot, K examples of each of N new classes, then 15 queries of each, every one judged apart; and
streams of images, by instance (Santoro et al. 2016), for a model that was trained either way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import ClassImages, Episodes
from ..data.episodes import distorted
from .config import TrainConfig
from .evaluation import InstanceAccuracy, Interrupted
from .objective import right_by_instance
from .prediction import (
    Answering,
    Beside,
    class_log_probabilities,
    draw_labels,
    examples_beside,
    log_probabilities_apart,
    random_order,
)
from .support import examples_first

QUERIES = 15  # of each class in an episode (Snell et al. 2017, section 3)
INSTANCES = 10  # images of each class in a stream (Santoro et al. 2016, table 1)
BATCH = 50  # episodes at a time


@dataclass(frozen=True)
class Protocol:
    """N-way K-shot: ``ways`` classes an episode, ``shots`` examples of each. Its text is such as 5-way-1-shot."""

    ways: int
    shots: int

    def __str__(self) -> str:
        return f"{self.ways}-way-{self.shots}-shot"

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """ValueError where it is no such text with at least 2 ways and 1 shot."""
        match = re.fullmatch(r"(\d+)-way-(\d+)-shot", text)
        if match is None or int(match[1]) < 2 or int(match[2]) < 1:
            raise ValueError(
                f"a protocol must be such as 5-way-1-shot, of at least 2 ways and 1 shot, got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))


# Those of the field's tables on Omniglot.
PROTOCOLS = (Protocol(5, 1), Protocol(5, 5), Protocol(20, 1), Protocol(20, 5))


def obstacle(protocol: Protocol, config: TrainConfig, classes: ClassImages) -> str:
    """Why a model cannot be measured by it on these classes; empty where it can."""
    needed = protocol.shots + QUERIES
    return _obstacle(protocol.ways, needed, f", {QUERIES} of them queries,", config, classes)


def obstacle_to_streams(ways: int, config: TrainConfig, classes: ClassImages) -> str:
    """The same of streams of so many classes."""
    return _obstacle(ways, INSTANCES, "", config, classes)


def _obstacle(ways: int, needed: int, of_which: str, config: TrainConfig, classes: ClassImages) -> str:
    if ways > config.ways and config.labels == "onehot":
        return f"the model was trained to tell {config.ways} classes apart"
    if ways > classes.num_classes:
        return f"it takes {ways} classes, and there are {classes.num_classes} to measure on"
    if (least := int(classes.counts.min())) < needed:
        return f"a class needs {needed} images{of_which} and one has {least}"
    return ""


def _batches(count: int, orders: int, views: int, stop: Callable[[], bool]) -> Iterator[int]:
    """How many episodes at a time; ValueError where orders or views is below 1, Interrupted where `stop` says yes."""
    for name, value in (("orders", orders), ("views", views)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    batch = max(1, BATCH // (orders * views))
    for start in range(0, count, batch):
        if stop():
            raise Interrupted
        yield min(batch, count - start)


def _viewed(images: Tensor, times: int, views: int, generator: torch.Generator) -> Tensor:
    """Of the images [T, B, ...] of episodes those of ``times`` sequences of each, [T, B * times, ...]: one of ``views`` sees
    them as they are, the others each image distorted anew."""
    again = images.repeat_interleave(times, 1)
    if views == 1:
        return again
    again, every = again.float(), torch.arange(again.shape[1])
    others = every[every % views > 0]
    seen = again[:, others]
    random = 2 * torch.rand(*seen.shape[:2], 6, generator=generator, dtype=torch.float32) - 1
    again[:, others] = distorted(seen.flatten(0, 1), random.flatten(0, 1)).view(seen.shape)
    return again


def _answers(found: Tensor, times: int) -> Tensor:
    """The best class [Q, B] by the mean probability over the sequences of an episode, of log p [Q, B * times, C]."""
    return found.exp().unflatten(1, (-1, times)).mean(2).argmax(2)


@torch.inference_mode()
def evaluate_protocol(
    model: Answering,
    config: TrainConfig,
    classes: ClassImages,
    protocol: Protocol,
    count: int,
    *,
    orders: int = 1,
    views: int = 1,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Accuracy on the queries of ``count`` episodes, at least 2: mean, low and high of the 95% interval over episodes. Model
    and classes are best those of :func:`mann_fast.training.prediction.encoded_classes`, for an image is in many episodes.

    The examples of an episode come in random order, with labels as the model was trained to see them. Every
    query is judged from the memory after the examples, and of the labels the model's answer is the best among those of the
    episode's classes. ``orders`` is how many random orders of the examples, each with labels dealt anew, the probabilities are
    the mean of, as a :class:`mann_fast.FewShotLearner` answers. ``views``, of a model that sees the images themselves: how many
    times each order is read, all but the first with every image distorted anew, as in training. (Features are already the mean
    over views.)

    `stop` is asked between batches; Interrupted is raised where it says yes. Raises ValueError where there is an
    :func:`obstacle`, named, or orders or views is below 1.
    """
    if why := obstacle(protocol, config, classes):
        raise ValueError(f"{protocol} cannot be measured: {why}")
    ways, each = protocol.ways, protocol.shots + QUERIES
    episodes = Episodes(classes, ways=ways, shots=each, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    times = orders * views
    for size in _batches(count, orders, views, stop):
        images, which, *_ = examples_first(episodes.sample_images(size), protocol.shots)
        examples = ways * protocol.shots
        # One sequence after another for each order and view of an episode.
        sequence = torch.arange(size).repeat_interleave(times)
        labels = draw_labels(config, ways, len(sequence), generator)  # [B * times, ways] or [..., 5]
        place = torch.arange(examples).unsqueeze(1).expand(-1, len(sequence))
        if orders > 1:
            place = random_order(len(sequence), examples, generator).T
        seen = _viewed(images, times, views, generator)
        found = log_probabilities_apart(
            model,
            config,
            seen[place, torch.arange(len(sequence))],
            labels[torch.arange(len(sequence)), which[place, sequence]],
            seen[examples:],
            labels,
        )
        parts.append((_answers(found, times) == which[examples:]).float().mean(0))
    accuracy = InstanceAccuracy.from_episodes(torch.cat(parts).unsqueeze(1))
    return {
        "protocol": str(protocol),
        "episodes": count,
        "orders": orders,
        "mean": accuracy.mean[0],
        "low": accuracy.low[0],
        "high": accuracy.high[0],
    }


@torch.inference_mode()
def evaluate_streams(
    model: Answering,
    config: TrainConfig,
    classes: ClassImages,
    ways: int,
    count: int,
    *,
    orders: int = 1,
    views: int = 1,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> InstanceAccuracy:
    """Accuracy by instance on ``count`` streams, at least 2, of 10 images of each of ``ways`` classes in random order: every
    image is asked about from the memory of those before it, with their labels. Model and classes as of
    :func:`evaluate_protocol`.

    A model that was trained on streams answers as it reads the image. One that was trained on support and queries is asked
    apart, and then shown the image with its label. The answer is the best among the labels of the stream's classes. ``orders``
    is how many times the labels are dealt for the same images; the probabilities are the mean. ``views`` as there.

    `stop` and errors as of :func:`evaluate_protocol`.
    """
    if why := obstacle_to_streams(ways, config, classes):
        raise ValueError(f"streams of {ways} classes cannot be measured: {why}")
    episodes = Episodes(classes, ways=ways, shots=INSTANCES, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    times = orders * views
    for size in _batches(count, orders, views, stop):
        images, which, instance, _ = episodes.sample_images(size)
        sequence = torch.arange(size).repeat_interleave(times)
        labels = draw_labels(config, ways, len(sequence), generator)
        shown = labels[torch.arange(len(sequence)), which[:, sequence]]
        found = _along(model, config, _viewed(images, times, views, generator), shown, labels)
        parts.append(right_by_instance(_answers(found, times) == which, instance, INSTANCES) / ways)
    return InstanceAccuracy.from_episodes(torch.cat(parts))


def _along(model: Answering, config: TrainConfig, images: Tensor, shown: Tensor, labels: Tensor) -> Tensor:
    """log p of each class for each image of a stream, [T, B, C], from what came before it; labels [B, C, ...]."""
    beside, (none, _) = examples_beside(config, images, shown)
    found, state = [], None
    for t in range(len(images)):
        image = images[t : t + 1]
        here = Beside(*(x if x is None else x[t : t + 1] for x in beside))
        if config.layout == "support":
            logits, _ = model(Beside(none, None).inputs(image, config), state)
            _, state = model(here.inputs(image, config), state)
        else:
            logits, state = model(here.inputs(image, config), state)
        found.append(class_log_probabilities(logits[0], labels, config.labels))
    return torch.stack(found)
