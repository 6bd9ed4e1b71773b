"""What is minimised and what counts as a right answer, for both kinds of labels.

One-hot labels: logits [..., ways], targets [...]. String labels: logits [..., 25], five letters of five
values each, and targets [..., 5].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.episodes import LETTERS  # in a string label, and values of a letter


def label_loss(logits: Tensor, targets: Tensor, labels: str) -> Tensor:
    """Mean over all steps and episodes of -log p(label), in nats; a string's p is the product over its
    letters.
    """
    if labels == "onehot":
        return F.cross_entropy(logits.flatten(end_dim=-2), targets.flatten())
    letters = logits.unflatten(-1, (LETTERS, LETTERS))
    return LETTERS * F.cross_entropy(letters.flatten(end_dim=-2), targets.flatten())


def is_right(logits: Tensor, targets: Tensor, labels: str) -> Tensor:
    """bool, the shape of logits without its last dimension; a string is right if all its letters are."""
    if labels == "onehot":
        return logits.argmax(-1) == targets
    return (logits.unflatten(-1, (LETTERS, LETTERS)).argmax(-1) == targets).all(-1)


def right_by_instance(right: Tensor, instance: Tensor, shots: int) -> Tensor:
    """How many of an episode's 1st, 2nd, ... images of a class were answered rightly.

    right bool [T, B], instance int64 [T, B] counted from 1 -> float32 [B, shots].
    """
    counts = torch.zeros(right.shape[1], shots, dtype=torch.float32)
    return counts.scatter_add_(1, instance.T - 1, right.T.float())
