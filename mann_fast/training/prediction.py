"""Classifying images of new classes with a trained model, from a few examples of each and no further
training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import encode_inputs
from ..data.episodes import LETTERS
from .config import TrainConfig


@torch.inference_mode()
def predict(
    model: nn.Module,
    config: TrainConfig,
    examples: Tensor,
    classes: Tensor,
    images: Tensor,
    *,
    orders: int = 32,
    seed: int = 0,
) -> Tensor:
    """Probability of each class for each image, float32 [Q, C]; rows sum to 1.

    examples uint8 [n, S, S] and classes int64 [n] (0 to C - 1, each at least once) are what is known; images
    uint8 [Q, S, S] are to be classified. The model reads the examples in `orders` random orders, each with
    its own assignment of labels to classes, all of them one batch; each image is then judged from the memory
    after the examples, apart from the other images, and the probabilities are averaged over the orders.
    Labels that no class has are left out.

    Raises ValueError where there are more classes than the model has ways.
    """
    num_classes = int(classes.max()) + 1
    if num_classes > config.ways:
        raise ValueError(
            f"{num_classes} classes were given, but the model was trained to tell {config.ways} apart: "
            f"give at most {config.ways}, or train one with --ways {num_classes}"
        )
    if orders < 1:
        raise ValueError(f"orders must be at least 1, got {orders}")
    generator = torch.Generator().manual_seed(seed)
    order = _random_order(orders, len(examples), generator).T  # [n, K]
    labels = draw_labels(config, num_classes, orders, generator)  # [K, C] or [K, C, 5]

    shown = labels[torch.arange(orders), classes[order]]  # [n, K] or [n, K, 5]
    before = torch.cat(
        [torch.full_like(shown[:1], -1), shown[:-1]]
    )  # a model reads the label of the step before
    _, state = model(encode_inputs(examples[order], before, ways=config.ways, labels=config.labels))
    log_probabilities = []
    for image in images:  # one more step each, all from the same state
        step = image.expand(1, orders, *image.shape)
        logits, _ = model(encode_inputs(step, shown[-1:], ways=config.ways, labels=config.labels), state)
        log_probabilities.append(class_log_probabilities(logits[0], labels, config.labels))
    if not log_probabilities:
        return torch.empty(0, num_classes)
    return torch.stack(log_probabilities).exp().mean(1)


def _random_order(rows: int, n: int, generator: torch.Generator) -> Tensor:
    """`rows` permutations of 0 .. n - 1, int64 [rows, n]."""
    return torch.rand(rows, n, generator=generator).argsort(1)


def draw_labels(config: TrainConfig, num_classes: int, orders: int, generator: torch.Generator) -> Tensor:
    """Different labels for the classes, anew for each order: int64 [orders, C], or letters [orders, C, 5]."""
    if config.labels == "onehot":
        return _random_order(orders, config.ways, generator)[:, :num_classes]
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
