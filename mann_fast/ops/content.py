"""content_read: cosine similarity, softmax and weighted read in one pass over the memory; backward in two."""

from __future__ import annotations

import math

from torch import Tensor

from .. import reference
from . import _checks
from ._declare import Argument, Op, Option, Output
from ._public import run
from ._register import declare

EPS = Option("eps", "float", 1e-6, _checks.number(lambda x: 0 < x < math.inf, "positive and finite"))
MEMORY = Argument("memory", "B N D")

CONTENT_READ = declare(
    Op(
        "content_read",
        arguments=(
            MEMORY,
            Argument("key", "B R D", like="memory", half=True, heads_in=""),
            Argument("sharpness", "B R", like="key", optional=True),
        ),
        options=(EPS,),
        outputs=(Output("read", "B R D", like="key"), Output("weights", "B R N", like="memory")),
        saved=("memory", "key", "sharpness", "weights"),
        public=("content_read",),
    )
)


def content_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Read a memory by content (Graves et al. 2014, arXiv 1410.5401, eqs. 2, 5, 6).

    ``weights = softmax over slots of sharpness * dot(key, slot) / sqrt(|key|^2 |slot|^2 + eps)`` and ``read = weights @
    memory``, for every sample and head. With zero keys or zero slots values and gradients are finite. Where
    ``|key|^2 |slot|^2`` exceeds the largest number of memory's dtype (in float32 where ``|key| |slot|`` exceeds 1.8e19) the
    similarity is 0.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        key: [B, R, D], of the dtype of memory, or bfloat16 or float16 beside a float32 memory (computed in float32).
        sharpness: [B, R] of key's dtype, or None for 1. Any real number.
        eps: added to the product of the squared norms; > 0.

    Returns:
        read [B, R, D] of key's dtype, weights [B, R, N] of memory's dtype. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    return run(CONTENT_READ, reference.content_read, (memory, key, sharpness), {"eps": eps})
