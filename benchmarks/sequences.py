"""Resets, lengths and rollouts of a MemoryLayer beside nn.LSTM's own ways, as ratios of one run; for docs/sequences.md.

python benchmarks/sequences.py [--threads N]
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from mann_fast import MemoryLayer

STEPS, BATCH, INPUTS, HIDDEN = 128, 8, 32, 64
RESETS = 23


def measured(calls, rounds):
    """Median milliseconds of each; in turn, so that what else the machine does meets all alike."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def show(title, times, of):
    print(title)
    for name, value in times.items():
        print(f"  {name:44} {value:8.2f} ms {value / times[of]:6.2f} times {of}")


def pieces(resets):
    """From where to where there is no reset, of any sample."""
    starts = sorted({0, *resets.any(1).nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], STEPS], strict=True))


def training(module, run):
    def step():
        module.zero_grad()
        run().sum().backward()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layer = MemoryLayer(INPUTS, HIDDEN, num_slots=32, slot_size=16, num_heads=2)
    lstm = nn.LSTM(INPUTS, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUTS)
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets.view(-1)[torch.randperm(STEPS * BATCH)[:RESETS]] = True

    def layer_cut():
        outputs, state = [], layer.initial_state(BATCH)
        for lo, hi in pieces(resets):
            output, state = layer(x[lo:hi], state.reset(resets[lo]))
            outputs.append(output)
        return torch.cat(outputs)

    def lstm_cut():
        outputs, state = [], (x.new_zeros(1, BATCH, HIDDEN),) * 2
        for lo, hi in pieces(resets):
            going = (~resets[lo]).unsqueeze(1)
            output, state = lstm(x[lo:hi], tuple(part * going for part in state))
            outputs.append(output)
        return torch.cat(outputs)

    calls = {
        "the layer, no resets": training(layer, lambda: layer(x)[0]),
        f"the layer, {RESETS} resets in one call": training(layer, lambda: layer(x, resets=resets)[0]),
        "the layer, cut at every reset": training(layer, layer_cut),
        "nn.LSTM, no resets": training(lstm, lambda: lstm(x)[0]),
        "nn.LSTM, cut at every reset": training(lstm, lstm_cut),
    }
    show("Training, T=128, B=8:", measured(calls, arguments.rounds), "the layer, no resets")

    wide = MemoryLayer(405, 200)  # 128 slots of 40 numbers, 4 heads
    wide_lstm = nn.LSTM(405, 200)
    padded, half = torch.randn(50, 16, 405), torch.full((16,), 25)
    spread = torch.linspace(1, 50, 16).long()

    def packed(lengths):
        return pack_padded_sequence(padded, lengths, enforce_sorted=False)

    calls = {
        "the layer, no lengths": training(wide, lambda: wide(padded)[0]),
        "the layer, half of every sequence": training(wide, lambda: wide(padded, lengths=half)[0]),
        "the layer, lengths from 1 to T": training(wide, lambda: wide(padded, lengths=spread)[0]),
        "the layer, packed, from 1 to T": training(wide, lambda: wide(packed(spread))[0].data),
        "nn.LSTM, no lengths": training(wide_lstm, lambda: wide_lstm(padded)[0]),
        "nn.LSTM, packed, from 1 to T": training(wide_lstm, lambda: wide_lstm(packed(spread))[0].data),
    }
    show("Training, T=50, B=16:", measured(calls, arguments.rounds), "the layer, no lengths")

    flags = resets.unsqueeze(1)

    def rollout(module, **named):
        state = None
        for t in range(STEPS):
            _, state = module(x[t : t + 1], state, **{name: rows[t] for name, rows in named.items()})

    calls = {
        "the layer": lambda: rollout(layer),
        "the layer, with resets": lambda: rollout(layer, resets=flags),
        "nn.LSTM": lambda: rollout(lstm),
    }
    with torch.no_grad():
        show("A rollout of 128 steps, B=8, no gradients:", measured(calls, arguments.rounds), "nn.LSTM")


if __name__ == "__main__":
    main()
