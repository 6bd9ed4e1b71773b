"""A training run on the bAbI tasks, and what came of it beside the papers."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..data.babi import NONE, TASKS, Babi, Stories, Story
from ..models import MANN
from . import processes
from .checkpoint import build_model
from .config import BabiConfig
from .evaluation import Interrupted
from .run import Run
from .sequences import SequenceStep

MONITOR_STORIES = 5  # of each task behind each point of the curve; always the same ones
BATCH = 16  # stories at a time when measuring

# Errors in percent of the answers, with the standard deviation over runs: table 1 of Csordas and Schmidhuber 2019 (arXiv
# 1904.10278), which gives those of Graves et al. 2016, too. Of the DNC as they ran it themselves: REPEATED.
PUBLISHED = {
    "Graves et al. 2016": (
        (9.0, 12.6), (39.2, 20.5), (39.6, 16.4), (0.4, 0.7), (1.5, 1.0), (6.9, 7.5), (9.8, 7.0), (5.5, 5.9), (7.7, 8.3),
        (9.6, 11.4), (3.3, 5.7), (5.0, 6.3), (3.1, 3.6), (11.0, 7.5), (27.2, 20.1), (53.6, 1.9), (32.4, 8.0), (4.2, 1.8),
        (64.6, 37.4), (0.0, 0.1),
    ),
    "C. and S. 2019, md": (
        (0.0, 0.0), (6.9, 4.7), (12.4, 5.1), (0.1, 0.2), (1.3, 0.7), (0.1, 0.1), (3.0, 5.0), (2.5, 2.1), (0.1, 0.2),
        (0.5, 0.5), (0.0, 0.0), (0.2, 0.2), (0.1, 0.1), (2.0, 1.6), (23.6, 18.6), (53.9, 1.2), (39.8, 1.2), (2.0, 2.6),
        (40.7, 34.9), (0.1, 0.1),
    ),
    "C. and S. 2019, mds": (
        (0.4, 1.2), (8.6, 10.1), (10.8, 9.5), (0.8, 1.5), (1.6, 1.0), (1.1, 2.1), (3.4, 2.3), (4.6, 4.5), (0.8, 1.9),
        (2.6, 3.9), (0.1, 0.1), (0.2, 0.2), (0.1, 0.1), (8.0, 13.1), (26.3, 20.7), (54.5, 1.8), (39.9, 3.2), (6.3, 4.1),
        (48.6, 32.8), (0.9, 0.9),
    ),
}  # fmt: skip
MEANS = {
    "Graves et al. 2016": (16.7, 7.6),
    "C. and S. 2019, md": (9.5, 1.6),
    "C. and S. 2019, mds": (11.0, 3.8),
}
REPEATED = (16.9, 5.2)


def answer_logits(model: nn.Module, stories: Stories, words: int) -> Tensor:
    """At every wanted answer of a batch, step by step, a logit for each word: [answers, words]."""
    inputs = F.one_hot(stories.words, words).float()
    # An LSTM needs no lengths: what is beyond a story's end comes after all its answers.
    of_memory = {"lengths": stories.lengths} if isinstance(model, MANN) else {}
    logits, _ = model(inputs, **of_memory)
    return logits[stories.answers != NONE]


def wanted_answers(stories: Stories) -> Tensor:
    """The words that are wanted there, int64 [answers]."""
    return stories.answers[stories.answers != NONE]


class BabiTrainer(Run):
    """Trains one model on the stories of all tasks, drawn anew at every step.

    Makes its model from torch's global generator, which it seeds with ``config.seed``.
    """

    def __init__(self, config: BabiConfig, data: Babi):
        self.data, self.words = data, len(data.vocabulary)
        torch.manual_seed(config.seed)
        super().__init__(config, build_model(config, self.words, self.words))
        self.generator = Generator().manual_seed(config.seed)
        self.monitor = {number: stories[:MONITOR_STORIES] for number, stories in data.test.items()}
        self._start_interval()

    def _start_interval(self) -> None:
        self._interval = {"loss": 0.0, "error": 0.0, "steps": 0}

    def train_step(self) -> SequenceStep:
        """Draw a batch of stories and take one step of AdamW by the mean cross-entropy of its answers; TrainingDiverged where
        the loss or gradient is not finite. The error is the share of answers that are wrong.
        """
        started = time.perf_counter()
        self.model.train()
        drawn = self.data.sample(self.config.batch, self.generator)
        # What the processes' parts are averaged to is the mean over the answers of the whole batch.
        share = max(1, sum(int((story.answers != NONE).sum()) for story in drawn)) / processes.count()
        stories = Stories.of(drawn[self.part])
        logits, wanted = answer_logits(self.model, stories, self.words), wanted_answers(stories)
        wrong = (logits.detach().argmax(1) != wanted).sum() / share
        loss, error = self.descend(F.cross_entropy(logits, wanted, reduction="sum") / share, wrong)
        for name, value in (("loss", loss), ("error", error.item()), ("steps", 1)):
            self._interval[name] += value
        self.seconds += time.perf_counter() - started
        return SequenceStep(self.step, loss, error.item())

    @torch.inference_mode()
    def metrics(self) -> dict[str, Any]:
        """Averages over the steps since the last call, and the errors on some held-out stories now: a line of metrics.jsonl."""
        self.model.eval()
        steps = self._interval["steps"]
        found = {number: _error(self.model, stories, self.words) for number, stories in self.monitor.items()}
        record = {
            "step": self.step,
            "loss": self._interval["loss"] / steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_error": self._interval["error"] / steps,
            "test_error": {"mean of all tasks": sum(found.values()) / len(found)},
            "task_error": {TASKS[number]: error for number, error in found.items()},
            "seconds": round(self.seconds, 3),
        }
        self._start_interval()
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "data": {"fingerprint": fingerprint(self.data)},
            "vocabulary": list(self.data.vocabulary),
            "generator": self.generator.get_state(),
            "interval": dict(self._interval),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError where the data or the kind of model are not the same."""
        if state["data"]["fingerprint"] != fingerprint(self.data):
            raise ValueError(
                f"the stories of --data {self.config.data} are not those that the checkpoint was trained on; "
                "give the same data, or start a new run with another --out"
            )
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])
        self._interval = dict(state["interval"])


def fingerprint(data: Babi) -> str:
    """A hash of the vocabulary and of all stories."""
    digest = hashlib.sha256(json.dumps(data.vocabulary).encode())
    for part in (data.train, data.test):
        for number, stories in part.items():
            digest.update(f"{number} {len(stories)}".encode())
            for story in stories:
                digest.update(torch.cat(story).numpy().tobytes())
    return digest.hexdigest()


def _error(
    model: nn.Module, stories: Sequence[Story], words: int, stop: Callable[[], bool] = lambda: False
) -> float:
    """The share of wrong answers."""
    wrong, count = 0, 0
    by_length = sorted(stories, key=lambda story: len(story.words))
    for start in range(0, len(by_length), BATCH):
        if stop():
            raise Interrupted
        batch = Stories.of(by_length[start : start + BATCH])
        wanted = wanted_answers(batch)
        wrong += int((answer_logits(model, batch, words).argmax(1) != wanted).sum())
        count += len(wanted)
    return wrong / max(1, count)


class TaskResult(NamedTuple):
    """Of one task, shares of its answers, word by word: error of the model, guess of the task's commonest answer."""

    task: int
    name: str
    error: float
    guess: float


@torch.inference_mode()
def measure_babi(
    model: nn.Module, data: Babi, count: int, *, stop: Callable[[], bool] = lambda: False
) -> list[TaskResult]:
    """Errors on the stories for testing, at most ``count`` of each task.

    `stop` is asked between batches; Interrupted is raised where it says yes.
    """
    model.eval()
    found = []
    for number, stories in data.test.items():
        error = _error(model, stories[:count], len(data.vocabulary), stop)
        ((commonest, _),) = Counter(_answers(data.train[number])).most_common(1) or [(NONE, 0)]
        wanted = _answers(stories[:count])
        guess = sum(answer != commonest for answer in wanted) / max(1, len(wanted))
        found.append(TaskResult(number, TASKS[number], error, guess))
    return found


def _answers(stories: Sequence[Story]) -> list[int]:
    return [answer for story in stories for answer in story.answers.tolist() if answer != NONE]


def has_learned_babi(results: Sequence[TaskResult]) -> bool:
    """Whether the mean error is below half of that of the commonest answers."""
    return sum(result.error for result in results) < sum(result.guess for result in results) / 2
