"""Checkpoint files: plain dicts, numbers, strings and tensors, so that ``torch.load(..., weights_only=True)``
reads them; and the trained model that comes with the package, as safetensors.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models import MANN, LSTMClassifier
from .config import RunConfig, TrainConfig, config_from_dict
from .files import replacing

FORMAT = "mann_fast checkpoint"
VERSION = 1

# Trained on Omniglot; the file beside it says how, and under which licence it comes.
PRETRAINED = Path(__file__).parent.parent / "pretrained" / "omniglot.safetensors"

MODEL_CLASSES = {"mann": MANN, "lstm": LSTMClassifier}


def save_checkpoint(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash there is the old file or the new one."""
    buffer = io.BytesIO()  # torch.save on a full disk says "unexpected pos"; Python says what is wrong
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_weights(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write the part of a loaded checkpoint that using the model takes, as safetensors, atomically."""
    described = {
        "mann_fast": content["mann_fast"],
        "config": content["config"].to_dict(),
        "data": content["data"],
        "model": {"config": content["model"]["config"]},
        "step": content["step"],
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(described)}
    with replacing(path) as temporary:
        save_file(content["model"]["state"], temporary, metadata)


def _read_weights(path: Path) -> dict[str, Any]:
    """The inverse of `save_weights`, in the form of a checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a model of mann_fast, or is damaged") from error
    content = json.loads(metadata.get("content", "{}"))
    content.get("model", {}).update(state=state)
    return {**content, "format": metadata.get("format"), "version": int(metadata.get("version", 0))}


def load_checkpoint(path: str | os.PathLike = PRETRAINED) -> dict[str, Any]:
    """Read a checkpoint, or weights with the ending .safetensors; its "config" comes back as a TrainConfig or SequenceConfig.

    Without a path: the model that comes with the package, 5-way, trained on Omniglot's background set.

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
    if path.suffix == ".safetensors":
        content = _read_weights(path)
    else:
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
    return {**content, "config": config_from_dict(content["config"])}


def build_model(config: RunConfig, input_size: int, num_outputs: int) -> nn.Module:
    """A new model of the configured kind and sizes, initialised from torch's global generator."""
    if config.model == "lstm":
        return LSTMClassifier(input_size, num_outputs, config.hidden_size)
    if isinstance(config, TrainConfig):
        options = {"write_target": "shared"}  # takes off in fewer steps than "per_head": docs/omniglot.md
    else:
        options = {"addressing": config.addressing, "controller": config.controller}
    return MANN(
        input_size,
        num_outputs,
        config.hidden_size,
        num_slots=config.slots,
        slot_size=config.slot_size,
        num_heads=config.heads,
        **options,
    )


def restore_model(content: dict[str, Any]) -> nn.Module:
    """The trained model of a loaded checkpoint, in evaluation mode."""
    model = MODEL_CLASSES[content["config"].model](**content["model"]["config"])
    model.load_state_dict(content["model"]["state"])
    return model.eval()
