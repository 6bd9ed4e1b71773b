"""The loop around `Trainer`: checkpoints, metrics, learning curve and summary in one output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, Episodes
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .evaluation import InstanceAccuracy, Interrupted, evaluate
from .files import read_json_lines, replacing, write_json
from .plots import plot_learning_curve
from .trainer import StepResult, Trainer, TrainingDiverged

CHECKPOINT, METRICS, CURVE, SUMMARY = "checkpoint.pt", "metrics.jsonl", "curve.png", "summary.json"

# What may change when a run is resumed: how long it goes on, how fast, and how it is reported.
CHANGEABLE = ("data", "steps", "lr", "warmup", "decay", "log_every", "checkpoint_every", "eval_episodes")


def require_no_run(out: str | os.PathLike) -> None:
    """FileExistsError if the folder `out` holds a run already."""
    if (Path(out) / CHECKPOINT).exists():
        raise FileExistsError(
            f"{out} already holds a run: continue it with --resume, or choose another --out"
        )


def start_run(
    config: TrainConfig, dataset: Dataset, out: str | os.PathLike, *, overwrite: bool = False
) -> Trainer:
    """A new run in folder `out`; FileExistsError where it holds one already, unless that is to be
    overwritten.
    """
    out = Path(out)
    if not overwrite:
        require_no_run(out)
    trainer = Trainer(config, dataset)
    out.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, METRICS, CURVE, SUMMARY):
        (out / name).unlink(missing_ok=True)
    return trainer


def resume_run(config: TrainConfig, dataset: Dataset, out: str | os.PathLike) -> Trainer:
    """The run in folder `out` where its checkpoint left it; lines of metrics.jsonl written after the
    checkpoint are cut off.

    Raises FileNotFoundError without a checkpoint, ValueError where settings or data that make the result
    differ.
    """
    out = Path(out)
    state = load_checkpoint(out / CHECKPOINT)
    before, now = state["config"].to_dict(), config.to_dict()
    for name in before:
        if name not in CHANGEABLE and before[name] != now[name]:
            raise ValueError(
                f"the run in {out} was started with {name} = {before[name]!r} and cannot continue with "
                f"{now[name]!r}; leave the option out, or start a new run with another --out"
            )
    if config.steps < state["step"]:
        raise ValueError(
            f"the run in {out} is at step {state['step']} already; "
            f"steps must be at least that, got {config.steps}"
        )
    trainer = Trainer(config, dataset)
    trainer.load_state_dict(state)
    if (out / METRICS).exists():
        kept = [record for record in read_json_lines(out / METRICS) if record["step"] <= trainer.step]
        with replacing(out / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return trainer


def train(
    trainer: Trainer,
    out: str | os.PathLike,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepResult], None] = lambda result: None,
) -> bool:
    """Train up to ``config.steps``; False where `stop`, asked before every step, said yes first.

    Either way the folder then holds a checkpoint to resume from, the metrics up to it, and the learning
    curve. Raises TrainingDiverged, leaving the last good checkpoint in place.
    """
    out = Path(out)
    config = trainer.config
    finished = True
    try:
        with open(out / METRICS, "a", encoding="utf-8") as metrics:
            while trainer.step < config.steps:
                if stop():
                    finished = False
                    break
                on_step(trainer.train_step())
                last = trainer.step == config.steps
                if last or trainer.step % config.log_every == 0:
                    print(json.dumps(trainer.metrics()), file=metrics, flush=True)
                if trainer.step % config.checkpoint_every == 0 and not last:
                    save_checkpoint(out / CHECKPOINT, trainer.state_dict())
        save_checkpoint(out / CHECKPOINT, trainer.state_dict())
    except TrainingDiverged as error:
        advice = "try a smaller --lr"
        if (out / CHECKPOINT).exists():
            advice = f"the last good checkpoint is {out / CHECKPOINT}; resume from it with a smaller --lr"
        raise TrainingDiverged(f"{error}; {advice}") from error
    draw_curve(trainer, out)
    return finished


def draw_curve(trainer: Trainer, out: Path) -> None:
    """curve.png from metrics.jsonl; nothing before the first line is written."""
    if records := read_json_lines(out / METRICS):
        plot_learning_curve(out / CURVE, records, trainer.config, describe(trainer.config))


def describe(config: TrainConfig, source: str | None = None) -> str:
    """A run in a few words, for titles; `source` if it is measured on other data than it was trained on."""
    source = source or config.data
    data = source if source in ("glyphs", "omniglot") else Path(source).resolve().name
    labels = ", string labels" if config.labels == "string" else ""
    return f"{config.model.upper()} on {data}, {config.ways}-way{labels}"


def summarise(
    trainer: Trainer, dataset: Dataset, out: str | os.PathLike, *, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Evaluate on the held-out classes, write summary.json and return its content; Interrupted where `stop`
    said yes.
    """
    config = trainer.config
    episodes = Episodes(
        dataset.test, ways=config.ways, shots=config.shots, labels=config.labels, seed=config.seed
    )
    accuracy = evaluate(
        trainer.model, episodes, config.eval_episodes, labels=config.labels, shots=config.shots, stop=stop
    )
    summary = {
        "config": config.to_dict(),
        "step": trainer.step,
        "training_seconds": round(trainer.seconds, 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "train_classes": trainer.num_classes,
        "heldout_classes": dataset.test.num_classes,
        "heldout_accuracy": accuracy.to_dict(),
        "chance": config.chance,
        "learned": has_learned(accuracy, config),
        "files": {
            name: str(Path(out) / file)
            for name, file in (("checkpoint", CHECKPOINT), ("metrics", METRICS), ("curve", CURVE))
        },
    }
    write_json(Path(out) / SUMMARY, summary)
    return summary


def has_learned(accuracy: InstanceAccuracy, config: TrainConfig) -> bool:
    """Whether an image is recognised when its class is seen for the 2nd time, beyond any guess."""
    return accuracy.mean[1] > config.learned_above


__all__ = [
    "CHECKPOINT",
    "CURVE",
    "Interrupted",
    "METRICS",
    "SUMMARY",
    "describe",
    "has_learned",
    "resume_run",
    "start_run",
    "summarise",
    "train",
]
