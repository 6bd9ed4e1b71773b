"""Random cases of every op against the reference in float64: sizes, options, dtypes, layouts, values, resets, lengths, threads.

    python tests/fuzz.py [--cases 10000] [--seed 0]     as `make fuzz`

Each case is a number; `--seed N --cases 1` runs one again. In float64 a result may be off by rounding alone; in float32 and
half precision by a few times what plain PyTorch is off in the same dtype. Prints what failed, and exits with 1 if anything did.
"""

import argparse
import itertools
import random
import sys
import time

import torch

from mann_fast import ops, reference
from mann_fast.ops._register import OPS
from mann_fast.reference.cell import CONTROLLERS, dnc_head_sizes, head_sizes, ntm_head_sizes

HALF = (torch.bfloat16, torch.float16)
TIGHT = 1e-9  # of the greatest number of a tensor
TIMES_PLAIN = 8  # as far off as plain PyTorch, so often
EPSILONS = 30  # or so many roundings
SMALL = 1e-3  # what is less is measured by this


class Case:
    """What one number draws."""

    def __init__(self, number):
        self.draw = random.Random(number)
        self.noise = torch.Generator("cpu").manual_seed(number)
        draw = self.draw
        self.family = draw.choice(["content", "write", "lrua", "lrua", "ntm", "ntm", "cell", "cell"])
        self.T, self.B = draw.choice([0, 1, 1, 2, 3, 9, 17, 21]), draw.choice([0, 1, 1, 2, 3, 5, 9])
        self.N = draw.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 130])
        self.D = draw.choice([1, 2, 3, 5, 8, 13, 16, 17, 40])
        self.R = draw.randint(1, min(5, self.N))
        self.W, self.reach = draw.randint(0, 3), draw.randint(0, 3)
        self.H = draw.choice([1, 3, 8, 17, 33])
        self.wide = draw.choice([torch.float64, torch.float64, torch.float32])
        # A scan's choice of slots turns on the last bit of usage, so that in less than float64 only ops without one compare.
        # Nor do networks, which amplify rounding and cancel it in few numbers: how far plain PyTorch is off there is luck.
        if self.family == "cell":
            self.wide = torch.float64
        self.half = draw.choice([*HALF, None, None]) if self.wide == torch.float32 else None
        self.scale = draw.choice([1.0, 1.0, 1.0, 1e-3, 30.0])
        self.sharp = draw.choice([0.0, 1.0, 10.0, 40.0])
        self.threads = draw.choice([1, 1, 2, 3])
        self.options = {"eps": draw.choice([1e-6, 1e-6, 1e-3])}
        if self.family == "cell" and draw.random() < 0.5:
            self.family = draw.choice(["ntm_cell", "dnc_cell"])

    def __str__(self):
        names = (
            "family",
            "T",
            "B",
            "N",
            "D",
            "R",
            "W",
            "reach",
            "H",
            "wide",
            "half",
            "scale",
            "sharp",
            "threads",
            "options",
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def normal(self, *sizes, scale=1.0):
        """float64 numbers that the dtype of the case has, laid out in one of many ways."""
        dtype = self.half or self.wide
        x = (torch.randn(sizes, generator=self.noise, dtype=torch.float64) * scale).to(dtype).double()
        return self.laid_out(x)

    def laid_out(self, x):
        kind = self.draw.choice(["plain", "plain", "turned", "sliced"])
        if kind == "turned":
            axes = list(range(x.dim()))
            self.draw.shuffle(axes)
            back = [axes.index(i) for i in range(x.dim())]
            return x.permute(axes).contiguous().permute(back)
        if kind == "sliced":
            larger = torch.full([n + 2 for n in x.shape], torch.nan, dtype=x.dtype)
            return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
        return x

    def state(self, *sizes, scale=1.0):
        x = torch.randn(sizes, generator=self.noise, dtype=torch.float64) * scale
        return self.laid_out(x.to(self.wide).double())

    def shares(self, *sizes, of_state=False):
        x = torch.softmax(torch.randn(sizes, generator=self.noise, dtype=torch.float64), -1)
        return self.laid_out(x.to(self.wide if of_state else self.half or self.wide).double())

    def unit(self, *sizes):
        x = torch.sigmoid(torch.randn(sizes, generator=self.noise, dtype=torch.float64))
        return self.laid_out(x.to(self.half or self.wide).double())

    def usage(self):
        order = [torch.randperm(self.N, generator=self.noise) for _ in range(self.B)]
        return torch.stack(order).double() * 0.375 if order else torch.zeros(0, self.N, dtype=torch.float64)

    def sequences(self):
        given = {}
        if self.draw.random() < 0.5:
            given["resets"] = torch.rand(self.T, self.B, generator=self.noise) < self.draw.choice(
                [0.1, 0.4, 1]
            )
            if self.draw.random() < 0.7:
                given["start"] = self.state(self.N, self.D, scale=self.scale)
        if self.draw.random() < 0.5:
            given["lengths"] = torch.randint(0, self.T + 1, (self.B,), generator=self.noise)
        return given


# Of each family: tensors by name (those of the state first), what must not be differentiated, and how a function of
# mann_fast.ops or mann_fast.reference is called with them.


def content(case):
    tensors = {
        "memory": case.state(case.B, case.N, case.D, scale=case.scale),
        "key": case.normal(case.B, case.R, case.D),
    }
    if case.draw.random() < 0.7:
        tensors["sharpness"] = case.normal(case.B, case.R, scale=case.sharp)
    return tensors, (), lambda of, x: of.content_read(**x, **case.options)


def write(case):
    target = case.draw.choice(["per_head", "shared"])
    tensors = {
        "memory": case.state(case.B, case.N, case.D, scale=case.scale),
        "read_weights": case.shares(case.B, case.R, case.N, of_state=True),
        "usage": case.usage(),
        "write_vector": case.normal(case.B, case.R, case.D),
        "gate_logit": case.normal(case.B, case.R),
    }
    return tensors, ("usage",), lambda of, x: of.lrua_write(**x, write_target=target)


def lrua(case):
    options = {
        **case.options,
        "order": case.draw.choice(["write_first", "read_first"]),
        "write_target": case.draw.choice(["per_head", "shared"]),
        "usage_decay": case.draw.choice([0.95, 0.0, 1.0]),
    }
    if case.wide != torch.float64:
        case.T = min(case.T, 1)
    case.scale = min(case.scale, 1.0)
    steps = (case.T, case.B, case.R)
    tensors = {
        "memory": case.state(case.B, case.N, case.D, scale=case.scale),
        "read_weights": case.shares(case.B, case.R, case.N, of_state=True),
        "usage": case.usage(),
        "keys": case.normal(*steps, case.D),
        "write_vectors": case.normal(*steps, case.D),
        "gate_logits": case.normal(*steps),
    }
    if case.draw.random() < 0.7:
        tensors["sharpness"] = case.normal(*steps, scale=min(case.sharp, 10))
    tensors |= case.sequences()

    def call(of, x):
        x = dict(x)
        state = ops.LRUAState(*(x.pop(name) for name in ("memory", "read_weights", "usage")))
        reads, state = of.lrua_scan(state, **x, **options)
        return reads, *state

    return tensors, ("usage",), call


def ntm(case):
    options = {**case.options, "order": case.draw.choice(["write_first", "read_first"])}
    case.R = case.draw.randint(0 if case.W else 1, case.R)
    case.scale, steps = min(case.scale, 1.0), (case.T, case.B)
    tensors = {"memory": case.state(case.B, case.N, case.D, scale=case.scale)}
    for name, heads in (("read_weights", case.R), ("write_weights", case.W)):
        tensors[name] = case.shares(case.B, heads, case.N, of_state=True)
    for kind, heads in (("read", case.R), ("write", case.W)):
        tensors[f"{kind}.key"] = case.normal(*steps, heads, case.D)
        tensors[f"{kind}.sharpness"] = case.normal(*steps, heads, scale=min(case.sharp, 10)).abs()
        tensors[f"{kind}.gate"] = case.unit(*steps, heads)
        tensors[f"{kind}.shift"] = case.shares(*steps, heads, 2 * case.reach + 1)
        tensors[f"{kind}.sharpening"] = 1 + case.unit(*steps, heads)
    tensors["erase"], tensors["add"] = case.unit(*steps, case.W, case.D), case.normal(*steps, case.W, case.D)
    tensors |= case.sequences()

    def call(of, x):
        x = dict(x)
        state = ops.NTMState(*(x.pop(name) for name in ("memory", "read_weights", "write_weights")))
        heads = [
            ops.NTMHead(*(x.pop(f"{kind}.{name}") for name in ops.NTMHead._fields))
            for kind in ("read", "write")
        ]
        reads, state = of.ntm_scan(state, *heads, **x, **options)
        return reads, *state

    return tensors, (), call


def lrua_of_cell(case):
    vector, sharpness = (
        case.draw.choice(["separate", "key"]),
        case.draw.choice(["learned", "learned", None, 3.0]),
    )
    options = {
        "write_vector": vector,
        "sharpness": sharpness,
        "order": case.draw.choice(["write_first", "read_first"]),
        "write_target": case.draw.choice(["per_head", "shared"]),
        "usage_decay": case.draw.choice([0.95, 0.0, 1.0]),
    }
    rest = {"read_weights": case.shares(case.B, case.R, case.N, of_state=True), "usage": case.usage()}
    return options, head_sizes(case.R, case.D, vector, sharpness), rest


def ntm_of_cell(case):
    max_shift = case.draw.choice([None, case.reach, case.reach])
    options = {"max_shift": max_shift, "order": case.draw.choice(["write_first", "read_first"])}
    names = ("read_weights", "write_weights")
    weights = {name: case.shares(case.B, case.R, case.N, of_state=True) for name in names}
    return options, ntm_head_sizes(case.R, case.D, max_shift), weights


def dnc_of_cell(case):
    link, masks = case.draw.random() < 0.7, case.draw.random() < 0.5
    options = {"masks": masks, "mask_min": case.draw.choice([0.0, 0.2]) if masks else 0.0}
    options |= {"deallocate": case.draw.random() < 0.5, "link_sharpening": link and case.draw.random() < 0.5}
    options["clip"] = case.draw.choice([None, None, 1.0])
    rest = {"usage": case.unit(case.B, case.N), "precedence": None, "links": None}
    if link:
        rest["precedence"] = case.shares(case.B, case.N, of_state=True) / 2
        links = case.shares(case.B, case.N, case.N, of_state=True) / 2
        rest["links"] = links * (1 - torch.eye(case.N, dtype=torch.float64))
    rest["read_weights"] = case.shares(case.B, case.R, case.N, of_state=True) / 2
    rest["write_weights"] = case.shares(case.B, case.N, of_state=True) / 2
    parts = {"link": link, "masks": masks, "link_sharpening": options["link_sharpening"]}
    return options, dnc_head_sizes(case.R, case.D, **parts), rest


def cell(case, op="cell", of_memory=lrua_of_cell, state_of=ops.LRUAState, constant="usage"):
    kind = case.draw.choice(list(CONTROLLERS))
    options, sizes, rest = of_memory(case)
    options |= case.options | {"controller": kind}
    per_unit, names = CONTROLLERS[kind]
    gates, values = per_unit * case.H, sum(sizes)
    tensors = {
        "gates": case.normal(case.T, case.B, gates),
        **{name: case.normal(case.B, case.H) for name in names},
        "memory": case.state(case.B, case.N, case.D, scale=min(case.scale, 1.0)),
        **rest,
        "reads": case.normal(case.B, case.R, case.D),
    }
    if names:
        tensors |= {"hidden_weight": case.normal(gates, case.H, scale=0.3), "hidden_bias": case.normal(gates)}
    tensors |= {
        "reads_weight": case.normal(gates, case.R * case.D, scale=0.3),
        "head_weight": case.normal(values, case.H, scale=0.3),
        "head_bias": case.normal(values),
        **case.sequences(),
    }

    def call(of, x):
        x = dict(x)
        state = tuple(x.pop(name) for name in names)
        memory = state_of(*(x.pop(name) for name in state_of._fields))
        first = {"hidden_weight": None, "hidden_bias": None}
        given = {"state": state, "memory": memory, **first, **x, **options}
        if op == "dnc_cell" and of is reference and case.T:
            given["step"] = in_order(given)
        output, state, memory, reads = getattr(of, op)(**given)
        return [x for x in (output, *state, *memory, reads) if x is not None]

    return tensors, (constant,), call


def ntm_cell(case):
    return cell(case, "ntm_cell", ntm_of_cell, ops.NTMState, None)


def in_order(given):
    """The reference's step with the orders of allocation of the kernel, one step after the other: of usages that nearly agree
    the order turns on their last bit."""
    values = given | dict(zip(("hidden", "cell"), (*given["state"], None, None), strict=False))
    values |= given["memory"]._asdict() | {"controller": list(CONTROLLERS).index(given["controller"])}
    values |= {"clip": given["clip"] or 0.0, "bfloat16": False, "anchor_every": 1}
    if "resets" in given and "start" not in given:
        values["start"] = torch.zeros(values["memory"].shape[1:], dtype=torch.float64)
    with torch.no_grad():
        results = torch.ops.mann_fast.dnc_cell(*(values.get(name) for name in OPS["dnc_cell"].names))
    kept = results[[x.name for x in OPS["dnc_cell"].outputs].index("orders")]
    slots = torch.arange(kept.shape[2])
    ended = (kept.sort(-1)[0] != slots).any(
        -1, keepdim=True
    )  # no order is kept of a sample that takes no part
    orders = iter(torch.where(ended, slots, kept))
    return lambda *told, **options: reference.dnc_step(*told, orders=next(orders), **options)


def dnc_cell(case):
    return cell(case, "dnc_cell", dnc_of_cell, ops.DNCState, "write_weights")


FAMILIES = {
    "content": content,
    "write": write,
    "lrua": lrua,
    "ntm": ntm,
    "cell": cell,
    "ntm_cell": ntm_cell,
    "dnc_cell": dnc_cell,
}
STATE = ("memory", "read_weights", "write_weights", "usage", "precedence", "links", "start")


def results(of, case, tensors, constant, call, dtypes):
    """What comes out, and the gradients of a fixed functional of it, in float64."""
    leaves = {}
    for name, x in tensors.items():
        if x is not None and x.is_floating_point():
            x = x.detach().to(dtypes[0] if name in STATE else dtypes[1]) if dtypes else x.detach().clone()
            x.requires_grad_(name not in constant)
        leaves[name] = x
    outputs = call(of, leaves)
    noise = torch.Generator("cpu").manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=noise, dtype=torch.float64)).sum()
        for x in outputs
        if x.requires_grad
    )
    wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    if not isinstance(loss, torch.Tensor):
        return [*outputs]
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (*outputs, *gradients)]


def check(number):
    """None where the case is right, else what is wrong with it."""
    case = Case(number)
    tensors, constant, call = FAMILIES[case.family](case)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        low = (case.wide, case.half or case.wide)
        fused = results(ops, case, tensors, constant, call, low)
        exact = results(reference, case, tensors, constant, call, None)
        plain = (
            results(reference, case, tensors, constant, call, low) if case.wide != torch.float64 else exact
        )
    finally:
        torch.set_num_threads(before)
    for i, (x, y, z) in enumerate(itertools.zip_longest(fused, exact, plain)):
        if x is None or y is None or x.shape != y.shape:
            return f"result {i} of {case}: another number or shape of results"
        if not y.numel():
            continue
        greatest = max(SMALL, y.abs().max().item())
        error = (x - y).abs().max().item() / greatest
        bound = TIGHT
        if case.wide != torch.float64:
            off = (z - y).abs().max().item() / greatest
            bound = TIMES_PLAIN * off + EPSILONS * torch.finfo(case.half or case.wide).eps
        if not error <= bound:
            return f"result {i} of {case}: off by {error:.2g} of its greatest, {bound:.2g} allowed"
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
