"""MANN: the memory-augmented classifier of Santoro et al. 2016 (arXiv 1605.06065)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ..layers import Memory, MemoryLayer, MemoryState
from ..layers.base import check_sizes
from ..layers.controllers import obstacle
from ..layers.memory import Input
from ..layers.registry import make_memory, name_of, options_of
from ..layers.sequences import each, each_taken, of_padded, packed_uncompiled, steps_taken
from ..ops._checks import check_flag, shown
from .encoders import ENCODERS, check_image_shape, count_features, encode_images

# The weights of the input start so much larger than nn.LSTMCell would make them. Most of an image of a drawn
# character is background: at nn.LSTMCell's width the hidden states of two characters are almost the same, and
# hundreds of training steps pass before they are not.
INPUT_GAIN = 3.0


class MANN(nn.Module):
    """A :class:`mann_fast.MemoryLayer` and a linear classifier on its output; the paper's sizes by default.

    Args:
        input_size: width of the input: the image and the label of the step before.
        num_classes: how many logits per step.
        encoder: what makes features of the images, before the memory's controller sees them: ``"conv4"``
            (:class:`mann_fast.models.encoders.Conv4`), or a module of your own that takes images [M, C, H, W] and returns
            [M, ...]. All images of a call go through it at once, M = T * B. None: the controller sees the pixels.
        image_shape: (C, H, W) of the images where there is an encoder: the first C * H * W numbers of every input.
        num_images: how many images every input begins with, where there is an encoder: 2 for episodes with ``late="pair"``,
            where that of the step before follows, 0 for none.
        normalize_features: whether the features of every image are scaled to a root mean square of 1, less the buffer
            ``feature_mean`` [E] (0 in a new model), so that the controller sees in which direction they point from there, and
            not how far: docs/few-shot.md.
        hidden_size, controller, addressing, memory_start, bias, batch_first, device, dtype, options: as of
            :class:`mann_fast.MemoryLayer`; the controller by its name.

    Attributes:
        layer: the MemoryLayer.
        classifier: ``nn.Linear`` from its output to the logits.
        encoder: the module, or None.
        feature_mean: a buffer [E] with ``normalize_features``.
        config: dict of plain values, all options of the memory among them; ``MANN(**config)`` is a new model of the same
            kind and sizes. Of a memory of your own it holds the name of the class: pass an object again,
            ``MANN(**{**config, "addressing": MyMemory()})``; so of an encoder of your own.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    feature_mean: Tensor

    def __init__(
        self,
        input_size: int,
        num_classes: int,
        hidden_size: int = 200,
        *,
        controller: str = "lstm",
        addressing: str | Memory = "lrua",
        memory_start: str = "constant",
        bias: bool = True,
        batch_first: bool = False,
        encoder: str | nn.Module | None = None,
        image_shape: Sequence[int] | None = None,
        num_images: int = 1,
        normalize_features: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        check_sizes(input_size=input_size, num_classes=num_classes, num_images=num_images)
        check_flag("normalize_features", normalize_features)
        memory = make_memory(addressing, options)
        arguments: dict[str, Any] = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "controller": controller,
            "memory_start": memory_start,
            "bias": bias,
            "batch_first": batch_first,
        }
        self.config = {
            "num_classes": num_classes,
            **arguments,
            "encoder": type(encoder).__name__ if isinstance(encoder, nn.Module) else encoder,
            "image_shape": None if image_shape is None else list(image_shape),
            "num_images": num_images,
            "normalize_features": normalize_features,
            "addressing": name_of(memory),
            **{name: getattr(memory, name) for name in options_of(memory)},
        }
        made = self._make_encoder(encoder, image_shape, device=device, dtype=dtype)
        if made is not None and self.image_shape is not None:
            features = count_features(made, self.image_shape)
            arguments["input_size"] += num_images * (features - prod(self.image_shape))
            if normalize_features:
                self.register_buffer("feature_mean", torch.zeros(features, device=device, dtype=dtype))
        self.layer = MemoryLayer(**arguments, addressing=memory, device=device, dtype=dtype)
        self.classifier = nn.Linear(self.layer.output_size, num_classes, device=device, dtype=dtype)
        self.encoder = made
        self._adjust_parameters()

    def _make_encoder(self, encoder: object, image_shape: object, **factory: Any) -> nn.Module | None:
        self.image_shape: tuple[int, int, int] | None = None
        if encoder is None:
            if image_shape is not None:
                raise ValueError(f"image_shape must be None without an encoder, got {image_shape!r}")
            if self.config["normalize_features"]:
                raise ValueError("normalize_features needs an encoder, got True")
            if self.config["num_images"] != 1:
                raise ValueError(f"num_images must be 1 without an encoder, got {self.config['num_images']}")
            return None
        if not isinstance(encoder, nn.Module) and not (isinstance(encoder, str) and encoder in ENCODERS):
            known = ", ".join(map(repr, ENCODERS))
            raise ValueError(f"encoder must be None, {known} or a module, got {shown(encoder)}")
        self.image_shape = check_image_shape(image_shape, encoder)
        count, width = self.config["num_images"], self.config["input_size"]
        if (pixels := count * prod(self.image_shape)) > width:
            of_images = "an image" if count == 1 else f"{count} images"
            raise ValueError(
                f"input_size must be at least the {pixels} numbers of {of_images} {list(self.image_shape)}, got {width}"
            )
        return (
            encoder if isinstance(encoder, nn.Module) else ENCODERS[encoder](self.image_shape[0], **factory)
        )

    def _adjust_parameters(self) -> None:
        if self.config["normalize_features"]:  # which are as far apart as the encoder can make them
            return
        controller = self.layer.controller
        of_input = controller.weight_ih if isinstance(controller, nn.RNNCellBase) else controller.weight
        with torch.no_grad():
            of_input[:, : self.layer.input_size] *= INPUT_GAIN  # type: ignore[index, operator]

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as for a new model; the encoder's where its modules have ``reset_parameters``."""
        if self.config["normalize_features"]:
            self.feature_mean.zero_()
        for module in () if self.encoder is None else self.encoder.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        self.layer.reset_parameters()
        self.classifier.reset_parameters()
        self._adjust_parameters()

    def encode(self, x: Input, lengths: Tensor | None = None) -> Input:
        """What the memory's controller sees: x with every image replaced by its features, [..., E + L]; without an encoder x.

        lengths: as of :meth:`forward`. What lies beyond them is no image: the encoder does not see it, so that it is in no
        mean of a batch norm, and 0 stands there.

        Raises ValueError where x has not the width of the input; TypeError, ValueError: lengths that do not fit.
        """
        if self.encoder is None or self.image_shape is None:
            return x
        if isinstance(x, PackedSequence):
            return x._replace(data=self.encode(x.data))
        width = self.config["input_size"]
        if x.shape[-1:] != (width,):
            raise ValueError(
                f"x must have {width} numbers per step, an image {list(self.image_shape)} and the label of the step before, "
                f"got {list(x.shape)}"
            )
        if lengths is None:
            return self._with_features(x, self.config["num_images"])
        batch_first = self.layer.batch_first
        of_padded(x, None, lengths, batch_first)  # raises where they do not fit
        taken = steps_taken(lengths, x.shape[int(batch_first and x.dim() == 3)], batch_first)
        return each_taken(lambda x: self._with_features(x, self.config["num_images"]), x, taken)

    def features(self, images: Tensor, *views: Tensor) -> Tensor:
        """What the memory's controller sees of images alone, whatever label comes with them: float [..., E].

        images: [..., C, H, W] of ``image_shape``, with the values of the input. views: the same images seen otherwise, turned a
        little or shifted; the features are then the mean over all of them.

        Raises ValueError where there is no encoder, and for images of another shape.
        """
        if self.encoder is None or self.image_shape is None:
            raise ValueError("features are what an encoder makes of images, and this model has none")
        if images.shape[-3:] != self.image_shape:
            raise ValueError(f"images must be [..., *{list(self.image_shape)}], got {list(images.shape)}")
        found = self._with_features(images.flatten(-3), 1)
        if not views:
            return found
        found = torch.stack([found, *(self.features(view) for view in views)]).mean(0)
        return F.rms_norm(found, found.shape[-1:]) if self.config["normalize_features"] else found

    def _with_features(self, x: Tensor, count: int) -> Tensor:
        assert self.encoder is not None and self.image_shape is not None
        mean = self.feature_mean if self.config["normalize_features"] else None
        return encode_images(self.encoder, x, self.image_shape, count, mean)

    def answer(
        self, encoded: Tensor, state: MemoryState | Sequence[Any] | None = None
    ) -> tuple[Tensor, MemoryState]:
        """:meth:`forward` of a tensor that :meth:`encode` gave, so that images that come up often are encoded once."""
        output, state = self.layer(encoded, state)
        return self.classifier(output), state

    def forward(
        self,
        x: Input,
        state: MemoryState | Sequence[Any] | None = None,
        *,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Input, MemoryState]:
        """Logits for every step of a sequence.

        Args:
            x, state, resets, lengths: as of :meth:`mann_fast.MemoryLayer.forward`.

        Returns:
            logits [T, B, num_classes] (laid out as x; of a PackedSequence one of the same batch_sizes and indices; 0 beyond a
            sample's length), and the state after the last step.

        Raises:
            TypeError, ValueError: as of :meth:`mann_fast.MemoryLayer.forward`.
        """
        if isinstance(x, PackedSequence) and torch.compiler.is_compiling():
            return packed_uncompiled(self.forward, x, state, resets=resets, lengths=lengths)
        output, state = self.layer(self.encode(x, lengths), state, resets=resets, lengths=lengths)
        if isinstance(output, PackedSequence):
            return output._replace(data=self.classifier(output.data)), state
        if lengths is None:
            return self.classifier(output), state
        batch_first = self.layer.batch_first
        taken = steps_taken(lengths, output.shape[int(batch_first and output.dim() == 3)], batch_first)
        plain = obstacle("classifier", self.classifier, nn.Linear) is None
        return each(self.classifier, output, taken, by_rows=plain), state

    if TYPE_CHECKING:
        __call__ = forward
