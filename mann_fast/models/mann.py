"""MANN: the memory-augmented classifier of Santoro et al. 2016 (arXiv 1605.06065)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import MemoryLayer, MemoryState
from ..layers.memory import check_sizes

# The weights of the input start so much larger than nn.LSTMCell would make them. Most of an image of a drawn
# character is background: at nn.LSTMCell's width the hidden states of two characters are almost the same, and
# hundreds of training steps pass before they are not.
INPUT_GAIN = 3.0


class MANN(nn.Module):
    """A :class:`mann_fast.MemoryLayer` and a linear classifier on its output; the paper's sizes by default.

    Args:
        input_size: width of the input: the image and the label of the step before.
        num_classes: how many logits per step.
        hidden_size, num_slots, slot_size, num_heads, controller, addressing, max_shift, sharpness, write_vector, order,
            write_target, usage_decay, eps, memory_start, batch_first, device, dtype: as of
            :class:`mann_fast.MemoryLayer`; the controller by its name.

    Attributes:
        layer: the MemoryLayer.
        classifier: ``nn.Linear`` from its output to the logits.
        config: dict of plain values; ``MANN(**config)`` is a new model of the same kind and sizes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int = 200,
        *,
        num_slots: int = 128,
        slot_size: int = 40,
        num_heads: int = 4,
        controller: str = "lstm",
        addressing: str = "lrua",
        max_shift: int = 1,
        sharpness: str | float | None = "learned",
        write_vector: str = "separate",
        order: str | None = None,
        write_target: str = "per_head",
        usage_decay: float = 0.95,
        eps: float = 1e-6,
        memory_start: str = "constant",
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(num_classes=num_classes)
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_slots": num_slots,
            "slot_size": slot_size,
            "num_heads": num_heads,
            "controller": controller,
            "addressing": addressing,
            "max_shift": max_shift,
            "sharpness": sharpness,
            "write_vector": write_vector,
            "order": order,
            "write_target": write_target,
            "usage_decay": usage_decay,
            "eps": eps,
            "memory_start": memory_start,
            "batch_first": batch_first,
        }
        self.config = {"num_classes": num_classes, **options}
        self.layer = MemoryLayer(**options, device=device, dtype=dtype)
        with torch.no_grad():
            next(self.layer.controller.parameters())[:, :input_size] *= INPUT_GAIN  # its weight_ih
        self.classifier = nn.Linear(self.layer.output_size, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        """Logits for every step of a sequence.

        Args:
            x, state: as of :meth:`mann_fast.MemoryLayer.forward`.

        Returns:
            logits [T, B, num_classes] (laid out as x), and the state after the last step.

        Raises:
            as :meth:`mann_fast.MemoryLayer.forward`.
        """
        output, state = self.layer(x, state)
        return self.classifier(output), state
