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
            raise TypeError(
                f"mask must be a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        if self.reads.dim() != 3 or mask.shape != self.reads.shape[:1]:
            raise ValueError(
                f"mask must have shape [B] for a batched state, got {list(mask.shape)} "
                f"beside reads {list(self.reads.shape)}"
            )
        initial = _initial_state(self.controller[0], self.memory.memory.shape[1], *self.reads.shape[1:])

        def choose(start: Tensor, now: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *(1,) * (now.dim() - 1)), start, now)

        pairs = [
            choose(*pair) for pair in zip(_leaves(initial), _leaves(self), strict=True)
        ]
        return MemoryState((pairs[0], pairs[1]), LRUAState(*pairs[2:5]), pairs[5])


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

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("num_slots", "slot_size", "num_heads")}
        options |= {name: getattr(self, name) for name in ("sharpness", "write_vector", "order", "write_target")}
        if self.batch_first:
            options["batch_first"] = True
        return f"{self.input_size}, {self.hidden_size}, " + ", ".join(f"{k}={v!r}" for k, v in options.items())

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
        """All steps. The input's part of the gates is one product for all of them."""
        (h, c), memory, reads = state
        steps, batch, _ = x.shape
        if steps == 0:
            empty = h.new_empty(0, batch, self.hidden_size + self.num_heads * self.slot_size)
            return empty, state._map(Tensor.clone)
        cell = self.controller
        gates_of_input = F.linear(x, cell.weight_ih[:, : self.input_size], cell.bias_ih + cell.bias_hh)
        recurrent = torch.cat([cell.weight_ih[:, self.input_size :], cell.weight_hh], dim=1).t()
        head_weight, head_bias = self.heads.weight.t(), self.heads.bias
        hidden, width = self.hidden_size, self.num_heads * self.slot_size
        options = {"order": self.order, "write_target": self.write_target}
        options |= {"usage_decay": self.usage_decay, "eps": self.eps}
        outputs = []
        reads = reads.flatten(1)
        for gates in gates_of_input.unbind(0):
            gates = torch.addmm(gates, torch.cat([reads, h], dim=1), recurrent)
            inward, forget, candidate, outward = gates.split(hidden, dim=1)  # in torch's order
            c = torch.sigmoid(forget) * c + torch.sigmoid(inward) * torch.tanh(candidate)
            h = torch.sigmoid(outward) * torch.tanh(c)
            vectors, gate, *learned = torch.addmm(head_bias, h, head_weight).split(self._head_sizes, dim=1)
            vectors = torch.tanh(vectors)
            key = vectors[:, :width].unflatten(1, (self.num_heads, self.slot_size))
            write = key
            if self.write_vector == "separate":
                write = vectors[:, width:].unflatten(1, (self.num_heads, self.slot_size))
            sharpness = None
            if learned:
                sharpness = SHARPNESS_MIN + SHARPNESS_SCALE * F.softplus(learned[0])
            elif self.sharpness is not None:
                sharpness = torch.full_like(gate, self.sharpness)
            if sharpness is not None:
                sharpness = sharpness.to(key.dtype)  # autocast runs softplus in float32
            read, memory = ops.lrua_step(memory, key, write, gate, sharpness, **options)
            reads = read.flatten(1)
            outputs += [h, reads]
        output = torch.cat(outputs, dim=1).view(batch, steps, -1).transpose(0, 1)
        return output, MemoryState((h, c), memory, reads.unflatten(1, (self.num_heads, self.slot_size)))

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
        shapes = {
            "state.controller[0]": (h, (batch, self.hidden_size)),
            "state.controller[1]": (c, (batch, self.hidden_size)),
            "state.memory.memory": (memory[0], (batch, self.num_slots, self.slot_size)),
            "state.memory.read_weights": (memory[1], (batch, self.num_heads, self.num_slots)),
            "state.memory.usage": (memory[2], (batch, self.num_slots)),
            "state.reads": (reads, (batch, self.num_heads, self.slot_size)),
        }
        for name, (tensor, shape) in shapes.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")

    def _forward(self, x: Tensor, state: MemoryState | None, dtype: torch.dtype) -> tuple[Tensor, MemoryState]:
        batched = x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        steps, batch, _ = x.shape
        sizes = self.hidden_size, self.num_slots, self.slot_size, self.num_heads
        if state is None:
            state = MemoryState.initial(batch, *sizes, dtype=dtype, device=x.device)
        else:
            _check_state(state, (batch,) if batched else (), *sizes, dtype, x.device)
            if not batched:
                state = state._map(lambda tensor: tensor.unsqueeze(0))

        if steps == 0:
            output = x.new_empty(0, batch, self.hidden_size + self.num_heads * self.slot_size, dtype=dtype)
            state = state._map(lambda tensor: tensor.clone())
        else:
            output, state = self._unroll(x.to(dtype), state)
        if self.projection is not None:
            output = F.linear(output, self.projection.weight.to(dtype), self.projection.bias.to(dtype))
        if not batched:
            return output.squeeze(1), state._map(lambda tensor: tensor.squeeze(0))
        return output.transpose(0, 1) if self.batch_first else output, state

    def _unroll(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """T >= 1 steps of controller, heads and memory: [T, B, hidden and reads], and the state after them."""
        (hidden, cell), memory, read = state
        controller, heads, dtype = self.controller, self.heads, x.dtype
        num_heads, slot_size = self.num_heads, self.slot_size
        # The input's share of the gates is one product for all steps. The rest depends on the step before: one product with
        # [hidden, reads], which is also the step's output.
        input_weight, read_weight = controller.weight_ih.to(dtype).split([self.input_size, num_heads * slot_size], 1)
        gates_of_x = F.linear(x, input_weight, (controller.bias_ih + controller.bias_hh).to(dtype))
        recurrent_weight = torch.cat([controller.weight_hh.to(dtype), read_weight], 1).t()
        heads_weight, heads_bias = heads.weight.to(dtype).t(), heads.bias.to(dtype)
        learned, separate = self.sharpness == "learned", self.write_vector == "separate"
        vectors = (2 if separate else 1) * num_heads * slot_size
        sharpness = None
        if learned:
            least = x.new_full((), SHARPNESS_MIN)
        elif self.sharpness is not None:
            sharpness = x.new_full((x.shape[1], num_heads), self.sharpness)

        seen = torch.cat([hidden, read.flatten(1)], 1)
        outputs = []
        for gates in gates_of_x.unbind(0):
            gates = torch.addmm(gates, seen, recurrent_weight)
            input_forget, candidate, exposed = gates.split(
                [2 * self.hidden_size, self.hidden_size, self.hidden_size], 1
            )
            let_in, keep = torch.sigmoid(input_forget).chunk(2, 1)
            cell = torch.addcmul(keep * cell, let_in, torch.tanh(candidate))
            hidden = torch.sigmoid(exposed) * torch.tanh(cell)

            raw = torch.addmm(heads_bias, hidden, heads_weight)
            raw_vectors, raw_scalars = raw.split([vectors, raw.shape[1] - vectors], 1)
            key, *write_vector = torch.tanh(raw_vectors).view(x.shape[1], -1, num_heads, slot_size).unbind(1)
            gate = raw_scalars[:, :num_heads]
            if learned:
                sharpness = torch.add(least, F.softplus(raw_scalars[:, num_heads:]), alpha=SHARPNESS_SCALE)
            read, memory = ops.lrua_step(
                memory,
                key,
                write_vector[0] if separate else key,
                gate,
                sharpness,
                order=self.order,
                write_target=self.write_target,
                usage_decay=self.usage_decay,
                eps=self.eps,
            )
            seen = torch.cat([hidden, read.flatten(1)], 1)
            outputs.append(seen)
        return torch.stack(outputs), MemoryState((hidden, cell), memory, read)
