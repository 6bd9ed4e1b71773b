"""A whole MANN sequence in one call: controller, heads and memory."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import reference
from .._anchors import lrua_interval
from .._state import check_dense
from ..reference.cell import CONTROLLERS, SHARPNESS_MIN, SHARPNESS_SCALE, head_sizes
from ..reference.lrua import LRUAState
from . import _backend, _checks
from ._declare import Argument, Op, Option, Output, Sizes, came
from ._register import call, declare
from ._sequences import NAMES as SEQUENCE_NAMES
from ._sequences import may_look, raw_sequences
from ._sequences import sequences as of_sequences
from .content import EPS
from .lrua import (
    READ_FIRST,
    SHARED_TARGET,
    STATE,
    USAGE_DECAY,
    lrua_step,
    raw_options,
)

WRITE_VECTORS = ("separate", "key")
# Of Controller in csrc/include/arguments.h.
NUMBERS = {name: number for number, name in enumerate(CONTROLLERS)}


def _gradients(ctx: Any, tensors: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Those of :data:`CELL`."""
    return gradients(CELL, ctx, tensors, results)


def gradients(
    op: Op, ctx: Any, tensors: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of all that is differentiable, in the order of the arguments: the weights' are one product each, of the
    gradients of gates and heads at all steps with what they met there. The same for every memory, whose op saves and gives
    as many tensors in the same order."""
    resets, lengths, _, reads, output = tensors[RESETS:]
    hidden, head_weight = tensors[0], tensors[6]
    needed = dict(zip(op.names, ctx.needs_input_grad, strict=True))
    products = torch.bfloat16 if ctx.options[_bfloat16(op)] else output.dtype
    size = head_weight.shape[1]
    (
        grad_gates,
        grad_hidden_gates,
        grad_heads,
        grad_hidden,
        grad_cell,
        grad_memory,
        grad_read_weights,
        grad_reads,
        grad_start,
    ) = results
    if hidden is None or grad_hidden_gates.dim() == 1:  # only a GRU's differ
        grad_hidden_gates = grad_gates
    hidden_weight = hidden_bias = reads_weight = head_weight = head_bias = None
    if needed["hidden_bias"]:
        hidden_bias = grad_hidden_gates.sum((0, 1))
    if needed["head_bias"]:
        head_bias = grad_heads.sum((0, 1))
    with _backend.without_autocast(output.device.type):  # backward may be called inside the caller's
        met = output.to(products)
        nothing, taken = resets, None
        if lengths is not None:
            ended = torch.arange(output.shape[0], device=lengths.device).unsqueeze(1) >= lengths
            # From its end on a sample takes nothing of the step before, not even a NaN, and has gradients of 0: no work on it,
            # where it can be left out.
            nothing = ended if resets is None else resets | ended
            taken = (~ended).flatten().nonzero().squeeze(1) if may_look(lengths) else None
        of_gates = grad_gates.to(products)
        of_hidden = of_gates if grad_hidden_gates is grad_gates else grad_hidden_gates.to(products)
        if needed["hidden_weight"]:
            hidden_weight = _weight_gradient(of_hidden, hidden.to(products), met[..., :size], nothing, taken)
        if needed["reads_weight"]:
            first = reads.reshape(reads.shape[0], met.shape[2] - size).to(products)
            reads_weight = _weight_gradient(of_gates, first, met[..., size:], nothing, taken)
        if needed["head_weight"]:
            head_weight = _product(_rows(grad_heads.to(products)), _rows(met[..., :size]), taken)
    weights = [
        x if x is None else x.to(output.dtype)
        for x in (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    ]
    start = grad_start.sum(0) if needed["start"] else None
    return grad_gates, grad_hidden, grad_cell, grad_memory, grad_read_weights, grad_reads, *weights, start


def _bfloat16(op: Op) -> int:
    return [option.name for option in op.backward_options].index("bfloat16")


def _rows(x: Tensor) -> Tensor:
    """[T, B, K] as [T B, K]. (flatten has no rule for is_grads_batched, and -1 none for K = 0.)"""
    steps, batch, width = x.shape
    return x.reshape(steps * batch, width)


def _weight_gradient(
    grads: Tensor, first: Tensor, met: Tensor, nothing: Tensor | None, taken: Tensor | None
) -> Tensor:
    """The sum over steps and samples of grads [T, B, G] times what they met: ``first`` [B, K] at the first step, then met
    [T, B, K] of the step before, but 0 where they met ``nothing`` [T, B]. (No tensor of T - 1 steps: torch.compile would make
    T = 2 a case of its own.) taken: see :func:`_product`."""
    before = torch.cat([first, _rows(met)])[: grads.shape[0] * grads.shape[1]]
    if nothing is not None:
        before = before.masked_fill(nothing.reshape(-1, 1), 0)
    return _product(_rows(grads), before, taken)


def _product(grads: Tensor, met: Tensor, taken: Tensor | None) -> Tensor:
    """grads^T met over their rows; where ``taken`` is known, over those alone, as all others are 0."""
    if taken is not None:
        grads, met = grads.index_select(0, taken), met.index_select(0, taken)
    return torch.mm(grads.t(), met)


def _interval(values: tuple[Any, ...], backend: str) -> int:
    (_, num_slots, slot_size), heads = values[3].shape, values[4].shape[1]
    # In CUDA too: beside the weights there is no room for a replay in shared memory.
    return lrua_interval(num_slots, slot_size, heads)


def _recurrent(values: Mapping[str, Any]) -> bool:
    return values["hidden"] is not None


# controller: its number in NUMBERS. Sharpness is learned where the heads have values for it: then the factor on the
# similarity is sharpness + sharpness_scale * softplus(value), else sharpness. Everything is float32 or float64; with
# bfloat16 what the products of each step take is rounded to it.
CELL = declare(
    Op(
        "cell",
        arguments=(
            Argument("gates", "T B G", like="memory", half=True),
            Argument("hidden", "B H", like="gates", optional=True),
            Argument("cell", "B H", like="gates", optional=True),
            *STATE,
            Argument("reads", "B R D", like="gates"),
            Argument("hidden_weight", "G H", like="gates", optional=True),
            Argument("hidden_bias", "G", like="gates", optional=True),
            Argument("reads_weight", "G RD", like="gates"),
            Argument("head_weight", "heads H", like="gates"),
            Argument("head_bias", "heads", like="gates"),
            *of_sequences("T B"),
        ),
        options=(
            Option("controller", "int", NUMBERS["lstm"]),
            Option("separate_vector", "bool", True),
            Option("learned_sharpness", "bool", True),
            Option("sharpness", "float", SHARPNESS_MIN),
            Option("sharpness_scale", "float", SHARPNESS_SCALE),
            *(READ_FIRST, SHARED_TARGET, USAGE_DECAY, EPS),
            Option("bfloat16", "bool", False),
        ),
        outputs=(
            Output("output", "T B H+RD", like="gates"),
            Output("hidden", "B H", like="gates", when=_recurrent),
            Output("cell", "B H", like="gates", when=came("cell")),
            Output("reads", "B R D", like="gates"),
            Output("memory", "B N D", like="gates"),
            Output("read_weights", "B R N", like="gates"),
            Output("usage", "B N", like="gates", differentiable=False),
            Output("kept_gates", "T B kept", like="gates", kept=True),
            Output("kept_states", "T B H", like="gates", kept=True, when=_recurrent),
            Output("kept_heads", "T B heads", like="gates", kept=True),
            Output("slots", "T B R", like="gates", kept=True, integer=True),
            Output("anchors", "A B D+R P", like="gates", kept=True),
        ),
        saved=(
            *("hidden", "cell", "memory", "read_weights", "hidden_weight", "reads_weight", "head_weight"),
            *("kept_gates", "kept_states", "kept_heads", "slots", "anchors", *SEQUENCE_NAMES),
        ),
        also_saved=("reads", "output"),
        public=("cell",),
        interval=_interval,
        # A GRU keeps the hidden state's part of its candidate beside its gates.
        extents=lambda sizes: {
            "RD": sizes["R"] * sizes["D"],
            "H+RD": sizes["H"] + sizes["R"] * sizes["D"],
            "D+R": sizes["D"] + sizes["R"],
            "kept": sizes["G"] if sizes["controller"] == NUMBERS["feedforward"] else 4 * sizes["H"],
        },
        results=(
            Output("grad_gates", "T B G", like="memory"),
            Output(
                "grad_hidden_gates", "T B G", like="memory", when=lambda v: v["controller"] == NUMBERS["gru"]
            ),
            Output("grad_heads", "T B heads", like="memory"),
            Output("grad_hidden", "B H", like="memory", when=_recurrent),
            Output("grad_cell", "B H", like="memory", when=came("cell")),
            Output("grad_memory", "B N D", like="memory"),
            Output("grad_read_weights", "B R N", like="memory"),
            Output("grad_reads", "B R D", like="memory"),
            Output("grad_start", "B N D", like="memory", when=came("start")),
        ),
        gradients=_gradients,
    )
)
RESETS = CELL.saved.index("resets")

# What the public function takes, memory first, named as its callers know it.
TENSORS = (*STATE, CELL.arguments[0], *CELL.arguments[1:3], *CELL.arguments[6:])
NAMES = (
    "memory.memory",
    "memory.read_weights",
    "memory.usage",
    "gates",
    "state.hidden",
    "state.cell",
    *CELL.names[6:12],
    *SEQUENCE_NAMES,
)

_fitting: dict[tuple[Any, ...], bool] = {}  # not functools.cache, which torch.compile does not see through


def _fits(device: torch.device, wide: bool, *sizes: int) -> bool:
    """Whether the CUDA kernels have room for a network of these sizes: N, D, R, H, and the choices of cell_fits."""
    key = (device, wide, *sizes)
    if key not in _fitting:
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device, _disable_current_modes():  # no part of what may be tracing this call
            _fitting[key] = torch.ops.mann_fast_cuda.cell_fits(*sizes, wide)
    return _fitting[key]


_fits._dynamo_marked_constant = True  # type: ignore[attr-defined] # for torch.compile, as _loading.missing


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
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], LRUAState, Tensor]:
    """A whole memory-augmented network's sequence (Santoro et al. 2016, arXiv 1605.06065): controller, heads and memory.

    At every step the controller takes ``gates[t] + reads @ reads_weight.T``, and beside it ``hidden @ hidden_weight.T +
    hidden_bias``; one linear layer on its new hidden state gives key, write vector, gate and sharpness of each head, in this
    order; key and write vector go through tanh; then comes :func:`lrua_step`. In C++ on the CPU it is one call per
    direction for all steps, and in CUDA C++ (see docs/gpu.md) one launch where the weights fit the shared memory of a
    cluster of blocks; elsewhere a loop of steps. In half precision that call computes in float32 and rounds at its ends; in
    bfloat16 the CPU's also rounds what the products of each step take, which a processor with AVX512-BF16 has at twice the
    rate.

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
        resets, lengths, start: [T, B], [B] and [N, D] as in :func:`lrua_scan`; a reset zeroes the controller's state and the
            reads, too, and output is 0 after a sample's length. start has the dtype of the memory's state.

    Returns:
        output [T, B, H + R D], the hidden states and reads of every step; the controller's state, the LRUAState and the reads
        [B, R, D] after the last. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    sequences = (resets, lengths, start)
    options = (controller, write_vector, sharpness, order, write_target, usage_decay, eps)
    sizes = _check_cell(gates, state, memory, reads, weights, sequences, options)
    sequences = raw_sequences(memory[0], gates.shape[0], *sequences)
    backend = _backend.serving(gates.device)
    learned, separate = sharpness == "learned", write_vector == "separate"
    fused = backend == "cpp" or (
        backend == "cuda"
        and _fits(
            gates.device,
            gates.dtype == torch.float64,
            *(operator.index(sizes[axis]) for axis in "NDRH"),  # not symbols, for torch.compile
            NUMBERS[controller],
            separate,
            learned,
        )
    )
    if not fused or gates.shape[0] == 0:
        with _backend.without_autocast(gates.device.type):
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
                **dict(zip(SEQUENCE_NAMES, sequences, strict=True)),  # type: ignore[arg-type]
                step=reference.lrua_step if backend == "reference" else lrua_step,
            )
    dtype = gates.dtype
    tensors = [gates, *(*state, None, None)[:2], *memory, reads, *weights]
    if dtype in _checks.HALF_DTYPES:
        tensors = [x if x is None else x.float() for x in tensors]
    output, hidden, cell, reads, *memory = call(
        CELL,
        backend,
        *tensors,
        *sequences,
        NUMBERS[controller],
        separate,
        learned,
        SHARPNESS_MIN if learned else 1.0 if sharpness is None else float(sharpness),
        SHARPNESS_SCALE,
        order == "read_first",
        write_target == "shared",
        float(usage_decay),
        float(eps),
        dtype == torch.bfloat16 and backend == "cpp",
        0,
    )[:7]
    last = (hidden, cell)[: len(state)]
    if dtype != output.dtype:
        output, reads, last = output.to(dtype), reads.to(dtype), tuple(x.to(dtype) for x in last)
    return output, last, LRUAState(*memory), reads


def _check_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: LRUAState,
    reads: Tensor,
    weights: tuple[Tensor | None, ...],
    sequences: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Sizes:
    """The size of every axis. What has passed once is not looked at again: a rollout calls this at every step."""
    _checks.check_tuple("memory", memory, LRUAState)
    parts = state if isinstance(state, tuple) else ()

    def known() -> Sizes:
        controller, write_vector, sharpness, *of_step = options
        _checks.check_choice("write_vector", write_vector, WRITE_VECTORS)
        check_sharpness(sharpness)
        raw_options(*of_step)  # for its checks
        of_memory = _checks.check_tensors(STATE, NAMES[:3], memory)
        return check_controller(controller, state, weights) | {
            "RD": of_memory["R"] * of_memory["D"],
            "heads": sum(head_sizes(of_memory["R"], of_memory["D"], write_vector, sharpness)),
        }

    tensors = (*memory, gates, *(*parts, None, None)[:2], reads, *weights, *sequences)
    # With their types: True is equal to 1, but no number here.
    choices = (type(state), len(parts), *options, *map(type, options))
    return _checks.check_tensors(TENSORS, NAMES, tensors, choices=choices, known=known)


def check_controller(controller: Any, state: Any, weights: tuple[Tensor | None, ...]) -> Sizes:
    """The sizes that follow from the controller, whose name, state and weights are there as it asks for them."""
    _checks.check_choice("controller", controller, tuple(CONTROLLERS))
    gates_per_unit, names = CONTROLLERS[controller]
    if not isinstance(state, tuple) or len(state) != len(names):
        came = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a tuple ({', '.join(names)}) of this controller, got {came}")
    for name, part in zip(names, state, strict=True):
        check_dense(f"state.{name}", part)
    hidden_size = _checks.check_shape("head_weight", weights[3], CELL.arguments[10].names)[1]
    for name, value in zip(("hidden_weight", "hidden_bias"), weights[:2], strict=True):
        if not state and value is not None:
            came = type(value).__name__
            raise TypeError(f"{name} must be None for a feed-forward controller, got {came}")
        if state and value is None:
            raise TypeError(f"{name} must be a tensor, got NoneType")
    return {"H": hidden_size, "G": gates_per_unit * hidden_size}


def check_sharpness(sharpness: Any) -> None:
    """ "learned", a finite number or None."""
    number = isinstance(sharpness, (int, float)) and not isinstance(sharpness, bool)
    if not (sharpness is None or number or (isinstance(sharpness, str) and sharpness == "learned")):
        raise ValueError(f"sharpness must be 'learned', a number or None, got {_checks.shown(sharpness)}")
    if number and not math.isfinite(sharpness):
        raise ValueError(f"sharpness must be finite, got {sharpness}")
