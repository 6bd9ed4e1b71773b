"""Classifying images of new classes with a trained model, from a few examples of each and no further
training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..data import ClassImages, encode_inputs
from ..data.episodes import LETTERS, distorted, step_before
from ..layers import MemoryState
from ..models import MANN
from .config import TrainConfig

ENCODED_AT_ONCE = 256  # images, views of them counted

# A model, or the part of it behind its encoder: gives logits and state of inputs and state.
Answering = Callable[..., tuple[Tensor, Any]]


def has_encoder(model: Answering) -> TypeGuard[MANN]:
    """Whether the model makes features of images itself."""
    return isinstance(model, MANN) and model.image_shape is not None


def encoded_once(model: Answering, *images: Tensor, views: int = 1) -> tuple[Answering, list[Tensor]]:
    """What answers where every image is seen by the model's encoder once, however often it is shown: the part of the model
    behind it, and of each tensor of images [..., S, S] or [..., 3, S, S] the features [..., E], as `encode_inputs` takes them.
    Of a model without an encoder the model itself and the images.

    views: how many views of an image its features are the mean over: as it is, and distorted as in training, each time in one
    of the same ways, so that the features of an image depend on no other.

    Raises ValueError where views is below 1.
    """
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    if not has_encoder(model):
        return model, list(images)
    shape = model.image_shape
    assert shape is not None
    ways = 2 * torch.rand(views - 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32) - 1

    def features(part: Tensor) -> Tensor:
        lead = part.shape[: part.dim() - (2 if shape[0] == 1 else 3)]
        each = part.reshape(-1, *shape).split(max(1, ENCODED_AT_ONCE // views))
        found = []
        for some in each:
            seen = [some.float(), *(distorted(some, way.expand(len(some), -1)) for way in ways)]
            found.append(model.features(*(view.float() / 255 for view in seen)))
        # Multiplied by 255 like pixels, which `encode_inputs` takes away.
        return 255 * torch.cat(found).unflatten(0, lead)

    return model.answer, [features(part) for part in images]


def encoded_classes(model: Answering, classes: ClassImages, views: int = 1) -> tuple[Answering, ClassImages]:
    """:func:`encoded_once` of all images of the classes."""
    with torch.inference_mode():
        answering, (images,) = encoded_once(model, classes.images, views=views)
    return answering, replace(classes, images=images)


def logits_apart(
    model: Answering,
    config: TrainConfig,
    examples: Tensor,
    shown: Tensor,
    images: Tensor,
    *,
    together: bool = False,
) -> Tensor:
    """Logits for each image, [Q, B, outputs], each judged from the memory after the n examples of its sequence, apart from the
    other images. Arguments as of :func:`log_probabilities_apart`. ``together`` shows all images in one call; else one at a
    time, which takes less memory.

    The labels come as in training (:func:`examples_beside`).
    """
    first, asked = examples_beside(config, examples, shown)
    _, state = model(first.inputs(examples, config))
    found = []
    for part in images.split(len(images) if together else 1) if len(images) else ():
        count = len(part)
        inputs = asked.repeated(count).inputs(part.flatten(0, 1).unsqueeze(0), config)
        logits, _ = model(inputs, state if count == 1 else _repeated(state, count))  # one more step
        found.append(logits[0].unflatten(0, (count, -1)))
    return torch.cat(found) if found else torch.empty(0, images.shape[1], 0, dtype=torch.float32)


class Beside(NamedTuple):
    """What inputs have beside their images: labels [T, B, ...], -1 for none, and of a model that was trained with
    ``late="pair"`` the images before, [T, B, ...]."""

    labels: Tensor
    before: Tensor | None

    def inputs(self, images: Tensor, config: TrainConfig) -> Tensor:
        """With images [T, B, ...]."""
        return encode_inputs(images, self.labels, ways=config.ways, labels=config.labels, before=self.before)

    def repeated(self, count: int) -> Beside:
        """Of ``count`` times as many sequences, those of the batch one after another again and again."""
        labels, before = (
            x if x is None else x.repeat(1, count, *(1,) * (x.dim() - 2)) for x in (self.labels, self.before)
        )
        assert labels is not None
        return Beside(labels, before)


def examples_beside(config: TrainConfig, examples: Tensor, shown: Tensor) -> tuple[Beside, Beside]:
    """What stands beside the examples [n, B, ...] with the labels ``shown`` [n, B, ...], and beside an image after them.

    A model that was trained on streams reads every label one step late, that of the last example with the image. One that was
    trained on support and queries reads an example with its label, and an image with none.
    """
    none = torch.full_like(shown[:1], -1)
    if config.layout == "support":
        return Beside(shown, None), Beside(none, None)
    before, last = None, None
    if config.late == "pair":
        before, last = step_before(examples), examples[-1:]
    return Beside(torch.cat([none, shown[:-1]]), before), Beside(shown[-1:], last)


def _repeated(state: MemoryState, count: int) -> MemoryState:
    """The state of ``count`` times as many sequences, those of the batch one after another again and again."""
    return state.map(lambda x: x.repeat(count, *(1,) * (x.dim() - 1)))


@torch.inference_mode()
def log_probabilities_apart(
    model: Answering, config: TrainConfig, examples: Tensor, shown: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """log p of each class for each image, float32 [Q, B, C], where B sequences of n examples have been read.

    examples uint8 [n, B, ...] have the labels ``shown``, int64 [n, B] or letters [n, B, 5], read as the model was trained to
    (:func:`logits_apart`); images uint8 [Q, B, ...] are judged each from the memory after the examples, apart from one another;
    labels int64 [B, C] or [B, C, 5] are those of the classes, and others are left out.
    """
    found = logits_apart(model, config, examples, shown, images)
    if not len(found):
        return torch.empty(0, *labels.shape[:2], dtype=torch.float32)
    each = [class_log_probabilities(logits, labels, config.labels) for logits in found]
    return torch.stack(each)


def predict(
    model: nn.Module,
    config: TrainConfig,
    examples: Tensor,
    classes: Tensor,
    images: Tensor,
    *,
    orders: int = 32,
    views: int = 1,
    seed: int = 0,
) -> Tensor:
    """Probability of each class for each image, float32 [Q, C]; rows sum to 1: the mean of :func:`predict_by_order`."""
    return predict_by_order(
        model, config, examples, classes, images, orders=orders, views=views, seed=seed
    ).mean(1)


@torch.inference_mode()
def predict_by_order(
    model: nn.Module,
    config: TrainConfig,
    examples: Tensor,
    classes: Tensor,
    images: Tensor,
    *,
    orders: int,
    views: int = 1,
    seed: int,
) -> Tensor:
    """Probability of each class for each image by each order of the examples, float32 [Q, orders, C].

    examples uint8 [n, S, S], or [n, 3, S, S] in colour, and classes int64 [n] (0 to C - 1, each at least once) are what is
    known; images uint8 [Q, ...] are to be classified. The model reads the examples in `orders` random orders, each with its own
    assignment of labels to classes, all of them one batch; each image is then judged from the memory after the examples, apart
    from the other images. Labels that no class has are left out. views: as of :func:`encoded_once`.

    Raises ValueError where there are more classes than the model has ways, or orders or views is below 1.
    """
    order, labels, shown = draw_orders(config, classes, orders, seed)
    answering, (examples, images) = encoded_once(model, examples, images, views=views)
    repeated = images.unsqueeze(1).expand(-1, orders, *images.shape[1:])
    return log_probabilities_apart(answering, config, examples[order], shown, repeated, labels).exp()


def draw_orders(
    config: TrainConfig, classes: Tensor, orders: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random orders of examples whose classes are int64 [n]: the orders themselves, int64 [n, orders]; the labels of the
    classes in each, [orders, C] or letters [orders, C, 5]; and those of the examples as they come, [n, orders, ...].

    Raises ValueError as :func:`predict_by_order`.
    """
    num_classes = int(classes.max()) + 1
    require_ways(num_classes, config)
    if orders < 1:
        raise ValueError(f"orders must be at least 1, got {orders}")
    generator = torch.Generator().manual_seed(seed)
    order = random_order(orders, len(classes), generator).T
    labels = draw_labels(config, num_classes, orders, generator)
    return order, labels, labels[torch.arange(orders), classes[order]]


def require_ways(num_classes: int, config: TrainConfig) -> None:
    """ValueError where there are more classes than the model has ways."""
    if num_classes > config.ways:
        raise ValueError(
            f"{num_classes} classes were given, but the model was trained to tell {config.ways} apart: "
            f"give at most {config.ways}, or train one with --ways {num_classes}"
        )


def random_order(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """`rows` permutations of 0 .. n - 1, int64 [rows, n]."""
    return torch.rand(rows, n, generator=generator, dtype=torch.float32).argsort(1)


def draw_labels(config: TrainConfig, num_classes: int, orders: int, generator: torch.Generator) -> Tensor:
    """Different labels for the classes, anew for each order: int64 [orders, C], or letters [orders, C, 5]."""
    if config.labels == "onehot":
        return random_order(orders, config.ways, generator)[:, :num_classes]
    number = torch.stack(
        [torch.randperm(LETTERS**LETTERS, generator=generator)[:num_classes] for _ in range(orders)]
    )
    return number[..., None] // LETTERS ** torch.arange(LETTERS) % LETTERS


def class_log_probabilities(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """log p of each class given that it is one of them: logits [K, outputs], labels [K, C] or [K, C, 5] ->
    [K, C].
    """
    if kind == "onehot":
        return logits.gather(1, labels).log_softmax(1)
    letters = logits.unflatten(-1, (LETTERS, LETTERS)).log_softmax(-1)  # [K, letter, value]
    of_class = letters.gather(2, labels.transpose(1, 2))  # [K, letter, C]
    return of_class.sum(1).log_softmax(1)
