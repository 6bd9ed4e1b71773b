"""MANN: the memory-augmented classifier of Santoro et al. 2016 (arXiv 1605.06065)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import MemoryLayer, MemoryState

# The weights of the input start so much larger than nn.LSTMCell would make them. Most of an image of a drawn character is
# background: at nn.LSTMCell's width the hidden states of two characters are almost the same, and hundreds of training steps
# pass before they are not.
INPUT_GAIN = 3.0

LAYER_OPTIONS = (
    "num_slots",
    "slot_size",
    "num_heads",
    "sharpness",
    "write_vector",
    "order",
    "write_target",
    "usage_decay",
    "eps",
    "batch_first",
)


class MANN(nn.Module):
    """A :class:`mann_fast.MemoryLayer` and a linear classifier on its output, at the paper's sizes by default.

    Args:
        input_size: width of the input: the image and the label of the step before.
        num_classes: how many logits per step.
        hidden_size and options: as of :class:`mann_fast.MemoryLayer`, without output_size.

    ``config`` holds the arguments that make the same model again, as plain values.
    """

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int = 200,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__()
        if "output_size" in options:
            raise TypeError("MANN classifies what its layer gives: it takes no output_size")
        self.layer = MemoryLayer(input_size, hidden_size, device=device, dtype=dtype, **options)
        with torch.no_grad():
            self.layer.controller.weight_ih[:, :input_size] *= INPUT_GAIN
        # Every option, so that a checkpoint stays what it is when a default changes.
        self.config = {"input_size": input_size, "num_classes": num_classes, "hidden_size": hidden_size}
        self.config |= {name: getattr(self.layer, name) for name in LAYER_OPTIONS}
        self.classifier = nn.Linear(self.layer.output_size, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Logits [T, B, num_classes] (laid out as x) and the state; see :meth:`MemoryLayer.forward`."""
        output, state = self.layer(x, state)
        return self.classifier(output), state
