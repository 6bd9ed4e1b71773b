"""Episodes of support and queries: labelled examples of each class first, then images, every one judged apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import ClassImages, Episode, Episodes, encode_inputs
from ..data.episodes import Images
from .config import TrainConfig
from .evaluation import InstanceAccuracy, Interrupted, evaluate
from .objective import is_right
from .prediction import Answering, encoded_classes, encoded_once, logits_apart

QUERIES = 5  # of each class: in training, and to measure while training
BATCH = 10  # episodes at a time to measure
# Of 20 classes at once a new model learns nothing for long, of five it does soon, if their labels are any of the 20: of
# always the same five it learns only that there are five. So it starts with FEWEST classes an episode for FEW_STEPS steps, then
# has one more every STEPS_PER_WAY.
FEWEST, FEW_STEPS, STEPS_PER_WAY = 5, 400, 40


class Support(NamedTuple):
    """A batch of episodes. examples, queries: images [n, B, ...] and [Q, B, ...], uint8 or float up to 255; shown, targets:
    their labels, int64 [n, B] and [Q, B] or letters [..., 5]; classes: which of all classes examples and queries are of,
    int64 [n + Q, B].
    """

    examples: Tensor
    shown: Tensor
    queries: Tensor
    targets: Tensor
    classes: Tensor


def examples_first(drawn: Images, shots: int) -> Images:
    """With the first ``shots`` of every class before all others, each part in the random order that it had."""
    order = (drawn.instance > shots).long().argsort(dim=0, stable=True)
    places = torch.arange(order.shape[1])
    return Images(*(field[order, places] for field in drawn))


def sample_support(
    episodes: Episodes,
    batch: int,
    part: slice = slice(None),
    *,
    ways: int,
    shots: int,
    queries: int = QUERIES,
) -> Support:
    """``shots`` examples and ``queries`` queries of each of ``ways`` classes, at most those of the episodes."""
    drawn = examples_first(episodes.sample_images(batch, part, ways=ways, shots=shots + queries), shots)
    images, labels = drawn.images, episodes.deal(batch, drawn.which, part)
    n = ways * shots
    return Support(images[:n], labels[:n], images[n:], labels[n:], drawn.classes)


def as_stream(episode: Support, config: TrainConfig) -> Episode:
    """For a picture: the queries one after another, after the examples, of which the instance is 0. So a query finds what those
    before it have written, too, and is not judged apart.
    """
    known = torch.cat([episode.shown, torch.full_like(episode.targets, -1)])
    inputs = encode_inputs(
        torch.cat([episode.examples, episode.queries]), known, ways=config.ways, labels=config.labels
    )
    targets = torch.cat([episode.shown, episode.targets])
    asked = torch.arange(len(known)).unsqueeze(1) >= len(episode.examples)
    return Episode(inputs, targets, asked.long().expand(-1, inputs.shape[1]), episode.classes)


def ways_of_step(config: TrainConfig, step: int) -> int:
    """Of a training step, counted from 0, without a curriculum."""
    of_memory = step - config.encoder_steps
    return min(config.ways, FEWEST + max(0, of_memory - FEW_STEPS) // STEPS_PER_WAY)


def steps_of_shots(config: TrainConfig, first: int, last: int) -> Tensor:
    """How many of the steps from ``first`` on and before ``last`` had 1, 2, ... examples of a class, int64 [shots]."""
    return torch.bincount(torch.arange(first, last) % config.shots, minlength=config.shots)


@torch.inference_mode()
def support_accuracy(model: Answering, config: TrainConfig, episode: Support) -> Tensor:
    """The share of right answers of each episode, float32 [B]."""
    answering, (examples, queries) = encoded_once(model, episode.examples, episode.queries)
    logits = logits_apart(answering, config, examples, episode.shown, queries)
    return is_right(logits, episode.targets, config.labels).float().mean(0)


def images_of_class(config: TrainConfig) -> int:
    """How many different images of a class an episode takes at most."""
    return config.shots + (QUERIES if config.layout == "support" else 0)


def measured_ways(config: TrainConfig, classes: ClassImages) -> int:
    """Of how many of these classes an episode to measure on can be. A model of support and queries tells fewer apart, as in its
    first steps; how a stream is answered goes by how many classes it has.

    Raises ValueError where there are too few.
    """
    count = classes.num_classes
    if config.layout == "support":
        if count < 2:
            raise ValueError(f"it takes at least 2 classes to tell apart, and there is {count} to measure on")
        return min(config.ways, count)
    if count < config.ways:
        raise ValueError(
            f"the model was trained on streams of {config.ways} classes at a time and is measured on such, which takes at "
            f"least {config.ways} classes, and there are {count} to measure on"
        )
    return config.ways


def make_episodes(
    config: TrainConfig,
    classes: ClassImages,
    *,
    augment: bool = False,
    seed: int,
    ways: int | None = None,
) -> Episodes:
    """Episodes of the configured kind; of support and queries with images for both. Of fewer ``ways`` than configured, but of
    the same labels.
    """
    sizes = {"ways": ways or config.ways, "shots": images_of_class(config), "num_labels": config.ways}
    options = {"labels": config.labels, "late": config.late}
    return Episodes(classes, **sizes, **options, augment=augment, seed=seed)


def measure_accuracy(
    model: nn.Module,
    config: TrainConfig,
    episodes: Episodes,
    count: int,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> InstanceAccuracy:
    """Accuracy by instance over ``count`` episodes of :func:`make_episodes`; of support and queries that on the queries after
    1, 2, ... ``config.shots`` examples of each class, over ``count`` new episodes of each, of as many classes as its episodes.

    `stop` is asked between batches; Interrupted is raised where it says yes.
    """
    if config.layout == "stream":
        return evaluate(model, episodes, count, labels=config.labels, shots=config.shots, stop=stop)
    model.eval()
    answering, classes = encoded_classes(model, episodes.classes)  # an image is in many episodes
    seen = make_episodes(config, classes, seed=0, ways=episodes.ways)
    seen.load_state_dict(episodes.state_dict())
    by_shots = []
    for shots in range(1, config.shots + 1):
        parts = []
        for start in range(0, count, BATCH):
            if stop():
                raise Interrupted
            episode = sample_support(seen, min(BATCH, count - start), ways=episodes.ways, shots=shots)
            parts.append(support_accuracy(answering, config, episode))
        by_shots.append(torch.cat(parts))
    return InstanceAccuracy.from_episodes(torch.stack(by_shots, 1))
