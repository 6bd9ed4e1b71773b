"""MANN: the memory-augmented classifier of Santoro et al. 2016 (arXiv 1605.06065)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..layers import Memory, MemoryLayer, MemoryState
from ..layers.base import check_sizes
from ..layers.controllers import obstacle
from ..layers.memory import Input
from ..layers.registry import make_memory, name_of, options_of
from ..layers.sequences import each, packed_uncompiled, steps_taken

# The weights of the input start so much larger than nn.LSTMCell would make them. Most of an image of a drawn
# character is background: at nn.LSTMCell's width the hidden states of two characters are almost the same, and
# hundreds of training steps pass before they are not.
INPUT_GAIN = 3.0


class MANN(nn.Module):
    """A :class:`mann_fast.MemoryLayer` and a linear classifier on its output; the paper's sizes by default.

    Args:
        input_size: width of the input: the image and the label of the step before.
        num_classes: how many logits per step.
        hidden_size, controller, addressing, memory_start, bias, batch_first, device, dtype, options: as of
            :class:`mann_fast.MemoryLayer`; the controller by its name.

    Attributes:
        layer: the MemoryLayer.
        classifier: ``nn.Linear`` from its output to the logits.
        config: dict of plain values, all options of the memory among them; ``MANN(**config)`` is a new model of the same
            kind and sizes. Of a memory of your own it holds the name of the class: pass an object again,
            ``MANN(**{**config, "addressing": MyMemory()})``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int = 200,
        *,
        controller: str = "lstm",
        addressing: str | Memory = "lrua",
        memory_start: str = "constant",
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes)
        memory = make_memory(addressing, options)
        arguments: dict[str, Any] = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "controller": controller,
            "memory_start": memory_start,
            "bias": bias,
            "batch_first": batch_first,
        }
        self.config = {
            "num_classes": num_classes,
            **arguments,
            "addressing": name_of(memory),
            **{name: getattr(memory, name) for name in options_of(memory)},
        }
        self.layer = MemoryLayer(**arguments, addressing=memory, device=device, dtype=dtype)
        self.classifier = nn.Linear(self.layer.output_size, num_classes, device=device, dtype=dtype)
        self._adjust_parameters()

    def _adjust_parameters(self) -> None:
        controller = self.layer.controller
        of_input = controller.weight_ih if isinstance(controller, nn.RNNCellBase) else controller.weight
        with torch.no_grad():
            of_input[:, : self.layer.input_size] *= INPUT_GAIN  # type: ignore[index, operator]

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as for a new model."""
        self.layer.reset_parameters()
        self.classifier.reset_parameters()
        self._adjust_parameters()

    def forward(
        self,
        x: Input,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Input, MemoryState]:
        """Logits for every step of a sequence.

        Args:
            x, state, resets, lengths: as of :meth:`mann_fast.MemoryLayer.forward`.

        Returns:
            logits [T, B, num_classes] (laid out as x; of a PackedSequence one of the same batch_sizes and indices; 0 beyond a
            sample's length), and the state after the last step.

        Raises:
            TypeError, ValueError: as of :meth:`mann_fast.MemoryLayer.forward`.
        """
        if isinstance(x, PackedSequence) and torch.compiler.is_compiling():
            return packed_uncompiled(self.forward, x, state, resets=resets, lengths=lengths)
        output, state = self.layer(x, state, resets=resets, lengths=lengths)
        if isinstance(output, PackedSequence):
            return output._replace(data=self.classifier(output.data)), state
        if lengths is None:
            return self.classifier(output), state
        batch_first = self.layer.batch_first
        taken = steps_taken(lengths, output.shape[int(batch_first and output.dim() == 3)], batch_first)
        plain = obstacle("classifier", self.classifier, nn.Linear) is None
        return each(self.classifier, output, taken, by_rows=plain), state

    if TYPE_CHECKING:
        __call__ = forward
