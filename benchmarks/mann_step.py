"""A whole training step of a MANN (forward, backward, Adam) beside nn.LSTM's and what people would use instead, in one run.

python benchmarks/mann_step.py [--batch 16] [--hidden 200] [--steps 50] [--compile] [--jax] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import mann_fast
from mann_fast.benchmark import baselines, ceilings
from mann_fast.benchmark.cost import mann_step_flop
from mann_fast.benchmark.timer import interleave
from mann_fast.models import LSTMClassifier

INPUTS, CLASSES, SLOTS, SIZE, HEADS = 405, 5, 128, 40, 4  # 20 x 20 pixels and five labels; the paper's memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50, help="time steps of the sequence")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of a step in a loop")
    parser.add_argument("--jax", action="store_true", help="also JAX, lax.scan under jit (needs jax)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all rounds")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.rand(args.steps, args.batch, INPUTS)
    targets = torch.randint(CLASSES, (args.steps, args.batch))
    model = mann_fast.MANN(INPUTS, CLASSES, args.hidden)

    def reference(model, x):
        with mann_fast.backend("reference"):
            return model(x)[0]

    logits = {
        "mann_fast": lambda model, x: model(x)[0],
        "eager reference": reference,
        "eager by products": baselines.mann_by_steps,
    }
    if args.compile:
        step = torch.compile(baselines.cell_step)
        logits["torch.compile of the step"] = lambda model, x: baselines.mann_by_steps(model, x, step)

    def loss_and_gradients(function, model):
        loss = F.cross_entropy(function(model, x).flatten(0, 1), targets.flatten())
        return loss, *torch.autograd.grad(loss, tuple(model.parameters()))

    expected = loss_and_gradients(reference, model)
    verified, first_calls = {}, {}
    for name, function in logits.items():
        begin = time.perf_counter()
        actual = loss_and_gradients(function, model)
        first_calls[name] = time.perf_counter() - begin
        verified[name] = all(
            torch.allclose(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())
            for a, b in zip(actual, expected, strict=True)
        )

    def training_step(function, model):
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step():
            optimizer.zero_grad()
            F.cross_entropy(function(model, x).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()

        return step

    contestants = {
        name: training_step(function, mann_fast.MANN(INPUTS, CLASSES, args.hidden))
        for name, function in logits.items()
    }
    lstm = LSTMClassifier(INPUTS, CLASSES, args.hidden)
    contestants["nn.LSTM alone"] = training_step(lambda model, x: model(x)[0], lstm)
    if args.jax:
        from mann_fast.benchmark.jax_baseline import training_step as jax_training_step

        contestants["JAX jit of lax.scan"], verified["JAX jit of lax.scan"], first = jax_training_step(
            model, x, targets, expected
        )
        first_calls["JAX jit of lax.scan"] = first
    sgemm, sgemm_flop = ceilings.sgemm()
    timings = interleave({**contestants, "sgemm": sgemm}, seconds=args.seconds)
    rate = sgemm_flop / timings["sgemm"].median
    flop = mann_step_flop(args.steps, args.batch, INPUTS, args.hidden, CLASSES, SLOTS, SIZE, HEADS)
    table = Table(title=f"training step, float32, T={args.steps} B={args.batch} hidden {args.hidden}")
    for column in (
        "what",
        "median ms (quartiles)",
        "times nn.LSTM",
        "times mann_fast",
        "share of sgemm",
        "first call s",
    ):
        table.add_column(column)
    rows = []
    for name in contestants:
        t = timings[name]
        row = {
            "what": name,
            "verified": verified.get(name),
            "median_ms": 1e3 * t.median,
            "quartiles_ms": [1e3 * t.low, 1e3 * t.high],
            "times_lstm": t.median / timings["nn.LSTM alone"].median,
            "times_mann_fast": t.median / timings["mann_fast"].median,
            "share_of_sgemm": None if name == "nn.LSTM alone" else flop / t.median / rate,
            "first_call_s": first_calls.get(name),
        }
        rows.append(row)
        shown = f"{row['median_ms']:.1f} ({1e3 * t.low:.1f}-{1e3 * t.high:.1f})"
        table.add_row(
            name,
            "unverified" if row["verified"] is False else shown,
            f"{row['times_lstm']:.2f}",
            f"{row['times_mann_fast']:.2f}",
            "" if row["share_of_sgemm"] is None else f"{row['share_of_sgemm']:.0%}",
            "" if row["first_call_s"] is None else f"{row['first_call_s']:.1f}",
        )
    Console(width=120).print(table)
    environment = {
        "mann_fast": mann_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "sgemm GFLOP/s": round(rate / 1e9),
        "GFLOP of a step": round(flop / 1e9, 2),
    }
    print(json.dumps(environment))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": environment, "sizes": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
