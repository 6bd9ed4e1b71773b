"""A training run on episodes of images."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import ClassImages, Dataset, Episodes
from ..data.episodes import distorted, images_of_input, step_before
from ..models.backbones import is_backbone
from ..models.encoders import ENCODERS
from . import processes
from .checkpoint import build_model, take_encoder
from .config import TrainConfig
from .curriculum import Curriculum
from .evaluation import InstanceAccuracy, episode_accuracy
from .metric import pair_loss
from .objective import is_right, label_loss, right_by_instance
from .prediction import Answering, encoded_classes, has_encoder, logits_apart
from .run import Run
from .support import (
    images_of_class,
    make_episodes,
    sample_support,
    steps_of_shots,
    support_accuracy,
    ways_of_step,
)

# Held-out episodes behind each point of the learning curve, always the same ones; of support for each number of shots.
MONITOR_EPISODES = {"stream": 64, "support": 16}
# Images in a step of the encoder: of many classes, so that some are hard to tell apart, and of each so many.
PAIR_CLASSES, PAIR_IMAGES = 64, 4
# How many times the features of every training image are made, each time of another distortion, after how many steps of the
# memory the next time, and how many numbers they are at most together (1 GiB).
COPIES, STEPS_OF_COPY, MOST_NUMBERS = 4, 1000, 2**28
AVERAGED = 8192  # images at most whose features have the mean that is taken from all
LEARNED = 0.5  # with a curriculum: episodes are learned where a smaller share of the answers that can be known is wrong
NOISE = 0.8  # on the features that the memory learns from, as a share of their root mean square


@dataclass(frozen=True)
class StepResult:
    """Of one training step: its number counted from 1, the loss of the answers, and accuracy by instance [shots]; on support
    and queries after so many shots, NaN but for those that the step had. Of a step of the encoder the loss of its pairs, and
    NaN. ways: the classes of its episodes, None of a step of the encoder.
    """

    step: int
    loss: float
    accuracy: Tensor
    ways: int | None = None


class Trainer(Run):
    """Trains one model on the training classes of a dataset.

    An encoder learns alone in the first ``config.encoder_steps`` steps, from pairs of images. From there on it stays as it is:
    its features of every image are made once, and the memory learns from them in the other steps. These may have a curriculum
    of the classes of an episode, which come in as many more episodes of a step; so many are learned where half of the answers
    that can be known are right.

    Makes its model from torch's global generator, which it seeds with ``config.seed``; the encoder has the weights of
    ``config.encoder_from``, but for a run that ``resumes``, whose state brings all weights. Raises ValueError where the dataset
    has too few classes or images for the configured episodes, or the other checkpoint no such encoder.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, *, resumes: bool = False):
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
        self._classes, self._heldout = classes, dataset.test
        torch.manual_seed(config.seed)
        super().__init__(config, build_model(config, self.episodes.input_size, self.episodes.num_outputs))
        if config.encoder_from and not resumes:
            take_encoder(self.model, config)
        if config.encoder in ENCODERS and not config.encoder_steps and not config.encoder_from:
            raise ValueError(
                f"encoder_steps must be at least 1 with encoder {config.encoder}, which starts from nothing, got 0"
            )
        if config.encoder_steps and not any(x.requires_grad for x in self.model.encoder.parameters()):
            raise ValueError(
                f"encoder {config.encoder} has nothing to learn: give encoder_steps 0 (--encoder-steps 0)"
            )
        self.curriculum = Curriculum("ways", config.curriculum, config.ways, LEARNED)
        self._answering: Answering = self.model
        self._seen: list[Episodes] = []  # of features, where the model has an encoder, once it has learned
        self._monitor = _draw_monitor(config, make_episodes(config, dataset.test, seed=0))
        self._start_interval()

    def _start_interval(self) -> None:
        self._interval_loss = 0.0
        self._interval_accuracy = torch.zeros(self.config.shots, dtype=torch.float32)
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
        of_encoder = self.step < self.config.encoder_steps
        if not of_encoder and has_encoder(self.model):
            if self.step == self.config.encoder_steps:
                self._start_interval()
            self._take_features()
        self.model.train()
        ways = None if of_encoder else self._ways()
        loss, accuracy = self._compare() if ways is None else self._ask(ways)
        value, accuracy = self.descend(loss, accuracy)
        if ways is not None:
            self.curriculum.note(1 - accuracy[self.config.first_known :].nanmean().item())
        self._interval_loss += value
        self._interval_accuracy += accuracy.nan_to_num()
        self._interval_steps += 1
        self.seconds += time.perf_counter() - started
        return StepResult(self.step, value, accuracy, ways)

    def _ways(self) -> int:
        """Of this step of the memory."""
        if self.config.curriculum or self.config.layout == "stream":
            return self.curriculum.now
        return ways_of_step(self.config, self.step)

    def _compare(self) -> tuple[Tensor, Tensor]:
        """Loss of the encoder on the pairs of new images, of which nobody asks anything."""
        assert has_encoder(self.model)
        batch = self.config.batch
        ways = min(max(2, PAIR_CLASSES // batch), self.num_classes)
        shots = min(PAIR_IMAGES, images_of_class(self.config))
        drawn = self.episodes.sample_images(batch, self.part, ways=ways, shots=shots)
        pixels = drawn.images.reshape(-1, *self.config.image_shape).float() / 255
        loss = pair_loss(self.model.features(pixels), drawn.classes.flatten())
        return loss, torch.full((self.config.shots,), math.nan)

    def _take_features(self) -> None:
        """Go on with the features that the encoder makes of the images, in every step of images distorted another way."""
        of_memory = self.step - self.config.encoder_steps
        if not self._seen:
            self._end_encoder()
        copies = min(COPIES, 1 + of_memory // STEPS_OF_COPY) if self.config.augment else 1
        for copy in range(len(self._seen), copies):
            if copy and (copy + 1) * self._seen[0].classes.images.numel() > MOST_NUMBERS:
                break
            self._encode(copy)
        following = self._seen[self.step % len(self._seen)]
        following.load_state_dict(self.episodes.state_dict())
        self.episodes = following

    def _end_encoder(self) -> None:
        """From here on it stays as it is."""
        self.model.eval()
        if self.step == self.config.encoder_steps:
            statistics = [x for x in self.model.buffers() if x.is_floating_point()]  # of batch norms
            processes.average(statistics)
            self._centre(self._classes)
        self._answering, heldout = encoded_classes(self.model, self._heldout)
        self._monitor = _draw_monitor(self.config, make_episodes(self.config, heldout, seed=0))

    def _encode(self, copy: int) -> None:
        self.model.eval()
        seed = self.config.seed
        shown = _distorted(self._classes, seed + copy) if copy else self._classes
        _, features = encoded_classes(self.model, shown)
        self._seen.append(make_episodes(self.config, features, seed=seed))

    def _centre(self, classes: ClassImages) -> None:
        """Give the model the mean of the features, of which it then sees how they differ."""
        some = classes.images[:: 1 + len(classes.images) // AVERAGED].reshape(-1, *self.config.image_shape)
        with torch.no_grad():
            parts = [self.model.encoder(part.float() / 255).flatten(1).double() for part in some.split(256)]
        self.model.feature_mean.copy_(torch.cat(parts).mean(0))

    def _ask(self, ways: int) -> tuple[Tensor, Tensor]:
        """Loss and accuracy on a new batch. Fewer ways come in as many more episodes."""
        config = self.config
        batch = config.batch * (config.ways // ways)
        if config.layout == "support":
            return self._ask_queries(ways, batch)
        episode = self.episodes.sample(batch, processes.part_of(batch), ways=ways)
        inputs = episode.inputs
        if self._seen:
            images = images_of_input(config.late)
            width = (inputs.shape[2] - self.episodes.num_outputs) // images
            (features,) = varied(inputs[..., :width])
            before = [step_before(features)] * (images - 1)
            inputs = torch.cat([features, *before, inputs[..., images * width :]], 2)
        logits, _ = self._answering(inputs)
        right = right_by_instance(
            is_right(logits.detach(), episode.targets, config.labels), episode.instance, config.shots
        )
        loss = label_loss(logits, episode.targets, config.labels)
        return loss, right.mean(0) / ways

    def _ask_queries(self, ways: int, batch: int) -> tuple[Tensor, Tensor]:
        """The same, with accuracy by shots; the batch is of one number of shots."""
        config = self.config
        shots = 1 + self.step % config.shots
        episode = sample_support(self.episodes, batch, processes.part_of(batch), ways=ways, shots=shots)
        examples, queries = episode.examples, episode.queries
        if self._seen:
            examples, queries = (255 * x for x in varied(examples, queries))
        logits = logits_apart(self._answering, config, examples, episode.shown, queries, together=True)
        accuracy = torch.full((config.shots,), math.nan)
        accuracy[shots - 1] = is_right(logits.detach(), episode.targets, config.labels).float().mean()
        return label_loss(logits, episode.targets, config.labels), accuracy

    def _heldout_accuracy(self) -> InstanceAccuracy:
        config = self.config
        if config.layout == "support":
            found = [support_accuracy(self._answering, config, episode) for episode in self._monitor]
            return InstanceAccuracy.from_episodes(torch.stack(found, 1))
        (episode,) = self._monitor
        return InstanceAccuracy.from_episodes(
            episode_accuracy(self._answering, episode, config.labels, config.shots)
        )

    def metrics(self) -> dict[str, Any]:
        """Averages over the steps since the last call, and the accuracy on held-out classes now: a line of
        metrics.jsonl. While the encoder learns, the loss of its pairs alone.
        """
        mean, rate = self._interval_loss / self._interval_steps, self.optimizer.param_groups[0]["lr"]
        seconds = round(self.seconds, 3)
        if self.step <= self.config.encoder_steps:
            self._start_interval()
            return {"step": self.step, "pair_loss": mean, "lr": rate, "seconds": seconds}
        self.model.eval()
        heldout = self._heldout_accuracy()
        counts: Tensor | int = self._interval_steps
        if self.config.layout == "support":
            counts = steps_of_shots(self.config, self.step - self._interval_steps, self.step)
        trained = (self._interval_accuracy / counts).tolist()
        record = {
            "step": self.step,
            **({"ways": self.curriculum.now} if self.config.curriculum else {}),
            "loss": mean,
            "lr": rate,
            # None where no step of the interval had so many shots.
            "train_accuracy": [None if math.isnan(value) else value for value in trained],
            "heldout_accuracy": list(heldout.mean),
            "heldout_interval": [list(heldout.low), list(heldout.high)],
            "seconds": seconds,
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
            "curriculum": self.curriculum.state_dict(),
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
        if self.config.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])
        self._interval_loss = state["interval"]["loss"]
        self._interval_accuracy = state["interval"]["accuracy"].clone()
        self._interval_steps = state["interval"]["steps"]


def varied(*features: Tensor) -> list[Tensor]:
    """Other features [n, B, E] for the same task: those of an episode with numbers that have changed places and signs, the same
    for all of its images, and each with noise. What is like what stays, so that this is all that there is to learn; of which
    classes they are, the memory cannot know. All are scaled to a root mean square of 1.
    """
    batch, width = features[0].shape[1:]
    places = torch.rand(batch, width, dtype=torch.float32).argsort(1)
    signs = 2 * torch.randint(0, 2, (batch, width)).float() - 1
    found = []
    for x in features:
        moved = F.rms_norm(x, x.shape[-1:]).gather(2, places.expand(x.shape)) * signs
        found.append(F.rms_norm(moved + NOISE * torch.randn_like(moved), x.shape[-1:]))
    return found


def _distorted(classes: ClassImages, seed: int) -> ClassImages:
    """The same classes with every image turned, stretched, slanted and shifted a little."""
    generator = torch.Generator().manual_seed(seed)
    how = 2 * torch.rand(len(classes.images), 6, generator=generator, dtype=torch.float64) - 1
    parts = zip(classes.images.split(1024), how.split(1024), strict=True)
    return replace(classes, images=torch.cat([distorted(*part).round().byte() for part in parts]))


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
