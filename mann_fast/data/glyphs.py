"""Handwritten-like glyphs: a class is a few curved strokes, an image one careless drawing of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .images import ClassImages

_MAX_STROKES = 4
_DOTS = 24  # along each stroke
_BATCH = 2000  # images drawn at a time, which bounds the memory

_T = (np.arange(_DOTS + 1) / _DOTS)[:, None]
_BASIS = np.concatenate([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], 1)  # Bernstein


def generate_glyphs(
    num_classes: int, images_per_class: int = 20, *, image_size: int = 20, seed: int = 0, first: int = 0
) -> ClassImages:
    """Invented characters, drawn ``images_per_class`` times each; every seed gives other characters. ``first``: how many of
    them to pass over, without drawing them.

    A class has two to four strokes, each a cubic Bezier curve: straight, bent or curled, now and then
    beginning where the one before ended. Each image moves the points of the curves a little and turns,
    scales, slants and shifts the whole, with a pen of its own width. NumPy's frozen generator (RandomState)
    makes the same strokes everywhere; a pixel may differ by one grey level between machines, whose
    exponentials round differently.

    Raises ValueError for sizes that are not positive integers, and ``first`` less than 0.
    """
    for name, value in (
        ("num_classes", num_classes),
        ("images_per_class", images_per_class),
        ("image_size", image_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"first must be an integer of at least 0, got {first!r}")
    random = np.random.RandomState(seed)
    points, drawn = _characters(random, first + num_classes)
    images = np.empty((num_classes * images_per_class, image_size, image_size), np.uint8)
    which = np.repeat(np.arange(first + num_classes), images_per_class)
    passed_over = first * images_per_class
    for begin in range(0, len(which), _BATCH):
        part = which[begin : begin + _BATCH]
        hand = _Hand.of(random, len(part))
        wanted = slice(max(0, passed_over - begin), None)
        if len(part := part[wanted]):
            hand = _Hand(*(numbers[wanted] for numbers in hand))
            dots, ink = _strokes(hand.place(points[part]), drawn[part])
            begin = max(0, begin - passed_over)
            images[begin : begin + len(part)] = _draw(dots, ink, hand.width, image_size)
    starts = torch.arange(num_classes + 1) * images_per_class
    names = tuple(f"glyph{first + i:05d}" for i in range(num_classes))
    return ClassImages(torch.from_numpy(images), starts, names)


def _characters(random: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Control points [count, strokes, 4, 2] within about [-1, 1] and which strokes exist [count, strokes]."""
    shape = (count, _MAX_STROKES)
    # Strokes go from one crossing of a 3 x 3 grid to about another, so that characters share parts
    begin, end = random.randint(9, size=shape), random.randint(1, 9, shape)
    joined = random.uniform(size=shape) < 0.4  # begins where the stroke before ended
    joined[:, 0] = False
    for stroke in range(_MAX_STROKES):
        begin[:, stroke] = np.where(joined[:, stroke], end[:, stroke - 1], begin[:, stroke])
        end[:, stroke] = (begin[:, stroke] + end[:, stroke]) % 9
    begin, end = (
        np.stack([cell % 3 - 1, cell // 3 - 1], -1) * 0.75 + random.uniform(-0.15, 0.15, (*shape, 2))
        for cell in (begin, end)
    )
    begin[:, 1:] = np.where(joined[:, 1:, None], end[:, :-1], begin[:, 1:])
    # The inner points lie beside the straight line: both on one side bend it, on different sides make an S
    across = (end - begin)[..., ::-1] * np.array([-1.0, 1.0])
    bend = random.uniform(-1.2, 1.2, (*shape, 2)) * (random.uniform(size=(*shape, 1)) < 0.7)
    inner = [
        begin + (end - begin) * along + across * bend[..., i, None] for i, along in enumerate((1 / 3, 2 / 3))
    ]
    points = np.stack([begin, *inner, end], 2)
    drawn = np.arange(_MAX_STROKES) < random.randint(2, _MAX_STROKES + 1, (count, 1))
    # Where on the sheet a character lies says nothing about it: centre what is drawn, and make it fit
    curves = np.where(drawn[..., None, None], _BASIS @ points, np.nan)
    low, high = np.nanmin(curves, (1, 2)), np.nanmax(curves, (1, 2))
    scale = np.minimum(1, 1.8 / (high - low).max(1))
    return (points - ((low + high) / 2)[:, None, None]) * scale[:, None, None, None], drawn


class _Hand(NamedTuple):
    """What is chance in a drawing, of M of them: all their random numbers, drawn whether or not the images are."""

    points: np.ndarray  # [M, strokes, 4, 2]
    strokes: np.ndarray  # [M, strokes, 1, 2]
    angle: np.ndarray  # [M]
    slant: np.ndarray  # [M]
    size: np.ndarray  # [M, 2]
    shift: np.ndarray  # [M, 1, 1, 2]
    width: np.ndarray  # of the pen, [M, 1, 1], in sheets

    @classmethod
    def of(cls, random: np.random.RandomState, count: int) -> _Hand:
        return cls(
            random.normal(0, 0.09, (count, _MAX_STROKES, 4, 2)),
            random.normal(0, 0.06, (count, _MAX_STROKES, 1, 2)),
            random.normal(0, 0.15, count),
            random.normal(0, 0.15, count),
            random.uniform(0.7, 1.05, (count, 2)),
            random.normal(0, 0.135, (count, 1, 1, 2)),
            random.uniform(0.02, 0.032, (count, 1, 1)),
        )

    def place(self, points: np.ndarray) -> np.ndarray:
        """The control points [M, strokes, 4, 2] as this hand places them."""
        points = points + self.points
        points = points + self.strokes
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
        lean = np.zeros((len(points), 2, 2))
        lean[:, 0, 0], lean[:, 0, 1], lean[:, 1, 1] = self.size[:, 0], self.slant, self.size[:, 1]
        return np.einsum("mij,mskj->mski", turn @ lean, points) + self.shift


def _strokes(points: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dots along the curves [M, strokes * dots, 2] and the length of curve each stands for."""
    curve = _BASIS @ points  # [M, strokes, dots + 1, 2]
    middle = (curve[:, :, 1:] + curve[:, :, :-1]) / 2
    length = np.sqrt(((curve[:, :, 1:] - curve[:, :, :-1]) ** 2).sum(-1)) * drawn[..., None]
    return middle.reshape(len(points), -1, 2), length.reshape(len(points), -1)


def _draw(dots: np.ndarray, length: np.ndarray, width: np.ndarray, size: int) -> np.ndarray:
    """uint8 [M, size, size]: every dot is a soft round spot of ink, which saturates where spots overlap."""
    place = (dots * 0.4 + 0.5) * size - 0.5  # the character fills some 0.8 of the picture
    width = width * size
    pixels = np.arange(size)
    spots = np.exp(-0.5 * ((pixels - place[..., None]) / width[..., None]) ** 2)  # [M, dots, 2, size]
    rows, columns = spots[:, :, 1] * length[..., None], spots[:, :, 0]
    ink = np.matmul(rows.transpose(0, 2, 1), columns) * (0.4 * size / width)
    return np.uint8(np.rint(255 * (1 - np.exp(-ink))))
