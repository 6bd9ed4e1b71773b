"""The training step of a layer of each memory beside nn.LSTM's, the eager reference and the dnc package where it is installed,
as ratios of one run; for docs/benchmarks.md.

python benchmarks/whole_sequence.py [--threads N] [--memories lrua ntm dnc] [--shape T=50,B=16,N=128,D=40,R=4,H=200]
"""

import argparse
import statistics
import time

import torch
from torch import nn

from mann_fast import MemoryLayer, ops
from mann_fast.benchmark.cases import Shape

INPUTS = 40
SLOW = 6  # rounds of what takes seconds


def training(module, run):
    def step():
        module.zero_grad()
        run().sum().backward()

    return step


def calls_of(shape, memories):
    """By name, each a training step: forward and backward of a sum."""
    x = torch.randn(shape.T, shape.B, INPUTS)
    lstm = nn.LSTM(INPUTS, shape.H)
    calls = {"nn.LSTM": training(lstm, lambda: lstm(x)[0])}
    sizes = {"num_slots": shape.N, "slot_size": shape.D, "num_heads": shape.R}
    for name in memories:
        layer = MemoryLayer(INPUTS, shape.H, addressing=name, **sizes)

        def on_reference(layer=layer):
            with ops.backend("reference"):
                return layer(x)[0]

        calls[name] = training(layer, lambda layer=layer: layer(x)[0])
        calls[f"{name}, eager reference"] = training(layer, on_reference)
    if "dnc" in memories:
        try:
            from dnc import DNC
        except ImportError as error:
            print(f"the dnc package is left out: {error}")
        else:
            package = DNC(
                INPUTS, shape.H, nr_cells=shape.N, cell_size=shape.D, read_heads=shape.R, num_hidden_layers=1
            )
            calls["dnc package"] = training(
                package, lambda: package(x.transpose(0, 1), (None, None, None))[0]
            )
    return calls


def measured(calls, rounds):
    """Median milliseconds of each; in turn, so that what else the machine does meets all alike."""
    times = {name: [] for name in calls}
    for done in range(rounds + 1):  # the first is not counted
        for name, call in calls.items():
            if done > SLOW and statistics.median(times[name]) > 1e3:
                continue
            started = time.perf_counter()
            call()
            if done:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memories", nargs="+", default=["lrua", "ntm", "dnc"])
    parser.add_argument("--shape", type=Shape.parse, default=Shape())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    times = measured(calls_of(arguments.shape, arguments.memories), arguments.rounds)
    print(f"A training step at {arguments.shape}, {arguments.threads} threads, float32:")
    for name, value in times.items():
        print(f"  {name:24} {value:9.1f} ms {value / times['nn.LSTM']:7.2f} times nn.LSTM")


if __name__ == "__main__":
    main()
