"""Checkpoint files: plain dicts, numbers, strings and tensors, so that ``torch.load(..., weights_only=True)``
reads them; and the trained model that comes with the package, as safetensors.

What a file holds is checked before anybody uses it, down to names, shapes and finite weights: a damaged file is refused, with
an error that names it. What is checked are the sums that a zip archive keeps of its entries, which torch.load ignores, and of
safetensors a SHA-256 of our own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.serialization import config as serialization

from ..data import num_outputs
from ..data.episodes import images_of_input
from ..data.images import expand_user
from ..data.sequences import TASKS
from ..models import MANN, LSTMClassifier
from ..models.backbones import is_backbone
from ..models.encoders import is_own, make_own
from .config import (
    NO_ENCODER,
    BabiConfig,
    RunConfig,
    TrainConfig,
    config_from_dict,
    trainable,
)
from .files import replacing

FORMAT = "mann_fast checkpoint"
VERSION = 1  # of what is written; all from 1 on are read: docs/cli.md

# Trained on Omniglot; the file beside it says how, and under which licence it comes.
_FOLDER = Path(__file__).parent.parent / "pretrained"
SHIPPED = {
    name: _FOLDER / f"{name}.safetensors" for name in ("omniglot", "omniglot-stream")
}  # with the package
PRETRAINED = SHIPPED["omniglot"]  # where none is named
WEIGHTS = "model.safetensors"  # in a folder of save_pretrained; huggingface_hub's name

OF_ENCODER = "encoder."  # begins the names of its tensors
MODEL_CLASSES = {"mann": MANN, "lstm": LSTMClassifier}


def save_checkpoint(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash there is the old file or the new one."""
    buffer = io.BytesIO()  # torch.save on a full disk says "unexpected pos"; Python says what is wrong
    with serialization.patch("save.compute_crc32", True):  # a program may have turned off what loading checks
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
    state, text = content["model"]["state"], json.dumps(described)
    metadata = {"format": FORMAT, "version": str(VERSION), "content": text, "sha256": _digest(text, state)}
    with replacing(path) as temporary:  # save_file's file could be read by nobody else, whatever the umask
        temporary.write_bytes(save(state, metadata))


def _digest(text: str, state: dict[str, Tensor]) -> str:
    """SHA-256 of what weights hold; of a tensor its name, dtype and shape too."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_weights(path: Path) -> Any:
    """The inverse of `save_weights`, in the form of a checkpoint; any exception where the file is damaged."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    if metadata.get("format") != FORMAT:
        return None
    expected = {"format", "version", "content", "sha256"}
    # 0.1.0 wrote no digest. All other names are wrong: "sha256" itself may be what is damaged.
    if metadata.keys() != expected - {"sha256"} and (
        metadata.keys() != expected or metadata["sha256"] != _digest(metadata["content"], state)
    ):
        raise ValueError("what it holds is not what was written")
    content = json.loads(metadata["content"])
    content["model"]["state"] = state
    return {**content, "format": FORMAT, "version": int(metadata["version"])}


def _read_archive(path: Path) -> Any:
    """What `save_checkpoint` wrote; any exception where the file is damaged."""
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
        entries = archive.infolist()
        # torch.save compresses nothing, so nothing here inflates, nor do entries share bytes.
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed")
        if sum(entry.file_size for entry in entries) > os.fstat(archive.fp.fileno()).st_size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        # torch reads a copy, of names and checked bytes alone: no sum covers the rest of the directory, where one bit makes
        # an entry a folder, for which torch.load returns memory that nobody wrote.
        for entry in entries:
            copy.writestr(zipfile.ZipInfo(entry.filename), archive.read(entry))  # BadZipFile: a wrong sum
    checked.seek(0)
    with warnings.catch_warnings():
        # torch 2.14 warns that it checks a sparse tensor; that none belongs here is said in our own words.
        warnings.filterwarnings("ignore", "Validating sparse tensor", UserWarning)
        return torch.load(checked, map_location="cpu", weights_only=True, mmap=False)


def checkpoint_path(name: str | os.PathLike) -> Path:
    """The file of a model that comes with the package, by its name, unless there is such a file or folder; else a path."""
    path = expand_user(name)
    return path if path.exists() else SHIPPED.get(os.fspath(name), path)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Runs compute in float32, whatever dtype torch makes by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_in_float32()
def load_checkpoint(path: str | os.PathLike = PRETRAINED) -> dict[str, Any]:
    """Read a checkpoint, or weights with the ending .safetensors; its "config" comes back as a TrainConfig, SequenceConfig or
    BabiConfig.

    path: a file, the folder of a run or of ``save_pretrained``, or the name of a model that comes with the package, all trained
        on Omniglot's background set: "omniglot" (the default, 20-way, support and queries) or "omniglot-stream" (5-way, labels
        one step late).

    Raises FileNotFoundError where there is no file, and ValueError, which names the file, where it is no checkpoint, is of a
    newer format, is damaged, or holds what no run of its settings has: other names, types or shapes, or numbers that are not
    finite. A compressed archive, or a model of absurd size, is refused before it takes memory.
    """
    path = checkpoint_path(path)
    if path.is_dir():
        saved = path / WEIGHTS
        path = saved if saved.is_file() and not (path / "checkpoint.pt").exists() else path / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; `mann-fast train --out DIR` writes DIR/checkpoint.pt"
        )
    of_weights = path.suffix == ".safetensors"
    # OSError where it may not be read; after this, one is an offset that leads nowhere: damage.
    path.open("rb").close()
    try:
        content = (_read_weights if of_weights else _read_archive)(path)
    except Exception as error:  # whatever the readers of zip, pickle, safetensors and JSON run into
        raise ValueError(f"{path} is not a checkpoint of mann_fast, or is damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of mann_fast")
    try:
        _require_version(content)
        content = {**content, "config": _config(content)}
        parameters = _require_model(content)
        if not of_weights:
            _require_progress(content, parameters)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ) as error:  # the last two of numbers too large for torch
        raise ValueError(f"{path}: {_first_line(error)}") from error
    return content


def _first_line(error: Exception) -> str:
    """Of a message of torch, which may go on with its own frames."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _part(content: dict[str, Any], name: str, kind: type) -> Any:
    """What a checkpoint holds under a name such as "model.config"; ValueError where it is not there or of another type."""
    value: Any = content
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"it holds no {name}, so it is no whole checkpoint")
        value = value[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    if kind in (int, float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number from 0 up, got {value}")
    return value


def _require_version(content: dict[str, Any]) -> None:
    version, writer = _part(content, "version", int), _part(content, "mann_fast", str)
    if version > VERSION:
        raise ValueError(
            f"it has checkpoint format {version}, written by mann_fast {writer}, and this mann_fast reads formats up "
            f"to {VERSION}: update mann_fast"
        )
    if version < 1:
        raise ValueError(f"its checkpoint format must be from 1 to {VERSION}, got {version}")


def _config(content: dict[str, Any]) -> RunConfig:
    values = _part(content, "config", dict)
    if unnamed := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"settings must have names, got {unnamed[0]!r}")
    return config_from_dict(values)


def _require_model(content: dict[str, Any]) -> dict[str, Tensor]:
    """Checks what using the model takes; its parameters, without storage, by their names."""
    config = content["config"]
    if (step := _part(content, "step", int)) > config.steps:
        raise ValueError(f"step must be at most steps = {config.steps} of its settings, got {step}")
    made_with = _part(content, "model.config", dict)
    needed: dict[str, Any] = {"hidden_size": config.hidden_size, "batch_first": False}
    if isinstance(config, TrainConfig):
        _part(content, "data.drawn", bool)
        outputs = num_outputs(config.ways, config.labels)
        needed["num_classes"] = outputs
        width = math.prod(config.image_shape)
        if is_backbone(config.encoder):
            _part(content, "data.features.weights", str)
            mean = _part(content, "data.features.mean", list)
            if not all(isinstance(x, float) and math.isfinite(x) for x in mean):
                raise ValueError("data.features.mean must be finite numbers")
            width = len(mean)
        needed["input_size"] = images_of_input(config.late) * width + outputs
    elif isinstance(config, BabiConfig):
        words = _part(content, "vocabulary", list)
        if not all(isinstance(word, str) for word in words):
            raise ValueError("vocabulary must be words")
        needed |= {"input_size": len(words), "num_classes": len(words)}
    else:
        task = TASKS[config.task]
        needed |= {"input_size": task.input_size, "num_classes": task.output_size}
    if config.model == "mann":
        if isinstance(config, TrainConfig):
            needed |= encoder_options(config)
            if own_encoder(config):  # the config of the model has the name of its class
                del needed["encoder"]
        needed |= {
            "controller": config.controller,
            "addressing": config.addressing,
            **config.memory_options,
        }
    for name, value in needed.items():
        if made_with.get(name) != value:
            raise ValueError(
                f"model.config must have {name} = {value!r} by its settings, got {made_with.get(name)!r}"
            )
    state = _part(content, "model.state", dict)
    if own_encoder(config):
        own = {name: x for name, x in state.items() if str(name).startswith(OF_ENCODER)}
        state = {name: x for name, x in state.items() if name not in own}
        if not all(isinstance(x, Tensor) for x in own.values()):
            raise ValueError(f"model.state.{OF_ENCODER} must be tensors")
        _require_tensors(
            "model.state", own, own
        )  # of what shapes, only code that the file may not name knows
        made_with = {**made_with, "encoder": _Stub(_count_features(config, state))}
    try:
        model = MODEL_CLASSES[config.model](**{**made_with, "device": "meta"})
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"model.config makes no model: {_first_line(error)}") from error
    _require_tensors("model.state", state, model.state_dict())
    return dict(model.named_parameters())


class _Stub(nn.Module):
    """Stands for an encoder whose code is not there: it makes so many features."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), self.features)


def _count_features(config: TrainConfig, state: dict[Any, Any]) -> int:
    """What the encoder makes of an image, from the width of what the controller reads: features, label and reads."""
    name = "layer.controller.weight_ih"
    weight = state.get(name)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"model.state.{name} must be a matrix")
    outputs = num_outputs(config.ways, config.labels)
    columns = weight.shape[1] - outputs - config.heads * config.slot_size
    features = columns // images_of_input(config.late)
    if features < 1:
        raise ValueError(f"model.state.{name} has {weight.shape[1]} columns, too few for features and reads")
    return features


def _require_progress(content: dict[str, Any], parameters: dict[str, Tensor]) -> None:
    """Checks what `Run.load_state_dict` and its subclasses take."""
    config = content["config"]
    _part(content, "seconds", float)
    generators, averages = ["rng"], ["loss"]
    if isinstance(config, TrainConfig):
        _part(content, "data.fingerprint", str)
        accuracy = {"accuracy": _part(content, "interval.accuracy", Tensor)}
        _require_tensors("interval", accuracy, {"accuracy": torch.empty(config.shots, device="meta")})
        generators += ["episodes.generator"]
    else:
        if isinstance(config, BabiConfig):
            _part(content, "data.fingerprint", str)
        averages += ["error"]
        generators += ["generator"]
    first = getattr(config, "curriculum", 0)
    if first:
        name, last = ("ways", config.ways) if isinstance(config, TrainConfig) else ("length", config.length)
        now = _part(content, f"curriculum.{name}", int)
        if not first <= now <= last:
            raise ValueError(f"curriculum.{name} must be from {first} to {last} by its settings, got {now}")
        if not all(isinstance(x, float) and x >= 0 for x in _part(content, "curriculum.errors", list)):
            raise ValueError("curriculum.errors must be numbers from 0 up")
    for name in averages:
        _part(content, f"interval.{name}", float)
    _part(content, "interval.steps", int)
    for name in generators:
        state = _part(content, name, Tensor)
        try:
            torch.Generator().set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name} is no state of a random generator") from error
    moments = _part(content, "optimizer.state", dict)
    # An encoder learns alone first, and then it is all parameters that have been learned.
    alone = config.encoder_steps if isinstance(config, TrainConfig) else 0
    if 0 < content["step"] <= alone and not moments:
        raise ValueError("optimizer.state lacks the parameters that have been learned")
    if content["step"] > alone:
        for index, name in enumerate(parameters):
            if index not in moments and (alone or not name.startswith(OF_ENCODER)):
                raise ValueError(f"optimizer.state lacks {index}, {name}")
    for index, kept in moments.items():
        if type(index) is not int or index < 0 or not isinstance(kept, dict):
            raise ValueError(f"optimizer.state must be dicts by the number of a parameter, got {index!r}")
        if index < len(parameters):
            parameter = list(parameters.values())[index]
        elif own_encoder(config):  # its parameters come last
            parameter = _part(kept, "exp_avg", Tensor)
        else:
            raise ValueError(f"optimizer.state must be dicts by the number of a parameter, got {index!r}")
        expected = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.empty((), device="meta")}
        _require_tensors(f"optimizer.state.{index}", kept, expected)


def _require_tensors(where: str, found: dict[Any, Any], expected: dict[str, Tensor]) -> None:
    """ValueError unless these are dense, finite tensors of the expected names, shapes and dtypes."""
    if differing := found.keys() ^ expected.keys():
        name = min(map(str, differing))
        raise ValueError(f"{where} {'lacks' if name in expected else 'must not have'} {name}")
    for name, like in expected.items():
        tensor = found[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{where}.{name} must be a dense tensor, got {type(tensor).__name__}")
        if (tensor.dtype, tensor.shape) != (like.dtype, like.shape):
            raise ValueError(
                f"{where}.{name} must be {like.dtype} {list(like.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():  # one number repeated may claim to be more than memory holds
            raise ValueError(f"{where}.{name} must be contiguous, got strides {tensor.stride()}")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}.{name} has numbers that are not finite")


def encoder_options(config: TrainConfig) -> dict[str, Any]:
    """Of MANN, which has no encoder where a backbone has made features of the images before."""
    if config.encoder == NO_ENCODER or is_backbone(config.encoder):
        return {"encoder": None, "image_shape": None}
    options = {"encoder": config.encoder, "image_shape": list(config.image_shape)}
    images = images_of_input(config.late)
    return options if images == 1 else {**options, "num_images": images}  # older models do not name it


def own_encoder(config: RunConfig) -> bool:
    return isinstance(config, TrainConfig) and is_own(config.encoder)


@_in_float32()
def build_model(config: RunConfig, input_size: int, num_outputs: int) -> nn.Module:
    """A new model of the configured kind and sizes, initialised from torch's global generator."""
    if config.model == "lstm":
        return LSTMClassifier(input_size, num_outputs, config.hidden_size)
    options: dict[str, Any] = {}
    if isinstance(config, TrainConfig):
        options = encoder_options(config)
        if options["encoder"] is not None:
            options["normalize_features"] = True  # docs/few-shot.md has what it brings
        if own_encoder(config):
            options["encoder"] = make_own(config.encoder)
    return MANN(
        input_size,
        num_outputs,
        config.hidden_size,
        controller=config.controller,
        addressing=config.addressing,
        **config.memory_options,
        **options,
    )


def load_encoder(path: str | os.PathLike) -> tuple[TrainConfig, dict[str, Tensor]]:
    """Settings of the checkpoint and the tensors of its encoder; errors as of :func:`load_checkpoint`, and ValueError where it
    has no encoder, or keeps none because it was made elsewhere."""
    content = load_checkpoint(path)
    config = content["config"]
    if not isinstance(config, TrainConfig) or not trainable(config.encoder):
        raise ValueError(
            f"{path} holds no encoder that a run has trained; expected one of --encoder conv4 or your own"
        )
    named = content["model"]["state"].items()
    return config, {name.removeprefix(OF_ENCODER): x for name, x in named if name.startswith(OF_ENCODER)}


def take_encoder(model: nn.Module, config: TrainConfig) -> None:
    """Give the encoder of the model the weights of that of ``config.encoder_from``; ValueError where it is another kind."""
    other, weights = load_encoder(config.encoder_from)
    for name in ("encoder", "image_size", "colour"):
        if (wanted := getattr(config, name)) != (found := getattr(other, name)):
            raise ValueError(
                f"encoder_from must be a checkpoint with {name} = {wanted!r}, got {found!r} in {config.encoder_from}"
            )
    assert isinstance(model.encoder, nn.Module)
    try:
        model.encoder.load_state_dict(weights)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(
            f"encoder must have the parameters of that in {config.encoder_from}: {lines}"
        ) from error


@_in_float32()
def restore_model(content: dict[str, Any], encoder: nn.Module | None = None) -> nn.Module:
    """The trained model of a loaded checkpoint, in evaluation mode.

    encoder: a new module such as the model was trained with, where that was the user's own (MODULE:FACTORY): a file may not
    say which code to run. Raises ValueError where it is needed and not there, there and not needed, or of other parameters.
    """
    config, made_with = content["config"], content["model"]["config"]
    if own_encoder(config) != (encoder is not None):
        trained = getattr(config, "encoder", NO_ENCODER)
        again = "name it again, and trust its code" if encoder is None else "leave it out"
        raise ValueError(f"the model was trained with the encoder {trained}: {again} (--encoder)")
    if encoder is not None:
        made_with = {**made_with, "encoder": encoder}
    model = MODEL_CLASSES[config.model](**made_with)
    try:
        model.load_state_dict(content["model"]["state"])
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(
            f"encoder must have the parameters that the model was trained with: {lines}"
        ) from error
    return model.eval()
