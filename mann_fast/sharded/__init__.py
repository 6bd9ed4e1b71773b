"""A memory whose slots are shared out over processes: the ops of :mod:`mann_fast.ops`, with one small collective each.

Each rank of a group holds some slots of every sample, memory [B, n, D] and what there is of each slot; slots are
numbered through the ranks, in their order. Keys, write vectors, gates and sharpness are the same on all ranks, and so is what
is read. What a rank sends per sample does not depend on how many slots there are.

Gradients are those of one process, where all ranks run the same backward: with the same gradient of what was read, and each
with its own of what it holds. They come at the price of up to two more collectives as small.
"""

from .content import content_read
from .lrua import least_used, lrua_step
from .sparse import sparse_read, sparse_step

__all__ = ["content_read", "least_used", "lrua_step", "sparse_read", "sparse_step"]
