"""Random cases of every op against the reference in float64: sizes, options, dtypes, layouts, values, resets, lengths, threads.

    python tests/fuzz.py [--cases 10000] [--seed 0]     as `make fuzz`

Each case is a number; `--seed N --cases 1` runs one again. A result may be off by rounding, and by a few times what plain
PyTorch is off in the same dtype, on these inputs or on any of a few that differ from them by one rounding: where a result is a
small difference of large numbers, one evaluation is near to it by luck, and the worst of several says what its numbers allow.
Where usages nearly tie, the choice of slots turns on a last bit: in less than float64, and in float64 where results differ,
the reference takes the op's choices, and these must be right but for rounding. Prints what failed, and exits with 1 if
anything did.
"""

import argparse
import itertools
import sys
import time

import torch
from fuzz_cases import FAMILIES, Case

from mann_fast import ops, reference

TIGHT = 1e-9  # of the greatest number of a tensor, in float64
TIMES_PLAIN = 4  # as far off as plain PyTorch, so often
NUDGED = 6  # further evaluations of plain PyTorch
EPSILONS = 10  # or so many roundings
NO_DIGIT = 4  # where plain PyTorch is off by this part of the greatest number, nothing is judged
SMALL = 1e-3  # what is less is measured by this
NEARLY_TIED = {torch.float64: 1e-12, torch.float32: 1e-5}


def results(of, drawn, tensors, **replayed):
    """What comes out, and the gradients of a fixed functional of it."""
    leaves = {
        name: x.detach().requires_grad_(x.is_floating_point() and name not in drawn.constant)
        for name, x in tensors.items()
    }
    outputs = drawn.call(of, leaves, **replayed)
    noise = torch.Generator("cpu").manual_seed(1)
    loss = sum(  # of numbers that every dtype has
        (x.double() * torch.randn(x.shape, generator=noise).bfloat16()).sum()
        for x in outputs
        if x.requires_grad
    )
    wanted = [x for x in leaves.values() if x.requires_grad]
    if not isinstance(loss, torch.Tensor):
        return [*outputs]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outputs, *gradients)]


def as_dtype(tensors, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def nudged(case, drawn, number):
    """The inputs, each number of them one rounding up or down, within its range: 0 stays, and from 1 it goes down, but for
    sharpening up."""
    noise = torch.Generator("cpu").manual_seed(number)
    tensors = drawn.tensors
    # Cells compute in the dtype of what they are told; the others in the state's.
    if case.family not in ("cell", "ntm_cell"):
        tensors = as_dtype(tensors, case.wide)

    def beside(name, x):
        if name in drawn.constant or not x.is_floating_point():
            return x
        up = torch.rand(x.shape, generator=noise) < 0.5
        up = torch.where(x == 1, name.endswith("sharpening"), up)
        return x + x * torch.where(up, 1, -1) * torch.finfo(x.dtype).eps

    return {name: beside(name, x) for name, x in tensors.items()}


def same_bits(x, y):
    return x.shape == y.shape and torch.equal(*(z.clone().flatten().view(torch.uint8) for z in (x, y)))


def off(actual, exact):
    return (actual.double() - exact).abs().max().item()


def check(number):
    """None where the case is right, else what is wrong with it."""
    case = Case(number)
    drawn = FAMILIES[case.family](case)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return fault(case, drawn)
    finally:
        torch.set_num_threads(before)


def fault(case, drawn):
    fused = results(ops, drawn, drawn.tensors)
    with torch.no_grad():
        if not all(map(same_bits, fused, drawn.call(ops, drawn.tensors))):
            return f"{case}: other results where no gradient is asked for"
    wide = as_dtype(drawn.tensors, torch.float64)
    if drawn.chosen is None or case.wide == torch.float64:
        found = unlike(case, drawn, fused, results(reference, drawn, wide))
        if drawn.chosen is None or not found:
            return found
    replayed = drawn.chosen.of(drawn.tensors)
    with drawn.chosen.watched() as out_of_order:
        exact = results(reference, drawn, wide, **replayed)
    if max(out_of_order, default=0) > NEARLY_TIED[case.wide]:
        return f"{case}: chose a slot of a usage that is {max(out_of_order):.2g} greater than another's"
    return unlike(case, drawn, fused, exact, **replayed)


def unlike(case, drawn, fused, exact, **replayed):
    """What is wrong with the results of the op, beside the reference."""
    plain = exact if case.wide == torch.float64 else results(reference, drawn, drawn.tensors, **replayed)
    evaluations = [plain]
    for i, (x, y, z) in enumerate(itertools.zip_longest(fused, exact, plain)):
        if x is None or y is None or x.shape != y.shape or x.dtype != z.dtype:
            return f"result {i} of {case}: another number, shape or dtype of results"
        if not y.numel():
            continue
        if not y.is_floating_point():  # slots and times, which do not round
            if not torch.equal(x, y):
                return f"result {i} of {case}: {(x != y).sum()} integers of {y.numel()} differ"
            continue
        greatest, error = max(SMALL, y.abs().max().item()), off(x, y)
        rounding = greatest * (TIGHT if case.wide == torch.float64 else EPSILONS * torch.finfo(x.dtype).eps)
        if not error <= TIMES_PLAIN * off(z, y) + rounding and len(evaluations) == 1:
            others = (nudged(case, drawn, n) for n in range(NUDGED))
            evaluations += [results(reference, drawn, x, **replayed) for x in others]
        spread = max(off(z[i], y) for z in evaluations)
        allowed = TIMES_PLAIN * spread + rounding
        if len(evaluations) > 1 and spread > greatest / NO_DIGIT:
            continue
        if not error <= allowed:
            return (
                f"result {i} of {case}: off by {error:.2g} where it is {greatest:.2g}, {allowed:.2g} allowed"
            )
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, failed = time.time(), 0
    for number in range(arguments.seed, arguments.seed + arguments.cases):
        fault = check(number)
        if fault:
            failed += 1
            print(f"--seed {number} --cases 1: {fault}", flush=True)
    print(f"{arguments.cases} cases, {failed} failed, {time.time() - started:.0f} seconds")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
