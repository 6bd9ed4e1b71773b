"""A sequence of a network with a sparse memory, step by step: one memory that is changed in place."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import _backend, sparse_cell
from ..ops._register import NAMESPACES
from ..ops._sequences import NO_SEQUENCES, is_plain, may_look, raw_sequences
from ..ops.sparse import SPARSE_SCAN, check_slots, check_times
from ..reference.cell import sequence, split_sparse_heads
from ..reference.sequences import AnyState, Steps
from ..reference.sparse import SparseState
from .sparse_index import LEAST_SLOTS, SparseIndex

_RAW = {backend: getattr(torch.ops, NAMESPACES[backend]) for backend in ("cpp", "cuda")}
_BATCHED: Any = torch._C._parse_dispatch_key(
    "Batched"
)  # of is_grads_batched; torch.func takes no such Function at all


class _Step(torch.autograd.Function):
    """A step in place. Its backward changes the memory's gradient in place, too: between two steps nobody else has it. After
    the last one it is the caller's, and copied."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        last: bool,
        threshold: float,
        eps: float,
        resets: Tensor | None,
        lengths: Tensor | None,
        start: Tensor | None,
        lists: Tensor | None,
        candidates: Tensor | None,
        memory: Tensor,
        last_access: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        slots_before, weights_before, clock, *told = tensors
        sequences = (resets, lengths, start)
        with torch._C._AutoDispatchBelowAutograd():
            read, slots, weights, clock, oldest, rows = _RAW[backend].sparse_step_(
                *(memory, slots_before, weights_before, last_access, clock, *told),
                *(*sequences, lists, candidates, threshold, eps),
            )
        ctx.mark_dirty(memory)
        ctx.mark_non_differentiable(slots, clock, oldest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slots_before, weights_before, *told, *sequences, oldest, slots, weights, rows)
        ctx.backend, ctx.last, ctx.eps, ctx.shape = backend, last, eps, memory.shape
        return read, memory, slots, weights, clock, oldest

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_read, grad_memory, _, grad_weights, *_ = grads
        tensors = ctx.saved_tensors
        if any(x is not None and torch._C._dispatch_keys(x).has(_BATCHED) for x in grads):
            raise NotImplementedError(
                "a sparse memory changes one gradient in place and takes no batch of them (is_grads_batched, "
                "vectorize=True): differentiate one at a time"
            )
        recorded = torch.is_grad_enabled()
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            results = _Step._backward(ctx, grad_read, grad_memory, grad_weights, tensors)
        if recorded:
            given = [x for x in (*grads, *tensors) if x is not None]
            results = tuple(x if x is None else _Once.apply(x, *given) for x in results)
        return results

    @staticmethod
    def _backward(
        ctx: Any, grad_read: Any, grad_memory: Any, grad_weights: Any, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        if grad_memory is None:
            grad_memory = tensors[1].new_zeros(ctx.shape)
        elif ctx.last or not grad_memory.is_contiguous():
            grad_memory = grad_memory.clone(memory_format=torch.contiguous_format)
        of_start, _, _, of_memory = ctx.needs_input_grad[6:10]
        of_weights, *of_told, grad_start = _RAW[ctx.backend].sparse_step_backward_(
            grad_read, grad_memory, grad_weights, *tensors, ctx.eps, of_start
        )
        return (
            *(None, None, None, None, None, None),
            grad_start.sum(0) if of_start else None,
            *(None, None),
            grad_memory if of_memory else None,
            *(None, None, of_weights, None, *of_told),
        )


class _Once(torch.autograd.Function):
    """A gradient by what it depends on, which has no gradient itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *given: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "a sparse memory's step in place has no second derivative; use mann_fast.reference or "
            "`with mann_fast.backend('reference')` for that"
        )


class _InPlace(Steps):
    """For a memory that is changed where it is: its kernel begins and ends samples by what is said of the step, and resets cost
    nothing at the steps that have none. On a GPU the kernel alone knows which these are."""

    def __init__(self, steps: int, resets: Tensor | None, lengths: Tensor | None, start: Tensor | None):
        super().__init__(resets, lengths, start)
        self.steps, self.last = steps, False
        self.any_begins = [resets is not None] * steps
        if resets is not None and may_look(resets):
            self.any_begins = resets.any(1).tolist()
        self.now: tuple[Tensor | None, ...] = NO_SEQUENCES

    def begin(self, t: int, state: AnyState) -> AnyState:
        resets = self.resets[t] if self.resets is not None and self.any_begins[t] else None
        lengths = None if self.lengths is None else (t < self.lengths).to(torch.int64)
        self.now = (resets, lengths, None if resets is None else self.start)
        self.last = t == self.steps - 1
        return state

    def finish(self, t: int, after: AnyState, before: AnyState) -> AnyState:
        return after


def _own(x: Tensor) -> Tensor:
    """A copy to change in place. In inference mode, too, one that counts its changes: an index asks for that."""
    if not torch.is_inference_mode_enabled():
        return x.clone()
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def sparse_steps(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: SparseState,
    reads: Tensor,
    *weights: Any,
    controller: str,
    threshold: float,
    eps: float,
    index: SparseIndex | None = None,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], SparseState, Tensor]:
    """As :func:`mann_fast.ops.sparse_cell`; for :class:`mann_fast.layers.Sparse`, which has checked what comes.

    A loop of steps where such a loop knows what one call does not: with the C++ kernels an ``index``, which may choose which
    slots are compared, and with CUDA's that nobody else sees the memory, which is copied once and then changed in place, and so
    is its gradient. Both in eager mode alone.
    """
    steps, num_slots = gates.shape[0], memory.memory.shape[1]
    backend = _backend.serving(gates.device, SPARSE_SCAN)
    indexed = index is not None and backend == "cpp" and num_slots >= LEAST_SLOTS
    known = [x for x in (resets, lengths) if x is not None]
    if not (
        (indexed or backend == "cuda")
        and steps > 0
        and forward_ad._current_level < 0
        and all(is_plain(x) for x in (gates, reads, *memory, *known))
    ):
        options: dict[str, Any] = {"threshold": threshold, "eps": eps}
        options |= {"resets": resets, "lengths": lengths, "start": start}
        return sparse_cell(gates, state, memory, reads, *weights, controller=controller, **options)
    check_slots(memory.read_slots, num_slots)
    check_times(memory.last_access, memory.clock)
    in_place = _InPlace(steps, *raw_sequences(memory.memory, steps, resets, lengths, start))
    of_index: Any = index.call(memory, eps) if index is not None and indexed else nullcontext()
    memory = memory._replace(memory=_own(memory.memory), last_access=_own(memory.last_access))
    heads, slot_size = reads.shape[1:]

    def step(state: SparseState, values: Tensor) -> tuple[Tensor, SparseState]:
        told = split_sparse_heads(values, heads, slot_size)
        handed: tuple[Any, Any] = (None, None)
        if searching is not None:
            searching.begin(*in_place.now[:2])
            handed = searching.lists, searching.candidates(told[0])
        of_step = (backend, in_place.last, threshold, eps, *in_place.now, *handed)
        tensors = (state.memory, state.last_access, state.read_slots, state.read_weights, state.clock)
        read, rows, slots, weights, clock, oldest = _Step.apply(*of_step, *tensors, *told)
        if searching is not None:
            searching.note(rows, told[0], told[3], slots, [state.read_slots, oldest])
        return read, SparseState(rows, slots, weights, state.last_access, clock)

    with _backend.without_autocast(gates.device.type), of_index as searching:
        options = {"controller": controller, "sequences": in_place, "step": step}
        output, state, memory, reads = sequence(gates, state, memory, reads, *weights, **options)
        if searching is not None:
            searching.keep(memory)
    return output, state, memory, reads
