"""The loop around `Trainer`: checkpoints, metrics, learning curve and summary in one output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset
from ..data.babi import Babi
from . import processes
from .babi import BabiTrainer, has_learned_babi, measure_babi
from .checkpoint import load_checkpoint, save_checkpoint
from .config import NO_ENCODER, BabiConfig, RunConfig, SequenceConfig, TrainConfig
from .evaluation import InstanceAccuracy, Interrupted
from .files import append_json_line, read_json_lines, remove_temporaries, replacing, write_json
from .lock import only_run
from .plots import plot_learning_curve
from .run import Run, TrainingDiverged
from .sequence_plots import plot_answers, plot_sequence, plot_sequence_curve
from .sequences import SequenceStep, SequenceTrainer, has_learned_task, measure, task_of, trace_sequence
from .support import make_episodes, measure_accuracy
from .trainer import StepResult, Trainer

CHECKPOINT, METRICS, CURVE, SUMMARY = "checkpoint.pt", "metrics.jsonl", "curve.png", "summary.json"
ANSWERS, MEMORY = "answers.png", "memory.png"  # of a sequence task
FILES = (CHECKPOINT, METRICS, CURVE, SUMMARY, ANSWERS, MEMORY)

# What may change when a run is resumed: how long it goes on, how fast, and how it is reported.
CHANGEABLE = ("data", "steps", "lr", "warmup", "decay", "log_every", "checkpoint_every", "eval_episodes")


def require_no_run(out: str | os.PathLike) -> None:
    """FileExistsError if the folder `out` holds a run already."""
    if (Path(out) / CHECKPOINT).exists():
        raise FileExistsError(
            f"{out} already holds a run: continue it with --resume, or choose another --out"
        )


AnyTrainer = Trainer | SequenceTrainer | BabiTrainer


def make_trainer(config: RunConfig, dataset: Dataset | Babi | None, *, resumes: bool = False) -> AnyTrainer:
    if isinstance(config, SequenceConfig):
        return SequenceTrainer(config)
    if isinstance(config, BabiConfig):
        return BabiTrainer(config, dataset)
    return Trainer(config, dataset, resumes=resumes)


def start_run(
    config: RunConfig, dataset: Dataset | Babi | None, out: str | os.PathLike, *, overwrite: bool = False
) -> AnyTrainer:
    """A new run in folder `out`, of a SequenceConfig without a dataset; FileExistsError where it holds one already, unless that
    is to be overwritten; BlockingIOError where another process is training in it.
    """
    out = Path(out)
    with only_run(out):
        if not overwrite:
            require_no_run(out)
        trainer = make_trainer(config, dataset)
        if processes.rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (out / name).unlink(missing_ok=True)
                remove_temporaries(out / name)
    return trainer


def resume_run(config: RunConfig, dataset: Dataset | Babi | None, out: str | os.PathLike) -> AnyTrainer:
    """The run in folder `out` where its checkpoint left it; lines of metrics.jsonl written after the
    checkpoint are cut off.

    Raises FileNotFoundError without a checkpoint, ValueError where settings or data that make the result
    differ, BlockingIOError where another process is training in it.
    """
    out = Path(out)
    with only_run(out):
        state = load_checkpoint(out / CHECKPOINT)
        before, now = state["config"].to_dict(), config.to_dict()
        for name in before:
            if name not in CHANGEABLE and before[name] != now.get(name):
                raise ValueError(
                    f"the run in {out} was started with {name} = {before[name]!r} and cannot continue with "
                    f"{now[name]!r}; leave the option out, or start a new run with another --out"
                )
        if config.steps < state["step"]:
            raise ValueError(
                f"the run in {out} is at step {state['step']} already; "
                f"steps must be at least that, got {config.steps}"
            )
        trainer = make_trainer(config, dataset, resumes=True)
        trainer.load_state_dict(state)
        if processes.rank() == 0:
            for name in FILES:
                remove_temporaries(out / name)
            if (out / METRICS).exists():
                kept = [record for record in read_metrics(out) if record["step"] <= trainer.step]
                lines = "".join(json.dumps(record) + "\n" for record in kept)
                with replacing(out / METRICS) as temporary:
                    temporary.write_text(lines, encoding="utf-8")
    return trainer


def train(
    trainer: Run,
    out: str | os.PathLike,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepResult | SequenceStep], None] = lambda result: None,
    on_metrics: Callable[[dict[str, Any]], None] = lambda record: None,
) -> bool:
    """Train up to ``config.steps``; False where `stop`, asked before every step, said yes first, to one of the processes.
    ``on_metrics`` gets every line of metrics.jsonl as it is written.

    Either way the folder then holds a checkpoint to resume from, the metrics up to it, and the learning
    curve. Raises TrainingDiverged, leaving the last good checkpoint in place, and BlockingIOError where another process is
    training in the folder.
    """
    out = Path(out)
    with only_run(out):
        try:
            finished = _train(trainer, out, stop, on_step, on_metrics)
        except TrainingDiverged as error:
            advice = "try a smaller --lr"
            if (out / CHECKPOINT).exists():
                advice = f"the last good checkpoint is {out / CHECKPOINT}; resume from it with a smaller --lr"
            raise TrainingDiverged(f"{error}; {advice}") from error
        if processes.rank() == 0:
            save_checkpoint(out / CHECKPOINT, trainer.state_dict())
            draw_curve(trainer, out)
    return finished


def _train(
    trainer: Run,
    out: Path,
    stop: Callable[[], bool],
    on_step: Callable[[StepResult | SequenceStep], None],
    on_metrics: Callable[[dict[str, Any]], None],
) -> bool:
    """The steps of `train`, with the lines of metrics and the checkpoints on the way."""
    config = trainer.config
    while trainer.step < config.steps:
        if processes.any_of(stop()):
            return False
        on_step(trainer.train_step())
        if processes.rank():
            continue
        last = trainer.step == config.steps
        if last or trainer.step % config.log_every == 0:
            record = trainer.metrics()
            append_json_line(out / METRICS, record)
            on_metrics(record)
        if trainer.step % config.checkpoint_every == 0 and not last:
            save_checkpoint(out / CHECKPOINT, trainer.state_dict())
    return True


def read_metrics(out: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the folder ``out``; none before the first is written."""
    metrics = Path(out) / METRICS
    return read_json_lines(metrics) if metrics.exists() else []


def draw_curve(trainer: Run, out: Path) -> None:
    """curve.png from metrics.jsonl; nothing before the first line is written."""
    config = trainer.config
    if records := read_metrics(out):
        plot = plot_learning_curve if isinstance(config, TrainConfig) else plot_sequence_curve
        plot(out / CURVE, records, config, describe(config))


def describe(config: RunConfig, source: str | None = None) -> str:
    """A run in a few words, for titles; `source` if it is measured on other data than it was trained on."""
    if not isinstance(config, TrainConfig):
        model = _memory(config) if config.model == "mann" else f"{config.model.upper()} without memory"
        if isinstance(config, BabiConfig):
            return f"{model}, on bAbI"
        task = task_of(config)
        return f"{model}, on {config.task}, trained on up to {task.name(*task.longest)}"
    source = source or config.data
    data = source if source in ("glyphs", "omniglot") else Path(source).resolve().name
    labels = ", string labels" if config.labels == "string" else ""
    if config.layout == "support":
        labels += ", support and queries"
    if config.late == "pair":
        labels += ", pairs late"
    usual = TrainConfig.of(NO_ENCODER, config.layout, late=config.late)
    plain = config if config.memory != usual.memory else replace(config, memory="")
    parts = [_memory(plain)] if config.model == "mann" else []
    if config.encoder != NO_ENCODER:
        parts += [config.encoder, f"{config.image_size} x {config.image_size}"]
    model = config.model.upper() + (f" ({', '.join(parts)})" if parts else "")
    return f"{model} on {data}, {config.ways}-way{labels}"


def _memory(config: RunConfig) -> str:
    options = ", ".join(part.removesuffix("=true") for part in config.memory.split())
    memory = f"{_spelt(config.addressing)} memory" + (f" ({options})" if options else "")
    return f"{memory}, {_spelt(config.controller)} controller"


def _spelt(name: str) -> str:
    """Abbreviations in capitals: NTM, LSTM, but content and feedforward."""
    return name.upper() if len(name) <= 4 else name


def summarise(
    trainer: Trainer, dataset: Dataset, out: str | os.PathLike, *, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Evaluate on the held-out classes, write summary.json and return its content; Interrupted where `stop`
    said yes.
    """
    config = trainer.config
    episodes = make_episodes(config, dataset.test, seed=config.seed)
    accuracy = measure_accuracy(trainer.model, config, episodes, config.eval_episodes, stop=stop)
    return _write_summary(
        trainer,
        out,
        {
            "train_classes": trainer.num_classes,
            "drawn": trainer.drawn,
            "heldout_classes": dataset.test.num_classes,
            "heldout_accuracy": accuracy.to_dict(),
            "chance": config.chance,
            "learned": has_learned(accuracy, config),
        },
    )


def summarise_task(
    trainer: SequenceTrainer, out: str | os.PathLike, *, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Measure on sequences of every size, draw the errors and what the memory does with one sequence, write summary.json and
    return its content; Interrupted where `stop` said yes.
    """
    out, config = Path(out), trainer.config
    results = measure(trainer.model, config, config.eval_episodes, seed=config.seed, stop=stop)
    title = describe(config)
    plot_answers(out / ANSWERS, results, config, title)
    plot_sequence(out / MEMORY, trace_sequence(trainer.model, config, seed=0), config, title)
    found = {
        "results": [result._asdict() for result in results],
        "learned": has_learned_task(results, config),
    }
    return _write_summary(trainer, out, found, answers=ANSWERS, memory=MEMORY)


def summarise_babi(
    trainer: BabiTrainer, out: str | os.PathLike, *, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Measure on the stories for testing, write summary.json and return its content; Interrupted where `stop` said yes."""
    results = measure_babi(trainer.model, trainer.data, trainer.config.eval_episodes, stop=stop)
    found = {
        "results": [result._asdict() for result in results],
        "learned": has_learned_babi(results),
    }
    return _write_summary(trainer, out, found)


def _write_summary(
    trainer: Run, out: str | os.PathLike, found: dict[str, Any], **pictures: str
) -> dict[str, Any]:
    files = {"checkpoint": CHECKPOINT, "metrics": METRICS, "curve": CURVE, **pictures}
    summary = {
        "config": trainer.config.to_dict(),
        "step": trainer.step,
        "training_seconds": round(trainer.seconds, 3),
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **found,
        "files": {name: str(Path(out) / file) for name, file in files.items()},
    }
    write_json(Path(out) / SUMMARY, summary)
    return summary


def has_learned(accuracy: InstanceAccuracy, config: TrainConfig) -> bool:
    """Whether an image is recognised after one of its class, beyond any guess."""
    return accuracy.mean[config.first_known] > config.learned_above


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
    "summarise_babi",
    "summarise_task",
    "train",
]
