"""A whole MANN sequence in one call: LSTM controller, heads and memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..reference.cell import SHARPNESS_MIN, SHARPNESS_SCALE, cell_by_steps, head_sizes
from ..reference.lrua import LRUAState
from . import _backend, _checks
from .lrua import _check_options, _check_state, _num_anchors, anchor_interval, lrua_step

WRITE_VECTORS = ("separate", "key")

# Sharpness is learned where the heads have values for it: then the factor on the similarity is
# sharpness + sharpness_scale * softplus(value), else sharpness. Where anchor_every is 0 nothing is kept for backward, and
# kept_gates, kept_cells, kept_heads, slots and anchors come out empty.
_backend.LIBRARY.define(
    "cell(Tensor gates, Tensor hidden, Tensor cell, Tensor memory, Tensor read_weights, Tensor usage, Tensor reads, "
    "Tensor hidden_weight, Tensor reads_weight, Tensor head_weight, Tensor head_bias, bool separate_vector, "
    "bool learned_sharpness, float sharpness, float sharpness_scale, bool read_first, bool shared_target, "
    "float usage_decay, float eps, SymInt anchor_every) -> "
    "(Tensor output, Tensor cell, Tensor memory, Tensor read_weights, Tensor usage, Tensor kept_gates, "
    "Tensor kept_cells, Tensor kept_heads, Tensor slots, Tensor anchors)"
)
_backend.LIBRARY.define(
    "cell_backward(Tensor? grad_output, Tensor? grad_cell, Tensor? grad_memory, Tensor? grad_read_weights, Tensor cell, "
    "Tensor memory, Tensor read_weights, Tensor hidden_weight, Tensor reads_weight, Tensor head_weight, "
    "Tensor kept_gates, Tensor kept_cells, Tensor kept_heads, Tensor slots, Tensor anchors, bool separate_vector, "
    "bool learned_sharpness, float sharpness, float sharpness_scale, bool read_first, bool shared_target, float eps, "
    "SymInt anchor_every) -> "
    "(Tensor grad_gates, Tensor grad_heads, Tensor grad_hidden, Tensor grad_cell, Tensor grad_memory, "
    "Tensor grad_read_weights, Tensor grad_reads)"
)


@torch.library.register_fake("mann_fast::cell")
def _(
    gates,
    hidden,
    cell,
    memory,
    read_weights,
    usage,
    reads,
    hidden_weight,
    reads_weight,
    head_weight,
    *options,
):
    steps, batch = gates.shape[0], memory.shape[0]
    heads, num_slots = read_weights.shape[1:]
    anchor_every = options[-1]
    kept = [(0,)] * 5
    if anchor_every > 0:
        anchors = _num_anchors(steps, anchor_every)
        kept = [
            gates.shape,
            (steps, *cell.shape),
            (steps, batch, head_weight.shape[0]),
            (steps, batch, heads),
            (anchors, batch, memory.shape[2] + heads, (num_slots + 15) // 16 * 16),
        ]
    return (
        gates.new_empty((steps, batch, hidden.shape[1] + heads * memory.shape[2])),
        gates.new_empty(cell.shape),
        gates.new_empty(memory.shape),
        gates.new_empty(read_weights.shape),
        gates.new_empty(usage.shape),
        gates.new_empty(kept[0]),
        gates.new_empty(kept[1]),
        gates.new_empty(kept[2]),
        gates.new_empty(kept[3], dtype=torch.int64),
        gates.new_empty(kept[4]),
    )


@torch.library.register_fake("mann_fast::cell_backward")
def _(
    grad_output,
    grad_cell,
    grad_memory,
    grad_read_weights,
    cell,
    memory,
    read_weights,
    hidden_weight,
    reads_weight,
    head_weight,
    kept_gates,
    kept_cells,
    kept_heads,
    *options,
):
    batch, heads, _ = read_weights.shape
    return (
        memory.new_empty(kept_gates.shape),
        memory.new_empty(kept_heads.shape),
        memory.new_empty(cell.shape),
        memory.new_empty(cell.shape),
        memory.new_empty(memory.shape),
        memory.new_empty(read_weights.shape),
        memory.new_empty((batch, heads, memory.shape[2])),
    )


def _weight_gradient(grads: Tensor, first: Tensor, rest: Tensor) -> Tensor:
    """The sum over steps and samples of grads [T, B, G] times what they met: ``first`` [B, K] at the first step, ``rest``
    [T - 1, B, K] after it."""
    later = torch.mm(grads[1:].flatten(0, 1).t(), rest.flatten(0, 1))
    return torch.addmm(later, grads[0].t(), first)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(
        gates,
        hidden,
        cell,
        memory,
        read_weights,
        usage,
        reads,
        hidden_weight,
        reads_weight,
        head_weight,
        head_bias,
        *options,
    ):
        return torch.ops.mann_fast.cell.default(
            gates,
            hidden,
            cell,
            memory,
            read_weights,
            usage,
            reads,
            hidden_weight,
            reads_weight,
            head_weight,
            head_bias,
            *options,
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, hidden, cell, memory, read_weights, _, reads, hidden_weight, reads_weight, head_weight, _ = inputs[
            :11
        ]
        *ctx.options, _, eps, anchor_every = inputs[11:]
        ctx.options += [eps, anchor_every]
        output, _, _, _, usage, *kept = outputs
        ctx.mark_non_differentiable(usage, *kept)
        ctx.save_for_backward(
            hidden, reads, output, cell, memory, read_weights, hidden_weight, reads_weight, head_weight, *kept
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        grads = grads[:4]
        count = 11 + len(ctx.options) + 1
        if all(grad is None for grad in grads):
            return (None,) * count
        hidden, reads, output, *saved = ctx.saved_tensors
        size = hidden.shape[1]
        results = torch.ops.mann_fast.cell_backward.default(*grads, *saved, *ctx.options)
        results = _checks.refuse_second_derivative("cell", results, *grads, hidden, reads, output, *saved)
        grad_gates, grad_heads, grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads = results
        needed = ctx.needs_input_grad[7:11]
        weights = [None] * 4
        if needed[0]:
            weights[0] = _weight_gradient(grad_gates, hidden, output[:-1, :, :size])
        if needed[1]:
            weights[1] = _weight_gradient(grad_gates, reads.flatten(1), output[:-1, :, size:])
        if needed[2]:
            weights[2] = torch.mm(grad_heads.flatten(0, 1).t(), output[..., :size].flatten(0, 1))
        if needed[3]:
            weights[3] = grad_heads.sum((0, 1))
        state = (grad_hidden, grad_cell, grad_memory, grad_read_weights, None, grad_reads)
        return grad_gates, *state, *weights, *(None,) * (count - 11)


def cell(
    gates: Tensor,
    controller: tuple[Tensor, Tensor],
    memory: LRUAState,
    reads: Tensor,
    hidden_weight: Tensor,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    write_vector: str = "separate",
    sharpness: str | float | None = "learned",
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor], LRUAState]:
    """A whole memory-augmented network's sequence (Santoro et al. 2016, arXiv 1605.06065): LSTM, heads and memory.

    At every step ``gates[t] + hidden @ hidden_weight.T + reads @ reads_weight.T`` are the gates of an LSTM (in the order of
    ``torch.nn.LSTMCell``); one linear layer on its new hidden state gives key, write vector, gate and sharpness of each
    head, in this order; key and write vector go through tanh; then comes :func:`lrua_step`. In C++ on the CPU it is one
    call per direction for all steps; elsewhere, and in half precision, a loop of steps.

    Args:
        gates: [T, B, 4 H], the input's part of the LSTM's gates, both biases included: one product for all steps. Any
            float dtype; everything else is of the same, but the memory's state is float32 beside half precision.
        controller: (hidden, cell), each [B, H].
        memory: LRUAState of [B, N, D], [B, R, N] and [B, N].
        reads: [B, R, D], what the heads read last.
        hidden_weight, reads_weight: [4 H, H], [4 H, R D].
        head_weight, head_bias: [heads, H], [heads]; heads is R D, twice that where the write vector is separate, plus R,
            plus R more where sharpness is learned.
        write_vector: "separate", or "key" where a head writes its key.
        sharpness: factor on the similarity: "learned" (1 + 10 softplus of its value), a number, or None for 1.
        order, write_target, usage_decay, eps: see :func:`lrua_step`.

    Returns:
        output [T, B, H + R D], the hidden states and reads of every step; (hidden, cell) and LRUAState after the last.
        The last reads are ``output[-1, :, H:]``. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _checks.check_tensor("gates", gates, "T B 4H")
    if not isinstance(controller, tuple) or len(controller) != 2:
        raise TypeError(f"controller must be a tuple (hidden, cell), got {type(controller).__name__}")
    if not isinstance(memory, tuple) or len(memory) != 3:
        raise TypeError(
            f"memory must be an LRUAState (memory, read_weights, usage), got {type(memory).__name__}"
        )
    _check_state(*memory, "memory.")
    batch, num_heads, _ = memory[1].shape
    slot_size = memory[0].shape[2]
    hidden, cell = controller
    _checks.check_tensor("controller[0]", hidden, "B H")
    size = hidden.shape[1]
    _checks.check_input("gates", gates, "T B 4H", (gates.shape[0], batch, 4 * size), memory[0])
    _checks.check_choice("write_vector", write_vector, WRITE_VECTORS)
    check_sharpness(sharpness)
    _check_options(order, write_target, usage_decay, eps)
    heads = sum(head_sizes(num_heads, slot_size, write_vector, sharpness))
    for name, value, axes, sizes in (
        ("controller[0]", hidden, "B H", (batch, size)),
        ("controller[1]", cell, "B H", (batch, size)),
        ("reads", reads, "B R D", (batch, num_heads, slot_size)),
        ("hidden_weight", hidden_weight, "4H H", (4 * size, size)),
        ("reads_weight", reads_weight, "4H RD", (4 * size, num_heads * slot_size)),
        ("head_weight", head_weight, "heads H", (heads, size)),
        ("head_bias", head_bias, "heads", (heads,)),
    ):
        _checks.check_like(name, value, axes, sizes, "gates", gates)
    weights = (hidden_weight, reads_weight, head_weight, head_bias)
    serving = _backend.serving(gates.device)
    if serving == "reference" or gates.dtype in _checks.HALF_DTYPES or gates.shape[0] == 0:
        return cell_by_steps(
            reference.lrua_step if serving == "reference" else lrua_step,
            gates,
            controller,
            memory,
            reads,
            *weights,
            write_vector=write_vector,
            sharpness=sharpness,
            order=order,
            write_target=write_target,
            usage_decay=usage_decay,
            eps=eps,
        )
    learned = sharpness == "learned"
    fixed = SHARPNESS_MIN if learned else 1.0 if sharpness is None else float(sharpness)
    tensors = (gates, hidden, cell, memory[0], memory[1], memory[2].detach(), reads, *weights)
    arguments = (
        *tensors,
        write_vector == "separate",
        learned,
        fixed,
        SHARPNESS_SCALE,
        order == "read_first",
        write_target == "shared",
        float(usage_decay),
        float(eps),
    )
    if _checks.records_gradient(*tensors):
        outputs = _checks.apply(_Cell, *arguments, anchor_interval(memory[0].shape[1], slot_size, num_heads))
    else:
        outputs = torch.ops.mann_fast.cell.default(*arguments, 0)
    output, cell, *state = outputs[:5]
    return output, (output[-1, :, :size].clone(), cell), LRUAState(*state)


def check_sharpness(sharpness: object) -> None:
    """ "learned", a finite number or None."""
    number = isinstance(sharpness, (int, float)) and not isinstance(sharpness, bool)
    if not (sharpness is None or number or sharpness == "learned"):
        raise ValueError(f"sharpness must be 'learned', a number or None, got {sharpness!r}")
    if number and not math.isfinite(sharpness):
        raise ValueError(f"sharpness must be finite, got {sharpness}")
