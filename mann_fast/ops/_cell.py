"""What the ops of whole sequences share, whatever their memory: declaration, gradients, checks, and the call."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .._state import check_dense
from ..reference.cell import CONTROLLERS
from . import _backend, _checks
from ._declare import Argument, Op, Option, Output, Sizes, after, came, there
from ._public import Scan
from ._register import LIBRARIES, NAMESPACES, call, declare
from ._sequences import NAMES as SEQUENCE_NAMES
from ._sequences import Values, may_look, of_sequences, raw_sequences

LIBRARIES["cpp"].define("fast_bfloat16() -> bool")

# Of Controller in csrc/include/arguments.h.
NUMBERS = {name: number for number, name in enumerate(CONTROLLERS)}

# Of an op's arguments those before and after its memory's state.
GATES = (
    Argument("gates", "T B G", like="memory", half=True),
    Argument("hidden", "B H", like="gates", optional=True),
    Argument("cell", "B H", like="gates", optional=True),
)
REST = (
    Argument("reads", "B R D", like="gates"),
    Argument("hidden_weight", "G H", like="gates", optional=True),
    Argument("hidden_bias", "G", like="gates", optional=True),
    Argument("reads_weight", "G RD", like="gates"),
    Argument("head_weight", "heads H", like="gates"),
    Argument("head_bias", "heads", like="gates"),
    *of_sequences("T B"),
)


class Network(NamedTuple):
    """What a public function takes of controller and heads."""

    gates: Tensor
    state: tuple[Tensor, ...]
    reads: Tensor
    hidden_weight: Tensor | None
    hidden_bias: Tensor | None
    reads_weight: Tensor
    head_weight: Tensor
    head_bias: Tensor

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        """The controller's state as (hidden, cell), None where there is none."""
        return (*(self.state if isinstance(self.state, tuple) else ()), None, None)[:2]


def _recurrent(values: Mapping[str, Any]) -> bool:
    return values["hidden"] is not None


def declare_cell(
    name: str,
    state: tuple[Argument, ...],
    options: tuple[Option, ...],
    kept: tuple[Output, ...],
    *,
    interval: Callable[[tuple[Any, ...], str], int],
    choices: str | None = None,
    extents: Callable[[Sizes], Sizes] = lambda sizes: {},
    constant: tuple[str, ...] = (),
    unsaved: tuple[str, ...] = (),
) -> Op:
    """The op of that name, which serves the public function of the same name. Everything is float32 or float64; with bfloat16
    what the products of each step take is rounded to it.

    state: the memory's, which the op takes and gives; ``constant``: what of it comes out as a constant, which backward does not
    take, nor what is ``unsaved``. options: the memory's. kept: what backward needs beside what it takes of the controller.
    interval: as of Op. extents: of axes that are the memory's own. choices: what <name>_fits takes of its options, as the
    schema has it; None where CUDA has no kernels.
    """

    def all_extents(sizes: Sizes) -> Sizes:
        own = extents(sizes)
        sizes = {**sizes, **own}
        reads = sizes["R"] * sizes["D"]
        # A GRU keeps the hidden state's part of its candidate beside its gates.
        gates = sizes["G"] if sizes["controller"] == NUMBERS["feedforward"] else 4 * sizes["H"]
        return {**own, "RD": reads, "H+RD": sizes["H"] + reads, "kept": gates}

    def all_gradients(
        ctx: Any, tensors: tuple[Any, ...], results: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        return _gradients(op, ctx, tensors, results)

    op = Op(
        name,
        arguments=(*GATES, *state, *REST),
        options=(
            Option("controller", "int", NUMBERS["lstm"]),
            *options,
            Option("bfloat16", "bool", False),
        ),
        outputs=(
            Output("output", "T B H+RD", like="gates"),
            Output("hidden", "B H", like="gates", when=_recurrent),
            Output("cell", "B H", like="gates", when=came("cell")),
            Output("reads", "B R D", like="gates"),
            *after(state, "gates", constant=constant),
            Output("kept_gates", "T B kept", like="gates", kept=True),
            Output("kept_states", "T B H", like="gates", kept=True, when=_recurrent),
            Output("kept_heads", "T B heads", like="gates", kept=True),
            *kept,
        ),
        saved=(
            *("hidden", "cell", *(a.name for a in state if a.name not in (*constant, *unsaved))),
            *("hidden_weight", "reads_weight", "head_weight", "kept_gates", "kept_states", "kept_heads"),
            *(x.name for x in kept),
            *SEQUENCE_NAMES,
        ),
        also_saved=("reads", "output"),
        public=(name,),
        interval=interval,
        extents=all_extents,
        results=(
            Output("grad_gates", "T B G", like="head_weight"),
            Output(
                "grad_hidden_gates",
                "T B G",
                like="head_weight",
                when=lambda v: v["controller"] == NUMBERS["gru"],
            ),
            Output("grad_heads", "T B heads", like="head_weight"),
            Output("grad_hidden", "B H", like="head_weight", when=_recurrent),
            Output("grad_cell", "B H", like="head_weight", when=came("cell")),
            *(
                Output(f"grad_{a.name}", a.axes, "head_weight", when=there(a))
                for a in state
                if a.differentiable
            ),
            Output("grad_reads", "B R D", like="head_weight"),
            Output("grad_start", "B N D", like="head_weight", when=came("start")),
        ),
        gradients=all_gradients,
    )
    if choices is not None:
        LIBRARIES["cuda"].define(
            f"{name}_fits(int N, int D, int R, int H, int controller, {choices}, bool wide) -> bool"
        )
    return declare(op)


def _gradients(
    op: Op, ctx: Any, tensors: tuple[Any, ...], results: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of all that is differentiable, in the order of the arguments: the weights' are one product each, of the
    gradients of gates and heads at all steps with what they met there."""
    saved = dict(zip((*op.saved, *op.also_saved), tensors, strict=True))
    given = {x.name.removeprefix("grad_"): y for x, y in zip(op.results, results, strict=True)}
    resets, lengths, output, hidden = (saved[name] for name in ("resets", "lengths", "output", "hidden"))
    needed = dict(zip(op.names, ctx.needs_input_grad, strict=True))
    options = dict(zip((option.name for option in op.backward_options), ctx.options, strict=True))
    products = torch.bfloat16 if options["bfloat16"] else output.dtype
    size = saved["head_weight"].shape[1]
    grad_gates, grad_heads, grad_hidden_gates = (given[name] for name in ("gates", "heads", "hidden_gates"))
    if hidden is None or grad_hidden_gates.dim() == 1:  # only a GRU's differ
        grad_hidden_gates = grad_gates
    of: dict[str, Tensor] = {}
    if needed["hidden_bias"]:
        of["hidden_bias"] = grad_hidden_gates.sum((0, 1))
    if needed["head_bias"]:
        of["head_bias"] = grad_heads.sum((0, 1))
    with _backend.without_autocast(output.device.type):  # backward may be called inside the caller's
        met = _rows(output.to(products))
        nothing, taken = resets, None
        if lengths is not None:
            ended = torch.arange(output.shape[0], device=lengths.device).unsqueeze(1) >= lengths
            # From its end on a sample takes nothing of the step before, not even a NaN, and has gradients of 0: no work on it,
            # where it can be left out.
            nothing = ended if resets is None else resets | ended
            taken = (~ended).flatten().nonzero().squeeze(1) if may_look(lengths) else None
        of_gates = grad_gates.to(products)
        of_hidden = of_gates if grad_hidden_gates is grad_gates else grad_hidden_gates.to(products)
        if needed["hidden_weight"] or needed["reads_weight"]:
            # What gates met: hidden state and reads of the step before, but 0 where that is nothing. (No tensor of T - 1 steps:
            # torch.compile would make T = 2 a case of its own.)
            reads = saved["reads"].reshape(saved["reads"].shape[0], met.shape[1] - size)
            first = torch.cat([reads.new_zeros(reads.shape[0], size) if hidden is None else hidden, reads], 1)
            before = torch.cat([first.to(products), met])[: met.shape[0]]
            if nothing is not None:
                before = before.masked_fill(nothing.reshape(-1, 1), 0)
            if needed["hidden_weight"]:
                of["hidden_weight"] = _product(of_hidden, before[:, :size], taken)
            if needed["reads_weight"]:
                of["reads_weight"] = _product(of_gates, before[:, size:], taken)
        if needed["head_weight"]:
            of["head_weight"] = _product(grad_heads.to(products), met[:, :size], taken)
    given |= {name: x.to(output.dtype) for name, x in of.items()}
    if needed["start"]:
        given["start"] = given["start"].sum(0)
    return tuple(given.get(a.name) for a in op.arguments if a.differentiable)


def _rows(x: Tensor) -> Tensor:
    """[T, B, K] as [T B, K]. (flatten has no rule for is_grads_batched, and -1 none for K = 0.)"""
    steps, batch, width = x.shape
    return x.reshape(steps * batch, width)


def _product(grads: Tensor, met: Tensor, taken: Tensor | None) -> Tensor:
    """The sum over steps and samples of grads [T, B, G] times what they met [T B, K]; where ``taken`` is known, over those
    alone, as all others are 0."""
    grads = _rows(grads)
    if taken is not None:
        grads, met = grads.index_select(0, taken), met.index_select(0, taken)
    return torch.mm(grads.t(), met)


class Cell:
    """The public function of a whole sequence.

    memory: the family of its memory. reference: the function of mann_fast.reference, which takes the memory's public ``step``
    for one of its own. head_sizes: the numbers of values of the heads, from the sizes of the memory and all options. choices:
    the last that <op>_fits takes, from sizes and raw options. state: the memory's tensors, where the op does not have them as
    callers do.
    """

    def __init__(
        self,
        op: Op,
        memory: Scan,
        reference: Callable[..., Any],
        step: Callable[..., Any],
        head_sizes: Callable[..., Sequence[int]],
        choices: Callable[[Mapping[str, Any]], tuple[int, ...]] = lambda options: (),
        state: tuple[Argument, ...] = (),
    ):
        self.op, self.memory, self.reference, self.step = op, memory, reference, step
        self.head_sizes, self.choices = head_sizes, choices
        self.state = state or op.arguments[len(GATES) : -len(REST)]
        self.arguments = (*self.state, *GATES, *REST)
        self.state_names = tuple(f"memory.{field}" for field in memory.kind._fields)
        states = ("gates", "state.hidden", "state.cell")
        self.names = (*self.state_names, *states, *(argument.name for argument in REST))

    def known(self, memory: Any) -> dict[str, Any]:
        """What options depend on, of which tensors a memory's state has; it raises where these do not go together."""
        return {}

    def _checked(
        self, network: Network, memory: Any, sequences: Values, controller: Any, options: dict[str, Any]
    ) -> tuple[Sizes, tuple[Any, ...], tuple[int, ...]]:
        """The size of every axis, the memory's options as the raw op takes them, and what <op>_fits takes of these."""
        gates, state, reads, *weights = network

        def known() -> Sizes:
            given = self.known(memory)
            sizes = given | _checks.check_tensors(self.state, self.state_names, memory)
            self.op.raw_options(options, sizes)  # for its checks
            given |= {"RD": sizes["R"] * sizes["D"], "heads": sum(self.head_sizes(sizes, options))}
            return given | check_controller(controller, state, tuple(weights))

        def then(sizes: Sizes) -> tuple[Any, ...]:
            raw = self.op.raw_options(options, sizes)
            named = zip(self.op.names[-len(raw) :], raw, strict=True)
            return sizes, raw[1:-2], self.choices(sizes | dict(named))

        _checks.check_tuple("memory", memory, self.memory.kind)
        tensors = (*memory, gates, *network.states, reads, *weights, *sequences)
        choices = (
            *(type(state), len(state) if isinstance(state, tuple) else 0),
            *(controller, *options.values()),
        )
        return _checks.check_tensors(
            self.arguments, self.names, tensors, choices=choices, known=known, then=then
        )

    def run(
        self, network: Network, memory: Any, sequences: Values, controller: str, options: dict[str, Any]
    ) -> Any:
        sizes, raw, choices = self._checked(network, memory, sequences, controller, options)
        self.memory.look(memory, "memory")
        gates, state, reads, *weights = network
        dtype = gates.dtype
        sequences = raw_sequences(memory[0], gates.shape[0], *sequences, value=self.memory.start)
        backend = _backend.serving(gates.device, self.op)
        if gates.shape[0] == 0 or not fused(self.op, backend, gates, sizes, controller, choices):
            options |= zip(SEQUENCE_NAMES, sequences, strict=True)
            memory = self.memory.kind(*memory)
            with _backend.without_autocast(gates.device.type):
                return self.reference(
                    *(gates, state, memory, reads, *weights), controller=controller, step=self.step, **options
                )
        of_memory = self.memory.raw_state(memory)
        tensors = [gates, *network.states, *of_memory, reads, *weights]
        if dtype in _checks.HALF_DTYPES:  # it computes in float32
            tensors = [x.float() if x is not None and x.is_floating_point() else x for x in tensors]
        rounded = (
            dtype == torch.bfloat16 and backend == "cpp" and _answer("cpp", gates.device, "fast_bfloat16")
        )
        results = call(self.op, backend, *tensors, *sequences, NUMBERS[controller], *raw, rounded, 0)
        output, hidden, cell, reads = results[:4]
        last = (hidden, cell)[: len(state)]
        if dtype != output.dtype:
            output, reads, last = output.to(dtype), reads.to(dtype), tuple(x.to(dtype) for x in last)
        memory = self.memory.public_state(results[4 : 4 + len(of_memory)], memory, sizes)
        return output, last, memory, reads


_answers: dict[tuple[Any, ...], bool] = {}  # not functools.cache, which torch.compile does not see through


def _answer(backend: str, device: torch.device, question: str, *values: Any) -> bool:
    """What the kernels of a backend answer on a device."""
    key = (device, question, *values)
    if key not in _answers:
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with on_device, _disable_current_modes():  # no part of what may be tracing this call
            _answers[key] = getattr(getattr(torch.ops, NAMESPACES[backend]), question)(*values)
    return _answers[key]


_answer._dynamo_marked_constant = True  # type: ignore[attr-defined] # for torch.compile, as _loading.missing


def fused(
    op: Op, backend: str, gates: Tensor, sizes: Sizes, controller: str, choices: tuple[int, ...]
) -> bool:
    """Whether the backend that serves the op takes the whole sequence in a call, not step by step: in CUDA where there is room
    for a network of these sizes. choices: the last of <op>_fits."""
    if backend != "cuda":
        return backend != "reference"
    numbers = (operator.index(sizes[axis]) for axis in "NDRH")  # not symbols, for torch.compile
    wide = gates.dtype == torch.float64
    return _answer("cuda", gates.device, f"{op.name}_fits", *numbers, NUMBERS[controller], *choices, wide)


def check_controller(controller: Any, state: Any, weights: tuple[Tensor | None, ...]) -> Sizes:
    """The sizes that follow from the controller, whose name, state and weights are there as it asks for them."""
    _checks.check_choice("controller", controller, tuple(CONTROLLERS))
    gates_per_unit, names = CONTROLLERS[controller]
    if not isinstance(state, tuple) or len(state) != len(names):
        came = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a tuple ({', '.join(names)}) of this controller, got {came}")
    for name, part in zip(names, state, strict=True):
        check_dense(f"state.{name}", part)
    hidden_size = _checks.check_shape("head_weight", weights[3], ("heads", "H"))[1]
    for name, value in zip(("hidden_weight", "hidden_bias"), weights[:2], strict=True):
        if not state and value is not None:
            came = type(value).__name__
            raise TypeError(f"{name} must be None for a feed-forward controller, got {came}")
        if state and value is None:
            raise TypeError(f"{name} must be a tensor, got NoneType")
    return {"H": hidden_size, "G": gates_per_unit * hidden_size}
