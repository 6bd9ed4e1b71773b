"""A training run on a sequence task, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..data.sequences import TASKS, Sequences
from ..models import MANN
from .checkpoint import build_model
from .config import SequenceConfig
from .curriculum import Curriculum
from .evaluation import Z95, Interrupted
from .run import Run
from .trace import Slots, slots_of

MONITOR_SEQUENCES = 16  # of each size behind each point of the curve; always the same ones
LEARNED_SHARE = 0.05  # a length is learned where the errors are this share of a guess's
BATCH = 50  # sequences at a time when measuring


@dataclass(frozen=True)
class SequenceStep:
    """Of one training step: its number counted from 1, its loss, its error (see `errors`) per answer, and the length that its
    sequences had at most, None of bAbI.
    """

    step: int
    loss: float
    error: float
    length: int | None = None


def task_of(config: SequenceConfig):
    """The task with its longest length of training."""
    return TASKS[config.task](length=config.length)


def errors(outputs: Tensor, sequences: Sequences, binary: bool) -> Tensor:
    """What is wrong at every answered step of every sequence, [answers, B]: how many bits, or the squared error."""
    outputs, targets = outputs[sequences.answered], sequences.targets[sequences.answered]
    if binary:
        return ((outputs > 0) != (targets > 0.5)).sum(2).float()
    return (outputs - targets).square().mean(2)


def mean_error(wrong: Tensor) -> tuple[float, float, float]:
    """The mean of what is wrong, [answers, B], and its 95% interval: the sequences are the independent trials."""
    per_sequence = wrong.double().mean(0)
    mean, half = per_sequence.mean().item(), Z95 * per_sequence.std().item() / len(per_sequence) ** 0.5
    return mean, max(0.0, mean - half), mean + half


def sequence_loss(outputs: Tensor, sequences: Sequences, binary: bool) -> Tensor:
    """Mean over answered steps, sequences and numbers: cross-entropy of each bit in nats, or squared error."""
    loss = F.binary_cross_entropy_with_logits if binary else F.mse_loss
    return loss(outputs[sequences.answered], sequences.targets[sequences.answered])


class SequenceTrainer(Run):
    """Trains one model on sequences, new ones at every step, of a size drawn for each batch: of ``config.length`` at most, with
    a curriculum of the length that it has come to; a length is learned where the errors are a twentieth of a guess's.

    Makes its model from torch's global generator, which it seeds with ``config.seed``.
    """

    def __init__(self, config: SequenceConfig):
        self.task = task_of(config)
        torch.manual_seed(config.seed)
        super().__init__(config, build_model(config, self.task.input_size, self.task.output_size))
        self.generator = Generator().manual_seed(config.seed)
        fixed = Generator().manual_seed(2**62)
        self.monitor = {
            self.task.name(*size): self.task.sample(MONITOR_SEQUENCES, fixed, *size)
            for size in self.task.tests
        }
        learned = LEARNED_SHARE * self.task.output_size / 2
        self.curriculum = Curriculum("length", config.curriculum, config.length, learned)
        self._start_interval()

    def _start_interval(self) -> None:
        self._interval = {"loss": 0.0, "error": 0.0, "steps": 0}

    def train_step(self) -> SequenceStep:
        """Draw a batch of sequences and take one step of AdamW; TrainingDiverged where the loss or gradient is not finite."""
        started = time.perf_counter()
        self.model.train()
        length = self.curriculum.now
        size = self.task.draw(self.generator, length)
        sequences = self.task.sample(self.config.batch, self.generator, *size).part(self.part)
        outputs, _ = self.model(sequences.inputs)
        error = errors(outputs.detach(), sequences, self.task.binary).mean()
        loss, error = self.descend(sequence_loss(outputs, sequences, self.task.binary), error)
        error = error.item()
        self.curriculum.note(error)
        for name, value in (("loss", loss), ("error", error), ("steps", 1)):
            self._interval[name] += value
        self.seconds += time.perf_counter() - started
        return SequenceStep(self.step, loss, error, length)

    @torch.inference_mode()
    def metrics(self) -> dict[str, Any]:
        """Averages over the steps since the last call, and the errors on sequences of every size now: a line of
        metrics.jsonl.
        """
        self.model.eval()
        steps = self._interval["steps"]
        found = {
            name: mean_error(errors(self.model(sequences.inputs)[0], sequences, self.task.binary))
            for name, sequences in self.monitor.items()
        }
        record = {
            "step": self.step,
            **({"length": self.curriculum.now} if self.config.curriculum else {}),
            "loss": self._interval["loss"] / steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_error": self._interval["error"] / steps,
            "test_error": {name: mean for name, (mean, _, _) in found.items()},
            "test_interval": {name: [low, high] for name, (_, low, high) in found.items()},
            "seconds": round(self.seconds, 3),
        }
        self._start_interval()
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "generator": self.generator.get_state(),
            "interval": dict(self._interval),
            "curriculum": self.curriculum.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])
        self._interval = dict(state["interval"])
        if self.config.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])


class SizeResult(NamedTuple):
    """Of many sequences of one size.

    name: the size in words; answers: how many each has. mean, low, high: what is wrong per answer (bits, or squared error) with
    its 95% interval; solved: the share of sequences without a wrong bit, None for regression. guess: what is wrong where
    the answer does not depend on the input. by_answer: the mean at each of the answers; ideal: the same of the best possible
    answers where it is known, else None.
    """

    name: str
    answers: int
    mean: float
    low: float
    high: float
    solved: float | None
    guess: float
    by_answer: list[float]
    ideal: list[float] | None


@torch.inference_mode()
def measure(
    model: nn.Module,
    config: SequenceConfig,
    count: int,
    *,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> list[SizeResult]:
    """Errors on ``count`` new sequences of each size, within training and beyond it.

    `stop` is asked between batches; Interrupted is raised where it says yes.
    """
    task, found = task_of(config), []
    generator = Generator().manual_seed(2**61 + seed)
    model.eval()
    for size in task.tests:
        parts: list[Tensor] = []
        ideals: list[Tensor] = []
        guesses: list[Tensor] = []
        for start in range(0, count, BATCH):
            if stop():
                raise Interrupted
            sequences = task.sample(min(BATCH, count - start), generator, *size)
            parts.append(errors(model(sequences.inputs)[0], sequences, task.binary))
            wanted = sequences.targets[sequences.answered]
            guesses.append(wanted.new_tensor(wanted.shape[2] / 2) if task.binary else wanted.square().mean())
            if sequences.ideal is not None:
                ideals.append(sequences.ideal)
        wrong = torch.cat(parts, dim=1)
        found.append(
            SizeResult(
                task.name(*size),
                len(wrong),
                *mean_error(wrong),
                (wrong.sum(0) == 0).float().mean().item() if task.binary else None,
                torch.stack(guesses).mean().item(),
                wrong.mean(1).tolist(),
                torch.cat(ideals, dim=1).mean(1).tolist() if ideals else None,
            )
        )
    return found


def has_learned_task(results: Sequence[SizeResult], config: SequenceConfig) -> bool:
    """Whether errors on the longest sequences of training are below half of a guess's."""
    task = task_of(config)
    longest = task.name(*task.longest)
    return next(result.mean < result.guess / 2 for result in results if result.name == longest)


class SequenceTrace(NamedTuple):
    """One sequence of T steps: name: its size in words; inputs [T, I], targets and outputs [T, O] (probabilities of bits),
    answered [T]; slots: None of a model without memory; error: what is wrong per answer.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    outputs: Tensor
    answered: Tensor
    slots: Slots | None
    error: float


@torch.inference_mode()
def trace_sequence(
    model: nn.Module, config: SequenceConfig, seed: int, length: int | None = None
) -> SequenceTrace:
    """What a model does with one new sequence, of the longest size of training or with another length."""
    task = task_of(config)
    first, *rest = task.longest
    sequences = task.sample(1, Generator().manual_seed(seed), length or first, *rest)
    slots = None
    if isinstance(model, MANN):
        hidden, _, weights = model.layer(sequences.inputs, return_weights=True)
        slots, outputs = slots_of(weights, model.layer.memory.num_slots), model.classifier(hidden)
    else:
        outputs, _ = model(sequences.inputs)
    return SequenceTrace(
        task.name(length or first, *rest),
        sequences.inputs[:, 0],
        sequences.targets[:, 0],
        (outputs.sigmoid() if task.binary else outputs)[:, 0],
        sequences.answered,
        slots,
        errors(outputs, sequences, task.binary).mean().item(),
    )
