"""The baseline without a memory: an LSTM with the interface of MANN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LSTMClassifier(nn.Module):
    """``nn.LSTM`` and a linear classifier, with the interface of :class:`mann_fast.MANN`.

    Args:
        input_size, num_classes, hidden_size: as in :class:`mann_fast.MANN`.
        batch_first, device, dtype: as in ``nn.LSTM``.

    ``config`` holds the arguments that make the same model again, as plain values.
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
        self.config = {
            "input_size": input_size,
            "num_classes": num_classes,
            "hidden_size": hidden_size,
            "batch_first": batch_first,
        }
        self.layer = nn.LSTM(input_size, hidden_size, batch_first=batch_first, device=device, dtype=dtype)
        self.classifier = nn.Linear(hidden_size, num_classes, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [T, B, num_classes] (laid out as x) and the state of ``nn.LSTM``."""
        output, state = self.layer(x, state)
        return self.classifier(output), state
