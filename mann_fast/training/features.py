"""Features that a pretrained backbone makes of images, computed once and kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from .._cache import cache_folder
from ..data import ClassImages, Dataset
from ..models.backbones import Backbone, is_backbone
from .config import TrainConfig
from .files import replacing

# Of a feature vector. The pixels of a drawn character are about as long, and the controller's weights start for those.
LENGTH = 10.0


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """What the memory's controller reads of images: the features of a backbone less their ``mean`` over the training images,
    float32 [E], all of one length (CL2N of Wang et al. 2019, SimpleShot, arXiv 1911.04623). What all images have in common
    would hide from the controller by what they differ.
    """

    backbone: Backbone
    mean: Tensor

    def features(self, images: Tensor) -> Tensor:
        """float32 [M, E] of images uint8 [M, 3, S, S] or [M, S, S]."""
        return self.scaled(self.backbone.features(images))

    def scaled(self, features: Tensor) -> Tensor:
        """Of what the backbone has made. Multiplied by 255 like pixels, which `encode_inputs` takes away."""
        return F.normalize(features - self.mean) * (LENGTH * 255)

    def to_dict(self) -> dict[str, Any]:
        """The part of a checkpoint that says which features its model reads."""
        return {"weights": self.backbone.weights, "mean": self.mean.tolist()}


def encoder_of(content: dict[str, Any]) -> FeatureEncoder | None:
    """What makes the features that the model of a loaded checkpoint reads; None where it reads the images.

    Raises ValueError where the weights are not those that the model was trained with; else as :class:`Backbone`.
    """
    config = content["config"]
    if not (isinstance(config, TrainConfig) and is_backbone(config.encoder)):
        return None
    backbone, features = Backbone(config.encoder), content["data"]["features"]
    if backbone.weights != features["weights"]:
        raise ValueError(
            f"the weights of {config.encoder} here are not those that the model was trained with: install the version of the "
            "library that has them, or train anew"
        )
    return FeatureEncoder(backbone, torch.tensor(features["mean"], dtype=torch.float32))


def encode_dataset(dataset: Dataset, backbone: Backbone) -> Dataset:
    """The same classes with features for images, and what made them."""
    encoder = FeatureEncoder(backbone, kept_features(dataset.train.images, backbone).mean(0))
    train, test = (encode_classes(part, encoder) for part in (dataset.train, dataset.test))
    return Dataset(train, test, dataset.kind, encoder.to_dict())


def encode_classes(classes: ClassImages, encoder: FeatureEncoder) -> ClassImages:
    """The same classes with features for images."""
    return replace(classes, images=encoder.scaled(kept_features(classes.images, encoder.backbone)))


def kept_features(images: Tensor, backbone: Backbone) -> Tensor:
    """`Backbone.features` from the cache folder, where they lie under a digest of the images and of the weights; computed and
    put there the first time.
    """
    key = hashlib.sha256(f"{backbone.encoder} {backbone.weights} {list(images.shape)}".encode())
    key.update(images.contiguous().numpy())
    file = cache_folder() / "features" / f"{key.hexdigest()}.safetensors"
    try:
        return load_file(file)["features"]
    except (FileNotFoundError, SafetensorError, KeyError):  # not there, or damaged
        features = backbone.features(images)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_bytes(save({"features": features}))
        return features
