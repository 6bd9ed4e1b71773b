"""A whole MANN sequence in one call: controller, heads and memory."""

from __future__ import annotations

import contextlib
import math
import operator

import torch
from torch import Tensor

from .. import reference
from ..reference.cell import CONTROLLERS, SHARPNESS_MIN, SHARPNESS_SCALE, head_sizes
from ..reference.lrua import LRUAState
from . import _backend, _checks
from .lrua import _anchors_shape, _check_options, _check_state, anchor_interval, lrua_step

WRITE_VECTORS = ("separate", "key")
# Of Controller in csrc/include/arguments.h.
NUMBERS = {name: number for number, name in enumerate(CONTROLLERS)}

# controller: its number in NUMBERS. Sharpness is learned where the heads have values for it: then the factor on the
# similarity is sharpness + sharpness_scale * softplus(value), else sharpness. Everything is float32 or float64; with
# bfloat16 what the products of each step take is rounded to it. Where anchor_every is 0 nothing is kept for backward, and
# what is kept comes out empty; so does what this controller does not have.
_backend.define(
    "cell(Tensor gates, Tensor? hidden, Tensor? cell, Tensor memory, Tensor read_weights, Tensor usage, Tensor reads, "
    "Tensor? hidden_weight, Tensor? hidden_bias, Tensor reads_weight, Tensor head_weight, Tensor head_bias, "
    "int controller, bool separate_vector, bool learned_sharpness, float sharpness, float sharpness_scale, "
    "bool read_first, bool shared_target, float usage_decay, float eps, bool bfloat16, SymInt anchor_every) -> "
    "(Tensor output, Tensor cell, Tensor memory, Tensor read_weights, Tensor usage, Tensor kept_gates, "
    "Tensor kept_states, Tensor kept_heads, Tensor slots, Tensor anchors)"
)
_backend.define(
    "cell_backward(Tensor? grad_output, Tensor? grad_cell, Tensor? grad_memory, Tensor? grad_read_weights, "
    "Tensor? hidden, Tensor? cell, Tensor memory, Tensor read_weights, Tensor? hidden_weight, Tensor reads_weight, "
    "Tensor head_weight, Tensor kept_gates, Tensor kept_states, Tensor kept_heads, Tensor slots, Tensor anchors, "
    "int controller, bool separate_vector, bool learned_sharpness, float sharpness, float sharpness_scale, "
    "bool read_first, bool shared_target, float eps, bool bfloat16, SymInt anchor_every) -> "
    "(Tensor grad_gates, Tensor grad_hidden_gates, Tensor grad_heads, Tensor grad_hidden, Tensor grad_cell, "
    "Tensor grad_memory, Tensor grad_read_weights, Tensor grad_reads)"
)


@_backend.fake("cell")
def _(gates, hidden, cell, memory, read_weights, usage, reads, *weights_and_options):
    head_weight, anchor_every = weights_and_options[3], weights_and_options[-1]
    steps, batch, width = gates.shape
    heads = read_weights.shape[1]
    values, hidden_size = head_weight.shape
    kept = [(0,)] * 5
    if anchor_every > 0:
        kept = [
            (steps, batch, width if hidden is None else 4 * hidden_size),
            (0,) if hidden is None else (steps, batch, hidden_size),
            (steps, batch, values),
            (steps, batch, heads),
            _anchors_shape(steps, memory, heads, anchor_every),
        ]
    return (
        gates.new_empty((steps, batch, hidden_size + heads * memory.shape[2])),
        gates.new_empty((0,) if cell is None else cell.shape),
        gates.new_empty(memory.shape),
        gates.new_empty(read_weights.shape),
        gates.new_empty(usage.shape),
        gates.new_empty(kept[0]),
        gates.new_empty(kept[1]),
        gates.new_empty(kept[2]),
        gates.new_empty(kept[3], dtype=torch.int64),
        gates.new_empty(kept[4]),
    )


@_backend.fake("cell_backward")
def _(
    grad_output,
    grad_cell,
    grad_memory,
    grad_read_weights,
    hidden,
    cell,
    memory,
    read_weights,
    hidden_weight,
    reads_weight,
    head_weight,
    kept_gates,
    kept_states,
    kept_heads,
    slots,
    anchors,
    controller,
    *options,
):
    batch, heads, _ = read_weights.shape
    gates = (*kept_gates.shape[:2], reads_weight.shape[0])
    return (
        memory.new_empty(gates),
        memory.new_empty(gates if controller == NUMBERS["gru"] else (0,)),
        memory.new_empty(kept_heads.shape),
        memory.new_empty((0,) if hidden is None else hidden.shape),
        memory.new_empty((0,) if cell is None else cell.shape),
        memory.new_empty(memory.shape),
        memory.new_empty(read_weights.shape),
        memory.new_empty((batch, heads, memory.shape[2])),
    )


_fitting: dict[tuple, bool] = {}  # not functools.cache, which torch.compile does not see through


def _fits(device: torch.device, wide: bool, *sizes: int) -> bool:
    """Whether the CUDA kernels have room for a network of these sizes: N, D, R, H, and the choices of cell_fits."""
    key = (device, wide, *sizes)
    if key not in _fitting:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _fitting[key] = torch.ops.mann_fast_cuda.cell_fits(*sizes, wide)
    return _fitting[key]


_fits._dynamo_marked_constant = True  # for torch.compile, as _backend._load_cuda


def _weight_gradient(grads: Tensor, first: Tensor, rest: Tensor) -> Tensor:
    """The sum over steps and samples of grads [T, B, G] times what they met: ``first`` [B, K] at the first step, ``rest``
    [T - 1, B, K] after it."""
    later = torch.mm(grads[1:].flatten(0, 1).t(), rest.flatten(0, 1))
    return torch.addmm(later, grads[0].t(), first)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return _backend.raw(arguments[-1]).cell.default(*arguments[:-1])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, hidden, cell, memory, read_weights, _, reads, hidden_weight, _, reads_weight, head_weight, _ = (
            inputs[:12]
        )
        *ctx.options, _, eps, bfloat16, anchor_every, ctx.backend = inputs[12:]
        ctx.options += [eps, bfloat16, anchor_every]
        output, out_cell, _, _, usage, *kept = outputs
        ctx.products = torch.bfloat16 if bfloat16 else output.dtype
        ctx.mark_non_differentiable(*([out_cell] if cell is None else []), usage, *kept)
        ctx.save_for_backward(
            reads, output, hidden, cell, memory, read_weights, hidden_weight, reads_weight, head_weight, *kept
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        grads = grads[:4]
        others = (None,) * (len(ctx.options) + 2)
        if all(grad is None for grad in grads):
            return (None,) * 12 + others
        reads, output, *saved = ctx.saved_tensors
        hidden, cell, head_weight = saved[0], saved[1], saved[6]
        size = head_weight.shape[1]
        results = _backend.raw(ctx.backend).cell_backward.default(*grads, *saved, *ctx.options)
        results = _checks.refuse_second_derivative("cell", results, *grads, reads, output, *saved)
        grad_gates, grad_hidden_gates, grad_heads, grad_hidden, grad_cell, *grad_memory, grad_reads = results
        if grad_hidden_gates.dim() == 1:
            grad_hidden_gates = grad_gates
        weights = [None] * 5
        if ctx.needs_input_grad[8]:
            weights[1] = grad_hidden_gates.sum((0, 1))
        if ctx.needs_input_grad[11]:
            weights[4] = grad_heads.sum((0, 1))
        with torch.autocast(output.device.type, enabled=False):  # backward may be called inside the caller's
            met = output.to(ctx.products)
            of_gates = grad_gates.to(ctx.products)
            of_hidden = of_gates if grad_hidden_gates is grad_gates else grad_hidden_gates.to(ctx.products)
            if ctx.needs_input_grad[7]:
                weights[0] = _weight_gradient(of_hidden, hidden.to(ctx.products), met[:-1, :, :size])
            if ctx.needs_input_grad[9]:
                weights[2] = _weight_gradient(of_gates, reads.flatten(1).to(ctx.products), met[:-1, :, size:])
            if ctx.needs_input_grad[10]:
                of_heads = grad_heads.to(ctx.products)
                weights[3] = torch.mm(of_heads.flatten(0, 1).t(), met[..., :size].flatten(0, 1))
        weights = [x if x is None else x.to(output.dtype) for x in weights]
        state = (None if hidden is None else grad_hidden, None if cell is None else grad_cell)
        return grad_gates, *state, *grad_memory, None, grad_reads, *weights, *others


def cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: LRUAState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    write_vector: str = "separate",
    sharpness: str | float | None = "learned",
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, ...], LRUAState]:
    """A whole memory-augmented network's sequence (Santoro et al. 2016, arXiv 1605.06065): controller, heads and memory.

    At every step the controller takes ``gates[t] + reads @ reads_weight.T``, and beside it ``hidden @ hidden_weight.T +
    hidden_bias``; one linear layer on its new hidden state gives key, write vector, gate and sharpness of each head, in this
    order; key and write vector go through tanh; then comes :func:`lrua_step`. In C++ on the CPU it is one call per
    direction for all steps, and in CUDA C++ (tested emulated; no GPU has run it yet) one launch where the weights fit the
    shared memory of a cluster of blocks; elsewhere a loop of steps. In half precision that call computes in float32 and
    rounds at its ends; in bfloat16 the CPU's also rounds what the products of each step take, which a processor with
    AVX512-BF16 has at twice the rate.

    The controller is an LSTM or a GRU as ``torch.nn.LSTMCell`` and ``torch.nn.GRUCell`` have them (G = 4 H or 3 H gates in
    their order), or feed-forward: one layer with tanh (G = H), which remembers by the memory alone.

    Args:
        gates: [T, B, G], the input's part, its bias included: one product for all steps. Any float dtype; everything else
            is of the same, but the memory's state is float32 beside half precision.
        state: the controller's: (hidden, cell) of an LSTM, (hidden,) of a GRU, each [B, H]; () where it is feed-forward.
        memory: LRUAState of [B, N, D], [B, R, N] and [B, N].
        reads: [B, R, D], what the heads read last.
        hidden_weight, hidden_bias: [G, H], [G]; None where the controller is feed-forward.
        reads_weight: [G, R D].
        head_weight, head_bias: [heads, H], [heads]; heads is R D, twice that where the write vector is separate, plus R,
            plus R more where sharpness is learned.
        controller: "lstm", "gru" or "feedforward".
        write_vector: "separate", or "key" where a head writes its key.
        sharpness: factor on the similarity: "learned" (1 + 10 softplus of its value), a number, or None for 1.
        order, write_target, usage_decay, eps: see :func:`lrua_step`.

    Returns:
        output [T, B, H + R D], the hidden states and reads of every step; the controller's state and the LRUAState after
        the last. The last reads are ``output[-1, :, H:]``. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _checks.check_choice("controller", controller, tuple(CONTROLLERS))
    gates_per_unit, state_names = CONTROLLERS[controller]
    _checks.check_tensor("gates", gates, "T B G")
    if not isinstance(state, tuple) or len(state) != len(state_names):
        came = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a tuple ({', '.join(state_names)}) of this controller, got {came}")
    if not isinstance(memory, tuple) or len(memory) != 3:
        raise TypeError(
            f"memory must be an LRUAState (memory, read_weights, usage), got {type(memory).__name__}"
        )
    _check_state(*memory, "memory.")
    batch, num_heads, _ = memory[1].shape
    slot_size = memory[0].shape[2]
    _checks.check_tensor("head_weight", head_weight, "heads H")
    size = head_weight.shape[1]
    width = gates_per_unit * size
    _checks.check_input("gates", gates, "T B G", (gates.shape[0], batch, width), memory[0])
    _checks.check_choice("write_vector", write_vector, WRITE_VECTORS)
    check_sharpness(sharpness)
    _check_options(order, write_target, usage_decay, eps)
    heads = sum(head_sizes(num_heads, slot_size, write_vector, sharpness))
    of_hidden = [
        ("hidden_weight", hidden_weight, "G H", (width, size)),
        ("hidden_bias", hidden_bias, "G", (width,)),
    ]
    if not state:
        for name, value, *_ in of_hidden:
            if value is not None:
                raise TypeError(
                    f"{name} must be None for a feed-forward controller, got {type(value).__name__}"
                )
        of_hidden = []
    for name, value, axes, sizes in (
        *(
            (f"state.{name}", value, "B H", (batch, size))
            for name, value in zip(state_names, state, strict=True)
        ),
        ("reads", reads, "B R D", (batch, num_heads, slot_size)),
        *of_hidden,
        ("reads_weight", reads_weight, "G RD", (width, num_heads * slot_size)),
        ("head_weight", head_weight, "heads H", (heads, size)),
        ("head_bias", head_bias, "heads", (heads,)),
    ):
        _checks.check_like(name, value, axes, sizes, "gates", gates)
    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    learned = sharpness == "learned"
    serving = _backend.serving(gates.device)
    fused = serving == "cpp" or (
        serving == "cuda"
        and _fits(
            gates.device,
            gates.dtype == torch.float64,
            *map(operator.index, (*memory[0].shape[1:], num_heads, size)),  # not symbols, for torch.compile
            NUMBERS[controller],
            write_vector == "separate",
            learned,
        )
    )
    if not fused or gates.shape[0] == 0:
        return reference.cell(
            gates,
            state,
            memory,
            reads,
            *weights,
            controller=controller,
            write_vector=write_vector,
            sharpness=sharpness,
            order=order,
            write_target=write_target,
            usage_decay=usage_decay,
            eps=eps,
            step=reference.lrua_step if serving == "reference" else lrua_step,
        )
    dtype = gates.dtype
    if dtype in _checks.HALF_DTYPES:
        widen = lambda x: x if x is None else x.float()  # noqa: E731
        gates, reads, *weights = map(widen, (gates, reads, *weights))
        state = tuple(map(widen, state))
    hidden, cell = (*state, None, None)[:2]
    fixed = SHARPNESS_MIN if learned else 1.0 if sharpness is None else float(sharpness)
    tensors = (gates, hidden, cell, memory[0], memory[1], memory[2].detach(), reads, *weights)
    arguments = (
        *tensors,
        NUMBERS[controller],
        write_vector == "separate",
        learned,
        fixed,
        SHARPNESS_SCALE,
        order == "read_first",
        write_target == "shared",
        float(usage_decay),
        float(eps),
        dtype == torch.bfloat16 and serving == "cpp",
    )
    if _checks.records_gradient(*tensors):
        anchor_every = anchor_interval(memory[0].shape[1], slot_size, num_heads)
        outputs = _checks.apply(_Cell, *arguments, anchor_every, serving)
    else:
        outputs = _backend.raw(serving).cell.default(*arguments, 0)
    output, cell, *memory = outputs[:5]
    last = (output[-1, :, :size].clone(), cell)
    return output.to(dtype), tuple(x.to(dtype) for x in last[: len(state)]), LRUAState(*memory)


def check_sharpness(sharpness: object) -> None:
    """ "learned", a finite number or None."""
    number = isinstance(sharpness, (int, float)) and not isinstance(sharpness, bool)
    if not (sharpness is None or number or sharpness == "learned"):
        raise ValueError(f"sharpness must be 'learned', a number or None, got {sharpness!r}")
    if number and not math.isfinite(sharpness):
        raise ValueError(f"sharpness must be finite, got {sharpness}")
