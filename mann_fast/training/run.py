"""What every training run does: one step of AdamW at a time, with a state that resumes bit for bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from . import processes
from .config import RunConfig


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became infinite or NaN; the parameters are still those of the step before."""


class Run:
    """A model and its optimiser. ``step`` counts the steps that were taken; ``seconds`` is the time spent in them, over all
    sessions of the run. In a process group of torch.distributed all processes train one model, each with the ``part`` of every
    batch; ValueError where it cannot be shared out evenly.
    """

    def __init__(self, config: RunConfig, model: nn.Module):
        self.config = config
        self.part = processes.part_of(config.batch)
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.seconds = 0.0

    def descend(self, loss: Tensor, quality: Tensor) -> tuple[float, Tensor]:
        """One step of AdamW by the loss of this process's part of the batch, a mean. Returns loss and ``quality``, a mean
        too, of the whole batch; TrainingDiverged where the loss or its gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach().clone()
        gradients = [x.grad for x in self.model.parameters() if x.grad is not None]
        processes.average([*gradients, loss, quality])
        norm = clip_grad_norm_(self.model.parameters(), self.config.clip)
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            raise TrainingDiverged(
                f"training diverged at step {self.step + 1}: "
                f"the loss is {value:g}, the gradient's norm {norm.item():g}"
            )
        self.optimizer.step()
        self.step += 1
        return value, quality

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: all that the next step depends on, and what rebuilds the model."""
        from .. import __version__

        return {
            "mann_fast": __version__,
            "config": self.config.to_dict(),
            "model": {"config": self.model.config, "state": self.model.state_dict()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError where the kind of model is not the same."""
        if not self._makes_this_model(state["model"]["config"]):
            raise ValueError(
                f"the checkpoint's model was made with {state['model']['config']}, "
                f"this version of mann_fast makes {self.model.config}; "
                f"go on with the version that wrote it ({state['mann_fast']})"
            )
        self.model.load_state_dict(state["model"]["state"])
        groups = self.optimizer.state_dict()["param_groups"]  # by the config, which is the same
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        self.seconds = state["seconds"]

    def _makes_this_model(self, config: dict[str, Any]) -> bool:
        """Whether the config of a checkpoint, of an earlier version perhaps, makes a model of this kind and sizes."""
        if (
            isinstance(own := getattr(self.model, "encoder", None), nn.Module)
            and config.get("encoder") == type(own).__name__
        ):
            config = {**config, "encoder": own}
        try:
            return type(self.model)(**config, device="meta").config == self.model.config
        except (TypeError, ValueError):  # options that it does not have
            return False
