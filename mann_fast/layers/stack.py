"""MemoryStack: MemoryLayers on top of each other, in one direction or both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .._state import State, describe, is_plain
from .base import MemoryWeights, check_sizes
from .memory import Input, MemoryLayer
from .sequences import Turn, packed_uncompiled
from .state import MemoryState


class StackState(NamedTuple("StackState", [("layers", tuple[MemoryState, ...])]), State):
    """What a MemoryStack carries from one call to the next: the state of every layer, from the input up; of a bidirectional
    stack, of each layer the forward one's and the backward one's."""

    __slots__ = ()

    @property
    def _batch(self) -> torch.Size:
        return self.layers[0]._batch

    def to(self, *args: Any, **kwargs: Any) -> StackState:
        """As :meth:`MemoryState.to`."""
        return StackState(tuple(state.to(*args, **kwargs) for state in self.layers))

    def reset(self, mask: Tensor, start: StackState | None = None) -> StackState:
        """As :meth:`MemoryState.reset`, with the start of a stack: ``stack.initial_state(1)``.

        Raises TypeError for a start of another number of layers; TypeError, ValueError, RuntimeError as there.
        """
        if start is not None and not (
            isinstance(start, StackState) and len(start.layers) == len(self.layers)
        ):
            came = f"one of {len(start.layers)}" if isinstance(start, StackState) else describe(start)
            raise TypeError(f"start must be a StackState of {len(self.layers)} layers or None, got {came}")
        starts = (None,) * len(self.layers) if start is None else start.layers
        return StackState(tuple(now.reset(mask, one) for now, one in zip(self.layers, starts, strict=True)))


class MemoryStack(nn.Module):
    """Several :class:`MemoryLayer`, each on the output of the one below; it goes where an ``nn.LSTM`` of several layers or both
    directions stood. Every layer, and each direction of it, has a memory of its own.

    Args:
        input_size, hidden_size: as of :class:`MemoryLayer`.
        num_layers: how many, at least 1.
        dropout: the probability that a number of the output of a layer other than the last is 0, in training.
        bidirectional: each layer is two, one of which goes from the last step to the first; their outputs are side by side.
        batch_first, options: as of :class:`MemoryLayer`, for every layer; the controller by its name. ``output_size`` is
            that of each layer in each direction.

    Attributes:
        layers: ``nn.ModuleList`` of the layers in the order of :class:`StackState`.
        output_size: the width of the output, an int: twice a layer's where bidirectional.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        num_layers: int = 1,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        batch_first: bool = False,
        **options: Any,
    ):
        super().__init__()
        check_sizes(num_layers=num_layers)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be within [0, 1], got {dropout}")
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional must be a bool, got {type(bidirectional).__name__}")
        if isinstance(options.get("controller"), nn.Module):
            raise TypeError("controller must be a name: a module would be the same one in every layer")
        if dropout and num_layers == 1:
            warnings.warn("dropout is between layers, and num_layers is 1: nothing is dropped", stacklevel=2)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.dropout = num_layers, float(dropout)
        self.bidirectional, self.batch_first = bidirectional, batch_first
        self.layers = nn.ModuleList()
        size = input_size
        for _ in range(num_layers):
            pair = [
                MemoryLayer(size, hidden_size, batch_first=batch_first, **options) for _ in self._directions()
            ]
            self.layers.extend(pair)
            size = sum(layer.output_size for layer in pair)
        self.output_size = size

    def _directions(self) -> range:
        return range(2 if self.bidirectional else 1)

    def extra_repr(self) -> str:
        options = {"dropout": (self.dropout, 0.0), "bidirectional": (self.bidirectional, False)}
        return ", ".join(
            f"{name}={value!r}" for name, (value, default) in options.items() if value != default
        )

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as for a new stack."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def flatten_parameters(self) -> None:
        """Does nothing: for programs that call ``nn.LSTM.flatten_parameters``."""

    def initial_state(self, batch: int) -> StackState:
        """The state at the start of a sequence, which ``forward`` takes where none is given.

        Raises TypeError, ValueError: batch is no int, or below 0.
        """
        return StackState(tuple(layer.initial_state(batch) for layer in self.layers))  # type: ignore[operator]

    @overload
    def forward(
        self,
        x: Input,
        state: StackState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: Literal[False] = False,
    ) -> tuple[Input, StackState]: ...

    @overload
    def forward(
        self,
        x: Input,
        state: StackState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: Literal[True],
    ) -> tuple[Input, StackState, tuple[MemoryWeights, ...]]: ...

    @overload
    def forward(
        self,
        x: Input,
        state: StackState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: bool,
    ) -> tuple[Input, StackState] | tuple[Input, StackState, tuple[MemoryWeights, ...]]: ...

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: StackState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Any, StackState] | tuple[Any, StackState, tuple[MemoryWeights, ...]]:
        """Run over a sequence.

        Args:
            x: as of :meth:`MemoryLayer.forward`.
            state: what an earlier call returned, or None for the start of a sequence. As of ``nn.LSTM``, a backward layer
                starts from its state at the last step.
            resets, lengths: as of :meth:`MemoryLayer.forward`, for every layer. A backward layer starts at each sample's last
                step, and begins anew at the last step before each reset: it sees the same pieces from their ends.
            return_weights: also return where the heads were at every step; slower, one step after the other.

        Returns:
            output [T, B, output_size] (laid out as x, or a PackedSequence as x), of a bidirectional stack forward then
            backward; the state; with ``return_weights`` also a :class:`MemoryWeights` for every layer, in the order of the
            state, each by the step of x.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`MemoryLayer.forward`; a state of another number of layers.
        """
        if isinstance(x, PackedSequence) and torch.compiler.is_compiling():
            return packed_uncompiled(
                self.forward, x, state, resets=resets, lengths=lengths, return_weights=return_weights
            )
        states: tuple[MemoryState | None, ...] = (None,) * len(self.layers)
        if state is not None:
            layers = (
                state[0] if isinstance(state, StackState) or (is_plain(state) and len(state) == 1) else None
            )
            if not is_plain(layers) or len(layers) != len(self.layers) or None in layers:
                came = describe(state) if layers is None else f"one of {len(layers)}"
                raise TypeError(
                    f"state must be a StackState of {len(self.layers)} layers or None, got {came}"
                )
            states = tuple(layers)
        ends: list[MemoryState] = []
        recorded: list[MemoryWeights] = []
        turn: Any = None
        for number in range(self.num_layers):
            outputs = []
            for direction in self._directions():
                layer, start = self.layers[len(ends)], states[len(ends)]
                if direction and turn is None:  # the layer before has checked all
                    turn = Turn(x, resets, lengths, self.batch_first)
                output, end, *weights = layer(
                    turn.around(x) if direction else x,
                    start,
                    resets=turn.resets if direction else resets,
                    lengths=lengths,
                    return_weights=return_weights,
                )
                outputs.append(turn.around(output) if direction else output)
                ends.append(end)
                recorded += [turn.weights(one) for one in weights] if direction else weights
            x = _map(lambda *parts: torch.cat(parts, -1), *outputs) if self.bidirectional else outputs[0]
            if self.dropout and number < self.num_layers - 1:
                x = _map(lambda part: F.dropout(part, self.dropout, self.training), x)
        end = StackState(tuple(ends))
        return (x, end, tuple(recorded)) if return_weights else (x, end)

    if TYPE_CHECKING:
        __call__ = forward


def _map(function: Callable[..., Tensor], x: Any, *others: Any) -> Any:
    """``function`` of tensors, or of the rows of PackedSequences of the same lengths."""
    if not isinstance(x, PackedSequence):
        return function(x, *others)
    return x._replace(data=function(x.data, *(other.data for other in others)))
