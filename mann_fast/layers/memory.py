"""MemoryLayer: a controller with heads on a memory (Santoro et al. 2016, arXiv 1605.06065; Graves et al. 2014, 1410.5401)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops import _checks
from ..ops.cell import CONTROLLERS, WRITE_VECTORS, check_sharpness, head_sizes
from ..ops.lrua import raw_options
from ..reference.cell import split_heads
from . import _ntm

# Keys and write vectors start so much larger than nn.Linear would make them: else all are near 0 and alike,
# and what is read is lost beside the input.
VECTOR_GAIN = 3.0

OPTIONS = ("order", "write_target", "usage_decay", "eps")  # of ops.lrua_step
MEMORY_STARTS = ("constant", "learned")


# What the paper and its best known implementations compute; docs/variants.md says how far each is from its original.
PRESETS = {
    "santoro2016": {"write_vector": "key", "sharpness": None, "write_target": "shared"},
    "theano-ntm-one-shot": {"sharpness": None},
    "snowkylin": {"sharpness": None, "write_target": "shared", "order": "read_first", "eps": 1e-16},
    "snowkylin-2": {"sharpness": None, "write_target": "shared", "eps": 1e-12},
    "graves2014": {"addressing": "ntm", "hidden_size": 100, "slot_size": 20, "num_heads": 1},
}
FORGET_BIAS = {"snowkylin": 1.0, "snowkylin-2": 1.0}  # of the LSTM, above what a new one has


class MemoryState(NamedTuple):
    """What a MemoryLayer carries from one call to the next.

    controller: (hidden, cell) of an LSTM, (hidden,) of a GRU, each [B, hidden_size], () of a feed-forward one, or the state of
    a module of the user's own. memory: :class:`mann_fast.ops.LRUAState` of [B, N, D], [B, R, N] and [B, N], or
    :class:`mann_fast.ops.NTMState`. reads: [B, R, D], what the heads read last. After a call on unbatched input no tensor
    has the axis B. All are of the layer's dtype, but the memory is float32 in half precision.
    """

    controller: tuple[Tensor, ...]
    memory: ops.LRUAState | ops.NTMState
    reads: Tensor

    def _map(self, function: Callable[..., Tensor], *others: MemoryState) -> MemoryState:
        """``function`` of every tensor, and of the tensors in the same place of other states."""
        states = (self, *others)
        return MemoryState(
            tuple(map(function, *(state.controller for state in states))),
            type(self.memory)(*map(function, *(state.memory for state in states))),
            function(*(state.reads for state in states)),
        )

    def detach(self) -> MemoryState:
        """The same numbers without their history, for truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> MemoryState:
        """Move or convert, as ``Tensor.to``; beside a half-precision dtype the memory is float32."""
        reads = self.reads.to(*args, **kwargs)
        dtype = _memory_dtype(reads.dtype)
        memory = type(self.memory)(*(x.to(reads.device, dtype) for x in self.memory))
        return MemoryState(tuple(x.to(*args, **kwargs) for x in self.controller), memory, reads)

    def reset(self, mask: Tensor, start: MemoryState | None = None) -> MemoryState:
        """Take the samples where ``mask`` is True back to the start of a sequence, and leave the others.

        Differentiable; no gradient passes a reset to what was before it.

        Args:
            mask: bool [B], on the device of the state; of shape [] for an unbatched state.
            start: the state to start from, of one sample: ``layer.initial_state(1)`` of a layer whose memory_start is
                "learned"; by default the constant one.

        Raises:
            TypeError, ValueError: not a bool tensor of that shape, a start of more samples or other sizes; RuntimeError: on
                another device.
        """
        batch, reads = self.reads.shape[:-2], self.reads
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {came}")
        if mask.shape != batch:
            raise ValueError(f"mask must have shape {list(batch)}, got {list(mask.shape)}")
        if mask.device != reads.device:
            raise RuntimeError(f"mask must be on the device of the state, {reads.device}, got {mask.device}")

        def choose(now: Tensor, start: Tensor) -> Tensor:
            return torch.where(mask.view(*mask.shape, *(1,) * (now.dim() - mask.dim())), start[0], now)

        if start is None:
            memory, one = self.memory, reads.new_zeros(1, *reads.shape[-2:])
            controller = tuple(torch.zeros_like(x[:1] if batch else x.unsqueeze(0)) for x in self.controller)
            start = _initial_state(one, memory.memory.shape[-2], controller, type(memory))
        elif start.reads.shape != (1, *reads.shape[-2:]):
            expected = [1, *reads.shape[-2:]]
            raise ValueError(
                f"start must be of one sample, its reads of shape {expected}, got {list(start.reads.shape)}"
            )
        return self._map(choose, start)


def _memory_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _checks.HALF_DTYPES else dtype


def _initial_state(
    reads: Tensor,
    num_slots: int,
    controller: tuple[Tensor, ...],
    kind: type[ops.LRUAState] | type[ops.NTMState],
) -> MemoryState:
    """The start of a sequence, for reads [B, R, D] and a controller's state of zeros."""
    batch, num_heads, slot_size = reads.shape
    heads = (num_heads,) if kind is ops.LRUAState else (num_heads, num_heads)
    factory = {"dtype": _memory_dtype(reads.dtype), "device": reads.device}
    return MemoryState(controller, kind.initial(batch, num_slots, slot_size, *heads, **factory), reads)


def check_sizes(**sizes: object) -> None:
    """Positive ints."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


class MemoryWeights(NamedTuple):
    """Where the heads were at every step: read and write, [T, B, R, N]; usage after it, [T, B, N], with "lrua", else None."""

    read: Tensor
    write: Tensor
    usage: Tensor | None


class MemoryLayer(nn.Module):
    """A recurrent layer with an external memory; it goes where an ``nn.LSTM`` stood.

    At every step the controller sees the input and what the heads read at the step before; one linear layer on
    its hidden state gives each head a key, a write vector, a gate and a sharpness; the memory is written and
    read (Santoro et al. 2016, eqs. 2-8; see :func:`mann_fast.ops.lrua_step`). The output is the hidden state
    and the reads of the same step. The memory is no parameter: every sample has its own, and a call without a
    state starts from an empty one.

    Args:
        input_size: width of the input.
        hidden_size: width of the controller's hidden state.
        num_slots, slot_size, num_heads: N, D and R of the memory; 1 <= R <= N. Each head reads and writes; with "ntm" and
            "content" there are R read heads and R write heads.
        controller: "lstm", "gru", or "feedforward": one layer with tanh, which remembers by the memory alone; or a module of
            your own: ``hidden, state = module(z, state)`` with z [B, input_size + num_heads * slot_size], hidden [B,
            hidden_size], and its state a tuple of tensors [B, ...], () at the start of a sequence.
        addressing: "lrua" (least recently used access), "ntm" (content, location and shift, with erase and add:
            :func:`mann_fast.ops.ntm_step`) or "content" (the same by content alone). sharpness, write_vector, write_target
            and usage_decay belong to "lrua"; the others learn their sharpness and have erase and add vectors.
        max_shift: S of "ntm": a head may move by up to S slots.
        sharpness: factor on the similarity before the softmax: "learned" (1 + 10 softplus of a linear layer),
            a number, or None for 1, as in the paper.
        write_vector: "separate" (what a head writes has a linear layer of its own) or "key" (a head writes
            its key, as in the paper).
        order, write_target, usage_decay, eps: see :func:`mann_fast.ops.lrua_step`. order None: "write_first" with "lrua",
            "read_first" with the others, as in their papers.
        memory_start: "constant" (1e-6, as in Collier and Beel 2018, arXiv 1807.08518) or "learned": a parameter, which
            starts there.
        output_size: None for hidden_size + num_heads * slot_size (hidden state, then the reads head by head),
            or the width of a linear projection of these.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]. The state is not affected.
        device, dtype: of the parameters. Beside half-precision parameters the memory is float32.

    Attributes:
        controller: ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.Linear`` on [input, reads], or the module given.
        heads: ``nn.Linear`` to keys (R D), write vectors (R D), gates (R) and sharpness (R), in this order,
            without those that the options leave out. With "ntm", for the read heads and then for the write heads: keys (R D),
            sharpness (R), gates (R), shifts (R (2S + 1)), sharpening (R); then erase (R D) and add (R D).
        start: the learned start of the memory, a parameter [N, D], or None.
        projection: ``nn.Linear`` to output_size, or None.
        output_size: the width of the output, an int.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        *,
        num_slots: int = 128,
        slot_size: int = 40,
        num_heads: int = 4,
        controller: str | nn.Module = "lstm",
        addressing: str = "lrua",
        max_shift: int = 1,
        sharpness: str | float | None = "learned",
        write_vector: str = "separate",
        order: str | None = None,
        write_target: str = "per_head",
        usage_decay: float = 0.95,
        eps: float = 1e-6,
        memory_start: str = "constant",
        output_size: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_slots=num_slots)
        check_sizes(slot_size=slot_size, num_heads=num_heads)
        if output_size is not None:
            check_sizes(output_size=output_size)
        if num_heads > num_slots:
            raise ValueError(f"num_heads must be at most num_slots = {num_slots}, got {num_heads}")
        if not isinstance(controller, nn.Module):
            _checks.check_choice("controller", controller, tuple(CONTROLLERS))
        _checks.check_choice("addressing", addressing, _ntm.ADDRESSINGS)
        if isinstance(max_shift, bool) or not isinstance(max_shift, int):
            raise TypeError(f"max_shift must be an int, got {type(max_shift).__name__}")
        if max_shift < 0:
            raise ValueError(f"max_shift must be at least 0, got {max_shift}")
        if order is None:
            order = "write_first" if addressing == "lrua" else "read_first"
        check_sharpness(sharpness)
        _checks.check_choice("write_vector", write_vector, WRITE_VECTORS)
        raw_options(order, write_target, usage_decay, eps)
        _checks.check_choice("memory_start", memory_start, MEMORY_STARTS)
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first must be a bool, got {type(batch_first).__name__}")
        if dtype is not None and dtype not in _checks.STATE_DTYPES + _checks.HALF_DTYPES:
            raise TypeError(f"dtype must be a floating-point dtype of 16, 32 or 64 bits, got {dtype}")

        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_slots, self.slot_size, self.num_heads = num_slots, slot_size, num_heads
        self.kind = "module" if isinstance(controller, nn.Module) else controller
        self.addressing, self.max_shift = addressing, max_shift
        self.sharpness, self.write_vector = sharpness, write_vector
        self.order, self.write_target, self.usage_decay, self.eps = order, write_target, usage_decay, eps
        self.memory_start, self.batch_first = memory_start, batch_first

        reads_size = num_heads * slot_size
        if addressing == "lrua":
            sizes = head_sizes(num_heads, slot_size, write_vector, sharpness)
            self._vectors_size = sizes[0]
        else:
            sizes = _ntm.head_sizes(num_heads, slot_size, max_shift, addressing)
            self._vectors_size = 0
        self.output_size = hidden_size + reads_size if output_size is None else output_size
        factory = {"device": device, "dtype": dtype}
        kinds = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "feedforward": nn.Linear}
        if self.kind != "module":
            controller = kinds[controller](input_size + reads_size, hidden_size, **factory)
        self.controller = controller
        self.heads = nn.Linear(hidden_size, sum(sizes), **factory)
        self.projection = None
        if output_size is not None:
            self.projection = nn.Linear(hidden_size + reads_size, output_size, **factory)
        learned = memory_start == "learned"
        start = nn.Parameter(torch.empty(num_slots, slot_size, **factory)) if learned else None
        self.register_parameter("start", start)
        self._adjust_parameters()

    @classmethod
    def preset(cls, name: str, input_size: int, **overrides) -> MemoryLayer:
        """A layer with the options of a published variant; see docs/variants.md.

        Args:
            name: "santoro2016" (Santoro et al. 2016, as written), "theano-ntm-one-shot", "snowkylin", "snowkylin-2"
                (implementations of it), or "graves2014" (a Neural Turing Machine with its authors' sizes).
            input_size: width of the input.
            overrides: arguments of :class:`MemoryLayer` that take the place of the preset's.

        Raises:
            ValueError: an unknown name; TypeError, ValueError: as :class:`MemoryLayer`.
        """
        _checks.check_choice("name", name, tuple(PRESETS))
        layer = cls(input_size, **{**PRESETS[name], **overrides})
        if name in FORGET_BIAS and layer.kind == "lstm":
            size = layer.hidden_size
            with torch.no_grad():
                layer.controller.bias_ih[size : 2 * size] += FORGET_BIAS[name]
        return layer

    def _adjust_parameters(self) -> None:
        with torch.no_grad():
            self.heads.weight[: self._vectors_size] *= VECTOR_GAIN
            if self.start is not None:
                reads = self.start.new_zeros(1, self.num_heads, self.slot_size)
                constant = _initial_state(reads, self.num_slots, (), self._memory_kind)
                self.start.copy_(constant.memory.memory[0])

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as for a new layer; a controller of your own by its own ``reset_parameters``."""
        for module in self.children():
            module.reset_parameters()
        self._adjust_parameters()

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self, name)}" for name in ("num_slots", "slot_size", "num_heads")]
        defaults = MemoryLayer.__init__.__kwdefaults__
        defaults = {**defaults, "order": "write_first" if self.addressing == "lrua" else "read_first"}
        for name in (
            "controller", "addressing", "max_shift", "sharpness", "write_vector", *OPTIONS, "memory_start", "batch_first",
        ):  # fmt: skip
            value = getattr(self, "kind" if name == "controller" else name)
            if value != defaults[name] and value != "module":
                shown.append(f"{name}={value!r}")
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])

    def initial_state(self, batch: int) -> MemoryState:
        """The state at the start of a sequence, which ``forward`` takes where none is given."""
        reads = self.heads.weight.new_zeros(batch, self.num_heads, self.slot_size)
        names = () if self.kind == "module" else CONTROLLERS[self.kind][1]
        controller = tuple(reads.new_zeros(batch, self.hidden_size) for _ in names)
        state = _initial_state(reads, self.num_slots, controller, self._memory_kind)
        if self.start is None:
            return state
        memory = self.start.to(state.memory.memory.dtype).repeat(batch, 1, 1)
        return state._replace(memory=state.memory._replace(memory=memory))

    @property
    def _memory_kind(self) -> type[ops.LRUAState] | type[ops.NTMState]:
        return ops.LRUAState if self.addressing == "lrua" else ops.NTMState

    def forward(
        self, x: Tensor, state: MemoryState | None = None, *, return_weights: bool = False
    ) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, MemoryWeights]:
        """Run over a sequence.

        Under ``torch.autocast`` a float32 layer computes as if it, x and state had been converted to the
        autocast dtype, in which output and state then come back.

        Args:
            x: [T, B, input_size], [B, T, input_size] with batch_first, or [T, input_size] unbatched; of the
                parameters' dtype and device. T and B may be 0.
            state: what an earlier call returned, or None for the start of a sequence. A state carried over
                two halves of a sequence gives the output of the whole; in half precision it is rounded where it is cut.
            return_weights: also return where the heads were at every step; slower, one step after the other.

        Returns:
            output [T, B, output_size] (laid out as x), and the state after the last step; with ``return_weights`` also
            :class:`MemoryWeights`, always time first and with the axis B, in the memory's dtype.

        Raises:
            TypeError, ValueError: wrong type, shape or dtype of x or state; RuntimeError: wrong device.
        """
        self._check_input(x)
        dtype, device = self.heads.weight.dtype, x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and x.is_floating_point() and torch.float64 not in (dtype, x.dtype):
            dtype = torch.get_autocast_dtype(device)
            if isinstance(state, MemoryState):
                state = state.to(dtype)
            with torch.autocast(device, enabled=False):
                return self._forward(x.to(dtype), state, return_weights)
        if x.dtype != dtype:
            raise TypeError(f"x must have the dtype of the parameters, {dtype}, got {x.dtype}")
        return self._forward(x, state, return_weights)

    def _forward(self, x: Tensor, state: MemoryState | None, return_weights: bool):
        """Bring x and state to [T, B, ...] and [B, ...], and the results back."""
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if state is None:
            state = self.initial_state(x.shape[1]).to(x.dtype)
        else:
            self._check_state(state, x, batched)
            if not batched:
                state = state._map(lambda part: part.unsqueeze(0))
        weights = ()
        if self.addressing == "lrua" and self.kind != "module" and not return_weights:
            output, state = self._run(x, state)
        else:
            output, state, *weights = self._run_by_steps(x, state, return_weights)
        if self.projection is not None:
            output = F.linear(output, self.projection.weight.to(x.dtype), self.projection.bias.to(x.dtype))
        if not batched:
            return output.squeeze(1), state._map(lambda part: part.squeeze(0)), *weights
        return output.transpose(0, 1) if self.batch_first else output, state, *weights

    def _run(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """All steps, in x's dtype: hidden states and reads [T, B, H + R D], and the last state."""
        cell, of_hidden = self.controller, (None, None)
        if self.kind == "feedforward":
            weight, bias = cell.weight, cell.bias
        else:
            weight, bias = cell.weight_ih, cell.bias_ih
            of_hidden = cell.weight_hh.to(x.dtype), cell.bias_hh.to(x.dtype)
        reads_size = self.num_heads * self.slot_size
        input_weight, reads_weight = weight.to(x.dtype).split([self.input_size, reads_size], dim=1)
        output, controller, memory = ops.cell(
            F.linear(x, input_weight, bias.to(x.dtype)),  # the input's part is one product for all steps
            *state,
            *of_hidden,
            reads_weight,
            self.heads.weight.to(x.dtype),
            self.heads.bias.to(x.dtype),
            controller=self.kind,
            write_vector=self.write_vector,
            sharpness=self.sharpness,
            **{name: getattr(self, name) for name in OPTIONS},
        )
        reads = state.reads.clone() if x.shape[0] == 0 else output[-1, :, self.hidden_size :].clone()
        return output, MemoryState(controller, memory, reads.view_as(state.reads))

    def _run_by_steps(self, x: Tensor, state: MemoryState, record: bool):
        """The same one step after the other, for what :func:`mann_fast.ops.cell` does not do."""
        controller, memory, reads = state
        outputs, recorded = [], []
        for now in x.unbind(0):
            hidden, controller = self._control(torch.cat([now, reads.flatten(1)], dim=1), controller)
            values = F.linear(hidden, self.heads.weight.to(x.dtype), self.heads.bias.to(x.dtype))
            reads, memory, written = self._access(values, memory, record)
            outputs.append(torch.cat([hidden, reads.flatten(1)], dim=1))
            if record:
                usage = memory.usage if self.addressing == "lrua" else None
                recorded.append((memory.read_weights, written, usage))
        if outputs:
            output = torch.stack(outputs)
        else:
            output = x.new_empty(0, x.shape[1], self.hidden_size + self.num_heads * self.slot_size)
            controller, memory, reads = state._map(torch.clone)
        state = MemoryState(controller, memory, reads)
        if not record:
            return output, state
        if recorded:
            parts = (None if part[0] is None else torch.stack(part) for part in zip(*recorded, strict=True))
            return output, state, MemoryWeights(*parts)
        nothing = memory.read_weights.new_empty(0, *memory.read_weights.shape)
        usage = memory.usage.new_empty(0, *memory.usage.shape) if self.addressing == "lrua" else None
        return output, state, MemoryWeights(nothing, nothing.clone(), usage)

    def _control(self, z: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The controller's hidden state and state, from input and reads [B, input_size + R D]."""
        if self.kind == "module":
            hidden, state = self.controller(z, state)
            if not isinstance(hidden, Tensor) or hidden.shape != (z.shape[0], self.hidden_size):
                shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                expected = [z.shape[0], self.hidden_size]
                raise ValueError(
                    f"controller must return hidden of shape [B, hidden_size] = {expected}, got {shape}"
                )
            if not isinstance(state, tuple):
                raise TypeError(f"controller must return its state as a tuple, got {type(state).__name__}")
            return hidden, state
        weights = [parameter.to(z.dtype) for parameter in self.controller.parameters()]
        if self.kind == "feedforward":
            return torch.tanh(F.linear(z, *weights)), ()
        if self.kind == "gru":
            hidden = torch.gru_cell(z, *state, *weights)
            return hidden, (hidden,)
        state = torch.lstm_cell(z, state, *weights)
        return state[0], state

    def _access(self, values: Tensor, memory: ops.LRUAState | ops.NTMState, record: bool):
        """What the heads read, the memory after the step and, where they are wanted, the write weights."""
        sizes = (self.num_heads, self.slot_size)
        if self.addressing != "lrua":
            heads = _ntm.split_heads(values, *sizes, self.max_shift, self.addressing)
            reads, memory = ops.ntm_step(memory, *heads, order=self.order, eps=self.eps)
            return reads, memory, memory.write_weights
        key, vector, gate, beta = split_heads(values, *sizes, self.write_vector, self.sharpness)
        written = None
        if record:
            written = ops.lrua_write(*memory, vector, gate, write_target=self.write_target)[1]
        options = {name: getattr(self, name) for name in OPTIONS}
        return *ops.lrua_step(memory, key, vector, gate, beta, **options), written

    def _check_input(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            expected = f"{layout} or [T, input_size] with input_size = {self.input_size}"
            raise ValueError(f"x must have shape {expected}, got {list(x.shape)}")
        device = self.heads.weight.device
        if x.device != device:
            raise RuntimeError(f"x must be on the device of the parameters, {device}, got {x.device}")

    def _check_state(self, state: object, x: Tensor, batched: bool) -> None:
        if not isinstance(state, MemoryState):
            raise TypeError(f"state must be a MemoryState or None, got {type(state).__name__}")
        kind = self._memory_kind
        names = () if self.kind == "module" else CONTROLLERS[self.kind][1]
        shape = "a controller's state" if self.kind == "module" else f"({', '.join(names)})"
        try:
            controller, (memory, read_weights, last), reads = state
            # What a module of the user's own keeps is its own to check.
            controller = [] if self.kind == "module" else list(zip(names, controller, strict=True))
            if self.addressing != "lrua" and not isinstance(state.memory, kind):
                raise TypeError
        except (TypeError, ValueError):
            raise TypeError(f"state must be a MemoryState of {shape}, an {kind.__name__} and reads") from None
        batch = (x.shape[1],) if batched else ()
        slots, size, heads, wide = self.num_slots, self.slot_size, self.num_heads, _memory_dtype(x.dtype)
        of_last = () if kind is ops.LRUAState else (heads,)
        for name, part, shape, dtype in (
            *((f"controller.{name}", part, (*batch, self.hidden_size), x.dtype) for name, part in controller),
            ("memory.memory", memory, (*batch, slots, size), wide),
            ("memory.read_weights", read_weights, (*batch, heads, slots), wide),
            (f"memory.{kind._fields[2]}", last, (*batch, *of_last, slots), wide),
            ("reads", reads, (*batch, heads, size), x.dtype),
        ):
            if not isinstance(part, Tensor):
                raise TypeError(f"state.{name} must be a tensor, got {type(part).__name__}")
            if part.shape != shape:
                raise ValueError(f"state.{name} must have shape {list(shape)}, got {list(part.shape)}")
            if part.dtype != dtype:
                raise TypeError(f"state.{name} must have dtype {dtype}, got {part.dtype}")
            if part.device != x.device:
                raise RuntimeError(f"state.{name} must be on the device of x, {x.device}, got {part.device}")
