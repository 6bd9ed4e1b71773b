"""What a step of a sparse memory costs with an approximate search, beside the exact one, and what it misses.

    python benchmarks/sparse_index.py [--largest 20] [--probes 16 64] [--repeats 3]

Every row of the memory is another: drawn at random, of which neighbours are hardest to find, or around N / 64 centres; keys are
rows with some noise. A layer's steps, by the processor's time on one thread, as the difference between a call of more and one
of fewer, once the index is built; the build is timed apart. Milliseconds forward, and forward and backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mann_fast import MemoryLayer
from mann_fast.layers import MemoryState, sparse_index

SIZE, READS, FEW, MANY, NOISE, SCALE = 32, 4, 4, 104, 0.3, 0.05
KINDS = ("random", "centres")


def memory_of(kind: str, slots: int) -> Tensor:
    if kind == "random":
        return torch.randn(slots, SIZE)
    centres = torch.randn(slots // 64, SIZE)
    return centres[torch.randint(len(centres), (slots,))] + 0.3 * torch.randn(slots, SIZE)


def layer_of(slots: int, probes: int | None) -> MemoryLayer:
    """Whose key is its input, but for tanh, of which inputs are too small to feel much."""
    layer = MemoryLayer(
        SIZE, SIZE, controller="feedforward", addressing="sparse", num_slots=slots, slot_size=SIZE, num_heads=1,
        num_reads=READS, probes=probes,
    )  # fmt: skip
    with torch.no_grad():
        for linear in (layer.controller, layer.heads):
            linear.bias.zero_()
        layer.controller.weight.zero_()[:, :SIZE] = torch.eye(SIZE)
        layer.heads.weight[:SIZE] = torch.eye(SIZE)
    return layer


class Run:
    """Calls of one layer that follow one another."""

    def __init__(self, layer: MemoryLayer, memory: Tensor):
        self.layer, self.memory = layer, memory
        state = layer.initial_state(1)
        self.state: MemoryState = state._replace(
            memory=state.memory._replace(memory=memory.unsqueeze(0).clone())
        )

    def call(self, steps: int, backward: bool) -> float:
        rows = self.memory[torch.randint(len(self.memory), (steps, 1))]
        x = SCALE * (rows + NOISE * torch.randn(steps, 1, SIZE))
        start = time.process_time()
        with torch.set_grad_enabled(backward):
            output, state = self.layer(x, self.state)
            if backward:
                output.square().sum().backward()
        seconds = time.process_time() - start
        self.state = state.detach()
        return seconds

    def build(self) -> float:
        """Seconds of a step that makes the index, which would come later by itself."""
        worth, sparse_index.WORTH = sparse_index.WORTH, 1
        try:
            return self.call(1, False)
        finally:
            sparse_index.WORTH = worth

    def step(self, backward: bool, repeats: int) -> float:
        """Milliseconds."""
        best: Callable[[int], float] = lambda steps: min(self.call(steps, backward) for _ in range(repeats))  # noqa: E731
        return (best(MANY) - best(FEW)) / (MANY - FEW) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--largest", type=int, default=20, help="exponent of 2 of the greatest number of slots"
    )
    parser.add_argument("--probes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sparse_index.AUDIT_EVERY = 16
    print(f"torch {torch.__version__}, one thread, B=1, D={SIZE}, R=1, K={READS}, float32")
    print("| N | rows | exact | probes | approximate | slots found | mass found | build |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for exponent in range(14, options.largest + 1, 3):
        for kind in KINDS:
            torch.manual_seed(0)
            memory = memory_of(kind, 1 << exponent)
            exact = Run(layer_of(1 << exponent, None), memory)
            times = [exact.step(backward, options.repeats) for backward in (False, True)]
            for probes in options.probes:
                run = Run(layer_of(1 << exponent, probes), memory)
                build = run.build() - exact.call(1, False)
                found = [run.step(backward, options.repeats) for backward in (False, True)]
                recall = run.layer.memory.recall()
                assert recall is not None
                cells = (
                    f"2^{exponent}", kind, "{:.2f}, {:.2f} ms".format(*times), f"{probes} of {int(2 ** (exponent / 2))}",
                    "{:.2f}, {:.2f} ms".format(*found), f"{recall.slots:.3f}", f"{recall.mass:.3f}", f"{build:.2f} s",
                )  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
