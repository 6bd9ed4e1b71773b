"""Checkpoint files: plain dicts, numbers, strings and tensors, so that ``torch.load(..., weights_only=True)``
reads them.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import MANN, LSTMClassifier
from .config import TrainConfig
from .files import replacing

FORMAT = "mann_fast checkpoint"
VERSION = 1

MODEL_CLASSES = {"mann": MANN, "lstm": LSTMClassifier}


def save_checkpoint(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash there is the old file or the new one."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint; its "config" comes back as a TrainConfig.

    Raises FileNotFoundError where there is no file, and ValueError where it is no checkpoint or of another
    format version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; `mann-fast train --out DIR` writes DIR/checkpoint.pt"
        )
    data = io.BytesIO(path.read_bytes())
    try:
        content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its readers of zip and pickle run into
        raise ValueError(f"{path} is not a checkpoint of mann_fast, or is damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of mann_fast")
    if content["version"] != VERSION:
        raise ValueError(
            f"{path} has checkpoint format {content['version']}, this mann_fast {VERSION}: "
            f"use the version of mann_fast that wrote it ({content.get('mann_fast')})"
        )
    return {**content, "config": TrainConfig.from_dict(content["config"])}


def build_model(config: TrainConfig, input_size: int, num_outputs: int) -> nn.Module:
    """A new model of the configured kind and sizes, initialised from torch's global generator."""
    if config.model == "lstm":
        return LSTMClassifier(input_size, num_outputs, config.hidden_size)
    return MANN(
        input_size,
        num_outputs,
        config.hidden_size,
        num_slots=config.slots,
        slot_size=config.slot_size,
        num_heads=config.heads,
        write_target="shared",  # takes off in fewer steps than "per_head": docs/omniglot.md
    )


def restore_model(content: dict[str, Any]) -> nn.Module:
    """The trained model of a loaded checkpoint, in evaluation mode."""
    model = MODEL_CLASSES[content["config"].model](**content["model"]["config"])
    model.load_state_dict(content["model"]["state"])
    return model.eval()
