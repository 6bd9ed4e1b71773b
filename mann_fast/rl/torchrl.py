"""A MemoryLayer for TorchRL, in the place of ``torchrl.modules.LSTMModule``."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key_list
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import recurrent_mode

from ..layers import MemoryLayer, MemoryState
from ..layers.controllers import state_names


def _as_tuple(key: Any) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


class MemoryModule(TensorDictModuleBase):
    """A :class:`mann_fast.MemoryLayer` that reads from a tensordict and writes to it, as ``torchrl.modules.LSTMModule`` does.

    Outside of recurrent mode, as a collector calls it, every element of the tensordict is one step, and where ``is_init`` is
    True it begins anew. In recurrent mode (``torchrl.modules.set_recurrent_mode``, which losses and value estimators set) the
    last batch dimension is time, and a whole batch [*, T] is one call of the layer. A sample begins there from the state
    that is stored at its first step, and anew where ``is_init`` is True, from the state that is stored at that step. A stored
    state of zeros, which the primer leaves, is no state of a memory: it stands for the start of the layer, which a layer
    with ``memory_start="learned"`` learns.

    Args:
        input_size, hidden_size, options: of the :class:`mann_fast.MemoryLayer` that is made, which has batch_first=True.
        in_key, in_keys: the key of the input, or a list of it, of one key for each tensor of the state, and of "is_init" where
            that has another name. One of the two. By default the tensors of the state are "recurrent_state_hidden",
            "recurrent_state_cell", "recurrent_state_memory" and so on, by their names in :class:`mann_fast.MemoryState`.
        out_key, out_keys: the key of the output, or a list of it and of one key for each tensor of the next state, in the order
            of in_keys; by default ("next", "recurrent_state_hidden") and so on.
        device: of the layer that is made.
        layer: a MemoryLayer with batch_first=True, in place of its arguments.
        default_recurrent_mode: whether to be in recurrent mode where ``set_recurrent_mode`` does not say.

    Raises:
        TypeError, ValueError: as MemoryLayer; a layer that is not batch_first, a controller of the user's own
            (how large its state is shows only when it runs), or keys that are not as many as the state has tensors.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        *,
        in_key: Any = None,
        in_keys: list[Any] | None = None,
        out_key: Any = None,
        out_keys: list[Any] | None = None,
        device: torch.device | str | None = None,
        layer: MemoryLayer | None = None,
        default_recurrent_mode: bool | None = None,
        **options: Any,
    ):
        super().__init__()
        if layer is None:
            if input_size is None or hidden_size is None:
                raise ValueError("input_size and hidden_size, or layer, must be given")
            layer = MemoryLayer(input_size, hidden_size, **{"batch_first": True, "device": device, **options})
        elif input_size is not None or hidden_size is not None or device is not None or options:
            raise ValueError("layer must be given without the arguments of a MemoryLayer")
        elif not isinstance(layer, MemoryLayer):
            raise TypeError(f"layer must be a MemoryLayer, got {type(layer).__name__}")
        if not layer.batch_first:
            raise ValueError("the layer must have batch_first=True, got False")
        if layer.kind == "module":
            raise ValueError(f"controller must be built in, got a {type(layer.controller).__name__}")
        memory = (name for name, sizes, _ in layer.memory.state_like.parts if sizes is not None)
        names = [f"recurrent_state_{name}" for name in (*state_names(layer.kind), *memory, "reads")]
        self.layer = layer
        self.in_keys = _keys("in_key", in_key, in_keys, names)
        self.out_keys = _keys("out_key", out_key, out_keys, [("next", name) for name in names])
        if len(self.in_keys) == len(names) + 1:
            self.in_keys.append("is_init")
        for kind, keys, count in (
            ("in", self.in_keys, len(names) + 2),
            ("out", self.out_keys, len(names) + 1),
        ):
            if len(keys) != count:
                states = f"{len(names)} of the state ({', '.join(names)})"
                raise ValueError(f"{kind}_keys must be one value and {states}, got {keys}")
        self._recurrent_mode = default_recurrent_mode

    @property
    def recurrent_mode(self) -> bool:
        """Whether the last batch dimension is time."""
        mode = recurrent_mode()
        return bool(self._recurrent_mode) if mode is None else mode

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that tells an environment of the tensors of the state, and sets them to zeros at a reset.

        Raises:
            RuntimeError: where the keys of the next state are not ("next", key of the state).
        """
        keys = [_as_tuple(key) for key in self.in_keys[1:-1]]
        if [_as_tuple(key) for key in self.out_keys[1:]] != [("next", *key) for key in keys]:
            raise RuntimeError(
                "make_tensordict_primer needs out_keys that are ('next', key) for each key of the state in in_keys, got "
                f"in_keys={self.in_keys} and out_keys={self.out_keys}"
            )
        parts = self.layer.initial_state(1).flatten()
        specs = {
            key: Unbounded(part.shape[1:], dtype=part.dtype) for key, part in zip(keys, parts, strict=True)
        }
        return TensorDictPrimer(specs, expand_specs=True)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run over the steps of a tensordict, and write output and next state to it.

        Args:
            tensordict: of any batch size, in recurrent mode [*, T]. Of in_keys: the input [*, input_size], the tensors of the
                state or none of them (which is the start of a sequence), and is_init, bool [*, 1].

        Returns:
            the tensordict. Of out_keys: the output [*, output_size], and the state after the step; in recurrent mode that after
            the last step, seen at every step of the sequence without a copy (LSTMModule has zeros before the last).

        Raises:
            KeyError: a key is missing; ValueError: no time in recurrent mode; TypeError, ValueError: as MemoryLayer.
        """
        shape = tensordict.batch_size
        if self.recurrent_mode and not shape:
            raise ValueError("tensordict must have batch size [*, T] in recurrent mode, got []")
        batch, steps = (shape[:-1].numel(), shape[-1]) if self.recurrent_mode else (shape.numel(), 1)
        values = [tensordict.get(key, None) for key in self.in_keys]
        x, *stored, is_init = values
        missing = [key for key, value in zip(self.in_keys, values, strict=True) if value is None]
        if missing and missing != self.in_keys[1:-1]:
            raise KeyError(
                f"tensordict must have all of in_keys, or all but the states, but lacks {missing}: InitTracker() gives an "
                "environment is_init, and make_tensordict_primer() its states"
            )

        def rows(value: Tensor) -> Tensor:
            return value.reshape(batch, steps, *value.shape[len(shape) :])

        x, is_init = rows(x), is_init.reshape(batch, steps)
        if missing:
            output, state = self.layer(x, resets=is_init)
        else:
            output, state = self._continue(x, [rows(part) for part in stored], is_init)
        tensordict.set(self.out_keys[0], output.reshape(*shape, *output.shape[2:]))
        for key, part in zip(self.out_keys[1:], state.flatten(), strict=True):
            part = part.unsqueeze(1).expand(batch, steps, *part.shape[1:])
            tensordict.set(key, part.reshape(*shape, *part.shape[2:]))
        return tensordict

    def _continue(self, x: Tensor, stored: list[Tensor], is_init: Tensor) -> tuple[Tensor, MemoryState]:
        """From the states [B, T, ...] that are stored at the first step and where ``is_init`` [B, T]."""
        batch, steps = x.shape[:2]
        form = self.layer.initial_state(0)
        begins = is_init.clone()
        begins[:, 0] = True
        known = torch.stack([(part[begins].flatten(1) != 0).any(1) for part in stored]).any(0)
        resets = begins.masked_scatter(begins, ~known)
        if not self.recurrent_mode:
            state = form.unflatten(part[:, 0] for part in stored)
            return self.layer(x, state, resets=resets | is_init)
        # What follows a step in "next" is marked as its first, with the state that came before it: there a sample goes on
        # from that state. It is cut at such places, and its pieces are sequences of a batch, each of its length.
        cuts = begins & ~resets
        cuts[:, 0] = True
        first = cuts.flatten().nonzero().squeeze(1)
        lengths = first.diff(append=first.new_tensor([batch * steps]))
        step = torch.arange(int(lengths.max()), device=x.device)
        index = (first.unsqueeze(1) + step).clamp(max=batch * steps - 1)
        output, state = self.layer(
            x.flatten(0, 1)[index],
            form.unflatten(part[cuts] for part in stored),
            resets=resets.flatten()[index],
            lengths=None if len(first) == batch else lengths,
        )
        last = cuts.sum(1).cumsum(0) - 1
        return output[step < lengths.unsqueeze(1)].unflatten(0, (batch, steps)), state.select(last)


def _keys(name: str, key: Any, keys: list[Any] | None, of_states: list[Any]) -> list[Any]:
    """``keys``, or ``key`` and the names of the state."""
    if (key is None) == (keys is None):
        raise ValueError(f"one of {name} and {name}s must be given, got {key} and {keys}")
    return list(unravel_key_list([key, *of_states] if keys is None else list(keys)))
