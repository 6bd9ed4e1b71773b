"""An op of mann_fast on the model: what its kernels compute beside the reference, and what their launches take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from capture import Launch, Recorder
from clock import LATENCIES, Clock, Record
from machine import Machine
from machine_code import Code, Kernel, built, compiled
from native import ROOT
from torch import Tensor

sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

ARCHITECTURE = "90"  # whose latencies the clock has
CLOCK = 1.98  # GHz of an H200
WIDEST = 4096  # lanes that are interpreted at once
WORST = 1e-4  # of the greatest number: how far a kernel in float32 may be off the reference


class WrongNumbers(Exception):
    """The kernels' numbers are not the reference's."""


class Timed(NamedTuple):
    """A launch, and what the clock says of its first blocks."""

    launch: Launch
    kernel: Kernel
    record: Record


class Model:
    """Serves CPU tensors with backend "cuda": every launch is interpreted, and noted in `launches`."""

    def __init__(self, per_processor: int = 1, scale: float = 1.0, of_build: bool = False) -> None:
        self.of_build = of_build  # or with the lines of the source
        self.per_processor = per_processor
        self.latencies = {name: round(scale * cycles) for name, cycles in LATENCIES.items()}
        self.codes: dict[str, Code] = {}
        self.launches: list[Timed] = []
        self.timing, self.worst = True, 0.0  # how far numbers are off, of the greatest
        self.recorder = Recorder()
        self.recorder.load(self._launched)

    def code(self, unit: str) -> Code:
        if unit not in self.codes:
            file = (
                built(unit, ARCHITECTURE) if self.of_build else compiled(f"csrc/cuda/{unit}.cu", ARCHITECTURE)
            )
            self.codes[unit] = Code(file)
        return self.codes[unit]

    def _launched(self, launch: Launch) -> None:
        kernel = self.code(launch.unit).kernel(launch.kernel)
        timed = min(launch.blocks, launch.cluster * self.per_processor)
        at_once = min(launch.blocks, max(timed, WIDEST // launch.threads // launch.cluster * launch.cluster))
        first = None
        for block in range(0, launch.blocks, at_once):
            machine = Machine(kernel, launch, min(at_once, launch.blocks - block))
            machine.run(block)
            first = first or machine
        if self.timing:
            warps = launch.threads // 32
            blocks = [first.traces[b * warps : (b + 1) * warps] for b in range(timed)]
            clock = Clock(kernel, launch, first.steps, blocks, self.latencies)
            self.launches.append(Timed(launch, kernel, clock.run()))

    def run(self, call: Callable[[], Tensor], part: str) -> list[Timed]:
        """The launches of an op "forward", forward where it keeps what backward needs ("keep"), or "backward". Raises
        WrongNumbers where they compute something else than the reference does."""
        from mann_fast import backend

        self.launches, self.timing = [], part != "backward"
        self.worst, self.recorder.failure = 0.0, None
        try:
            with torch.set_grad_enabled(part != "forward"):
                with backend("cuda"):
                    output = call()
                with backend("reference"):
                    expected = call()
            self._compare("the output", output, expected)
            if part != "forward" and not output.requires_grad:
                raise ValueError("its output has no gradient")
            if part == "backward":
                self.timing = True
                leaves = leaves_of(output)
                grad = torch.randn_like(output)
                found, right = (torch.autograd.grad(one, leaves, grad) for one in (output, expected))
                # A gradient that is 0 but for rounding is not compared by its own greatest number.
                least = max(float(one.abs().max()) for one in right) / 1000
                for one, other in zip(found, right, strict=True):
                    self._compare(f"a gradient of {tuple(other.shape)}", one, other, least)
        except RuntimeError as problem:
            raise self.recorder.failure or problem from None
        return self.launches

    def _compare(self, what: str, found: Tensor, expected: Tensor, least: float = 1e-30) -> None:
        allowed = max(WORST, 2 * torch.finfo(expected.dtype).eps) if expected.is_floating_point() else 0.0
        found, expected = found.detach().double(), expected.detach().double()
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(least))
        if not error <= allowed:
            raise WrongNumbers(f"{what} is off by {error:.1e} of its greatest number")
        self.worst = max(self.worst, error)


def leaves_of(output: Tensor) -> list[Tensor]:
    """What an output has been computed from and wants a gradient."""
    seen, todo, found = set(), [output.grad_fn], []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found
