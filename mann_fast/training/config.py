"""The settings of a training run, with their defaults in one place."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .._state import SIZE_MAX
from ..data.episodes import LABELS, LATE
from ..data.sequences import TASKS, KeyValue
from ..layers import MEMORIES, Memory
from ..layers.registry import PRESETS, make_memory, options_of
from ..models.backbones import is_backbone, recipe_of
from ..models.encoders import ENCODERS, check_image_shape, is_own
from ..reference.cell import CONTROLLERS

GRAVES = PRESETS["graves2014"].options  # for the tasks of that paper
MODELS = ("mann", "lstm")
LAYOUTS = ("stream", "support")  # of an episode
NO_ENCODER = "none"
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {"conv4": {"image_size": 28}}  # the field's
# Of a stream, shared slots take off in fewer steps than slots per head: docs/omniglot.md. Of support and queries, a step of few
# episodes with many classes tells more apart than one of many with few; measuring takes more images. What is written is the
# key, which holds image and label, so images that look alike find one another from the first step; the controller has no past,
# which would only tell of the order of the examples. docs/few-shot.md has what was tried.
LAYOUT_DEFAULTS: dict[str, dict[str, Any]] = {
    "stream": {"memory": "write_target=shared"},
    "support": {
        "controller": "feedforward",
        "memory": "write_vector=key write_target=per_head order=read_first",
        "shots": 5,
        "batch": 2,
        "lr": 2e-3,
        "log_every": 250,
        "eval_episodes": 200,
    },
}
# Of a stream that shows an image beside its label a controller needs no past, and without one learns sooner: docs/omniglot.md.
LATE_DEFAULTS: dict[str, dict[str, Any]] = {"pair": {"controller": "feedforward"}}
# Of so many steps an encoder has one to learn in. It took 7.5 times as long as one of the memory, and then come the features:
# both have about half of the time.
ENCODER_SHARE = 10
BABI = "babi"  # the name of its task
SIZES = {
    "num_slots": "slots",
    "slot_size": "slot_size",
    "num_heads": "heads",
}  # of a memory, by the names of settings
WORDS: dict[str, Any] = {
    "true": True,
    "false": False,
    "none": None,
}  # in "NAME=VALUE ...", beside numbers and names
MOST_NUMBERS = (
    2**28
)  # of one sample's memory: 1 GiB in float32. No parameter has this size, so no file bounds it


@dataclass(frozen=True)
class RunConfig:
    """What every run has. A checkpoint holds the settings whole.

    Raises TypeError and ValueError for a setting of the wrong type or out of range.
    """

    model: str = "mann"  # or "lstm", the baseline without memory
    hidden_size: int = 200
    slots: int = Memory.num_slots
    slot_size: int = Memory.slot_size
    heads: int = Memory.num_heads
    addressing: str = "lrua"
    memory: str = ""  # options of the memory, "NAME=VALUE ..."
    controller: str = "lstm"

    steps: int = 20_000
    batch: int = 16  # episodes or sequences per step
    lr: float = 3e-3  # of AdamW
    warmup: int = 100  # steps in which the learning rate rises to lr
    decay: float = 1.0  # share of the steps, at the end, in which it falls to 0
    clip: float = 10.0  # largest norm of the gradient
    weight_decay: float = 0.05  # of AdamW
    seed: int = 0

    log_every: int = 50  # steps per line of metrics.jsonl
    checkpoint_every: int = 500
    eval_episodes: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected = type(field.default)
            if expected is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not expected:
                raise TypeError(f"{field.name} must be of type {expected.__name__}, got {value!r}")
            if expected is int and field.name != "seed":  # it would be a size, or a number of steps
                _require(value <= SIZE_MAX, field.name, "at most 2^31 - 1", value)
        for name in (
            "hidden_size",
            "slots",
            "slot_size",
            "heads",
            "steps",
            "batch",
            "log_every",
            "checkpoint_every",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.eval_episodes >= 2, "eval_episodes", "at least 2", self.eval_episodes)
        numbers = self.slots * self.slot_size
        _require(numbers <= MOST_NUMBERS, "slots * slot_size", f"at most {MOST_NUMBERS}", numbers)
        _require(self.heads <= self.slots, "heads", f"at most slots = {self.slots}", self.heads)
        _require(self.addressing in MEMORIES, "addressing", f"one of {', '.join(MEMORIES)}", self.addressing)
        _require(
            self.controller in CONTROLLERS, "controller", f"one of {', '.join(CONTROLLERS)}", self.controller
        )
        self._check_memory()
        _require(self.model in MODELS, "model", f"one of {', '.join(MODELS)}", self.model)
        _require(math.isfinite(self.lr) and self.lr > 0, "lr", "a number above 0", self.lr)
        _require(self.warmup >= 0, "warmup", "at least 0", self.warmup)
        _require(0 <= self.decay <= 1, "decay", "from 0 to 1", self.decay)
        _require(self.clip > 0, "clip", "above 0", self.clip)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1", self.seed)

    def _check_memory(self) -> None:
        own = [name for name in options_of(MEMORIES[self.addressing]) if name not in SIZES]
        options = dict(_memory_option(part) for part in self.memory.split())
        for name in options:
            _require(name in own, "memory", f"options of {self.addressing!r}, {', '.join(own)}", self.memory)
        twice = len(options) < len(self.memory.split())
        _require(not twice, "memory", "options that are given once", self.memory)
        try:
            make_memory(self.addressing, self.memory_options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"memory must be options of {self.addressing!r}: {error}") from error

    @property
    def memory_options(self) -> dict[str, Any]:
        """Those of the memory, sizes among them."""
        sizes = {option: getattr(self, name) for option, name in SIZES.items()}
        return {**sizes, **dict(_memory_option(part) for part in self.memory.split())}

    def learning_rate(self, step: int) -> float:
        """The learning rate of one step, counted from 0: linear rise, constant, linear fall.

        It depends on the settings and the step alone, so a resumed run has nothing to restore.
        """
        return self._rate(step, self.steps)

    def _rate(self, step: int, steps: int) -> float:
        rise = (step + 1) / (self.warmup + 1)
        falling = self.decay * steps
        fall = (steps - step) / falling if falling else 1.0
        return self.lr * min(1.0, rise, fall)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; ValueError where settings are missing or unknown."""
        values = _with_memory(values)
        names = {field.name for field in fields(cls)}
        if differing := names ^ set(values):
            raise ValueError(f"settings of another version of mann_fast: {', '.join(sorted(differing))}")
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Of a run on episodes of images."""

    data: str = "glyphs"  # "glyphs", "omniglot" or the path of a folder
    image_size: int = 20  # images are resized to image_size x image_size pixels
    colour: bool = False  # three channels, else grey
    encoder: str = NO_ENCODER  # or one of ENCODERS, LIBRARY/NAME or MODULE:FACTORY, between the pixels and the controller
    encoder_steps: int = 0  # of the steps, in which the encoder learns alone; in the others it stays as it is
    encoder_from: str = ""  # the checkpoint whose encoder this one begins as

    ways: int = 5  # classes per episode
    shots: int = 10  # images of each class per episode
    labels: str = "onehot"  # or "string": five letters per class, as in the paper
    # "stream": every image is asked about, and its label follows one step late, as in the paper. "support": first up to `shots`
    # examples of each class, each with its label, then queries, every one judged apart from the others.
    layout: str = "stream"
    # Where above 0, training begins with episodes of so many classes, and has twice as many, up to `ways`, each time that they
    # are learned (Rae et al. 2016): see Trainer.
    curriculum: int = 0
    memory: str = LAYOUT_DEFAULTS["stream"]["memory"]
    # Of a stream: what comes one step late, "label", as in the paper, or "pair", the image once more beside its label.
    late: str = "label"
    augment: bool = True  # shift and turn the images a little; turned characters are classes of their own

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.image_size >= 1, "image_size", "at least 1", self.image_size)
        known = (NO_ENCODER, *ENCODERS)
        named = self.encoder in known or is_own(self.encoder) or is_backbone(self.encoder)
        choices = f"one of {', '.join(known)}, torchvision/NAME, timm/NAME or MODULE:FACTORY"
        _require(named, "encoder", choices, self.encoder)
        if is_backbone(self.encoder):
            never = "False with a backbone, which makes the features of every image once (--no-augment)"
            _require(not self.augment, "augment", never, self.augment)
        elif self.encoder != NO_ENCODER:
            _require(self.model == "mann", "encoder", f"{NO_ENCODER!r} with model lstm", self.encoder)
            check_image_shape(self.image_shape, self.encoder)
        taken = not self.encoder_from or trainable(self.encoder)
        _require(taken, "encoder_from", f"empty with encoder {self.encoder}", self.encoder_from)
        most = self.steps - 1 if trainable(self.encoder) else 0
        why = (
            f"from 0 to {most}, below steps" if trainable(self.encoder) else f"0 with encoder {self.encoder}"
        )
        _require(0 <= self.encoder_steps <= most, "encoder_steps", why, self.encoder_steps)
        _require(self.ways >= 2, "ways", "at least 2", self.ways)
        _require(self.layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}", self.layout)
        if self.layout == "support":
            _require(self.shots >= 1, "shots", "at least 1", self.shots)
            _require(self.model == "mann", "layout", "'stream' with model lstm", self.layout)
        else:
            least = "at least 2 (the first image of a class can only be guessed)"
            _require(self.shots >= 2, "shots", least, self.shots)
        _require(self.labels in LABELS, "labels", f"one of {', '.join(LABELS)}", self.labels)
        choices = LATE if self.layout == "stream" else LATE[:1]
        _require(
            self.late in choices, "late", f"one of {', '.join(choices)} with layout {self.layout}", self.late
        )
        if self.curriculum:
            within = f"0 or from 2 to ways = {self.ways}"
            _require(2 <= self.curriculum <= self.ways, "curriculum", within, self.curriculum)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of an image."""
        return (3 if self.colour else 1, self.image_size, self.image_size)

    @classmethod
    def of(cls, encoder: str, layout: str, **changes: Any) -> TrainConfig:
        """With the image size that suits the encoder and steps for it to learn in, and with what suits the layout, unless they
        are among the changes.
        """
        of_encoder = ENCODER_DEFAULTS.get(encoder, {})
        if is_backbone(encoder):
            of_encoder = {"image_size": recipe_of(encoder).image_size, "colour": True, "augment": False}
        of_late = LATE_DEFAULTS.get(changes.get("late", cls.late), {})
        of_layout = {"addressing": cls.addressing, **LAYOUT_DEFAULTS.get(layout, {}), **of_late}
        defaults = _of_addressing({**of_layout, **of_encoder}, changes)
        if trainable(encoder):
            steps = defaults.get("steps", cls.steps)
            learning = 0 if defaults.get("encoder_from") else min(max(1, steps // ENCODER_SHARE), steps - 1)
            defaults.setdefault("encoder_steps", learning)
        config = cls(encoder=encoder, layout=layout, **defaults)
        if layout == "support" and "slots" not in changes:  # one for every head and example
            examples = config.heads * config.ways * config.shots
            config = replace(config, slots=max(config.slots, examples))
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The same; checkpoints from before there were encoders have none, older ones a stream, none in which an encoder
        learned with the memory steps of its own, memory and controller went by the layout, and there was no curriculum.
        """
        before = {"colour": False, "encoder": NO_ENCODER, "encoder_steps": 0, "layout": "stream"}
        values = {**before, "encoder_from": "", "curriculum": 0, "late": "label", **values}
        of_layout = LAYOUT_DEFAULTS.get(str(values["layout"]), {})
        made = {
            name: of_layout.get(name, getattr(cls, name)) for name in ("addressing", "memory", "controller")
        }
        return super().from_dict({**made, **values})

    def learning_rate(self, step: int) -> float:
        """The same, once over the steps of the encoder and once over the others."""
        of_encoder = self.encoder_steps
        if step < of_encoder:
            return self._rate(step, of_encoder)
        return self._rate(step - of_encoder, self.steps - of_encoder)

    @property
    def chance(self) -> float:
        """The share of right answers of a blind guess: of one label of `ways`, or of five letters of five."""
        return 1 / self.ways if self.labels == "onehot" else 5.0**-5

    @property
    def first_known(self) -> int:
        """Of the accuracies by instance or by shots the place of the first that more than a guess can get right: the 2nd image
        of a class, an image after one example of it."""
        return 1 if self.layout == "stream" else 0

    @property
    def blind(self) -> float:
        """A share of right answers that is out of reach without looking at the images: more than one label in `ways` that were
        seen, and in a stream also more than the first answers have to choose from, or those that count labels."""
        return (2 if self.layout == "stream" else 1.25) / self.ways

    @property
    def learned_above(self) -> float:
        """Accuracy at `first_known` above which learning has started.

        A model that does not look at the images can still answer with a label that it has seen in the
        episode, which is right once in `ways`; a quarter of the way from there to 1 is out of reach without
        binding images to labels.
        """
        return 1 / self.ways + (1 - 1 / self.ways) / 4


def trainable(encoder: str) -> bool:
    """Whether a run can train the encoder."""
    return encoder in ENCODERS or is_own(encoder)


@dataclass(frozen=True)
class SequenceConfig(RunConfig):
    """Of a run on a task of `mann_fast.data.sequences`; `of_task` gives each its own defaults."""

    task: str = "copy"
    length: int = 20  # the longest of training, in the task's own unit
    # Where above 0, training begins with sequences of at most this length, and the limit doubles, up to `length`, each time
    # that they are learned (Rae et al. 2016): see SequenceTrainer.
    curriculum: int = 0

    addressing: str = GRAVES["addressing"]
    hidden_size: int = GRAVES["hidden_size"]
    slot_size: int = GRAVES["slot_size"]
    heads: int = GRAVES["num_heads"]
    steps: int = 3000
    lr: float = 1e-3
    decay: float = 0.5
    weight_decay: float = 0.0
    eval_episodes: int = 200  # of each size

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.task in TASKS, "task", f"one of {', '.join(TASKS)}", self.task)
        _require(self.length >= self.least, "length", f"at least {self.least}", self.length)
        fits = self.task != "key-value" or self.length <= KeyValue.most
        _require(fits, "length", f"at most {KeyValue.most}, as many as can differ", self.length)
        if self.task == "regression":
            _require(self.curriculum == 0, "curriculum", "0 with task regression", self.curriculum)
        elif self.curriculum:
            within = f"0 or from {self.least} to length = {self.length}"
            _require(self.least <= self.curriculum <= self.length, "curriculum", within, self.curriculum)

    @property
    def least(self) -> int:
        """The shortest length of a sequence."""
        return getattr(TASKS[self.task], "least", 1)

    @classmethod
    def of_task(cls, task: str, **changes: Any) -> SequenceConfig:
        """With the task's own defaults; of pairs these go by the length."""
        defaults = dict(TASK_DEFAULTS.get(task, {}))
        if task == "pairs":
            length = changes.get("length", defaults["length"])
            defaults |= {
                "curriculum": min(4, length),
                "slots": 4 * length,
            }  # twice the longest that is measured
        return cls(task=task, **_of_addressing(defaults, changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The same; older checkpoints have no curriculum."""
        return super().from_dict({"curriculum": 0, **values})


@dataclass(frozen=True)
class BabiConfig(RunConfig):
    """Of a run on the bAbI tasks, all at once; sizes, learning rate and batch of Csordas and Schmidhuber 2019."""

    task: str = BABI
    data: str = ""  # the path of the files: `mann_fast.data.babi.load_babi`

    addressing: str = "dnc"
    memory: str = "masks=true deallocate=true"  # the best of the paper's table 1
    hidden_size: int = 256
    slots: int = 256
    slot_size: int = 64
    steps: int = 500_000
    batch: int = 2  # stories
    lr: float = 1e-4
    decay: float = 0.0
    weight_decay: float = 1e-5
    log_every: int = 500
    eval_episodes: int = 1000  # stories of each task at most: all of the release

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.task == BABI, "task", repr(BABI), self.task)
        _require(bool(self.data), "data", "the path of the bAbI files", self.data)

    @classmethod
    def of(cls, **changes: Any) -> BabiConfig:
        """With no options of the memory where another than the DNC is among the changes, unless these are too."""
        return cls(**_of_addressing({"addressing": cls.addressing, "memory": cls.memory}, changes))


# Sizes of Graves et al. 2014 for their tasks, of Santoro et al. 2016 for regression; steps and learning rates: docs/tasks.md.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "copy": {"clip": 1.0},  # at 10 some seeds unlearn it again: docs/tasks.md
    "repeat-copy": {"length": 5, "steps": 10_000, "lr": 3e-3},
    "recall": {"length": 6, "steps": 4000},
    "key-value": {
        "length": 4,
        "addressing": "dnc",
        "memory": "masks=true deallocate=true link_sharpening=true",
        "hidden_size": 64,
        "slots": 8,  # fewer than pairs: what was asked for has to make room
        "slot_size": 16,
        "steps": 2000,
        "lr": 3e-3,
    },
    "pairs": {
        "length": 1024,
        "steps": 2000,
        "addressing": "sparse",
        "hidden_size": 64,
        "slot_size": 32,
        "lr": 3e-3,
    },
    "regression": {
        "length": 50,
        "steps": 10_000,
        "addressing": "lrua",
        "hidden_size": RunConfig.hidden_size,
        "slot_size": RunConfig.slot_size,
        "heads": RunConfig.heads,
    },
}


def config_kind(task: str | None) -> type[RunConfig]:
    """The class of the settings of a task, None for episodes of images."""
    if task is None:
        return TrainConfig
    return BabiConfig if task == BABI else SequenceConfig


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The settings of a checkpoint."""
    return config_kind(values.get("task")).from_dict(values)


def _of_addressing(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The defaults with changes; those of a memory's options are for the addressing that they stand beside."""
    if changes.get("addressing", defaults.get("addressing")) != defaults.get("addressing"):
        defaults = {**defaults, "memory": ""}
    return {**defaults, **changes}


def _with_memory(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint; older ones have options of the DNC alone, by the letters of Csordas and Schmidhuber 2019."""
    if "memory" in values:
        return values
    repairs = {"m": "masks", "d": "deallocate", "s": "link_sharpening"}
    letters = values.get("repairs", "")
    if not isinstance(letters, str) or not set(letters) <= repairs.keys():
        raise ValueError(f"repairs must be some of the letters {', '.join(repairs)}, got {letters!r}")
    memory = " ".join(f"{repairs[letter]}=true" for letter in sorted(set(letters)))
    return {"memory": memory, **{name: value for name, value in values.items() if name != "repairs"}}


def _memory_option(part: str) -> tuple[str, Any]:
    """NAME=VALUE: true, false, none, a number, or the name of a choice."""
    name, equals, text = part.partition("=")
    _require(bool(name and equals and text), "memory", "NAME=VALUE ...", part)
    if text.lower() in WORDS:
        return name, WORDS[text.lower()]
    for kind in (int, float):
        try:
            return name, kind(text)
        except ValueError:
            continue
    return name, text


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
