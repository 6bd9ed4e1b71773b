"""FewShotLearner: new classes from a few pictures of each, in a trained model's memory."""

from __future__ import annotations

import dataclasses
import inspect
import json
import operator
import os
import sys
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, overload

import numpy as np
import torch
from torch import Tensor, nn

from .data.datasets import FOR_PHOTOGRAPHS
from .data.images import are_coloured, expand_user, is_light
from .data.pictures import (
    Forms,
    as_images,
    as_items,
    as_pixels,
    forms_of,
    plain_label,
    require_several,
)
from .training.checkpoint import PRETRAINED, WEIGHTS, load_checkpoint, restore_model, save_weights
from .training.config import TrainConfig
from .training.features import encoder_of
from .training.files import write_json
from .training.loop import describe
from .training.prediction import predict_by_order, require_ways
from .training.recall import Recall, recall

try:
    from huggingface_hub import ModelHubMixin
except ImportError:
    HUB_MIXIN: type[object] | None = None
else:
    HUB_MIXIN = ModelHubMixin

# What save_pretrained writes beside the weights; huggingface_hub's names.
SETTINGS = "config.json"
CARD = "README.md"
CARD_OF = """---
library_name: mann_fast
tags:
- few-shot-learning
- memory-augmented-neural-network
---
{model}: a model of mann_fast that learns new classes from a few images of each, in its memory.

```python
from mann_fast import FewShotLearner  # pip install mann_fast

learner = FewShotLearner.from_pretrained("USER/NAME")  # this repository, or a folder of these files
learner.learn(images, labels)
learner.predict(other_images)
```
"""


class _Averages(TypedDict):
    orders: int
    views: int
    seed: int


class _Folders:
    """What of huggingface_hub's ModelHubMixin needs no huggingface_hub: saving to a folder, and loading from one."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory))  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        saved = Path(pretrained_model_name_or_path) / SETTINGS
        options = {**(json.loads(saved.read_text()) if saved.is_file() else {}), **options}
        return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **options)  # type: ignore[attr-defined]


class FewShotLearner(HUB_MIXIN or _Folders):  # type: ignore[misc]
    """Learns classes from a few images of each, at once and again and again, by showing them to a trained model; its weights
    do not change.

    Args:
        checkpoint: path of a ``checkpoint.pt`` of ``mann-fast train`` or of a ``.safetensors``, or of the folder of a run or of
            :meth:`save_pretrained`; None: the model that comes with mann_fast, for 2 to 20 classes of drawn characters;
            "omniglot-stream": the one that came with version 0.1, for 2 to 5.
        orders: how many random orders of the examples (and assignments of labels to classes) an answer is the mean of, at
            least 1. One alone is noise.
        views: how many views of every image its features are the mean over, at least 1: as it is, and turned, stretched and
            shifted a little. There is one only where the model reads pixels or a backbone's features, or was trained without
            such distortions (``--no-augment``).
        random_state: seed of the orders. The same examples and seed give the same answers.
        encoder: where the model was trained with an encoder of your own, a new module of that kind.

    Attributes:
        classes_: the labels that it has learned, [C], sorted where they can be, else as they came first.

    An *image* is a path, a PIL image, a NumPy array [H, W], [H, W, C] or [C, H, W], or a tensor of such a shape, of any size;
    C is 1, 3 or 4 (transparency). Integers of three channels go from 0 to 255, floats from 0 to 1; of one channel
    the contrast is stretched whatever its range. *Images* are a sequence of them (a column of pandas, too), or one array
    [M, ...], of flat squares also [M, S * S] (as scikit-learn's digits are; a DataFrame will do). Each becomes a square of the
    model's size as :func:`mann_fast.data.read_image` says, and for a model of drawings dark ink on light paper is inverted: all
    images, where the borders of the examples are light.

    An estimator of scikit-learn, which need not be there: ``fit``, ``score``, ``get_params``, ``set_params``, ``clone``.
    With huggingface_hub installed ``from_pretrained`` takes a repository's name too, and ``push_to_hub`` is there.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        orders: int = 8,
        views: int = 8,
        random_state: int = 0,
        encoder: nn.Module | None = None,
    ):
        self.checkpoint = checkpoint
        self.orders = orders
        self.views = views
        self.random_state = random_state
        self.encoder = encoder

    @classmethod
    def load(cls, checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> FewShotLearner:
        """A learner with its model loaded; arguments as of the class.

        Raises FileNotFoundError without such a file, ValueError where it is damaged or no model of images.
        """
        learner = cls(checkpoint, **options)
        learner._content()
        return learner

    @property
    def config(self) -> TrainConfig:
        """The settings of the model: ways, image size, encoder and so on; raises as :meth:`load`."""
        return self._content()["config"]

    def learn(self, images: Any, labels: Iterable[Hashable]) -> FewShotLearner:
        """Remember images with their labels, beside those of earlier calls: more examples, or more classes.

        labels: one for each image, of any kind that can be hashed: a list, an array, a tensor, [M] or [M, 1], or a column of
            pandas. Numbers and strings of NumPy and torch become those of Python. Returns itself.

        Raises ValueError for more classes than the model tells apart, another number of labels than of images, NaN for a label,
        an image that cannot be read, which it names, or where ``checkpoint`` has become a model of another image size since;
        TypeError for what is no image or label. Nothing is learned then.
        """
        if labels is None:
            raise ValueError(
                "labels must be given, one for each image: FewShotLearner requires y to be passed, but the target y is None"
            )
        config = self.config
        if isinstance(images, Iterator):
            images = list(images)
        images = as_images(images)
        pixels, named = as_pixels(images, config.image_size, config.colour), _as_list(labels, "labels")
        if len(named) != len(pixels):
            raise ValueError(f"labels must be one for each of {len(pixels)} images, got {len(named)}")
        if not named:
            raise ValueError("images must be at least one, got none: 0 sample(s)")
        if self._content()["data"]["drawn"] and not config.colour:
            self._warn_of_colour(images)
        before = getattr(self, "_examples", None)
        if before is not None:
            self._require_same_size(before, pixels)
        every = [*self._labels, *named] if before is not None else named
        classes = sorted_labels(every)
        require_ways(len(classes), config)
        self._examples = pixels if before is None else np.concatenate([before, pixels])
        self._labels: list[Hashable] = every
        # None where examples were learned by an older release and unpickled: then any form may have been.
        forms: Forms | None = set() if before is None else self.__dict__.get("_forms")
        self._forms: Forms | None = None if forms is None else forms | forms_of(images)
        self.classes_ = classes
        return self

    def fit(self, X: Any, y: Iterable[Hashable]) -> FewShotLearner:
        """Forget everything, then :meth:`learn`."""
        self.forget()
        return self.learn(X, y)

    def forget(self) -> FewShotLearner:
        """Forget all examples and classes; the model stays. Returns itself."""
        for name in ("_examples", "_labels", "_forms", "classes_"):
            self.__dict__.pop(name, None)
        return self

    def predict(self, images: Any) -> np.ndarray:
        """The most probable label of each image, [M]; raises as :meth:`predict_proba`."""
        found = self.predict_proba(images)
        return self.classes_[found.argmax(1)]

    @overload
    def predict_proba(self, images: Any, return_std: Literal[False] = False) -> np.ndarray: ...

    @overload
    def predict_proba(self, images: Any, return_std: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...

    @overload
    def predict_proba(self, images: Any, return_std: bool) -> np.ndarray | tuple[np.ndarray, np.ndarray]: ...

    def predict_proba(
        self, images: Any, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Probability of each class for each image, float64 [M, C] in the order of ``classes_``; rows sum to 1.

        Every image is judged apart from the others. An image of no class that was learned gets an answer, too.

        return_std: also the standard deviation over the orders, [M, C], 0 of a single one. Where it is large the answer
            hangs on the order in which the examples were read: the mean over ``orders`` is off by about the deviation over the
            square root of ``orders``.

        Raises ValueError before anything was learned, for an image that cannot be read, which it names, and for an array that
        may be meant as one image; TypeError for what is no image.
        """
        arguments = self._question(images)
        found = predict_by_order(*arguments, **self._averages()).double()
        mean = found.mean(1)
        shares: np.ndarray = (mean / mean.sum(1, keepdim=True)).numpy()
        return (shares, found.numpy().std(1)) if return_std else shares

    def recall(self, images: Any) -> Recall:
        """Where in the memory the answer to each of M images comes from, for the orders of :meth:`predict_proba`:
        a :class:`mann_fast.training.Recall`. Its ``examples``, [M, n], is the share of each example in the order of
        learning.

        Raises as :meth:`predict_proba`, and ValueError where the model has no memory (an LSTM).
        """
        return recall(*self._question(images), **self._averages())

    def score(self, X: Any, y: Iterable[Hashable], sample_weight: Any = None) -> float:
        """The share of images whose prediction is the label given, with ``sample_weight`` of their weights; raises as
        :meth:`predict`, ValueError for another number of labels or weights than of images, or none.
        """
        answers, wanted = self.predict(X).tolist(), _as_list(y, "y")
        if len(answers) != len(wanted):
            raise ValueError(f"y must be one label for each of {len(answers)} images, got {len(wanted)}")
        if not answers:
            raise ValueError("X must be at least one image, got none")
        right = [a == b for a, b in zip(answers, wanted, strict=True)]
        if sample_weight is None:
            return float(np.mean(right))
        weights = np.asarray(sample_weight, float)
        if weights.shape != (len(right),):
            raise ValueError(
                f"sample_weight must be [{len(right)}], one for each image, got {list(weights.shape)}"
            )
        if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(
                f"sample_weight must be finite and at least 0, and not all 0, got {sample_weight!r}"
            )
        return float(np.average(right, weights=weights))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the class by their names."""
        return {
            name: getattr(self, name)
            for name in inspect.signature(type(self).__init__).parameters
            if name != "self"
        }

    def set_params(self, **params: Any) -> FewShotLearner:
        """Change arguments of the class; ValueError for one that it does not have. Returns itself."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r}: must be one of {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return (
            f"FewShotLearner({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"
        )

    def __sklearn_is_fitted__(self) -> bool:
        return "_examples" in self.__dict__

    def __sklearn_tags__(self) -> Any:
        """Images are no rows of features, so scikit-learn's checks of tables do not apply."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False, three_d_array=True),
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> Any:
        """Write the model to a folder, made if need be, with a README.md that says what it is where there is none, and no
        examples. options: of huggingface_hub's mixin, where it is.
        """
        return super().save_pretrained(expand_user(os.fspath(save_directory)), **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> FewShotLearner:
        """A learner with the model of a folder of :meth:`save_pretrained`, or, with huggingface_hub installed, of a repository
        user/name; options: arguments of the class, and of huggingface_hub.

        Raises FileNotFoundError where there is no such folder; else as :meth:`load`.
        """
        folder = expand_user(os.fspath(pretrained_model_name_or_path))
        of_hub = len(folder.parts) <= 2 and not folder.is_absolute()
        if not folder.is_dir() and not (of_hub and HUB_MIXIN is not None):
            hint = ", or a repository with huggingface_hub (pip install 'mann_fast[hub]')" if of_hub else ""
            raise FileNotFoundError(f"{folder} does not exist; expected a folder of save_pretrained{hint}")
        # A repository's name has a slash whatever the system.
        return super().from_pretrained(
            folder if folder.is_dir() else pretrained_model_name_or_path, **options
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """The model, its settings among it, and not what was learned: for that, pickle the learner."""
        content = self._content()
        data = Path(content["config"].data).name  # where it lay on this machine is nobody else's business
        save_weights(
            save_directory / WEIGHTS, {**content, "config": dataclasses.replace(content["config"], data=data)}
        )
        settings = self.get_params()
        for name in ("checkpoint", "encoder"):  # a path of this machine, and code
            del settings[name]
        write_json(save_directory / SETTINGS, settings)
        card = save_directory / CARD
        if not card.exists():  # else its owner has written one
            model = describe(dataclasses.replace(content["config"], data=data))
            card.write_text(CARD_OF.format(model=model), encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> FewShotLearner:
        of_hub = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        download = {name: options.pop(name) for name in of_hub if name in options}
        file = expand_user(model_id) / WEIGHTS
        if not file.is_file() and HUB_MIXIN is not None and not file.parent.is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model_id, WEIGHTS, **download))
        return cls.load(file, **options)

    def _question(self, images: Any) -> tuple[nn.Module, TrainConfig, Tensor, Tensor, Tensor]:
        """The model, its settings, the examples, their classes by number and the images, as the model is to see them."""
        self._require_learned()
        content = self._content()
        config = content["config"]
        images = as_images(images)
        if (forms := self.__dict__.get("_forms")) is not None:
            require_several(images, forms)
        queries, examples = as_pixels(images, config.image_size, config.colour), self._examples
        self._require_same_size(examples, queries)
        if content["data"]["drawn"] and is_light(list(examples.mean(1) if config.colour else examples)):
            queries, examples = 255 - queries, 255 - examples
        place = {label: at for at, label in enumerate(self.classes_.tolist())}
        classes = torch.tensor([place[label] for label in self._labels])
        shown, asked = torch.from_numpy(examples), torch.from_numpy(queries)
        if self._features is not None:
            shown, asked = self._features.features(shown), self._features.features(asked)
        return self._model, config, shown, classes, asked

    def _averages(self) -> _Averages:
        """What an answer is the mean over."""
        views = self.views if self.config.augment else 1
        return {
            "orders": _whole("orders", self.orders),
            "views": _whole("views", views),
            "seed": _whole("random_state", self.random_state),
        }

    def _content(self) -> dict[str, Any]:
        """The checkpoint that ``checkpoint`` names now, and in ``_model`` what it makes."""
        if not isinstance(self.checkpoint, (str, os.PathLike, type(None))):
            came = type(self.checkpoint).__name__
            raise TypeError(f"checkpoint must be a path, the name of a model or None, got {came}")
        if "_loaded" not in self.__dict__ or self._loaded[0] != (self.checkpoint, self.encoder):
            content = load_checkpoint(PRETRAINED if self.checkpoint is None else self.checkpoint)
            if not isinstance(content["config"], TrainConfig):
                raise ValueError(
                    f"{self.checkpoint} is a model of the task {content['config'].task}, not of images"
                )
            self._features = encoder_of(content)
            self._model = restore_model(content, self.encoder)
            self._loaded: tuple[tuple[str | os.PathLike[str] | None, nn.Module | None], dict[str, Any]] = (
                (self.checkpoint, self.encoder),
                content,
            )
        return self._loaded[1]

    def _warn_of_colour(self, images: Any) -> None:
        """Most of the pictures in colour are no drawn characters."""
        if are_coloured(as_pixels(images, self.config.image_size, colour=True)):
            warnings.warn(
                "the images are in colour, and this model has learned to tell drawn characters apart, in grey: "
                f"{FOR_PHOTOGRAPHS}",
                stacklevel=3,
            )

    def _require_same_size(self, examples: np.ndarray, pixels: np.ndarray) -> None:
        """The examples are kept as the model of their time reads them, and ``checkpoint`` may be another one now."""
        if examples.shape[1:] != pixels.shape[1:]:
            raise ValueError(
                f"what was learned are images {list(examples.shape[1:])}, and the model of checkpoint={self.checkpoint!r} "
                f"reads {list(pixels.shape[1:])}: call forget(), then learn again"
            )

    def _require_learned(self) -> None:
        if self.__sklearn_is_fitted__():
            return
        message = "this FewShotLearner has learned nothing yet: call learn(images, labels) first"
        if "sklearn" in sys.modules:
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(message)
        raise ValueError(message)


def sorted_labels(labels: Sequence[Hashable]) -> np.ndarray:
    """The different ones, sorted where they can be, else as they come first; an array of objects where they are of kinds that
    NumPy would change.
    """
    distinct = list(dict.fromkeys(labels))
    try:
        distinct.sort()  # type: ignore[call-arg]
    except TypeError:
        pass
    kinds = {type(label) for label in distinct}
    if len(kinds) == 1 and kinds <= {bool, int, float, str}:
        plain = np.array(distinct)
        # Else NumPy has changed them: large integers become floats, and strings lose what is 0 at their ends.
        if plain.tolist() == distinct and {type(label) for label in plain.tolist()} == kinds:
            return plain
    found = np.empty(len(distinct), object)
    found[:] = distinct
    return found


def _as_list(labels: Any, name: str) -> list[Any]:
    """The labels, of an array, a tensor or a column of pandas as of a list, as Python has them."""
    if (
        hasattr(labels, "to_numpy") and labels.ndim > 1
    ):  # a DataFrame, whose items would be the names of its columns
        labels = labels.to_numpy()
    return [
        plain_label(label, f"{name}[{at}]") for at, label in enumerate(as_items(labels, name, "of labels"))
    ]


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
