"""Approximate search in a sparse memory, by an index of faiss (Johnson et al. 2017, arXiv 1702.08734).

An index of inverted lists holds most rows of a sample; a step asks it for candidates before it writes. What a step writes is
taken out of the index and stands in the lists that steps hand on (``Different`` of csrc/cpu/sparse_step.h), all of which are
compared, until the index is told of many at once. Cosines, weights and reads come from the rows themselves: what the index does
not find costs recall and nothing else.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import sparse_read
from ..ops._register import NAMESPACES
from ..reference.sparse import SparseState

_RAW = getattr(torch.ops, NAMESPACES["cpp"])
LEAST_SLOTS = 1 << 14  # below, comparing all takes no longer than asking an index
# Rows that an index is told at once, at least: as it starts, those that its lists are made from.
LEAST_TOLD = 1024
# To tell an index of a row takes as long as to compare it so many times: it is told once that has been done, so that at most
# twice the time is spent that the better of both would have taken.
WORTH = 256
POINTS, ROUNDS = 64, 5  # of k-means, which makes the lists: rows per list, and rounds; more find no more
GROWTH = 4  # the lists are made anew when there are so many times the rows
ALIKE = 32  # candidates among the rows that are all alike, and are not in it
AUDIT_EVERY = 256  # steps of the index between two that are compared with the exact search
AUDITS = 64  # of which the last are remembered


class SearchRecall(NamedTuple):
    """How much of what exact search reads the approximate one has read, on average over the audited steps.

    slots: the share of the K slots of greatest cosine that were found, equal ones alike. mass: the sum of exp(sharpness *
    cosine) over the slots that were read, as a share of that over the K greatest, at most 1. audits: steps, of one sample
    and all heads, that this is the average of.
    """

    slots: float
    mass: float
    audits: int


class _Sample:
    """The index of one sample's memory. told: whether a row is in it, bool [N]."""

    def __init__(self, num_slots: int, probes: int):
        self.probes = probes
        self.told = np.zeros(num_slots, bool)
        self.clear()

    def clear(self) -> None:
        self.index: Any = None
        self.told[:] = False
        self.others = np.empty(0, np.int64)  # some of the rows that are alike, the last to be written
        self.compared = 0  # rows, since the index was last told
        self.at_first = 0  # rows that the lists were made from,
        self.since = 0  # and that the index was told since

    def find(self, key: np.ndarray, count: int, room: np.ndarray) -> None:
        """The ``count`` candidates of each head's key [R, D], into ``room``, a row of an int64 tensor."""
        found = self.index.search(key, count)[1]
        found = found[found >= 0]
        room[: found.size] = found
        room[found.size : found.size + self.others.size] = self.others

    def note(self, memory: Tensor, lists: np.ndarray, written: np.ndarray, eps: float) -> None:
        """After a step: takes what it has written out of the index, and tells it of all that changed, of memory [N, D], once
        that is worth it."""
        written = written[self.told[written]]
        if written.size:
            self.remove(written)
        changed = int(lists[0])  # below 0: more than the lists hold, so that all are compared
        rows = changed if changed >= 0 else len(self.told) - int(np.count_nonzero(self.told))
        self.compared += changed if changed >= 0 else len(self.told)
        if rows < LEAST_TOLD or self.compared < WORTH * rows:
            return
        slots = lists[1 : 1 + changed] if changed >= 0 else np.flatnonzero(~self.told)
        self.tell(memory, slots, eps)
        self.others = np.flatnonzero(~self.told)[-ALIKE:]
        lists[0] = self.compared = 0

    def remove(self, slots: np.ndarray) -> None:
        import faiss

        self.told[slots] = False
        self.index.remove_ids(faiss.IDSelectorArray(slots))

    def tell(self, memory: Tensor, slots: np.ndarray, eps: float) -> None:
        import faiss

        self.told[slots] = True
        self.since += len(slots)
        rows = self._rows(memory, slots, eps)
        if self.index is None or self.since > GROWTH * self.at_first:
            slots = np.flatnonzero(self.told)
            size, width = len(slots), memory.shape[1]
            self.at_first, self.since = size, 0
            rows = self._rows(memory, slots, eps)
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(width), width, math.isqrt(size), faiss.METRIC_INNER_PRODUCT
            )
            index.cp.niter, index.cp.spherical = ROUNDS, True
            index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, POINTS
            index.train(rows)
            index.set_direct_map_type(faiss.DirectMap.Hashtable)
            index.nprobe = self.probes
            self.index = index
        self.index.add_with_ids(rows, slots)

    @staticmethod
    def _rows(memory: Tensor, slots: np.ndarray, eps: float) -> np.ndarray:
        """Scaled so that their inner products with a key of length 1 are the cosines."""
        rows = memory[torch.from_numpy(slots)].float()
        rows *= torch.rsqrt(rows.square().sum(1, keepdim=True) + eps)
        return rows.nan_to_num_(0, 0, 0).numpy()


class SparseIndex:
    """The indexes of a batch of memories, from call to call as long as these follow one another: a call whose state is not what
    the last one gave, to the tensor, starts with none, and so does a sample that begins anew.

    Args:
        probes: how many lists of an index are searched, of about sqrt(N).
    """

    def __init__(self, probes: int):
        self.probes = probes
        self.steps = 0  # that an index had a part in
        self.audits: deque[tuple[float, float]] = deque(maxlen=AUDITS)
        self._kept: _Kept | None = None

    def recall(self) -> SearchRecall | None:
        """None before the first step of an index."""
        if not self.audits:
            return None
        slots, mass = np.mean(self.audits, axis=0).tolist()
        return SearchRecall(slots, mass, len(self.audits))

    @contextmanager
    def call(self, state: SparseState, eps: float) -> Iterator[IndexedCall]:
        """For the steps of one call; its end gives the next call what it knows by :meth:`IndexedCall.keep`."""
        check_faiss()  # which may have been there when this was made, on another machine
        import faiss

        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "an approximate search finds other slots when a call is repeated in backward, as torch.utils.checkpoint does: "
                "use probes=None there"
            )
        kept, self._kept = self._kept, None
        if kept is not None and kept.identity == _identity(state):
            lists, samples = kept.lists, kept.samples
        else:
            lists = _RAW.sparse_lists(state.memory.detach())
            samples = [_Sample(state.memory.shape[1], self.probes) for _ in state.memory]
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            yield IndexedCall(self, lists, samples, state.read_slots.shape, eps)
        finally:
            faiss.omp_set_num_threads(threads)

    def keep(self, state: SparseState, lists: Tensor, samples: list[_Sample]) -> None:
        identity = _identity(state)
        if identity is not None:
            self._kept = _Kept(identity, (state.memory.detach(), state.last_access), lists, samples)


class _Kept(NamedTuple):
    """What one call leaves to the next: of which state, and the tensors of that themselves, in whose place nothing else can be
    as long as they live."""

    identity: tuple[Any, ...]
    tensors: tuple[Tensor, Tensor]
    lists: Tensor
    samples: list[_Sample]


def _identity(state: SparseState) -> tuple[Any, ...] | None:
    """What changes when a state is another one, or changed in place; None where that cannot be seen."""
    if state.memory.is_inference() or state.last_access.is_inference():
        return None
    return tuple((x.data_ptr(), x._version, x.shape, x.stride()) for x in (state.memory, state.last_access))


class IndexedCall:
    """The steps of one call of :class:`SparseIndex`. lists: what ``sparse_step_`` hands on from step to step."""

    def __init__(
        self, index: SparseIndex, lists: Tensor, samples: list[_Sample], shape: torch.Size, eps: float
    ):
        self.index, self.lists, self.samples, self.eps = index, lists, samples, eps
        _, heads, self.num_reads = shape
        # Of each head as many as it reads, and as many as a step writes before it reads: these are no candidates any more.
        self._count = self.num_reads + heads * (self.num_reads + 1)
        self._room = np.empty((len(samples), heads * self._count + ALIKE), np.int64)
        self._lists = lists.numpy()

    def begin(self, resets: Tensor | None, lengths: Tensor | None) -> None:
        """A step: of the samples whose length [B] is not 0, those that begin anew where resets [B] says so."""
        everyone = [True] * len(self.samples)
        self._taken = everyone if lengths is None else lengths.bool().tolist()
        for b in () if resets is None else resets.nonzero().flatten().tolist():
            if self._taken[b]:  # what begins anew in the padding does not
                self.samples[b].clear()

    def candidates(self, key: Tensor) -> Tensor | None:
        """Of key [B, R, D], before the step that reads by it: int64 [B, M], -1 where there are fewer; None: of no sample. There
        are none of one whose lists are full: all its rows are compared."""
        self._searched = [
            b for b, sample in enumerate(self.samples) if sample.index is not None and self._lists[b, 0] >= 0
        ]
        if not self._searched:
            return None
        keys = key.detach().float().numpy()
        self._room[:] = -1
        for b in self._searched:
            self.samples[b].find(keys[b], self._count, self._room[b])
        return torch.from_numpy(self._room)

    def note(
        self, memory: Tensor, key: Tensor, sharpness: Tensor, slots: Tensor, written: list[Tensor]
    ) -> None:
        """After a step that has read ``slots`` [B, R, K] of ``memory`` [B, N, D], and written to some, each [B, ...]."""
        samples = [(b, sample) for b, sample in enumerate(self.samples) if self._taken[b]]
        searched = [b for b in self._searched if self._taken[b]]
        if searched:
            if self.index.steps % AUDIT_EVERY == 0:
                b = searched[self.index.steps // AUDIT_EVERY % len(searched)]
                of_sample = [x[b : b + 1].detach() for x in (memory, key, sharpness, slots)]
                audit = _audit(*of_sample, eps=self.eps)
                # No NaN among what was read, which would be in the average for long.
                if math.isfinite(audit[1]):
                    self.index.audits.append(audit)
            self.index.steps += 1
        changed = torch.cat([x.flatten(1) for x in written], 1).numpy()
        for b, sample in samples:
            sample.note(memory[b].detach(), self._lists[b], changed[b], self.eps)

    def keep(self, state: SparseState) -> None:
        self.index.keep(state, self.lists, self.samples)


def _audit(
    memory: Tensor, key: Tensor, sharpness: Tensor, slots: Tensor, *, eps: float
) -> tuple[float, float]:
    """Of one sample's step [1, ...]: the shares of :class:`SearchRecall`."""
    exact = sparse_read(memory, key, num_reads=slots.shape[2], eps=eps)[1]
    key = key.to(memory.dtype)

    def cosines(slots: Tensor) -> Tensor:
        rows = memory[0, slots[0]]  # [R, K, D]
        squares = key[0].square().sum(1, keepdim=True) * rows.square().sum(2)
        return (rows * key[0].unsqueeze(1)).sum(2) * torch.rsqrt(squares + eps)

    found, best = cosines(slots), cosines(exact)
    least = best.amin(1, keepdim=True)
    scale = sharpness[0].to(memory.dtype).unsqueeze(1)
    # Cosines as they are summed here differ in their last digits from those of the search.
    right = (found >= least - 1e-6).double().mean()
    share = (torch.logsumexp(scale * found, 1) - torch.logsumexp(scale * best, 1)).exp().double().mean()
    return float(right), min(float(share), 1.0)


def check_faiss() -> None:
    """Raises ModuleNotFoundError where it is not installed."""
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "probes, an approximate search, needs faiss (pip install 'mann_fast[index]'); probes=None searches exactly"
        ) from error
