"""How far T steps in float32 drift from float64, forward and backward, fused beside eager; for docs/guarantees.md.

python benchmarks/drift.py [--steps 10000] [--cases lrua_scan "layer lrua" ...]

The loss is a sum of all reads (of a layer: outputs) with random signs, so that gradients go through all steps. An op
starts from the state of a new sequence, and the references replay what the fused op in float32 chose, for a near tie turns on
a last bit and all that follows with it. Layers choose for themselves. Each error is the greatest difference from the reference
in float64 over its greatest number; kept is what autograd keeps for backward. One thread.
"""

import argparse
import time

import torch

from mann_fast import MemoryLayer, ops, reference
from mann_fast.benchmark.memory import saved_bytes

B, N, D, R = 1, 16, 12, 2  # small, so that eager's graph of 10,000 steps in float64 fits in memory
INPUTS, HIDDEN = 8, 16


def signs(x, generator):
    return (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x.dtype)


def lrua_scan(T):
    state = ops.LRUAState.initial(B, N, D, R)
    told = [torch.tanh(torch.randn(T, B, R, D)), torch.tanh(torch.randn(T, B, R, D))]
    told += [torch.randn(T, B, R), 1 + 10 * torch.rand(T, B, R)]
    options = (False, False, 0.95, 1e-6, 8)
    slots = torch.ops.mann_fast.lrua_scan(*state, *told, None, None, None, *options)[4]

    def call(of, told, dtype):
        replayed = {} if of is ops else {"slots": slots}
        return of.lrua_scan(ops.LRUAState(*(x.to(dtype) for x in state)), *told, **replayed)

    return call, told


def head(T):
    key, sharpness = torch.tanh(torch.randn(T, B, R, D)), 1 + 4 * torch.rand(T, B, R)
    shift = torch.softmax(torch.randn(T, B, R, 3), -1)
    return [key, sharpness, torch.sigmoid(torch.randn(T, B, R)), shift, 1 + torch.rand(T, B, R)]


def ntm_scan(T):
    state = ops.NTMState.initial(B, N, D, R, R)
    told = [*head(T), *head(T), torch.sigmoid(torch.randn(T, B, R, D)), torch.tanh(torch.randn(T, B, R, D))]

    def call(of, told, dtype):
        heads = ops.NTMHead(*told[:5]), ops.NTMHead(*told[5:10])
        return of.ntm_scan(ops.NTMState(*(x.to(dtype) for x in state)), *heads, *told[10:])

    return call, told


def dnc_scan(T):
    state = ops.DNCState.initial(B, N, D, R)
    told = [
        torch.randn(T, B, R, D),
        1 + 4 * torch.rand(T, B, R),
        torch.randn(T, B, D),
        1 + 4 * torch.rand(T, B),
    ]
    told += [torch.sigmoid(torch.randn(T, B, D)), torch.randn(T, B, D), torch.sigmoid(torch.randn(T, B, R))]
    told += [torch.sigmoid(torch.randn(T, B)), torch.sigmoid(torch.randn(T, B))]
    told += [torch.softmax(torch.randn(T, B, R, 3), -1)]
    nothing = [None] * 3
    orders = torch.ops.mann_fast.dnc_scan(*state, *told, *nothing, *nothing, False, 1e-6, 1)[9]

    def call(of, told, dtype):
        replayed = {} if of is ops else {"orders": orders}
        return of.dnc_scan(ops.DNCState(*(x.to(dtype) for x in state)), ops.DNCInterface(*told), **replayed)

    return call, told


def layer(addressing):
    def case(T):
        torch.manual_seed(0)
        module = MemoryLayer(INPUTS, HIDDEN, addressing=addressing, num_slots=N, slot_size=D, num_heads=R)
        weights = list(module.parameters())

        def call(of, told, dtype):
            names = [name for name, _ in module.named_parameters()]
            x, *parameters = told
            module.to(dtype)
            with ops.backend("reference" if of is reference else "auto"):
                output, state = torch.func.functional_call(
                    module, dict(zip(names, parameters, strict=True)), (x,)
                )
            return output, state.memory

        return call, [torch.randn(T, B, INPUTS), *weights]

    return case


CASES = {"lrua_scan": lrua_scan, "ntm_scan": ntm_scan, "dnc_scan": dnc_scan}
CASES |= {f"layer {name}": layer(name) for name in ("lrua", "ntm", "dnc")}


def results(call, of, told, dtype):
    """Outputs, last state, gradients; bytes kept for backward; seconds of all."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in told]
    started = time.perf_counter()
    kept = {}

    def forward():
        kept["out"] = call(of, leaves, dtype)

    size = saved_bytes(forward)
    outputs, state = kept.pop("out")
    (outputs * signs(outputs, torch.Generator().manual_seed(1))).sum().backward()
    return outputs.detach(), list(state), [x.grad for x in leaves], size, time.perf_counter() - started


def worst(actual, exact):
    errors = [
        ((x.double() - y).abs().max() / y.abs().max()).item()
        for x, y in zip(actual, exact, strict=True)
        if y is not None and y.abs().max() > 0
    ]
    return max(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"T={arguments.steps}, B={B}, N={N}, D={D}, R={R}; errors of reads or outputs, last state, gradients; MB kept"
    )
    for name in arguments.cases:
        torch.manual_seed(0)
        call, told = CASES[name](arguments.steps)
        fused = results(call, ops, told, torch.float32)
        eager = results(call, reference, told, torch.float32)
        exact = results(call, reference, told, torch.float64)
        for kind, run in (("fused", fused), ("eager", eager)):
            errors = worst([run[0]], [exact[0]]), worst(run[1], exact[1]), worst(run[2], exact[2])
            shown = "  ".join(f"{error:.1e}" for error in errors)
            print(f"{name:12} {kind}  {shown}  {run[3] / 1e6:8.2f} MB  {run[4]:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
