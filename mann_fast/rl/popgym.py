"""A MemoryLayer for POPGym's baselines: a memory model for RLlib."""

from __future__ import annotations

from typing import Any

import torch
from popgym.baselines.ray_models.base_model import BaseModel
from torch import Tensor

from ..layers import MemoryLayer


class MemoryModel(BaseModel):
    """A ``custom_model`` for RLlib's PPO, as ``popgym.baselines.ray_models.ray_gru.GRU`` is one.

    In ``custom_model_config``, ``memory`` has the options of the :class:`mann_fast.MemoryLayer`; its width and that of its
    output are the baselines' own ``hidden_size``.
    """

    MODEL_CONFIG: dict[str, dict[str, Any]] = {"memory": {}}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        size = self.cfg["hidden_size"]
        self.core = MemoryLayer(
            self.cfg["preprocessor_output_size"],
            size,
            output_size=size,
            batch_first=True,
            **self.cfg["memory"],
        )

    def initial_state(self) -> list[Tensor]:
        """The tensors of a state at the start of a sequence, without the axis B."""
        return [part[0].detach() for part in self.core.initial_state(1).flatten()]

    def forward_memory(
        self, z: Tensor, state: list[Tensor], t_starts: Tensor, seq_lens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Run over sequences z [B, T, F] of lengths seq_lens [B], of which those with t_starts 0 begin anew."""
        resets = z.new_zeros(z.shape[:2], dtype=torch.bool)
        resets[:, 0] = t_starts == 0
        form = self.core.initial_state(0)
        output, after = self.core(z, form.unflatten(state), resets=resets, lengths=seq_lens)
        return output, after.flatten()
