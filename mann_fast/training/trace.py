"""What a memory does in the course of one episode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.episodes import Episode
from ..layers import MemoryWeights
from ..models import MANN
from ..reference.dnc import allocation
from .objective import is_right
from .prediction import class_log_probabilities


class Slots(NamedTuple):
    """Of T steps with N slots, weights summed over heads.

    written, read: [T, N]; usage: [T, N], after the step, None of a memory without. Of a DNC also written_by: [T, N, 2], what of
    written went by allocation and what by content; and with links read_by: [T, N, 3], read shared out among backward, content
    and forward by the modes of each head. None of other memories.
    """

    written: Tensor
    read: Tensor
    usage: Tensor | None
    written_by: Tensor | None
    read_by: Tensor | None


def over_slots(weights: MemoryWeights, num_slots: int) -> tuple[Tensor, Tensor]:
    """Read and write weights over all N = ``num_slots`` slots, [T, B, R, N], of a sparse memory too."""
    read, write = weights.read, weights.write
    if weights.read_slots is None or weights.write_slots is None:
        return read, write
    none = read.new_zeros(*read.shape[:3], num_slots)
    return none.scatter_add(3, weights.read_slots, read), none.scatter_add(3, weights.write_slots, write)


def slots_of(weights: MemoryWeights, num_slots: int) -> Slots:
    """Those of the first sample, with N = ``num_slots``."""
    read, write = (part[:, 0] for part in over_slots(weights, num_slots))
    usage, modes, allocated = (None if part is None else part[:, 0] for part in weights[2:5])
    written, written_by, read_by = write.sum(1), None, None
    if allocated is not None and usage is not None:
        by_allocation = allocated.unsqueeze(1) * allocation(usage, torch.sort(usage, dim=1, stable=True)[1])
        written_by = torch.stack([by_allocation, (written - by_allocation).clamp(min=0)], 2)
    if modes is not None:
        read_by = torch.einsum("trn,trm->tnm", read, modes)
    return Slots(written, read.sum(1), usage, written_by, read_by)


class Trace(NamedTuple):
    """Of T steps with C classes.

    names: C labels, as text; classes: int64 [T], which of them each image has; asked: bool [T], whether the model was asked,
    not shown an example with its label; right: bool [T], whether it was and its answer is right; probabilities: [T, C] of each
    class given that it is one of them; slots: see :class:`Slots`.
    """

    names: list[str]
    classes: Tensor
    asked: Tensor
    right: Tensor
    probabilities: Tensor
    slots: Slots


@torch.inference_mode()
def trace(model: MANN, episode: Episode, labels: str) -> Trace:
    """Run a model over a batch of one episode, in which an image of instance 0 is an example with its label.

    Raises ValueError where the model has no memory.
    """
    if not isinstance(model, MANN):
        raise ValueError(f"a model with a memory is needed, this is a {type(model).__name__}")
    output, _, weights = model.layer(model.encode(episode.inputs), return_weights=True)
    rows = model.classifier(output)[:, 0]
    asked = episode.instance[:, 0] > 0
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
        asked,
        asked & is_right(rows, targets, labels),
        of_classes.exp(),
        slots_of(weights, model.layer.memory.num_slots),
    )
