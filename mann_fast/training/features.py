"""Features that a pretrained backbone makes of images, computed once and kept."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._cache import cache_folder
from ..data import ClassImages, Dataset
from ..models.backbones import Backbone, is_backbone
from .config import TrainConfig
from .files import replacing

_VERSION = 1  # of what becomes of images before and after the backbone


def backbone_of(content: dict[str, Any]) -> Backbone | None:
    """The backbone whose features the model of a loaded checkpoint reads; None where it reads the images.

    Raises ValueError where its weights are not those that the model was trained with; else as :class:`Backbone`.
    """
    config = content["config"]
    if not (isinstance(config, TrainConfig) and is_backbone(config.encoder)):
        return None
    backbone = Backbone(config.encoder)
    if backbone.weights != content["data"]["encoder_weights"]:
        raise ValueError(
            f"the weights of {config.encoder} here are not those that the model was trained with: name the version that was "
            "used, or train anew"
        )
    return backbone


def encode_dataset(dataset: Dataset, backbone: Backbone) -> Dataset:
    """The same classes with features for images, and whose they are."""
    train, test = (encode_classes(part, backbone) for part in (dataset.train, dataset.test))
    return Dataset(train, test, dataset.kind, backbone.weights)


def encode_classes(classes: ClassImages, backbone: Backbone) -> ClassImages:
    """The same classes with features for images. They are kept in the cache folder, under a digest of the images and of the
    backbone's weights, and read from there the next time.
    """
    images = classes.images.contiguous()
    key = hashlib.sha256(f"{_VERSION} {backbone.encoder} {backbone.weights} {list(images.shape)}".encode())
    key.update(images.numpy())
    file = cache_folder() / "features" / f"{key.hexdigest()}.safetensors"
    try:
        features = load_file(file)["features"]
    except (FileNotFoundError, SafetensorError, KeyError):  # not there, or damaged
        features = backbone.features(images)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({"features": features}, temporary)
    return replace(classes, images=features)
