"""MemoryLayer: a controller with heads on a memory (Santoro et al. 2016, arXiv 1605.06065; Graves et al. 2014, 1410.5401;
Graves et al. 2016, Nature 538, 471)."""

# Annotations are not postponed here: Hugging Face's mixin for models reads those of __init__, to know what a file holds.
import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .._onnx import exporting
from .._state import check_dense, check_size
from ..ops._backend import chosen
from ..ops._checks import HALF_DTYPES, STATE_DTYPES, check_choice, check_flag
from . import controllers, sequences
from .base import Memory, MemoryWeights, check_sizes, stack_weights
from .registry import PRESETS, make_memory, name_of, options_of
from .sequences import Sequences
from .state import MemoryState, as_state, check_state, memory_dtype

MEMORY_STARTS = ("constant", "learned")

Input = TypeVar("Input", Tensor, PackedSequence)

# Of nn.LSTM, with what to do instead.
ELSEWHERE = {
    **dict.fromkeys(("num_layers", "dropout", "bidirectional"), "mann_fast.MemoryStack has it"),
    "proj_size": "output_size is the width of the output; the state is not projected",
}


class MemoryLayer(nn.Module):
    """A recurrent layer with an external memory; it goes where an ``nn.LSTM`` stood.

    At every step the controller sees the input and what the heads read at the step before; one linear layer on
    its hidden state gives each head what it addresses and writes with; the memory is written and read (by default as in
    Santoro et al. 2016, eqs. 2-8; see :func:`mann_fast.ops.lrua_step`). The output is the hidden state
    and the reads of the same step. The memory is no parameter: every sample has its own, and a call without a
    state starts from an empty one.

    Args:
        input_size: width of the input.
        hidden_size: width of the controller's hidden state.
        controller: "lstm", "gru", or "feedforward": one layer with tanh, which remembers by the memory alone; or a module of
            your own: ``hidden, state = module(z, state)`` with z [B, input_size + num_heads * slot_size], hidden [B,
            hidden_size], and its state a tuple of tensors [B, ...], () at the start of a sequence; at a reset within a call
            these tensors become 0.
        addressing: "lrua" (least recently used access: :class:`LRUA`), "ntm" (content, location and shift, with erase and add:
            :class:`NTM`), "content" (the same by content alone: :class:`Content`), "dnc" (Differentiable Neural Computer:
            :class:`DNC`) or "sparse" (K slots of up to millions: :class:`Sparse`); or a :class:`Memory` of your own.
        memory_start: "constant" (1e-6, as in Collier and Beel 2018, arXiv 1807.08518; of "dnc" 0, as in its paper) or
            "learned": a parameter, which starts there.
        output_size: None for hidden_size + num_heads * slot_size (hidden state, then the reads head by head),
            or the width of a linear projection of these.
        bias: whether controller, heads and projection have biases.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]. The state is not affected.
        device, dtype: of the parameters. Beside half-precision parameters the memory is float32.
        options: of the memory, with their defaults in its class. Of every memory: num_slots, slot_size, num_heads (N, D and R;
            128, 40 and 4). Of "lrua": sharpness, write_vector, order, write_target, usage_decay, eps; of "ntm":
            max_shift, order, eps; of "content": order, eps; of "dnc": link, masks, mask_min, deallocate, link_sharpening,
            clip, eps; of "sparse": num_reads, probes, threshold, eps. They are attributes of the layer, too.

    Attributes:
        controller: ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.Linear`` on [input, reads], or the module given.
        memory: the :class:`Memory`, which says what the heads compute.
        heads: ``nn.Linear`` from the hidden state to the values that the memory's step takes, in the order of its class.
        start: the learned start of the memory, a parameter [N, D], or None.
        projection: ``nn.Linear`` to output_size, or None.
        output_size: the width of the output, an int.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or an option that the memory does not have.
    """

    memory: Memory
    controller: nn.Module
    heads: nn.Linear
    start: nn.Parameter | None
    projection: nn.Linear | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        *,
        controller: str | nn.Module = "lstm",
        addressing: str | Memory = "lrua",
        memory_start: str = "constant",
        output_size: int | None = None,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        if output_size is not None:
            check_sizes(output_size=output_size)
        if not isinstance(controller, nn.Module):
            check_choice("controller", controller, tuple(controllers.MODULES))
        for name, instead in ELSEWHERE.items():
            if name in options:
                raise TypeError(f"{name} is no option of MemoryLayer: {instead}")
        memory = make_memory(addressing, options)
        check_choice("memory_start", memory_start, MEMORY_STARTS)
        for name, value in (("bias", bias), ("batch_first", batch_first)):
            check_flag(name, value)
        if dtype is not None and dtype not in STATE_DTYPES + HALF_DTYPES:
            raise TypeError(f"dtype must be a floating-point dtype of 16, 32 or 64 bits, got {dtype}")

        self.input_size, self.hidden_size = input_size, hidden_size
        self.kind = "module" if isinstance(controller, nn.Module) else controller
        self.memory_start, self.bias, self.batch_first = memory_start, bias, batch_first
        reads_size = memory.num_heads * memory.slot_size
        self.output_size = hidden_size + reads_size if output_size is None else output_size
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        if not isinstance(controller, nn.Module):
            controller = controllers.MODULES[controller](input_size + reads_size, hidden_size, **factory)
        self.controller = controller
        self.heads = nn.Linear(hidden_size, sum(memory.head_sizes()), **factory)
        self.projection = None
        if output_size is not None:
            self.projection = nn.Linear(hidden_size + reads_size, output_size, **factory)
        self.register_parameter("start", None)
        for name in options_of(memory):
            if name in ("memory", "addressing", "device", "dtype") or hasattr(self, name):
                raise ValueError(f"{name} cannot be an option of {name_of(memory)}: every MemoryLayer has it")
        self.memory = memory
        if memory_start == "learned":
            weight = self.heads.weight
            first = self._constant_state(1, weight.dtype, weight.device).memory[0]
            self.start = nn.Parameter(torch.empty_like(first[0], dtype=weight.dtype))
        self._adjust_parameters()

    @classmethod
    def preset(cls, name: str, input_size: int, **overrides: Any) -> "MemoryLayer":
        """A layer with the options of a published variant; see docs/variants.md.

        Args:
            name: "santoro2016" (Santoro et al. 2016, as written), "theano-ntm-one-shot", "snowkylin", "snowkylin-2"
                (implementations of it), "graves2014" (a Neural Turing Machine with its authors' sizes), "graves2016" or
                "csordas2019" (Differentiable Neural Computers with their authors' sizes and initial weights).
            input_size: width of the input.
            overrides: arguments of :class:`MemoryLayer` that take the place of the preset's.

        Raises:
            ValueError: an unknown name; TypeError, ValueError: as :class:`MemoryLayer`.
        """
        check_choice("name", name, tuple(PRESETS))
        options, forget_bias, draw = PRESETS[name]
        layer = cls(input_size, **{**options, **overrides})
        if draw is not None:
            with torch.no_grad():
                draw(layer)
        if forget_bias and isinstance(layer.controller, nn.LSTMCell):
            if layer.controller.bias_ih is None:
                raise ValueError(
                    f"bias must be True for the preset {name!r}, which adds to the forget gate's, got False"
                )
            size = layer.hidden_size
            with torch.no_grad():
                layer.controller.bias_ih[size : 2 * size] += forget_bias
        return layer

    @property
    def addressing(self) -> str:
        """The name of the memory; of one of your own that of its class."""
        return name_of(self.memory)

    # The memory's options are attributes of the layer: each has one place, also where it is changed later.
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            memory = self.__dict__.get("memory")
            if memory is None or name not in options_of(memory):
                raise
            return getattr(memory, name)

    def __setattr__(self, name: str, value: Any) -> None:
        memory = self.__dict__.get("memory")
        if memory is not None and name in options_of(memory):
            name, value = "memory", make_memory(memory, {name: value})
        super().__setattr__(name, value)

    def _adjust_parameters(self) -> None:
        with torch.no_grad():
            self.memory.adjust_heads(self.heads.weight)
            if self.start is not None:
                self.start.copy_(self._constant_state(1, self.start.dtype, self.start.device).memory[0][0])

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as for a new layer; a module of your own by its own ``reset_parameters``."""
        for name, module in self.named_children():
            if not hasattr(module, "reset_parameters"):
                raise TypeError(f"{name}, a {type(module).__name__}, has no reset_parameters")
            module.reset_parameters()  # type: ignore[operator]
        self._adjust_parameters()

    def flatten_parameters(self) -> None:
        """Does nothing: for programs that call ``nn.LSTM.flatten_parameters``."""

    def extra_repr(self) -> str:
        sizes = [field.name for field in fields(Memory)]
        shown = [f"{name}={getattr(self.memory, name)!r}" for name in sizes]
        defaults = {name: value for name, value in options_of(self.memory).items() if name not in sizes}
        options = {
            "controller": (self.kind, "module" if self.kind == "module" else "lstm"),
            "addressing": (self.addressing, "lrua"),
            **{name: (getattr(self.memory, name), default) for name, default in defaults.items()},
            "memory_start": (self.memory_start, "constant"),
            "bias": (self.bias, True),
            "batch_first": (self.batch_first, False),
        }
        shown += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])

    def initial_state(self, batch: int) -> MemoryState:
        """The state at the start of a sequence, which ``forward`` takes where none is given.

        Args:
            batch: B, an int of at least 0.

        Raises:
            TypeError, ValueError: a batch of the wrong type or value.
        """
        check_size("batch", batch, 0)
        state = self._constant_state(batch, *self._dtype_and_device())
        first, *rest = state.memory
        start = self._learned_start(first.dtype)
        if start is None:
            return state
        return state._replace(memory=type(state.memory)(start.repeat(batch, *(1,) * start.dim()), *rest))

    def _learned_start(self, dtype: torch.dtype) -> Tensor | None:
        if self.start is None:
            return None
        if type(self.start) not in controllers.PLAIN:
            controllers.check_whole("start", self.start)
        return self.start.to(dtype)

    def _dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """Of the parameters, without computing one that is parametrized; float32 on the CPU where none is floating-point, as of
        quantized modules."""
        for module in (self.heads, self.controller):
            weight = module._parameters.get("weight")
            if weight is None:  # nn.DataParallel's replicas have theirs as plain attributes
                weight = module.__dict__.get("weight")
            if weight is not None and weight.is_floating_point():
                return weight.dtype, weight.device
        parts = (part for part in self.parameters() if part.is_floating_point())
        part = next(parts, None)
        return (torch.float32, torch.device("cpu")) if part is None else (part.dtype, part.device)

    def _constant_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> MemoryState:
        """The start of a sequence where it is not learned."""
        reads = torch.zeros(batch, self.memory.num_heads, self.memory.slot_size, dtype=dtype, device=device)
        names = controllers.state_names(self.kind)
        memory = self.memory.initial_state(batch, dtype=memory_dtype(dtype), device=device)
        return MemoryState(tuple(reads.new_zeros(batch, self.hidden_size) for _ in names), memory, reads)

    @overload
    def forward(
        self,
        x: Input,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: Literal[False] = False,
    ) -> tuple[Input, MemoryState]: ...

    @overload
    def forward(
        self,
        x: Input,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: Literal[True],
    ) -> tuple[Input, MemoryState, MemoryWeights]: ...

    @overload
    def forward(
        self,
        x: Input,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: bool,
    ) -> tuple[Input, MemoryState] | tuple[Input, MemoryState, MemoryWeights]: ...

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Any, MemoryState] | tuple[Any, MemoryState, MemoryWeights]:
        """Run over a sequence.

        Under ``torch.autocast`` a float32 layer computes as if it, x and state had been converted to the
        autocast dtype, in which output and state then come back.

        Args:
            x: [T, B, input_size], [B, T, input_size] with batch_first, or [T, input_size] unbatched; of the
                parameters' dtype and device. T and B may be 0. Or a PackedSequence.
            state: what an earlier call returned, or None for the start of a sequence; the same tensors in plain nested tuples
                or lists will do. A state carried over two halves of a sequence gives the output of the whole; in half
                precision it is rounded where it is cut.
            resets: bool [T, B], laid out as x. Where True, that sample goes back to the start of a sequence before that step:
                the memory to its start, learned or not, the controller's state (also of a module of your own, tensor by
                tensor) and the reads to 0. Nothing of the steps before reaches those after, no value and no gradient.
            lengths: int64 [B], [] unbatched, each within [0, T]. A sample takes part in its first steps alone: its later output
                is 0, its state the one after its last step (of length 0 the one that came in; zeros, where a controller of your
                own had none), and what x and resets hold later reaches nothing and has a gradient of exactly 0. (Not beside a
                PackedSequence, which has its lengths.)
            return_weights: also return where the heads were at every step; slower, one step after the other.

        Returns:
            output [T, B, output_size] (laid out as x; of a PackedSequence one of the same batch_sizes and indices), and the
            state after the last step, in the order of the batch before it was sorted; with ``return_weights`` also
            :class:`MemoryWeights`, always time first and with the axis B, in the memory's dtype; 0 beyond a sample's length.

        Raises:
            TypeError, ValueError: wrong type, shape, dtype or value of x, state, resets or lengths; RuntimeError: wrong device.
        """
        if return_weights is not False:
            check_flag("return_weights", return_weights)
        if state is not None and lengths is None and not (return_weights or torch.is_grad_enabled()):
            quick = self._quickly(x, state, resets)
            if quick is not None:
                return quick
        if isinstance(x, PackedSequence) and torch.compiler.is_compiling():
            return sequences.packed_uncompiled(
                self.forward, x, state, resets=resets, lengths=lengths, return_weights=return_weights
            )
        dtype, on = self._dtype_and_device()
        packed = x if isinstance(x, PackedSequence) else None
        x = self._check_input(x, on)
        if state is not None:
            state = as_state(state, self.memory.state_like, self._state_names)
        if packed is None:
            known = sequences.of_padded(x, resets, lengths, self.batch_first)
        else:
            known = sequences.of_packed(packed, resets, lengths)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and x.is_floating_point() and torch.float64 not in (dtype, x.dtype):
            dtype = torch.get_autocast_dtype(device)
            if state is not None:
                state = state.to(dtype)
            with torch.autocast(device, enabled=False):
                output, *rest = self._forward(x.to(dtype), state, known, return_weights)
        elif x.dtype != dtype:
            name = "x" if packed is None else "x.data"
            raise TypeError(f"{name} must have the dtype of the parameters, {dtype}, got {x.dtype}")
        else:
            output, *rest = self._forward(x, state, known, return_weights)
        return (output if packed is None else packed._replace(data=output), *rest)

    if TYPE_CHECKING:
        __call__ = forward

    def _quickly(self, x: Any, state: Any, resets: Tensor | None) -> tuple[Tensor, MemoryState] | None:
        """A step of a rollout, whose time is Python's: where the state is one that a layer gives, what
        :func:`mann_fast.ops.cell` checks is all that there is to check. None where it is not, or does not fit, which the long
        way says."""
        weight: Any = self._modules["heads"]._parameters.get("weight")  # type: ignore[union-attr]
        try:
            if (
                type(x) is not Tensor
                or x.dtype != weight.dtype  # None of a parametrized one
                or x.layout is not torch.strided
                or x.dim() != 3
                or type(state) is not MemoryState
                or type(state.memory) is not self.memory.state_like.type
                or state.memory[0].shape[1:] != self.memory.state_like.parts[0][1]
                or not self.memory.fused
                or self.kind == "module"
                or torch.compiler.is_compiling()
                or torch.jit.is_tracing()  # type: ignore[attr-defined]
                or torch._C._is_any_autocast_enabled()
                or self._obstacle()
            ):
                return None
            if self.batch_first:
                x, resets = x.transpose(0, 1), None if resets is None else resets.t()
            output, state = self._run(x, state, Sequences(resets))
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None
        if self.projection is not None:
            output = controllers.linear("projection", self.projection, output)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward(
        self, x: Tensor, state: MemoryState | None, known: Sequences, return_weights: bool
    ) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, MemoryWeights]:
        """Bring x and state to [T, B, ...] and [B, ...], and the results back. Of a PackedSequence, x and output are rows."""
        packed = known.rows is not None
        batched = x.dim() == 3 or packed
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first and not packed:
            x = x.transpose(0, 1)
        steps, batch = (known.rows.steps, known.rows.batch) if known.rows is not None else x.shape[:2]
        if torch.jit.is_tracing() and steps == 0:  # type: ignore[attr-defined]
            raise ValueError(
                "x must have T >= 1 in torch.jit.trace: no step is what it would go on doing, got T = 0"
            )
        if state is None:
            state = self.initial_state(batch).to(x.dtype)
        else:
            self._check_state(state, x, (batch,) if batched else ())
            if not batched:
                state = state.map(lambda part: part.unsqueeze(0))
        weights: MemoryWeights | None = None
        one_call = self.memory.fused and self.kind != "module" and not return_weights
        # Where that call would be a loop, a compiler takes one step for all sooner.
        if one_call and self.memory.scans:
            one_call = chosen(x.device.type) == "cpp" or not self._scans(x)
        if one_call and not self._has_to_call():
            output, state = self._run(x, state, known)
        else:
            output, state, weights = self._run_by_steps(x, state, known, return_weights)
        if known.rows is not None:
            output = known.rows.take(output)
        if self.projection is not None:
            project = partial(controllers.linear, "projection", self.projection)
            taken = None if packed else known.taken
            plain = (
                taken is not None and controllers.obstacle("projection", self.projection, nn.Linear) is None
            )
            with self._calling(x.dtype):
                output = sequences.each(project, output, taken, by_rows=plain)
        if not batched:
            output, state = output.squeeze(1), state.map(lambda part: part.squeeze(0))
        elif self.batch_first and not packed:
            output = output.transpose(0, 1)
        return (output, state) if weights is None else (output, state, weights)

    def _obstacle(self) -> str | None:
        """Why controller or heads do what their parameters do not say; None where they do not."""
        modules: Any = self._modules  # sooner than attributes
        why = controllers.obstacle("heads", modules["heads"], nn.Linear)
        return why or controllers.obstacle(
            "controller", modules["controller"], controllers.MODULES[self.kind]
        )

    def _has_to_call(self) -> bool:
        """Whether controller or heads do what their parameters do not say; warns of what that costs."""
        why = self._obstacle()
        if why and not torch.compiler.is_compiling():
            warnings.warn(
                f"MemoryLayer goes one step after the other, which is slower, for {why}", stacklevel=6
            )
        return why is not None

    def _calling(self, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
        """In which submodules compute in this dtype. It keeps no converted weights: the gradients of every step are summed in
        the parameters' own dtype."""
        own, device = self._dtype_and_device()
        if dtype == own:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype, cache_enabled=False)

    def _run(self, x: Tensor, state: MemoryState, known: Sequences) -> tuple[Tensor, MemoryState]:
        """All steps, in x's dtype: hidden states and reads [T, B, H + R D], and the last state."""
        modules: Any = self._modules  # sooner than attributes
        weight, bias, hidden_weight, hidden_bias = controllers.weights(modules["controller"], x.dtype)
        head_weight, head_bias, *_ = controllers.weights(modules["heads"], x.dtype)
        sizes = [self.input_size, weight.shape[1] - self.input_size]
        input_weight, reads_weight = weight.split_with_sizes(sizes, 1)

        def of_input(x: Tensor) -> Tensor:  # one product for all steps
            return F.linear(x, input_weight, bias)

        given: dict[str, Tensor | None] = {}
        if known.resets is not None:
            given = {"resets": known.resets, "start": self._learned_start(state.memory[0].dtype)}
        if known.lengths is not None:
            given["lengths"] = known.lengths
        output, controller, memory, reads = self.memory.cell(
            sequences.each(of_input, x, known.taken) if known.rows is None else known.rows.put(of_input(x)),
            *state,
            hidden_weight,
            hidden_bias,
            reads_weight,
            head_weight,
            head_bias,
            controller=self.kind,
            **given,
        )
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined] # it may run where gradients are asked for
        if self.projection is None and known.rows is None and (output.requires_grad or traced):
            output = output.clone()  # backward needs it as it is; callers may change theirs in place
        return output, MemoryState(controller, memory, reads)

    def _run_by_steps(
        self, x: Tensor, state: MemoryState, known: Sequences, record: bool
    ) -> tuple[Tensor, MemoryState, MemoryWeights | None]:
        """The same one step after the other, with the weights of each where ``record``."""
        taken, begins = known.taken, known.begins
        ended = None if taken is None else ~taken
        if known.rows is not None:
            x = known.rows.put(x, 1)
        elif taken is not None:
            x = torch.where(taken.unsqueeze(2), x, 1)
        scans = self._scans(x) and not record
        # For a scan it is made of the parameters inside: torch.export warns of a closure over what has a history.
        first = None if begins is None or scans else self.initial_state(1).to(x.dtype)
        start, calling = state, self._calling(x.dtype)

        def step(
            now: Tensor, begins: Tensor | None, ended: Tensor | None, state: MemoryState
        ) -> tuple[Tensor, MemoryState, MemoryWeights | None]:
            before = state
            if begins is not None:
                state = sequences.restart(state, begins, first or self.initial_state(1).to(x.dtype))
            output, state, weights = self._step(now, state, record, calling)
            return output, state if ended is None else sequences.keep(state, ended, before), weights

        outputs, recorded = [], []
        if scans:
            output, state = sequences.scan_steps(step, x, begins, ended, state)
        elif x.shape[0]:
            flags = (sequences.each_step(part, x.shape[0]) for part in (begins, ended))
            for now, begins_now, ended_now in zip(x.unbind(0), *flags, strict=True):
                output, state, weights = step(now, begins_now, ended_now, state)
                outputs.append(output)
                recorded.append(weights)
            output = torch.stack(outputs)
        else:
            output = x.new_empty(0, x.shape[1], self.hidden_size + state.reads.shape[1:].numel())
            state = start.clone()
        if taken is not None:
            output = torch.where(taken.unsqueeze(2), output, 0)
        if not record:
            return output, state, None
        if not recorded:  # a step for its sizes
            values = x.new_zeros(x.shape[1], sum(self.memory.head_sizes()))
            recorded.append(self._access(values, state.memory, record)[2])
        return output, state, sequences.mask_weights(stack_weights(recorded, x.shape[0]), taken)

    def _scans(self, x: Tensor) -> bool:
        """Whether a compiler that may run the steps for another T can take one of them for all. (torch.compile does not say
        whether T is a symbol, torch.export does.)"""
        if not (self.memory.scans and torch.compiler.is_compiling()) or self.kind == "module" or exporting():
            return False
        symbolic = torch.compiler.is_dynamo_compiling() or isinstance(x.shape[0], torch.SymInt)
        return symbolic and x.shape[0] > 0 and not self._has_to_call()

    def _step(
        self, now: Tensor, state: MemoryState, record: bool, calling: contextlib.AbstractContextManager[Any]
    ) -> tuple[Tensor, MemoryState, MemoryWeights | None]:
        """One step of input [B, input_size]: hidden state and reads [B, H + R D], the next state, and the weights where
        ``record``. ``calling``: :meth:`_calling`, once for all steps."""
        controller, memory, reads = state
        z = torch.cat([now, reads.flatten(1)], dim=1)
        with calling:
            hidden, controller = controllers.step(self.kind, self.controller, z, controller, self.hidden_size)
            values = controllers.linear("heads", self.heads, hidden)
        expected = [now.shape[0], sum(self.memory.head_sizes())]
        if not isinstance(values, Tensor) or list(values.shape) != expected:
            came = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"heads must return values of shape [B, V] = {expected}, got {came}")
        reads, memory, weights = self._access(values, memory, record)
        return torch.cat([hidden, reads.flatten(1)], dim=1), MemoryState(controller, memory, reads), weights

    def _access(self, values: Tensor, state: Any, record: bool) -> tuple[Tensor, Any, MemoryWeights | None]:
        """A step of the memory, by the values of the heads."""
        reads, state, weights = self.memory.step(state, self.memory.split(values), record)
        shape = (values.shape[0], self.memory.num_heads, self.memory.slot_size)
        if reads.shape != shape or reads.dtype != values.dtype:
            expected, came = f"{list(shape)} in {values.dtype}", f"{list(reads.shape)} in {reads.dtype}"
            raise ValueError(f"{self.addressing}.step must give reads [B, R, D] = {expected}, got {came}")
        if not isinstance(state, self.memory.state_like.type):
            kind = self.memory.state_like.type.__name__
            raise TypeError(
                f"{self.addressing}.step must give a state of type {kind}, got {type(state).__name__}"
            )
        if record and weights is None:
            raise TypeError(f"{self.addressing}.step must give MemoryWeights where they are asked for")
        return reads, state, weights

    def _check_input(self, x: object, device: torch.device) -> Tensor:
        """x, or the rows of a PackedSequence."""
        layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        name, layout, dims = "x", f"{layout} or [T, input_size]", {2, 3}
        if isinstance(x, PackedSequence):
            name, x, layout, dims = "x.data", x.data, "[rows, input_size]", {2}
        check_dense(name, x)
        assert isinstance(x, Tensor)
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            expected = f"{layout} with input_size = {self.input_size}"
            raise ValueError(f"{name} must have shape {expected}, got {list(x.shape)}")
        if x.device != device:
            raise RuntimeError(f"{name} must be on the device of the parameters, {device}, got {x.device}")
        return x

    @property
    def _state_names(self) -> tuple[str, ...] | None:
        # What a module of the user's own keeps is its own to check.
        return None if self.kind == "module" else controllers.state_names(self.kind)

    def _check_state(self, state: MemoryState, x: Tensor, batch: tuple[int, ...]) -> None:
        sizes = (self.hidden_size, self.memory.num_heads, self.memory.slot_size)
        check_state(state, self.memory.state_like, self._state_names, sizes, x, batch)
