"""Pretrained backbones by name: networks of torchvision and timm that make features of images and are trained no further."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .encoders import is_own

_BATCH = 32  # images at a time


class Recipe(NamedTuple):
    """How a library makes a backbone, known without its weights: the side of its images in pixels, mean and standard deviation
    of the colours, from 0 to 1, that it was trained with, and what gives it with its weights, images [M, 3, S, S] to [M, E].
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    make: Callable[[], nn.Module]


def _torchvision(name: str) -> Recipe:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    if architecture not in models.list_models(module=models):  # which leaves detectors and the like out
        raise ValueError("torchvision.models has none of that name")
    every = models.get_model_weights(architecture)
    weights = every[tag] if tag else every.DEFAULT
    transforms = weights.transforms()
    with torch.device("meta"):
        shape = models.get_model(architecture, weights=None)
    linear = [at for at, module in shape.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("it does not end in a linear layer")

    def make() -> nn.Module:
        model = models.get_model(architecture, weights=weights)
        model.set_submodule(linear[-1], nn.Identity())  # what decides between the classes it was trained on
        return model

    return Recipe(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std), make)


def _timm(name: str) -> Recipe:
    import timm

    settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return Recipe(
        settings.input_size[-1],
        tuple(settings.mean),
        tuple(settings.std),
        lambda: timm.create_model(name, pretrained=True, num_classes=0),
    )


LIBRARIES: dict[str, Callable[[str], Recipe]] = {"torchvision": _torchvision, "timm": _timm}


def is_backbone(encoder: str) -> bool:
    """Whether a name is LIBRARY/NAME, such as "torchvision/resnet18" or "timm/resnet18.a1_in1k"."""
    library, _, name = encoder.partition("/")
    return library in LIBRARIES and bool(name) and not is_own(encoder)


def recipe_of(encoder: str) -> Recipe:
    """Of LIBRARY/NAME. Raises ModuleNotFoundError where the library is not installed, ValueError where it has no classifier of
    that name with weights.
    """
    library, _, name = encoder.partition("/")
    try:
        return LIBRARIES[library](name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the encoder {encoder} needs {library} (pip install 'mann_fast[backbones]'): {error}"
        ) from error
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:  # as the libraries have it
        raise ValueError(
            f"encoder must name a classifier of {library} that has weights, got {encoder!r}: {error}"
        ) from error


class Backbone:
    """A pretrained network without its last layer, in evaluation mode: what an image becomes depends on nothing else.

    Args:
        encoder: LIBRARY/NAME. A weights' tag may follow, as in "torchvision/resnet50.IMAGENET1K_V1"; without one they are the
            library's default. The library downloads them once, into its own cache folder.

    Attributes:
        encoder: the name.
        weights: SHA-256 of all its parameters and buffers.

    Raises:
        ModuleNotFoundError, ValueError: as :func:`recipe_of`. OSError: the weights cannot be had.
    """

    def __init__(self, encoder: str):
        self.encoder = encoder
        recipe = recipe_of(encoder)
        try:
            self._model = recipe.make().eval().requires_grad_(False)
        except Exception as error:  # what the clients of two libraries raise without a connection
            raise OSError(
                f"the weights of {encoder} cannot be had ({type(error).__name__}: {error}); they are downloaded once and kept, "
                "so run this once with a connection, or put the file into the library's cache folder"
            ) from error
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (recipe.mean, recipe.std)
        )
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        self.weights = digest.hexdigest()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float32 [M, E] of images uint8 [M, 3, S, S], or grey ones [M, S, S]."""
        images = images if images.dim() == 4 else images.unsqueeze(1).expand(-1, 3, -1, -1)
        parts = ((part.float() / 255 - self._mean) / self._std for part in images.split(_BATCH))
        return torch.cat([self._model(part).flatten(1) for part in parts])
