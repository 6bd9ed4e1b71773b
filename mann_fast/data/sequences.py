"""Sequence tasks for a memory: copy, repeat copy and associative recall (Graves et al. 2014, arXiv 1410.5401, sections 4.1 to
4.3), pairs asked for by either half (after Csordas and Schmidhuber 2019, arXiv 1904.10278), thousands of pairs asked for by
one (after the associative recall of Rae et al. 2016, arXiv 1610.09027), and regression on functions drawn from a Gaussian
process (Santoro et al. 2016, arXiv 1605.06065).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .images import counted


class Sequences(NamedTuple):
    """A batch: inputs [T, B, I], targets [T, B, O], and answered bool [T], the steps at which an answer is wanted.

    ideal: of regression, [T, B], the squared error of the best possible prediction: that of the Gaussian process itself; else
    None.
    """

    inputs: Tensor
    targets: Tensor
    answered: Tensor
    ideal: Tensor | None = None

    def part(self, part: slice) -> Sequences:
        """Some sequences of the batch."""
        ideal = None if self.ideal is None else self.ideal[:, part]
        return Sequences(self.inputs[:, part], self.targets[:, part], self.answered, ideal)


@dataclass(frozen=True)
class _OneLength:
    """A task whose size is one length."""

    length: int
    least = 1

    def draw(self, generator: Generator, length: int) -> tuple[int]:
        """The size of a batch of training, of at most this length."""
        return (_randint(self.least, length, generator),)

    @property
    def longest(self) -> tuple[int]:
        """The largest size of training."""
        return (self.length,)


@dataclass(frozen=True)
class Copy(_OneLength):
    """1 to ``length`` random vectors of 8 bits, then a mark; the answer is the vectors in the same order.

    Inputs are the bits, a mark at the start and one at the end.
    """

    bits = 8
    input_size = bits + 2
    output_size = bits
    marks = "start", "end"  # the last inputs, in words
    binary = True

    @property
    def tests(self) -> list[tuple[int]]:
        """Sizes to measure: within training, and beyond it."""
        return _distinct((max(1, self.length * share // 10),) for share in (5, 10, 15, 25, 50))

    @staticmethod
    def name(length: int) -> str:
        return counted(length, "vector")

    def sample(self, batch: int, generator: Generator, length: int) -> Sequences:
        bits = _bits(length, batch, self.bits, generator)
        inputs = torch.zeros(2 * length + 2, batch, self.input_size, dtype=torch.float32)
        inputs[0, :, self.bits] = 1
        inputs[1 : length + 1, :, : self.bits] = bits
        inputs[length + 1, :, self.bits + 1] = 1
        return _answered_last(inputs, bits)


@dataclass(frozen=True)
class RepeatCopy:
    """1 to ``length`` random vectors of 8 bits, then how often to repeat them, 1 to ``length`` times; the answer is that many
    copies, and a mark at their end.

    Inputs are the bits, a mark at the start, and the number as a share of ``length``.
    """

    length: int
    bits = 8
    input_size = bits + 2
    output_size = bits + 1
    marks = "start", "times"
    output_marks = ("end",)
    binary = True

    def draw(self, generator: Generator, length: int) -> tuple[int, int]:
        return _randint(1, length, generator), _randint(1, length, generator)

    @property
    def longest(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def tests(self) -> list[tuple[int, int]]:
        half, whole = max(1, self.length // 2), self.length
        return _distinct([(half, half), (whole, whole), (2 * whole, whole), (whole, 2 * whole)])

    @staticmethod
    def name(length: int, repeats: int) -> str:
        return f"{counted(length, 'vector')}, {counted(repeats, 'time')}"

    def sample(self, batch: int, generator: Generator, length: int, repeats: int) -> Sequences:
        bits = _bits(length, batch, self.bits, generator)
        inputs = torch.zeros(length + 2 + length * repeats + 1, batch, self.input_size, dtype=torch.float32)
        inputs[0, :, self.bits] = 1
        inputs[1 : length + 1, :, : self.bits] = bits
        inputs[length + 1, :, self.bits + 1] = repeats / self.length
        answer = torch.zeros(length * repeats + 1, batch, self.output_size, dtype=torch.float32)
        answer[:-1, :, : self.bits] = bits.repeat(repeats, 1, 1)
        answer[-1, :, self.bits] = 1
        return _answered_last(inputs, answer)


@dataclass(frozen=True)
class AssociativeRecall(_OneLength):
    """2 to ``length`` items of three random vectors of 6 bits, then one of them again; the answer is the item that came after
    it.

    Inputs are the bits, a mark before each item, and a mark before and after the item that is asked for.
    """

    least = 2
    bits = 6
    vectors = 3
    input_size = bits + 2
    output_size = bits
    marks = "item", "asked"
    binary = True

    @property
    def tests(self) -> list[tuple[int]]:
        return _distinct((max(2, self.length * share // 6),) for share in (2, 4, 6, 9, 12, 18))

    @staticmethod
    def name(items: int) -> str:
        return f"{items} items"

    def sample(self, batch: int, generator: Generator, items: int) -> Sequences:
        bits = torch.randint(2, (items, self.vectors, batch, self.bits), generator=generator).float()
        asked = torch.randint(items - 1, (batch,), generator=generator)
        size = self.vectors + 1
        inputs = torch.zeros(
            (items + 1) * size + 1 + self.vectors, batch, self.input_size, dtype=torch.float32
        )
        shown = inputs[: items * size].view(items, size, batch, self.input_size)
        shown[:, 0, :, self.bits] = 1
        shown[:, 1:, :, : self.bits] = bits
        query = inputs[items * size : (items + 1) * size + 1]
        query[[0, -1], :, self.bits + 1] = 1
        query[1:-1, :, : self.bits] = _chosen(bits, asked)
        return _answered_last(inputs, _chosen(bits, asked + 1))


@dataclass(frozen=True)
class KeyValue:
    """1 to 3 rounds: in each 1 to ``length`` pairs of 4 and 4 bits, one a step; then each pair is asked for once, in another
    order, by its first or by its second half. The answer, at the step of the question, is the other half.

    Inputs are the bits, of which a question leaves one half 0, a mark of a question by the first half, and one by the second.
    Within a round no first half comes twice and no second, so one pair alone answers; the next round pairs them anew, so what
    an earlier one left in the memory misleads.
    """

    length: int
    half = 4
    most = 2**half  # pairs of a round
    rounds = 3
    input_size = 2 * half + 2
    output_size = half
    marks = "asked by first", "asked by second"
    binary = True

    def draw(self, generator: Generator, length: int) -> tuple[int, int]:
        return _randint(1, length, generator), _randint(1, self.rounds, generator)

    @property
    def longest(self) -> tuple[int, int]:
        return self.length, self.rounds

    @property
    def tests(self) -> list[tuple[int, int]]:
        whole, rounds = self.length, self.rounds
        sizes = [(whole, 1), (whole, rounds), (whole, 2 * rounds), (whole, 4 * rounds)]
        return _distinct([*sizes, (min(2 * whole, self.most), rounds)])

    @staticmethod
    def name(pairs: int, rounds: int) -> str:
        return f"{counted(pairs, 'pair')}, {counted(rounds, 'round')}"

    def sample(self, batch: int, generator: Generator, pairs: int, rounds: int) -> Sequences:
        if pairs > self.most:
            raise ValueError(f"length must be at most {self.most}, got {pairs}: pairs of a round differ")
        half = self.half
        ranks = torch.rand(rounds, 2, batch, self.most, generator=generator)
        codes = ranks.argsort(3)[..., :pairs].unsqueeze(4)
        bits = (codes >> torch.arange(half) & 1).float()
        order = torch.rand(rounds, 1, batch, pairs, 1, generator=generator).argsort(3)
        first, second = bits.transpose(2, 3).unbind(1)  # [rounds, pairs, B, half]
        asked_first, asked_second = bits.gather(3, order.expand_as(bits)).transpose(2, 3).unbind(1)
        by_second = torch.randint(2, (rounds, pairs, batch, 1), generator=generator).float()
        inputs = torch.zeros(rounds, 2 * pairs, batch, self.input_size, dtype=torch.float32)
        inputs[:, :pairs, :, : 2 * half] = torch.cat([first, second], 3)
        question = [asked_first * (1 - by_second), asked_second * by_second, 1 - by_second, by_second]
        inputs[:, pairs:] = torch.cat(question, 3)
        targets = torch.zeros(rounds, 2 * pairs, batch, half, dtype=torch.float32)
        targets[:, pairs:] = torch.where(by_second == 1, asked_first, asked_second)
        answered = torch.arange(2 * pairs).repeat(rounds) >= pairs
        return Sequences(inputs.flatten(0, 1), targets.flatten(0, 1), answered)


@dataclass(frozen=True)
class Pairs(_OneLength):
    """1 to ``length`` pairs of 32 and 8 random bits, one a step; then 16 of them, or all where they are fewer, are asked for by
    their first bits, each once. The answer, at the step of the question, is the other 8.

    Inputs are the bits, of which a question leaves the last 8 at 0, and a mark of a question. (That two pairs of 4,096 have the
    same 32 bits happens once in 500 sequences.)
    """

    first, second = 32, 8
    questions = 16
    input_size = first + second + 1
    output_size = second
    marks = ("asked",)
    binary = True

    @property
    def tests(self) -> list[tuple[int]]:
        return _distinct((max(1, self.length * share // 16),) for share in (1, 4, 16, 32))

    @staticmethod
    def name(pairs: int) -> str:
        return counted(pairs, "pair")

    def sample(self, batch: int, generator: Generator, pairs: int) -> Sequences:
        bits = _bits(pairs, batch, self.first + self.second, generator)
        asked = torch.rand(batch, pairs, generator=generator).argsort(1)[:, : self.questions].T
        question = bits.gather(0, asked.unsqueeze(2).expand(-1, -1, bits.shape[2]))
        inputs = torch.zeros(pairs + len(asked), batch, self.input_size, dtype=torch.float32)
        inputs[:pairs, :, :-1] = bits
        inputs[pairs:, :, : self.first] = question[..., : self.first]
        inputs[pairs:, :, -1] = 1
        return _answered_last(inputs, question[..., self.first :])


@dataclass(frozen=True)
class Regression:
    """``length`` points of a function drawn from a Gaussian process, in random order; the answer at every step is the value of
    the function there, from the points before it.

    The process has mean 0 and covariance exp(-(x - x')^2 / (2 * 0.3^2)) on [-1, 1], and its values are seen with a noise of
    standard deviation 0.05. Inputs are the point and the value at the point before.
    """

    length: int
    input_size = 2
    output_size = 1
    marks = "point", "value before"
    output_marks = ("value",)
    binary = False
    length_scale = 0.3
    noise = 0.05

    def draw(self, generator: Generator, length: int) -> tuple[int]:
        return (length,)

    @property
    def longest(self) -> tuple[int]:
        return (self.length,)

    @property
    def tests(self) -> list[tuple[int]]:
        return [(self.length,)]

    @staticmethod
    def name(length: int) -> str:
        return counted(length, "point")

    def sample(self, batch: int, generator: Generator, length: int) -> Sequences:
        x = 2 * torch.rand(batch, length, 1, generator=generator, dtype=torch.float64) - 1
        covariance = torch.exp(-((x - x.mT) ** 2) / (2 * self.length_scale**2))
        covariance += self.noise**2 * torch.eye(length, dtype=torch.float64)
        root = torch.linalg.cholesky(covariance)
        z = torch.randn(batch, length, 1, generator=generator, dtype=torch.float64)
        values = root @ z
        # y = L z: given the values before it, y_t has mean y_t - L_tt z_t (Rasmussen and Williams 2006, appendix A.2).
        ideal = (root.diagonal(dim1=1, dim2=2).unsqueeze(2) * z).square()
        before = torch.cat([torch.zeros(batch, 1, 1, dtype=torch.float32), values[:, :-1].float()], dim=1)
        inputs = torch.cat([x.float(), before], dim=2).transpose(0, 1)
        answered = torch.ones(length, dtype=torch.bool)
        return Sequences(inputs, values.float().transpose(0, 1), answered, ideal.float().squeeze(2).T)


TASKS = {
    "copy": Copy,
    "repeat-copy": RepeatCopy,
    "recall": AssociativeRecall,
    "key-value": KeyValue,
    "pairs": Pairs,
    "regression": Regression,
}


def _distinct(sizes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each once: short sequences have few sizes."""
    return list(dict.fromkeys(sizes))


def _randint(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def _bits(length: int, batch: int, bits: int, generator: Generator) -> Tensor:
    return torch.randint(2, (length, batch, bits), generator=generator).float()


def _chosen(bits: Tensor, item: Tensor) -> Tensor:
    """[vectors, B, bits] of the items [B] out of [items, vectors, B, bits]."""
    return bits[item, :, torch.arange(len(item))].transpose(0, 1)


def _answered_last(inputs: Tensor, answer: Tensor) -> Sequences:
    """Of which the last steps want the answer."""
    targets = inputs.new_zeros(inputs.shape[0], *answer.shape[1:])
    targets[-len(answer) :] = answer
    answered = torch.zeros(inputs.shape[0], dtype=torch.bool)
    answered[-len(answer) :] = True
    return Sequences(inputs, targets, answered)
