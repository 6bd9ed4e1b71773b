"""The lines of metrics.jsonl for TensorBoard, an extra: pip install 'mann_fast[tensorboard]'."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .config import RunConfig, TrainConfig
from .plots import name_of_answer


def summary_writer() -> type:
    """torch's class that writes event files.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"TensorBoard's files need its package: pip install 'mann_fast[tensorboard]' ({error})"
        ) from error
    return SummaryWriter


class TensorBoardWriter:
    """Writes every line it is called with to ``folder``, a curve for each number in it; close it in the end.

    Args:
        folder: what it held before is removed.
        config: of the run.
        records: the lines that a resumed run has already.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike, config: RunConfig, records: Sequence[dict[str, Any]] = ()):
        kind = summary_writer()
        self._config = config
        # Of a resumed run some lines may have been cut off, which event files cannot forget.
        if Path(folder).exists():
            shutil.rmtree(folder)
        self._writer = kind(str(folder))
        for record in records:
            self(record)

    def __call__(self, record: dict[str, Any]) -> None:
        for name, value in _curves(record, self._config):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _curves(record: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, float]]:
    """Each number by its name: ``heldout_accuracy/2nd image``, ``test_error/20 vectors``, ``loss``. Intervals are left to
    curve.png: a curve for each of their ends would hide the others."""
    for name, value in record.items():
        if name == "step" or name.endswith("_interval"):
            continue
        if isinstance(value, dict):
            yield from ((f"{name}/{part}", number) for part, number in value.items())
        elif isinstance(value, list) and isinstance(config, TrainConfig):
            for k, number in enumerate(value, start=1):
                if number is not None:
                    yield f"{name}/{name_of_answer(config, k)}", number
        else:
            yield name, value
