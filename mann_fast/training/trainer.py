"""A training run on episodes of images."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, Episodes
from ..models.backbones import is_backbone
from . import processes
from .checkpoint import build_model
from .config import TrainConfig
from .evaluation import InstanceAccuracy, episode_accuracy
from .metric import encoded, pair_loss
from .objective import is_right, label_loss, right_by_instance
from .prediction import logits_apart
from .run import Run
from .support import make_episodes, sample_support, size_of_step, steps_of_shots, support_accuracy

# Held-out episodes behind each point of the learning curve, always the same ones; of support for each number of shots.
MONITOR_EPISODES = {"stream": 64, "support": 16}


@dataclass(frozen=True)
class StepResult:
    """Of one training step: its number counted from 1, the loss of the answers, and accuracy by instance [shots]; on support
    and queries after so many shots, NaN but for those that the step had.
    """

    step: int
    loss: float
    accuracy: Tensor


class Trainer(Run):
    """Trains one model on the training classes of a dataset.

    Makes its model from torch's global generator, which it seeds with ``config.seed``. Raises ValueError
    where the dataset has too few classes or images for the configured episodes.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset):
        if (dataset.features is not None) != is_backbone(config.encoder):
            raise ValueError(
                f"dataset must hold {'features (encode_dataset)' if is_backbone(config.encoder) else 'images'} with encoder "
                f"{config.encoder}, got {'images' if dataset.features is None else 'features'}"
            )
        self.fingerprint = fingerprint(dataset)
        self.features = dataset.features
        self.drawn = is_drawn(dataset)
        # A character turned by 90, 180 and 270 degrees is three more characters; a photograph is not.
        classes = dataset.train.rotated() if config.augment and self.drawn else dataset.train
        self.episodes = make_episodes(config, classes, augment=config.augment, seed=config.seed)
        self._monitor = _draw_monitor(config, make_episodes(config, dataset.test, seed=0))
        torch.manual_seed(config.seed)
        super().__init__(config, build_model(config, self.episodes.input_size, self.episodes.num_outputs))
        self._start_interval()

    def _start_interval(self) -> None:
        self._interval_loss = 0.0
        self._interval_accuracy = torch.zeros(self.config.shots)
        self._interval_steps = 0

    @property
    def num_classes(self) -> int:
        """How many classes it trains on, turned characters included."""
        return self.episodes.classes.num_classes

    def train_step(self) -> StepResult:
        """Draw a batch of episodes and take one step of AdamW; TrainingDiverged where the loss or gradient is
        not finite.
        """
        started = time.perf_counter()
        self.model.train()
        with encoded(getattr(self.model, "encoder", None)) as features:
            answers, accuracy, classes = self._ask()
        loss = answers
        if features:
            loss = loss + pair_loss(torch.cat(features), classes.flatten())
        _, found = self.descend(loss, torch.cat([answers.detach().view(1), accuracy]))
        answered, accuracy = found[0].item(), found[1:]
        self._interval_loss += answered
        self._interval_accuracy += accuracy.nan_to_num()
        self._interval_steps += 1
        self.seconds += time.perf_counter() - started
        return StepResult(self.step, answered, accuracy)

    def _ask(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and accuracy on a new batch, and the classes of its images, in the order in which the encoder has them."""
        config = self.config
        if config.layout == "support":
            return self._ask_queries()
        episode = self.episodes.sample(config.batch, self.part)
        logits, _ = self.model(episode.inputs)
        right = right_by_instance(
            is_right(logits.detach(), episode.targets, config.labels), episode.instance, config.shots
        )
        loss = label_loss(logits, episode.targets, config.labels)
        return loss, right.mean(0) / config.ways, episode.classes

    def _ask_queries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with accuracy by shots; the batch is of one number of shots."""
        config = self.config
        ways, shots, batch = size_of_step(config, self.step)
        episode = sample_support(self.episodes, batch, processes.part_of(batch), ways=ways, shots=shots)
        logits = logits_apart(
            self.model, config, episode.examples, episode.shown, episode.queries, together=True
        )
        accuracy = torch.full((config.shots,), math.nan)
        accuracy[shots - 1] = is_right(logits.detach(), episode.targets, config.labels).float().mean()
        return label_loss(logits, episode.targets, config.labels), accuracy, episode.classes

    def _heldout_accuracy(self) -> InstanceAccuracy:
        config = self.config
        if config.layout == "support":
            found = [support_accuracy(self.model, config, episode) for episode in self._monitor]
            return InstanceAccuracy.from_episodes(torch.stack(found, 1))
        (episode,) = self._monitor
        return InstanceAccuracy.from_episodes(
            episode_accuracy(self.model, episode, config.labels, config.shots)
        )

    def metrics(self) -> dict[str, Any]:
        """Averages over the steps since the last call, and the accuracy on held-out classes now: a line of
        metrics.jsonl.
        """
        self.model.eval()
        heldout = self._heldout_accuracy()
        counts: Tensor | int = self._interval_steps
        if self.config.layout == "support":
            counts = steps_of_shots(self.config, self.step - self._interval_steps, self.step)
        trained = (self._interval_accuracy / counts).tolist()
        record = {
            "step": self.step,
            "loss": self._interval_loss / self._interval_steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            # None where no step of the interval had so many shots.
            "train_accuracy": [None if math.isnan(value) else value for value in trained],
            "heldout_accuracy": list(heldout.mean),
            "heldout_interval": [list(heldout.low), list(heldout.high)],
            "seconds": round(self.seconds, 3),
        }
        self._start_interval()
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "data": {
                "drawn": self.drawn,
                "fingerprint": self.fingerprint,
                **({} if self.features is None else {"features": self.features}),
            },
            "episodes": self.episodes.state_dict(),
            "interval": {
                "loss": self._interval_loss,
                "accuracy": self._interval_accuracy,
                "steps": self._interval_steps,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError where the data or the kind of model are not the
        same.
        """
        if state["data"]["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the images of --data {self.config.data} are not those that the checkpoint was trained on; "
                "give the same data, or start a new run with another --out"
            )
        if self.features is not None and state["data"]["features"]["weights"] != self.features["weights"]:
            raise ValueError(
                f"the weights of {self.config.encoder} are not those that the run was started with"
            )
        super().load_state_dict(state)
        self.episodes.load_state_dict(state["episodes"])
        self._interval_loss = state["interval"]["loss"]
        self._interval_accuracy = state["interval"]["accuracy"].clone()
        self._interval_steps = state["interval"]["steps"]


def _draw_monitor(config: TrainConfig, episodes: Episodes) -> list[Any]:
    """The held-out episodes behind each point of the learning curve, of support a batch for each number of shots."""
    count = MONITOR_EPISODES[config.layout]
    if config.layout == "stream":
        return [episodes.sample(count)]
    each = range(1, config.shots + 1)
    return [sample_support(episodes, count, ways=config.ways, shots=shots) for shots in each]


def is_drawn(dataset: Dataset) -> bool:
    """Whether the images are drawings, ink 255 on 0, not photographs."""
    return dataset.kind != "folder" or dataset.train.inverted


def fingerprint(dataset: Dataset) -> str:
    """A hash of what the classes are called and how many images they have, training and held-out.

    Not of the pixels: image libraries of two machines may round them differently, and a run may move between
    machines.
    """
    parts = [(part.names, part.starts.tolist()) for part in (dataset.train, dataset.test)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
