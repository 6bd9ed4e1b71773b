"""MemoryLayer: an LSTM controller with heads on an LRUA memory (Santoro et al. 2016, arXiv 1605.06065)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops.lrua import ORDERS, WRITE_TARGETS, LRUAState

# A learned sharpness is SHARPNESS_MIN + SHARPNESS_SCALE * softplus(linear(hidden)), about 8 at the start. How soon the reads
# single out one slot decides whether training takes off: with a scale of 1 it is slow to, with a sharpness of 1 (the
# paper's) it hardly does.
SHARPNESS_MIN = 1.0
SHARPNESS_SCALE = 10.0

# Keys and write vectors start so much larger than nn.Linear would make them: else all are near 0 and alike, and what is
# read is lost beside the input.
VECTOR_GAIN = 3.0


class MemoryState(NamedTuple):
    """What a MemoryLayer carries from one call to the next.

    controller: (h, c), each [B, hidden_size]; memory: :class:`mann_fast.ops.LRUAState`; reads: [B, R, D], what the heads read
    last. After a call on unbatched input no tensor has the axis B.
    """

    controller: tuple[Tensor, Tensor]
    memory: LRUAState
    reads: Tensor

    def _map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        h, c = self.controller
        memory = LRUAState(*(function(x) for x in self.memory))
        return MemoryState((function(h), function(c)), memory, function(self.reads))

    def detach(self) -> MemoryState:
        """The same numbers without their history, for truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> MemoryState:
        """Move or convert, as ``Tensor.to``; a half-precision dtype leaves the memory, which is float32 beside it."""

        def convert_memory(x: Tensor) -> Tensor:
            converted = x.to(*args, **kwargs)
            return converted.float() if converted.dtype in (torch.bfloat16, torch.float16) else converted

        h, c = self.controller
        memory = LRUAState(*(convert_memory(x) for x in self.memory))
        return MemoryState(
            (h.to(*args, **kwargs), c.to(*args, **kwargs)), memory, self.reads.to(*args, **kwargs)
        )

    def reset(self, mask: Tensor) -> MemoryState:
        """Take the samples where ``mask`` (bool [B]) is true back to the start of a sequence, and leave the others.

        Raises TypeError or ValueError where the mask is not a bool tensor of shape [B].
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {kind}")
        if self.reads.dim() != 3 or mask.shape != self.reads.shape[:1]:
            raise ValueError(
                f"mask must have shape [B] for a batched state, got {list(mask.shape)} "
                f"beside reads {list(self.reads.shape)}"
            )
        initial = _initial_state(self.controller[0], self.memory.memory.shape[1], *self.reads.shape[1:])

        def choose(start: Tensor, now: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *(1,) * (now.dim() - 1)), start, now)

        h, c, memory, weights, usage, reads = map(choose, _leaves(initial), _leaves(self))
        return MemoryState((h, c), LRUAState(memory, weights, usage), reads)


def _leaves(state: MemoryState) -> tuple[Tensor, ...]:
    return (*state.controller, *state.memory, state.reads)


def _initial_state(h: Tensor, num_slots: int, num_heads: int, slot_size: int) -> MemoryState:
    """The start of a sequence, for the batch, dtype and device of a hidden state h [B, H]."""
    batch = h.shape[0]
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    memory = LRUAState.initial(batch, num_slots, slot_size, num_heads, dtype=dtype, device=h.device)
    return MemoryState(
        (torch.zeros_like(h), torch.zeros_like(h)), memory, h.new_zeros(batch, num_heads, slot_size)
    )


class MemoryLayer(nn.Module):
    """A recurrent layer with an external memory; it goes where an ``nn.LSTM`` stood.

    At every step an LSTM cell sees the input and what the heads read at the step before; one linear layer on its hidden
    state gives each head a key, a write vector, a gate and a sharpness; the memory is written and read (Santoro et al. 2016,
    eqs. 2-8; see :func:`mann_fast.ops.lrua_step`). The output is the hidden state and the reads of the same step.

    Args:
        input_size: width of the input.
        hidden_size: width of the LSTM's state.
        num_slots, slot_size, num_heads: N, D and R of the memory; 1 <= R <= N. Each head reads and writes.
        sharpness: factor on the similarity before the softmax: "learned" (1 + 10 softplus of a linear layer), a number, or
            None for 1, as in the paper.
        write_vector: "separate" (what a head writes has a linear layer of its own) or "key" (a head writes its key, as in
            the paper).
        order, write_target, usage_decay, eps: see :func:`mann_fast.ops.lrua_step`.
        output_size: None for hidden_size + num_heads * slot_size (hidden state and reads), or the width of a linear
            projection of these.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]. The state is not affected.
        device, dtype: of the parameters. Beside half-precision parameters the memory is float32.

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
        sharpness: str | float | None = "learned",
        write_vector: str = "separate",
        order: str = "write_first",
        write_target: str = "per_head",
        usage_decay: float = 0.95,
        eps: float = 1e-6,
        output_size: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_slots": num_slots}
        sizes |= {"slot_size": slot_size, "num_heads": num_heads}
        if output_size is not None:
            sizes["output_size"] = output_size
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_heads > num_slots:
            raise ValueError(f"num_heads must be at most num_slots = {num_slots}, got {num_heads}")
        number = isinstance(sharpness, (int, float)) and not isinstance(sharpness, bool)
        if not (sharpness is None or number or sharpness == "learned"):
            raise ValueError(f"sharpness must be 'learned', a number or None, got {sharpness!r}")
        for name, value, choices in (
            ("write_vector", write_vector, ("separate", "key")),
            ("order", order, ORDERS),
            ("write_target", write_target, WRITE_TARGETS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not 0 <= usage_decay <= 1:
            raise ValueError(f"usage_decay must be within [0, 1], got {usage_decay}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_slots, self.slot_size, self.num_heads = num_slots, slot_size, num_heads
        self.sharpness = float(sharpness) if number else sharpness
        self.write_vector, self.order, self.write_target = write_vector, order, write_target
        self.usage_decay, self.eps, self.batch_first = usage_decay, eps, batch_first
        reads_size = num_heads * slot_size
        self.output_size = hidden_size + reads_size if output_size is None else output_size
        factory = {"device": device, "dtype": dtype}
        self.controller = nn.LSTMCell(input_size + reads_size, hidden_size, **factory)
        vectors = 2 if write_vector == "separate" else 1
        self._head_sizes = [vectors * reads_size, num_heads] + ([num_heads] if sharpness == "learned" else [])
        self.heads = nn.Linear(hidden_size, sum(self._head_sizes), **factory)
        self.projection = None
        if output_size is not None:
            self.projection = nn.Linear(hidden_size + reads_size, output_size, **factory)
        self._widen_vectors()

    def _widen_vectors(self) -> None:
        with torch.no_grad():
            self.heads.weight[: self._head_sizes[0]] *= VECTOR_GAIN

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in (self.controller, self.heads, self.projection):
            if module is not None:
                module.reset_parameters()
        self._widen_vectors()

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("num_slots", "slot_size", "num_heads")}
        options |= {
            name: getattr(self, name) for name in ("sharpness", "write_vector", "order", "write_target")
        }
        if self.batch_first:
            options["batch_first"] = True
        return f"{self.input_size}, {self.hidden_size}, " + ", ".join(
            f"{k}={v!r}" for k, v in options.items()
        )

    def initial_state(self, batch: int) -> MemoryState:
        """The state at the start of a sequence, which ``forward`` takes where none is given."""
        h = self.controller.weight_hh.new_zeros(batch, self.hidden_size)
        return _initial_state(h, self.num_slots, self.num_heads, self.slot_size)

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Run over a sequence.

        Args:
            x: [T, B, input_size], [B, T, input_size] with batch_first, or [T, input_size] unbatched; of the parameters'
                dtype and device. T may be 0.
            state: what an earlier call returned, or None for the start of a sequence. A state carried over two halves of a
                sequence gives the output of the whole.

        Returns:
            output [T, B, output_size] (laid out as x), and the state after the last step.

        Raises:
            TypeError, ValueError: wrong type, shape or dtype of x or state; RuntimeError: wrong device.
        """
        self._check_input(x)
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if state is None:
            state = self.initial_state(x.shape[1])
        else:
            if not isinstance(state, tuple) or len(state) != 3:
                raise TypeError(f"state must be a MemoryState or None, got {type(state).__name__}")
            if not batched:
                state = MemoryState(*state)._map(lambda s: s.unsqueeze(0))
            self._check_state(state, x.shape[1])
        output, state = self._run(x, state)
        if self.projection is not None:
            output = self.projection(output)
        if not batched:
            return output.squeeze(1), state._map(lambda s: s.squeeze(0))
        return (output.transpose(0, 1) if self.batch_first else output), state

    def _run(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """All steps of controller, heads and memory: hidden state and reads [T, B, ...], and the state after them."""
        (h, c), memory, read = state
        steps, batch, _ = x.shape
        hidden_size, num_heads, slot_size = self.hidden_size, self.num_heads, self.slot_size
        if steps == 0:
            empty = h.new_empty(0, batch, hidden_size + num_heads * slot_size)
            return empty, state._map(Tensor.clone)
        cell = self.controller
        # The input's share of the gates is one product for all steps; what depends on the step before is one product with
        # [hidden, reads], which is also the step's output.
        input_weight, read_weight = cell.weight_ih.split([self.input_size, num_heads * slot_size], 1)
        gates_of_x = F.linear(x, input_weight, cell.bias_ih + cell.bias_hh)
        recurrent = torch.cat([cell.weight_hh, read_weight], 1).t()
        head_weight, head_bias = self.heads.weight.t(), self.heads.bias
        separate, learned = self.write_vector == "separate", self.sharpness == "learned"
        sharpness = None
        if not learned and self.sharpness is not None:
            sharpness = gates_of_x.new_full((batch, num_heads), self.sharpness)
        options = {"order": self.order, "write_target": self.write_target}
        options |= {"usage_decay": self.usage_decay, "eps": self.eps}
        seen = torch.cat([h, read.flatten(1)], 1)
        outputs = []
        for gates in gates_of_x.unbind(0):
            gates = torch.addmm(gates, seen, recurrent)
            admit_keep, candidate, expose = gates.split([2 * hidden_size, hidden_size, hidden_size], 1)
            admit, keep = torch.sigmoid(admit_keep).chunk(2, 1)
            c = torch.addcmul(keep * c, admit, torch.tanh(candidate))
            h = torch.sigmoid(expose) * torch.tanh(c)
            vectors, gate, *raw_sharpness = torch.addmm(head_bias, h, head_weight).split(self._head_sizes, 1)
            key, *write = torch.tanh(vectors).unflatten(1, (-1, num_heads, slot_size)).unbind(1)
            if learned:
                sharpness = SHARPNESS_MIN + SHARPNESS_SCALE * F.softplus(raw_sharpness[0])
                sharpness = sharpness.to(key.dtype)  # autocast runs softplus in float32
            read, memory = ops.lrua_step(
                memory, key, write[0] if separate else key, gate, sharpness, **options
            )
            seen = torch.cat([h, read.flatten(1)], 1)
            outputs.append(seen)
        return torch.stack(outputs), MemoryState((h, c), memory, read)

    def _check_input(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"x must have shape {layout} or [T, input_size] with input_size = {self.input_size}, got {list(x.shape)}"
            )
        weight = self.controller.weight_hh
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the dtype of the parameters, {weight.dtype}, got {x.dtype}")
        if x.device != weight.device:
            raise RuntimeError(f"x must be on the device of the parameters, {weight.device}, got {x.device}")

    def _check_state(self, state: MemoryState, batch: int) -> None:
        (h, c), memory, reads = state
        weight = self.controller.weight_hh
        memory_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        expected = {
            "state.controller[0]": (h, (batch, self.hidden_size), weight.dtype),
            "state.controller[1]": (c, (batch, self.hidden_size), weight.dtype),
            "state.memory.memory": (memory[0], (batch, self.num_slots, self.slot_size), memory_dtype),
            "state.memory.read_weights": (memory[1], (batch, self.num_heads, self.num_slots), memory_dtype),
            "state.memory.usage": (memory[2], (batch, self.num_slots), memory_dtype),
            "state.reads": (reads, (batch, self.num_heads, self.slot_size), weight.dtype),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
                raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
            if tensor.device != weight.device:
                raise RuntimeError(
                    f"{name} must be on the device of the parameters, {weight.device}, got {tensor.device}"
                )
