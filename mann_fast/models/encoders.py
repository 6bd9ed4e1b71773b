"""Encoders: what turns an image into the features that a memory's controller reads."""

from __future__ import annotations

import importlib
import operator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv4(nn.Sequential):
    """The field's Conv-4 (Snell et al. 2017, arXiv 1703.05175, section 3.1): four blocks, each a 3 x 3 convolution with 64
    filters, batch norm, ReLU and 2 x 2 max-pooling.

    Images [M, channels, S, S] with S of at least 16 become [M, 64, S // 16, S // 16].

    In training the batch norm takes its mean and variance over all images that come in one call, so over all steps and episodes
    of a batch. In evaluation (``eval()``) it takes the running ones of training: what becomes of an image does not depend on
    the others, and an answer of a :class:`mann_fast.MANN` on nothing that comes after it.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        blocks: list[nn.Module] = []
        for inputs in (channels, 64, 64, 64):
            # The batch norm takes the mean away, and with it any bias. The greatest of four numbers is above 0 or not whether
            # ReLU comes before or after, and after it has a quarter to do.
            blocks += [
                nn.Conv2d(inputs, 64, 3, padding=1, bias=False, device=device, dtype=dtype),
                nn.BatchNorm2d(64, device=device, dtype=dtype),
                nn.MaxPool2d(2),
                nn.ReLU(),
            ]
        super().__init__(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last, and so in all that follows: 1.4 times as fast on a CPU. A clone, for of a single channel contiguous()
        # cannot tell the layouts apart and leaves the strides, by which convolution chooses; vmap cannot clone to it.
        last = images.movedim(1, 3).clone(memory_format=torch.contiguous_format)
        return super().forward(last.movedim(3, 1))


ENCODERS = {"conv4": Conv4}  # by the names that MANN and mann-fast take


def is_own(encoder: str) -> bool:
    """Whether a name is MODULE:FACTORY, code of the user's own."""
    return ":" in encoder


def make_own(encoder: str) -> nn.Module:
    """What FACTORY of MODULE gives, called without arguments; a class will do. Runs the code of MODULE.

    Raises ValueError where there is no such thing, or it gives no ``nn.Module``; what the code itself raises passes.
    """
    module, _, factory = encoder.partition(":")
    try:
        make = operator.attrgetter(factory)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"encoder must be MODULE:FACTORY, got {encoder!r}: {error}") from error
    made = make()
    if not isinstance(made, nn.Module):
        raise ValueError(f"encoder {encoder} must give an nn.Module, got {type(made).__name__}")
    return made


def check_image_shape(image_shape: object, encoder: object) -> tuple[int, int, int]:
    """(C, H, W). Raises TypeError unless it is three integers, ValueError unless they are at least 1, of Conv4's sides 16."""
    listed = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else ()
    if len(listed) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) for n in listed):
        raise TypeError(f"image_shape must be three integers (C, H, W) with an encoder, got {image_shape!r}")
    least = 16 if encoder == "conv4" else 1
    if listed[0] < 1 or min(listed[1:]) < least:
        raise ValueError(f"image_shape must have a channel and sides of at least {least}, got {listed}")
    return listed


def count_features(encoder: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """How many numbers an encoder makes of an image, asked with one that is all 0; ValueError where it makes no row of it."""
    like = next(encoder.parameters(), torch.empty(0))
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():
            found = encoder(torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device))
    finally:
        for module, training in modes.items():
            module.training = training
    if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != 1 or not found.numel():
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"encoder must make [M, ...] of images {[1, *image_shape]}, got {came}")
    return found.numel()


def encode_images(
    encoder: nn.Module, x: Tensor, image_shape: tuple[int, int, int], count: int, mean: Tensor | None
) -> Tensor:
    """x [..., count * C * H * W + L] with the images at its start replaced by their features, [..., count * E + L]; all images
    in one call. After the first an image that is all 0 is none, and has features of 0.
    mean: [E], from which on the features of every image are scaled to a root mean square of 1, or None: as they are.
    """
    pixels = count * prod(image_shape)
    images = x[..., :pixels].reshape(count * prod(x.shape[:-1]), *image_shape)
    if len(images) == 0:  # of which a batch norm has no mean
        features = x.new_empty(*x.shape[:-1], count * count_features(encoder, image_shape))
    else:
        features = encoder(images).reshape(*x.shape[:-1], count, -1)
        if mean is not None:
            features = F.rms_norm(features - mean, features.shape[-1:])
        if count > 1:
            there = images.flatten(1).ne(0).any(1).view(features.shape[:-1])
            there[..., 0] = True
            features = torch.where(there.unsqueeze(-1), features, 0)
        features = features.flatten(-2)
    return torch.cat([features, x[..., pixels:]], -1)
