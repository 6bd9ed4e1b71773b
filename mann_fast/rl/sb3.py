"""A MemoryLayer for Stable-Baselines3: a policy for ``sb3_contrib.RecurrentPPO``."""

from __future__ import annotations

from typing import Any

import torch
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import MemoryLayer, MemoryState

LSTM_ARGUMENTS = ("lstm_hidden_size", "n_lstm_layers", "lstm_kwargs")


class PackedMemory(nn.Module):
    """A MemoryLayer whose state is two tensors [1, B, hidden_size], as RecurrentPPO keeps the (h, c) of an LSTM: the numbers of
    a :class:`mann_fast.MemoryState`, half of them in each.

    Args:
        layer: a MemoryLayer with batch_first=True and a built-in controller.

    Attributes:
        input_size: of the layer. hidden_size: half of the numbers that a sample's state has. num_layers: 1.
    """

    num_layers = 1

    def __init__(self, layer: MemoryLayer):
        super().__init__()
        if layer.kind == "module":
            raise ValueError(f"controller must be built in, got a {type(layer.controller).__name__}")
        parts = layer.initial_state(1).flatten()
        for part in parts:
            if part.dtype != torch.float32:
                raise TypeError(f"the state must be float32 as RecurrentPPO keeps it, got {part.dtype}")
        self.layer = layer
        self.input_size = layer.input_size
        self.hidden_size = (sum(part.numel() for part in parts) + 1) // 2

    def _pack(self, state: MemoryState) -> tuple[Tensor, Tensor]:
        flat = torch.cat([part.flatten(1) for part in state.flatten()], 1)
        flat = F.pad(flat, (0, 2 * self.hidden_size - flat.shape[1])).unsqueeze(0)
        return flat[..., : self.hidden_size], flat[..., self.hidden_size :]

    def _unpack(self, flat: Tensor) -> MemoryState:
        form = self.layer.initial_state(1)
        sizes = [part.numel() for part in form.flatten()]
        parts = flat[:, : sum(sizes)].split_with_sizes(sizes, 1)
        return form.unflatten(
            part.unflatten(1, like.shape[1:]) for part, like in zip(parts, form.flatten(), strict=True)
        )

    def forward(
        self, x: Tensor, states: tuple[Tensor, Tensor], episode_starts: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a batch of sequences in one call of the layer.

        Args:
            x: [B, T, input_size].
            states: what an earlier call returned; a sample of zeros, with which RecurrentPPO begins, starts anew.
            episode_starts: bool [B, T], where True the sample starts anew before that step.

        Returns:
            output [B, T, output_size], and the state after the last step.
        """
        flat = torch.cat(states, 2).squeeze(0)
        blank = (flat == 0).all(1, keepdim=True)  # no state of a memory: the weights of a head sum to 1
        resets = torch.cat([episode_starts[:, :1] | blank, episode_starts[:, 1:]], 1)
        output, state = self.layer(x, self._unpack(flat), resets=resets)
        return output, self._pack(state)


class MemoryPolicy(RecurrentActorCriticPolicy):
    """A policy for ``RecurrentPPO(MemoryPolicy, env, ...)`` with :class:`mann_fast.MemoryLayer` in the place of ``nn.LSTM``.

    Args:
        memory_kwargs: arguments of the MemoryLayer but input_size, batch_first, device and dtype.
        args, kwargs: of ``sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy`` but those of its LSTM. Actor and
            critic have a layer each, unless ``enable_critic_lstm=False``, or ``shared_lstm=True`` beside it. For images and
            dictionaries, features_extractor_class is SB3's ``NatureCNN`` and ``CombinedExtractor``.

    Raises:
        TypeError, ValueError: as MemoryLayer; an argument of the LSTM; a memory whose state is not float32; a controller of the
            user's own.
    """

    def __init__(self, *args: Any, memory_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        for name in LSTM_ARGUMENTS:
            if name in kwargs:
                raise TypeError(
                    f"{name} is no argument of MemoryPolicy: memory_kwargs has those of its layer"
                )
        self.memory_kwargs = {**(memory_kwargs or {})}
        width = MemoryLayer(1, device="meta", **self.memory_kwargs).output_size
        super().__init__(*args, lstm_hidden_size=width, **kwargs)
        self.lstm_actor = self._make_memory()
        self.lstm_hidden_state_shape = (1, 1, self.lstm_actor.hidden_size)
        if self.enable_critic_lstm:
            self.lstm_critic = self._make_memory()
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer: torch.optim.Optimizer = self.optimizer_class(
            self.parameters(), lr=lr, **self.optimizer_kwargs
        )

    def _make_memory(self) -> PackedMemory:
        return PackedMemory(MemoryLayer(self.features_dim, batch_first=True, **self.memory_kwargs))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What ``save`` keeps, so that ``load`` makes the same policy."""
        own = {"memory_kwargs": self.memory_kwargs}
        for name in ("shared_lstm", "enable_critic_lstm"):
            own[name] = getattr(self, name)
        return {**super()._get_constructor_parameters(), **own}

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: PackedMemory,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output [B T, ...] of features [B T, ...], whose B sequences begin anew where episode_starts [B T] is 1."""
        batch = lstm_states[0].shape[1]
        output, states = lstm(
            features.unflatten(0, (batch, -1)), lstm_states, episode_starts.view(batch, -1).bool()
        )
        return output.flatten(0, 1), states
