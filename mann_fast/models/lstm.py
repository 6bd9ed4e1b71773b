"""The baseline without a memory: an LSTM with the interface of MANN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layers.base import check_sizes


class LSTMClassifier(nn.Module):
    """``nn.LSTM`` and a linear classifier on its output, with the interface of :class:`mann_fast.MANN`.

    Args:
        input_size, num_classes, hidden_size: as of :class:`mann_fast.MANN`.
        batch_first, device, dtype: as of ``nn.LSTM``.

    Attributes:
        layer, classifier: the LSTM and the ``nn.Linear``.
        config: dict of plain values; ``LSTMClassifier(**config)`` is a new model of the same sizes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int = 200,
        *,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(input_size=input_size, num_classes=num_classes, hidden_size=hidden_size)
        options = {"input_size": input_size, "hidden_size": hidden_size, "batch_first": batch_first}
        self.config = {"num_classes": num_classes, **options}
        self.layer = nn.LSTM(**options, device=device, dtype=dtype)
        self.classifier = nn.Linear(hidden_size, num_classes, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits for every step of a sequence.

        Args:
            x, state: as of ``nn.LSTM``; T >= 1.

        Returns:
            logits [T, B, num_classes] (laid out as x), and the state of ``nn.LSTM`` after the last step.
        """
        output, state = self.layer(x, state)
        return self.classifier(output), state

    if TYPE_CHECKING:
        __call__ = forward
