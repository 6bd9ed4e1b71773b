"""Episodes: short tasks whose labels are dealt anew each time, so that only memory can answer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from ..ops._checks import check_choice
from .images import ClassImages

LABELS = ("onehot", "string")
LATE = ("label", "pair")  # what comes one step late: the label alone, or the image with it once more
LETTERS = 5  # a string label is five letters, each one of a to e: 25 numbers, 3,125 labels

_TURN = math.pi / 16  # the paper's small rotation
_SHIFT = 0.1  # of the width: the paper's 10 of 105 pixels
_STRETCH = 0.2  # log of the largest factor of width and height: new alphabets are recognised better (docs/omniglot.md)
_SLANT = 0.25  # sideways per unit of height


class Episode(NamedTuple):
    """A batch of episodes, time first.

    inputs: float32 [T, B, F], the pixels in [0, 1], of ``late="pair"`` those of the step before, and the label of the step
        before (zeros at the first).
    targets: int64 [T, B], the label; with string labels [T, B, 5], a letter 0 to 4 each.
    instance: int64 [T, B], 1 where a class is seen for the first time in its episode, 2 for the second, and
        so on.
    classes: int64 [T, B], which of all classes it is.
    """

    inputs: Tensor
    targets: Tensor
    instance: Tensor
    classes: Tensor


class Images(NamedTuple):
    """A batch of episodes without labels, time first.

    images: [T, B, S, S] or in colour [T, B, 3, S, S], uint8 or with ``augment`` float32 up to 255; or features [T, B, E].
    which: int64 [T, B], which of the episode's classes each is of, from 0 to ways - 1; instance, classes: as of
        :class:`Episode`.
    """

    images: Tensor
    which: Tensor
    instance: Tensor
    classes: Tensor


class Episodes:
    """Draws batches of episodes from the images of ``classes``.

    An episode has ``ways`` classes drawn at random, ``shots`` different images of each in random order (T =
    ways * shots steps), and labels dealt to the classes at random. ``labels="string"`` deals strings of five
    letters instead, different within an episode. ``num_labels`` deals them from more labels than an episode has classes,
    those of a model that tells so many apart. ``late="pair"`` shows the image of the step before once more, beside its
    label. ``augment=True`` turns, stretches, slants and shifts every image a little, anew in each batch. Everything random
    comes from a generator of its own: the same ``seed`` gives the same episodes, and :meth:`state_dict` continues exactly. In
    the worker processes of a ``DataLoader`` each copy draws episodes of its own, which follow from ``seed`` and the seed of the
    worker, and so from that of the loader.

    Raises ValueError for options that do not fit, too few classes for ``ways``, or a class with fewer than
    ``shots`` images (which it names).
    """

    def __init__(
        self,
        classes: ClassImages,
        *,
        ways: int = 5,
        shots: int = 10,
        labels: str = "onehot",
        late: str = "label",
        augment: bool = False,
        seed: int = 0,
        num_labels: int | None = None,
    ) -> None:
        check_labels(ways, labels)
        num_labels = ways if num_labels is None else num_labels
        if not isinstance(num_labels, int) or num_labels < ways:
            raise ValueError(f"num_labels must be an integer of at least ways = {ways}, got {num_labels!r}")
        check_choice("late", late, LATE)
        if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
            raise ValueError(f"shots must be a positive integer, got {shots!r}")
        if classes.num_classes < ways:
            raise ValueError(
                f"episodes of {ways} classes (ways) need at least {ways} classes, got {classes.num_classes}; "
                "add classes or lower ways"
            )
        if augment and classes.are_features:
            raise ValueError(
                "augment must be False for features, which were computed once: they cannot be turned"
            )
        classes.require(shots, "add images or lower shots")
        self.classes = classes
        self.ways, self.shots, self.labels, self.late, self.augment = ways, shots, labels, late, augment
        self.image_size = classes.image_size
        self.length = ways * shots
        self.num_labels = num_labels
        self.num_outputs = num_outputs(num_labels, labels)
        self._image_shape = classes.images.shape[1:]
        self._pixels = classes.images.flatten(1)
        self.input_size = images_of_input(late) * self._pixels.shape[1] + self.num_outputs
        self._generator = torch.Generator().manual_seed(seed)
        self._worker = _worker_seed()  # where the generator was seeded

    def sample(self, batch: int, part: slice = slice(None), *, ways: int | None = None) -> Episode:
        """A batch of ``batch`` new episodes, on the CPU; of these the ``part`` alone, so that processes which draw the same
        batch share the work of making it. Of fewer ``ways`` than its episodes have, but of the same labels.

        Raises ValueError where batch is no integer of at least 0.
        """
        pixels, which, instance, classes = self.sample_images(batch, part, ways=ways)
        all_labels = self.labels == "onehot" and (ways or self.ways) == self.num_labels
        targets = which if all_labels else self.deal(batch, which, part)
        previous = torch.cat([torch.full_like(targets[:1], -1), targets[:-1]])
        before = step_before(pixels) if self.late == "pair" else None
        inputs = encode_inputs(pixels, previous, ways=self.num_labels, labels=self.labels, before=before)
        return Episode(inputs, targets, instance, classes)

    def sample_images(
        self, batch: int, part: slice = slice(None), *, ways: int | None = None, shots: int | None = None
    ) -> Images:
        """The images of a batch alone, without labels. As :meth:`sample`, or of fewer ``ways`` and ``shots`` than its episodes
        have.
        """
        ways, shots = self.ways if ways is None else ways, self.shots if shots is None else shots
        length = ways * shots
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 0:
            raise ValueError(f"batch must be an integer of at least 0, got {batch!r}")
        self._seed_in_worker()
        chosen = self._distinct(torch.full((batch,), self.classes.num_classes), ways)
        chosen = chosen.gather(1, self._shuffled(batch, ways))  # so that any class can get any label
        within = self._distinct(self.classes.counts[chosen], shots)
        images = self.classes.starts[chosen].unsqueeze(-1) + within  # [B, ways, shots]
        order = self._shuffled(batch, length).t().contiguous()  # [T, B]
        label = order // shots
        images = images.flatten(1).t().gather(0, order)[:, part]
        instance = F.one_hot(label, ways).cumsum(0).gather(2, label.unsqueeze(2)).squeeze(2)[:, part]
        classes = chosen.t().gather(0, label)[:, part]

        pixels = self._pixels[images.flatten()].view(*images.shape, *self._image_shape)
        if self.augment:
            random = 2 * self._uniform(length, batch, 6)[:, part] - 1
            pixels = distorted(pixels.flatten(0, 1), random.flatten(0, 1)).view(pixels.shape)
        return Images(pixels, label[:, part], instance, classes)

    def deal(self, batch: int, which: Tensor, part: slice = slice(None)) -> Tensor:
        """Labels for classes that :meth:`sample_images` gave as numbers, int64 [T, B]: of all ``num_labels``,
        int64 [T, B], whether or not there are fewer classes; or strings of five letters, [T, B, 5].
        """
        dealt = self._shuffled(batch, self.num_labels) if self.labels == "onehot" else self._strings(batch)
        return dealt[torch.arange(batch)[part], which]

    def state_dict(self) -> dict[str, Tensor]:
        """What is needed to go on with exactly the episodes that would have come next."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from a :meth:`state_dict`. Raises ValueError where it is not one."""
        if set(state) != {"generator"}:
            raise ValueError(f"state must have the single entry 'generator', got {sorted(state)}")
        self._generator.set_state(state["generator"])
        self._worker = _worker_seed()

    def __getstate__(self) -> dict[str, Any]:
        """With the generator as bytes: torch shares its state with a spawned process, and lets go of it before that has it."""
        return {**self.__dict__, "_generator": self._generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._generator = torch.Generator()
        self._generator.set_state(torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8))

    def _seed_in_worker(self) -> None:
        """A copy in a DataLoader's worker has the generator of the original and of all other copies: seed it anew, once. The
        worker's seed is another in every pass over the loader, too."""
        worker = _worker_seed()
        if worker != self._worker:
            of_original = int(torch.randint(2**62, (), generator=self._generator))
            self._generator.manual_seed(of_original + worker)
            self._worker = worker

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def _shuffled(self, batch: int, length: int) -> Tensor:
        """A random order of 0 to length - 1 per row, int64 [batch, length]."""
        return self._uniform(batch, length).argsort(1)

    def _distinct(self, sizes: Tensor, count: int) -> Tensor:
        """``count`` different integers below each of ``sizes``, every set equally likely (R. Floyd)."""
        last = sizes.unsqueeze(-1) - count + torch.arange(count)
        drawn = (self._uniform(*last.shape) * (last + 1)).long()
        picks = torch.full_like(last, -1)
        for i in range(count):
            taken = (picks == drawn[..., i : i + 1]).any(-1)
            picks[..., i] = torch.where(taken, last[..., i], drawn[..., i])
        return picks

    def _strings(self, batch: int) -> Tensor:
        """A string of letters per label, int64 [batch, ways, 5]."""
        number = self._distinct(torch.full((batch,), LETTERS**LETTERS), self.ways)
        return number.unsqueeze(-1) // LETTERS ** torch.arange(LETTERS) % LETTERS


def distorted(images: Tensor, random: Tensor) -> Tensor:
    """Every image turned by up to pi/16, stretched by up to 1.2, slanted, and shifted by up to 10% of its width: float32 of the
    same shape.

    images: [M, S, S] or [M, 3, S, S], values from 0 to 255; random: [M, 6], which says how, within [-1, 1).
    """
    count, size = len(images), images.shape[-1]
    middles = (2 * torch.arange(size, dtype=torch.float32) + 1) / size - 1  # of the pixels, from -1 to 1
    across, down = torch.meshgrid(middles, middles, indexing="xy")
    places = torch.stack([across, down, torch.ones_like(across)]).flatten(1)  # [3, S * S]
    random = random.float()
    angle, shift = random[:, 0] * _TURN, random[:, 1:3] * 2 * _SHIFT  # the picture is 2 wide in grid units
    cos, sin = angle.cos(), angle.sin()
    width, height = (_STRETCH * random[:, 3:5]).exp().unbind(1)
    slant = _SLANT * random[:, 5]
    # A turn of what has been stretched and slanted.
    across = torch.stack([cos * width, cos * slant - sin * height, shift[:, 0]], 1)
    down = torch.stack([sin * width, sin * slant + cos * height, shift[:, 1]], 1)
    transform = torch.cat([across, down], 1)
    # One product for all images: affine_grid takes seven times as long as the sampling itself. In float32 whatever autocast
    # the caller is in, which would round the places of pixels.
    with torch.autocast("cpu", enabled=False):
        grid = (transform.view(-1, 3) @ places).view(count, 2, size, size).permute(0, 2, 3, 1)
    channels = images if images.dim() == 4 else images.unsqueeze(1)
    moved = F.grid_sample(channels.float(), grid, padding_mode="border", align_corners=False)
    return moved.clamp_(max=255).view(images.shape)  # interpolation may round to a little more


def _worker_seed() -> int | None:
    """Of the DataLoader worker that this process is; None elsewhere."""
    worker = get_worker_info()
    return None if worker is None else worker.seed


def num_outputs(ways: int, labels: str) -> int:
    """How many numbers a label is encoded in, which is also how many outputs a model needs."""
    return LETTERS * LETTERS if labels == "string" else ways


def images_of_input(late: str) -> int:
    """How many images an input has."""
    return 2 if late == "pair" else 1


def step_before(images: Tensor) -> Tensor:
    """Of every step of images [T, ...] those of the step before, of the first zeros: no image."""
    return torch.cat([torch.zeros_like(images[:1]), images[:-1]])


def encode_inputs(
    images: Tensor, previous: Tensor, *, ways: int, labels: str = "onehot", before: Tensor | None = None
) -> Tensor:
    """What a model reads, float32 [T, B, C * S * S + L]: the pixels, then the label of the step before; between them, where it
    is given, the image ``before``, as images, zeros for none.

    images: [T, B, S, S], or in colour [T, B, 3, S, S], uint8 or float, with values from 0 to 255; or features [T, B, E] of
        :class:`mann_fast.training.features.FeatureEncoder`. previous: the label of the step before, int64 [T, B] in
        [-1, ways), or for string labels [T, B, 5] letters in [-1, 5); -1 stands for none and is encoded as zeros. L is
        ``ways``, or 25 for string labels.
    """
    check_labels(ways, labels)
    size = ways if labels == "onehot" else LETTERS
    places = previous.unsqueeze(-1) if labels == "onehot" else previous
    onehot = (places.unsqueeze(-1) == torch.arange(size, device=previous.device)).flatten(2)
    pixels = images.flatten(2)
    if before is not None:
        pixels = torch.cat([pixels, before.flatten(2)], 2)
    width = pixels.shape[2] + onehot.shape[2]
    inputs = torch.empty(*pixels.shape[:2], width, dtype=torch.float32, device=images.device)
    torch.div(pixels, 255, out=inputs[..., : pixels.shape[2]])
    inputs[..., pixels.shape[2] :] = onehot
    return inputs


def check_labels(ways: int, labels: str) -> None:
    """Raises ValueError unless ``ways`` classes can be told apart by labels of this kind."""
    check_choice("labels", labels, LABELS)
    if not isinstance(ways, int) or isinstance(ways, bool) or ways < 1:
        raise ValueError(f"ways must be a positive integer, got {ways!r}")
    if labels == "string" and ways > LETTERS**LETTERS:
        raise ValueError(f"ways must be at most {LETTERS**LETTERS} with string labels, got {ways}")
