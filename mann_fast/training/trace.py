"""What a memory does in the course of one episode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.episodes import Episode
from ..models import MANN
from .objective import is_right
from .prediction import class_log_probabilities


class Trace(NamedTuple):
    """Of T steps with N slots and C classes.

    names: C labels, as text; classes: int64 [T], which of them each image has; right: bool [T], whether the model's
    answer is; probabilities: [T, C] of each class given that it is one of them; written, read: [T, N], weights summed
    over heads; usage: [T, N], after the step, None of a memory without.
    """

    names: list[str]
    classes: Tensor
    right: Tensor
    probabilities: Tensor
    written: Tensor
    read: Tensor
    usage: Tensor | None


@torch.inference_mode()
def trace(model: MANN, episode: Episode, labels: str) -> Trace:
    """Run a model over a batch of one episode.

    Raises ValueError where the model has no memory.
    """
    if not isinstance(model, MANN):
        raise ValueError(f"a model with a memory is needed, this is a {type(model).__name__}")
    output, _, weights = model.layer(episode.inputs, return_weights=True)
    rows = model.classifier(output)[:, 0]
    targets = episode.targets[:, 0]
    distinct, classes = targets.unique(dim=0, return_inverse=True)
    of_classes = class_log_probabilities(rows, distinct.expand(len(rows), *distinct.shape), labels)
    if labels == "onehot":
        names = [f"label {int(label) + 1}" for label in distinct]
    else:
        names = ["".join(chr(ord("a") + int(letter)) for letter in label) for label in distinct]
    return Trace(
        names,
        classes,
        is_right(rows, targets, labels),
        of_classes.exp(),
        weights.write[:, 0].sum(1),
        weights.read[:, 0].sum(1),
        None if weights.usage is None else weights.usage[:, 0],
    )
