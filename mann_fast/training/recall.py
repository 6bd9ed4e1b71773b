"""Of an answer, where in the memory it came from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import MANN
from .config import TrainConfig
from .prediction import draw_orders, encoded_once, examples_beside
from .trace import over_slots


class Recall(NamedTuple):
    """What Q images read from a memory that holds n examples, in K orders of these, float32.

    slots: [Q, K, N], the read weights over the N slots, the mean of the heads; each row sums to 1 (of a memory that reads so).
    holds: [Q, K, N, n + 1], of each slot which share came from each example when it was read, last from the image itself, where
    a step writes before it reads; the rest to 1 was there before all of them. A write of weight w takes the share w of a slot
    from what was there; those of several heads add up, to 1 at most.
    """

    slots: Tensor
    holds: Tensor

    @property
    def examples(self) -> Tensor:
        """The share of what was read that came from each example, the mean over the orders: [Q, n], rows sum to at most 1."""
        return (self.slots.unsqueeze(3) * self.holds[..., :-1]).sum(2).mean(1)


def displace(holds: Tensor, written: Tensor, source: Tensor) -> Tensor:
    """``holds`` [B, N, n + 1] (:class:`Recall`) after one more write, of weights ``written`` [B, N], by source [B] of each."""
    share = written.clamp(0, 1).unsqueeze(2)
    by = nn.functional.one_hot(source, holds.shape[2]).to(holds.dtype).unsqueeze(1)
    return holds + share * (by - holds)


@torch.inference_mode()
def recall(
    model: nn.Module,
    config: TrainConfig,
    examples: Tensor,
    classes: Tensor,
    images: Tensor,
    *,
    orders: int,
    views: int = 1,
    seed: int,
) -> Recall:
    """Where each image reads; arguments, orders, views and errors as of :func:`mann_fast.training.prediction.predict_by_order`.

    Raises ValueError where the model has no memory.
    """
    if not isinstance(model, MANN):
        raise ValueError(f"a model with a memory is needed, this is a {type(model).__name__}")
    n, num_slots = len(examples), model.layer.memory.num_slots
    _, (examples, images) = encoded_once(model, examples, images, views=views)
    order, _, shown = draw_orders(config, classes, orders, seed)
    first, asked = examples_beside(config, examples[order], shown)
    inputs = first.inputs(examples[order], config)
    _, state, weights = model.layer(inputs, return_weights=True)
    learned = inputs.new_zeros(orders, num_slots, n + 1)
    # What a step writes comes from its image, or from the one that has its label there.
    sources, asking = order, torch.full((orders,), n)
    if config.late == "pair":
        sources, asking = torch.cat([asking.unsqueeze(0), order[:-1]]), order[-1]
    for source, written in zip(sources, over_slots(weights, num_slots)[1], strict=True):
        learned = displace(learned, written.sum(1), source)

    reads_first = getattr(model.layer.memory, "order", None) == "read_first"
    slots, holds = [], []
    for image in images:
        inputs = asked.inputs(image.expand(1, orders, *image.shape), config)
        _, _, weights = model.layer(inputs, state, return_weights=True)
        read, write = (part[0] for part in over_slots(weights, num_slots))
        slots.append(read.mean(1))
        holds.append(learned if reads_first else displace(learned, write.sum(1), asking))
    return Recall(
        torch.stack(slots) if slots else learned.new_empty(0, orders, num_slots),
        torch.stack(holds) if holds else learned.new_empty(0, *learned.shape),
    )
