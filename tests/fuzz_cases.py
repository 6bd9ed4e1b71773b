"""What the cases of fuzz.py are drawn from: for each family of ops its tensors and options."""

import itertools
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from mann_fast import ops, reference
from mann_fast.ops._register import OPS
from mann_fast.ops._sequences import raw_sequences
from mann_fast.reference.cell import (
    CONTROLLERS,
    dnc_head_sizes,
    head_sizes,
    ntm_head_sizes,
    sparse_head_sizes,
)

HALF = (torch.bfloat16, torch.float16)


class Chosen(NamedTuple):
    """What an op chooses by usage, or by another number of each slot, the least first. of(tensors): its choices, as the
    reference takes them to replay. place, name: the function of the reference that is given both, step by step, and
    usage_and_choice(arguments) what they are there. ended: bool [T, B], the steps after a sample's end, where nothing is
    chosen, or None."""

    of: Callable[..., dict[str, torch.Tensor]]
    place: Any
    name: str
    usage_and_choice: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    ended: torch.Tensor | None

    @contextmanager
    def watched(self):
        """By how much a slot's usage exceeds that of one which should come after it, of each step while this lasts."""
        right, out_of_order = getattr(self.place, self.name), []
        steps = itertools.cycle(range(0 if self.ended is None else len(self.ended)))

        def watch(*arguments, **options):
            usage, chosen = (x.detach() for x in self.usage_and_choice(*arguments, **options))
            taken = torch.zeros_like(usage, dtype=torch.bool).scatter(-1, chosen, True)
            ordered = usage.gather(-1, chosen)
            rest = usage.masked_fill(taken, torch.inf).amin(-1, keepdim=True)
            fall = (ordered - torch.cat([ordered[..., 1:], rest], -1)).flatten(1).amax(1)
            if self.ended is not None:
                fall = fall[~self.ended[next(steps)]]
            out_of_order.extend(fall.tolist())
            return right(*arguments, **options)

        with mock.patch.object(self.place, self.name, watch):
            yield out_of_order


def orders_of_allocation(choices, ended):
    return Chosen(choices, reference.dnc, "allocation", lambda usage, order: (usage, order), ended)


class Drawn(NamedTuple):
    """tensors by name, each in its own dtype; constant: names of those that are not differentiated; call(of, tensors): what a
    function of mann_fast.ops or mann_fast.reference gives for them."""

    tensors: dict[str, torch.Tensor]
    constant: tuple[str, ...]
    call: Callable[..., Any]
    chosen: Chosen | None = None


class Case:
    """What one number draws."""

    def __init__(self, number):
        self.draw = random.Random(number)
        self.noise = torch.Generator("cpu").manual_seed(number)
        draw = self.draw
        self.family = draw.choice([*FAMILIES])
        self.T, self.B = draw.choice([0, 1, 1, 2, 3, 9, 17, 21]), draw.choice([0, 1, 1, 2, 3, 5, 9])
        self.N = draw.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 130])
        self.D = draw.choice([1, 2, 3, 5, 8, 13, 16, 17, 40])
        self.R = draw.randint(1, min(5, self.N))
        self.W, self.reach = draw.randint(0, 3), draw.randint(0, 3)
        self.H = draw.choice([1, 3, 8, 17, 33])
        self.wide = draw.choice([torch.float64, torch.float64, torch.float32])
        self.half = draw.choice([*HALF, None, None]) if self.wide == torch.float32 else None
        self.scale = draw.choice([1.0, 1.0, 1.0, 1e-3, 30.0])
        self.sharp = draw.choice([0.0, 1.0, 10.0, 40.0])
        self.threads = draw.choice([1, 1, 2, 3])
        self.one_step = draw.random() < 0.2  # by the op of one step
        self.begun = draw.random() < 0.2  # from the start of a sequence, where all slots are equal
        self.extreme = draw.random() < 0.2  # zero vectors, gates of 0 and 1, shares that are all one's
        self.options = {"eps": draw.choice([1e-6, 1e-6, 1e-3])}

    def __str__(self):
        return ", ".join(f"{name}={x}" for name, x in vars(self).items() if name not in ("draw", "noise"))

    def laid_out(self, x, dtype):
        x = x.to(dtype)
        kind = self.draw.choice(["plain", "plain", "turned", "sliced", "repeated"])
        if kind == "turned":
            axes = list(range(x.dim()))
            self.draw.shuffle(axes)
            back = [axes.index(i) for i in range(x.dim())]
            return x.permute(axes).contiguous().permute(back)
        if kind == "sliced":
            larger = torch.full([n + 2 for n in x.shape], torch.nan, dtype=dtype)
            return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
        if kind == "repeated" and x.numel():
            return x[:1].expand(x.shape)
        return x

    def random(self, *sizes):
        return torch.randn(sizes, generator=self.noise, dtype=torch.float64)

    def normal(self, *sizes, scale=1.0, of_state=False):
        x = self.random(*sizes) * scale
        if self.extreme and x.dim() > 1:
            x = x * (torch.rand(*sizes[:-1], 1, generator=self.noise) < 0.8)
        return self.laid_out(x, self.wide if of_state else self.half or self.wide)

    def shares(self, *sizes, of_state=False):
        x = torch.softmax(self.random(*sizes) * (1e5 if self.extreme else 1), -1)
        return self.laid_out(x, self.wide if of_state else self.half or self.wide)

    def unit(self, *sizes, of_state=False):
        x = torch.sigmoid(self.random(*sizes) * (1e5 if self.extreme else 1))
        return self.laid_out(x, self.wide if of_state else self.half or self.wide)

    def memory(self):
        return self.normal(self.B, self.N, self.D, scale=min(self.scale, 1.0), of_state=True)

    def read_slots(self, num_reads):
        order = torch.rand(self.B, self.R, self.N, generator=self.noise).argsort(2)
        return order[:, :, :num_reads].contiguous()

    def usage(self):
        """Numbers far enough from each other that rounding does not change their order."""
        order = [torch.randperm(self.N, generator=self.noise) for _ in range(self.B)]
        usage = torch.stack(order) * 0.375 if order else torch.zeros(0, self.N)
        return usage.to(self.wide)

    def state(self, kind, initial, **drawn):
        """Tensors of a state, as drawn or as at the start of a sequence."""
        if self.begun:
            start = zip(kind._fields, kind.initial(*initial, dtype=self.wide), strict=True)
            drawn = {name: x for name, x in start if name in drawn}
        return drawn

    def sequences(self):
        given = {}
        if self.draw.random() < 0.5:
            given["resets"] = torch.rand(self.T, self.B, generator=self.noise) < self.draw.choice(
                [0.1, 0.4, 1]
            )
            if self.draw.random() < 0.7:
                given["start"] = self.memory()[0] if self.B else torch.zeros(self.N, self.D, dtype=self.wide)
        if self.draw.random() < 0.5:
            given["lengths"] = torch.randint(0, self.T + 1, (self.B,), generator=self.noise)
        return given

    def ended(self, tensors):
        if "lengths" not in tensors:
            return None
        return torch.arange(self.T).unsqueeze(1) >= tensors["lengths"]

    def within(self, tensors, chosen):
        """What an op chose at each step, but for those after the end of a sample, where it writes nothing."""
        ended = self.ended(tensors)
        return chosen if ended is None else chosen.masked_fill(ended.unsqueeze(2), 0)

    def steps(self):
        """The sizes before those of a step's tensors, and what a scan is told of its sequences; of one step neither."""
        if self.one_step:
            return (self.B,), {}
        return (self.T, self.B), self.sequences()


def taken(tensors, kind, prefix=""):
    """The tensors of a named tuple, out of a dictionary that has them under these names."""
    return kind(*(tensors.pop(prefix + name, None) for name in kind._fields))


def content(case):
    tensors = {
        "memory": case.normal(case.B, case.N, case.D, scale=case.scale, of_state=True),
        "key": case.normal(case.B, case.R, case.D),
    }
    if case.draw.random() < 0.7:
        tensors["sharpness"] = case.normal(case.B, case.R, scale=case.sharp)
    return Drawn(tensors, (), lambda of, x: of.content_read(**x, **case.options))


def least_used(case):
    """Usages of which many are equal, or none; both zeros, infinite and NaN."""
    usage = case.random(case.B, case.N)
    if case.draw.random() < 0.5:
        usage = (2 * usage).round() / 2
    if case.extreme:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=torch.float64)
        which = torch.randint(0, 20, usage.shape, generator=case.noise)
        usage = torch.where(which < len(odd), odd[which.clamp_max(len(odd) - 1)], usage)
    n = case.draw.randint(0, case.N)
    tensors = {"usage": case.laid_out(usage, case.wide)}
    return Drawn(tensors, ("usage",), lambda of, x: (of.least_used(x["usage"], n),))


def write(case):
    target = case.draw.choice(["per_head", "shared"])
    tensors = {
        "memory": case.normal(case.B, case.N, case.D, scale=case.scale, of_state=True),
        "read_weights": case.shares(case.B, case.R, case.N, of_state=True),
        "usage": case.usage(),
        "write_vector": case.normal(case.B, case.R, case.D),
        "gate_logit": case.normal(case.B, case.R),
    }
    return Drawn(tensors, ("usage",), lambda of, x: of.lrua_write(**x, write_target=target))


def lrua(case):
    options = {
        **case.options,
        "order": case.draw.choice(["write_first", "read_first"]),
        "write_target": case.draw.choice(["per_head", "shared"]),
        "usage_decay": case.draw.choice([0.95, 0.0, 1.0]),
    }
    steps, sequences = case.steps()
    heads = (*steps, case.R)
    tensors = case.state(
        ops.LRUAState,
        (case.B, case.N, case.D, case.R),
        memory=case.memory(),
        read_weights=case.shares(case.B, case.R, case.N, of_state=True),
        usage=case.usage(),
    )
    told = [case.normal(*heads, case.D), case.normal(*heads, case.D), case.normal(*heads)]
    if case.draw.random() < 0.7:
        told.append(case.normal(*heads, scale=min(case.sharp, 10)))
    names = ("keys", "write_vectors", "gate_logits", "sharpness")
    tensors |= dict(zip(names, told, strict=False)) | sequences

    def call(of, x, **replayed):
        x = dict(x)
        state = taken(x, ops.LRUAState)
        inputs = [x.pop(name, None) for name in names]
        step_or_scan = of.lrua_step if case.one_step else of.lrua_scan
        reads, state = step_or_scan(state, *inputs, **x, **options, **replayed)
        return reads, *state

    def choices(x):
        raw = [x.get(name) for name in (*ops.LRUAState._fields, *names)]
        raw += raw_sequences(x["memory"], case.T, *(x.get(name) for name in ("resets", "lengths", "start")))
        flags = (options["order"] == "read_first", options["write_target"] == "shared")
        raw += [*flags, options["usage_decay"], options["eps"], 8]
        return {"slots": case.within(x, torch.ops.mann_fast.lrua_scan(*raw)[4])}

    chosen = Chosen(
        choices,
        reference.lrua,
        "lrua_step",
        lambda state, *inputs, slots, **options: (state.usage, slots),
        case.ended(tensors),
    )
    return Drawn(tensors, ("usage",), call, None if case.one_step else chosen)


def ntm_head(case, steps, heads):
    return ops.NTMHead(
        case.normal(*steps, heads, case.D),
        case.normal(*steps, heads, scale=min(case.sharp, 10)).abs(),
        case.unit(*steps, heads),
        case.shares(*steps, heads, 2 * case.reach + 1),
        1 + case.unit(*steps, heads),
    )


def named(prefix, values):
    return {prefix + name: x for name, x in zip(type(values)._fields, values, strict=True) if x is not None}


def address(case):
    tensors = {
        "memory": case.normal(case.B, case.N, case.D, scale=case.scale, of_state=True),
        "previous": case.shares(case.B, case.R, case.N, of_state=True),
        **named("", ntm_head(case, (case.B,), case.R)),
    }

    def call(of, x):
        x = dict(x)
        return (of.ntm_address(x.pop("memory"), taken(x, ops.NTMHead), **x, **case.options),)

    return Drawn(tensors, (), call)


def ntm(case):
    options = {**case.options, "order": case.draw.choice(["write_first", "read_first"])}
    case.R = case.draw.randint(0 if case.W else 1, case.R)
    steps, sequences = case.steps()
    tensors = case.state(
        ops.NTMState,
        (case.B, case.N, case.D, case.R, case.W),
        memory=case.memory(),
        read_weights=case.shares(case.B, case.R, case.N, of_state=True),
        write_weights=case.shares(case.B, case.W, case.N, of_state=True),
    )
    tensors |= named("read.", ntm_head(case, steps, case.R)) | named("write.", ntm_head(case, steps, case.W))
    tensors["erase"], tensors["add"] = case.unit(*steps, case.W, case.D), case.normal(*steps, case.W, case.D)
    tensors |= sequences

    def call(of, x):
        x = dict(x)
        state = taken(x, ops.NTMState)
        heads = [taken(x, ops.NTMHead, kind) for kind in ("read.", "write.")]
        reads, state = (of.ntm_step if case.one_step else of.ntm_scan)(state, *heads, **x, **options)
        return reads, *state

    return Drawn(tensors, (), call)


def dnc(case):
    options = {**case.options, "deallocate": case.draw.random() < 0.5}
    link, masks, sharpened = (case.draw.random() < share for share in (0.7, 0.5, 0.5))
    steps, sequences = case.steps()
    if link:
        ahead = case.shares(case.B, case.N, case.N, of_state=True)
        links = {
            "links": ahead * (1 - torch.eye(case.N, dtype=case.wide)),
            "precedence": case.shares(case.B, case.N, of_state=True),
        }
    tensors = case.state(
        ops.DNCState,
        (case.B, case.N, case.D, case.R),
        memory=case.memory(),
        usage=case.unit(case.B, case.N, of_state=True),
        read_weights=case.shares(case.B, case.R, case.N, of_state=True),
        write_weights=case.shares(case.B, case.N, of_state=True),
        **links if link else {},
    )
    heads, few = (*steps, case.R), min(case.sharp, 10)
    interface = ops.DNCInterface(
        read_keys=case.normal(*heads, case.D),
        read_sharpness=1 + case.normal(*heads, scale=few).abs(),
        write_key=case.normal(*steps, case.D),
        write_sharpness=1 + case.normal(*steps, scale=few).abs(),
        erase=case.unit(*steps, case.D),
        write_vector=case.normal(*steps, case.D),
        free_gates=case.unit(*heads),
        allocation_gate=case.unit(*steps),
        write_gate=case.unit(*steps),
        read_modes=case.shares(*heads, 3) if link else None,
        read_masks=case.unit(*heads, case.D) if masks else None,
        write_mask=case.unit(*steps, case.D) if masks else None,
        link_sharpening=1 + case.unit(*heads, 2) if link and sharpened else None,
    )
    tensors |= named("", interface) | {"written": tensors.pop("write_weights")} | sequences
    tensors = {name: x for name, x in tensors.items() if x is not None}

    def call(of, x, **replayed):
        x = dict(x)
        x["write_weights"] = x.pop("written")
        state, told = taken(x, ops.DNCState), taken(x, ops.DNCInterface)
        step_or_scan = of.dnc_step if case.one_step else of.dnc_scan
        reads, state = step_or_scan(state, told, **x, **options, **replayed)
        return reads, *(x for x in state if x is not None)

    def choices(x):
        x = dict(x)
        x["write_weights"] = x.pop("written")
        state, told = taken(x, ops.DNCState), taken(x, ops.DNCInterface)
        if case.one_step:
            told = [y if y is None else y.unsqueeze(0) for y in told]
        given = [x.get(name) for name in ("resets", "lengths", "start")]
        raw = raw_sequences(state.memory, 1 if case.one_step else case.T, *given, value=0.0)
        raw = [*state, *told, *raw, options["deallocate"], options["eps"], 1]
        orders = case.within(x, torch.ops.mann_fast.dnc_scan(*raw)[9])
        return {"orders": orders[0] if case.one_step else orders}

    return Drawn(tensors, ("written",), call, orders_of_allocation(choices, case.ended(tensors)))


def by_cosine(choices, ended):
    def far_and_read(memory, key, sharpness, num_reads, eps, slots):
        return -reference.sparse.cosine_of(memory.unsqueeze(1), key, eps), slots

    return Chosen(choices, reference.sparse, "_read", far_and_read, ended)


def sparse_read(case):
    num_reads = case.draw.randint(1, min(case.N, 9))
    tensors = {
        "memory": case.normal(case.B, case.N, case.D, scale=case.scale, of_state=True),
        "key": case.normal(case.B, case.R, case.D),
    }
    if case.draw.random() < 0.7:
        tensors["sharpness"] = case.normal(case.B, case.R, scale=min(case.sharp, 10))

    def call(of, x, **replayed):
        return of.sparse_read(**x, num_reads=num_reads, **case.options, **replayed)

    def choices(x):
        given = (x["memory"], x["key"], x.get("sharpness"))
        raw = torch.ops.mann_fast.sparse_read(*given, case.N, num_reads, case.options["eps"])
        return {"slots": raw[1]}

    return Drawn(tensors, (), call, by_cosine(choices, None))


def sparse(case):
    # No threshold is a sum of equal shares, which might fall on either side of it.
    options = {**case.options, "threshold": case.draw.choice([0.005, 0.0, 0.37])}
    num_reads = case.draw.randint(1, min(case.N, 9))
    steps, sequences = case.steps()
    heads = (*steps, case.R)
    tensors = case.state(
        ops.SparseState,
        (case.B, case.N, case.D, case.R, num_reads),
        memory=case.memory(),
        read_slots=case.read_slots(num_reads),
        read_weights=case.shares(case.B, case.R, num_reads, of_state=True),
        last_access=torch.randint(-1, 5, (case.B, case.N), generator=case.noise),
        clock=torch.full((case.B,), 4),
    )
    told = {
        "keys": case.normal(*heads, case.D),
        "write_vectors": case.normal(*heads, case.D),
        "gate_logits": case.normal(*heads),
    }
    if case.draw.random() < 0.7:
        told["sharpness"] = case.normal(*heads, scale=min(case.sharp, 10))
    if case.draw.random() < 0.7:
        told["write_gate_logits"] = case.normal(*heads)
    tensors |= told | sequences
    names = ("keys", "write_vectors", "gate_logits", "sharpness", "write_gate_logits")

    def call(of, x, slots=None):
        x = dict(x)
        state = taken(x, ops.SparseState)
        inputs = [x.pop(name, None) for name in names]
        if slots is not None:  # those read; which are the oldest, the reference finds in the integers
            x["slots"] = (None if case.one_step else [None] * case.T, slots)
        reads, state = (of.sparse_step if case.one_step else of.sparse_scan)(state, *inputs, **x, **options)
        return reads, *state

    def choices(x):
        state, told = taken(dict(x), ops.SparseState), [x.get(name) for name in names]
        if case.one_step:
            told = [y if y is None else y.unsqueeze(0) for y in told]
        given = [x.get(name) for name in ("resets", "lengths", "start")]
        raw = [*state, *told, *raw_sequences(state.memory, 1 if case.one_step else case.T, *given)]
        slots = torch.ops.mann_fast.sparse_scan(*raw, case.N, options["threshold"], options["eps"], 1)[7]
        ended = case.ended(x)
        slots = slots if ended is None else slots.masked_fill(ended[:, :, None, None], 0)
        return {"slots": slots[0] if case.one_step else slots}

    return Drawn(tensors, (), call, by_cosine(choices, case.ended(tensors)))


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
    if case.wide != torch.float64:
        case.T = min(case.T, 1)  # for the reference cannot be told what slots to choose
    return options, head_sizes(case.R, case.D, vector, sharpness), {"usage": case.usage()}


def ntm_of_cell(case):
    max_shift = case.draw.choice([None, case.reach, case.reach])
    options = {"max_shift": max_shift, "order": case.draw.choice(["write_first", "read_first"])}
    weights = {"write_weights": case.shares(case.B, case.R, case.N, of_state=True)}
    return options, ntm_head_sizes(case.R, case.D, max_shift), weights


def cell(case, op="cell", of_memory=lrua_of_cell, state_of=ops.LRUAState, constant=("usage",)):
    kind = case.draw.choice(list(CONTROLLERS))
    options, sizes, rest = of_memory(case)
    options |= case.options | {"controller": kind}
    per_unit, names = CONTROLLERS[kind]
    gates, values = per_unit * case.H, sum(sizes)
    heads = (case.R, case.R) if state_of is ops.NTMState else (case.R,)
    if state_of is ops.SparseState:
        heads += (rest["read_slots"].shape[2],)
    rest.setdefault("read_weights", case.shares(case.B, case.R, case.N, of_state=True))
    tensors = {
        "gates": case.normal(case.T, case.B, gates),
        **{name: case.normal(case.B, case.H) for name in names},
        **case.state(
            state_of,
            (case.B, case.N, case.D, *heads),
            memory=case.memory(),
            **rest,
        ),
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

    def call(of, x, orders=None, slots=None):
        x = dict(x)
        state = tuple(x.pop(name) for name in names)
        memory = taken(x, state_of)
        given = {"hidden_weight": None, "hidden_bias": None, **x, **options}
        if orders is not None:
            steps = iter(orders)
            given["step"] = lambda *told, **given: of.dnc_step(*told, orders=next(steps), **given)
        if slots is not None:
            steps = iter(slots)
            given["step"] = lambda *told, **given: of.sparse_step(*told, slots=(None, next(steps)), **given)
        output, state, memory, reads = getattr(of, op)(state=state, memory=memory, **given)
        return [x for x in (output, *state, *memory, reads) if x is not None]

    def choices(x):
        x = {name: y.to(case.wide) if y.is_floating_point() else y for name, y in x.items()}
        given = (x.get(name) for name in ("resets", "lengths", "start"))
        start = {"value": 0.0} if op == "dnc_cell" else {}
        sequences = raw_sequences(x["memory"], case.T, *given, **start)
        of_op = OPS[op]
        values = {option.name: option.default for option in of_op.options} | x | options
        values |= dict(zip(("resets", "lengths", "start"), sequences, strict=True))
        values |= {"controller": list(CONTROLLERS).index(kind), "num_slots": case.N}
        values |= {"bfloat16": case.half == torch.bfloat16, "anchor_every": 1}
        values["clip"] = values.get("clip") or 0.0
        results = getattr(torch.ops.mann_fast, op)(*(values.get(name) for name in of_op.names))
        results = dict(zip((x.name for x in of_op.outputs), results, strict=True))
        if op == "dnc_cell":
            return {"orders": case.within(x, results["orders"])}
        ended, slots = case.ended(x), results["slot_history"]
        return {"slots": slots if ended is None else slots.masked_fill(ended[:, :, None, None], 0)}

    chosen = {"dnc_cell": orders_of_allocation, "sparse_cell": by_cosine}.get(op)
    return Drawn(tensors, constant, call, chosen(choices, case.ended(tensors)) if chosen else None)


def ntm_cell(case):
    return cell(case, "ntm_cell", ntm_of_cell, ops.NTMState, ())


def dnc_of_cell(case):
    link, masks = case.draw.random() < 0.7, case.draw.random() < 0.5
    options = {"masks": masks, "mask_min": case.draw.choice([0.0, 0.2]) if masks else 0.0}
    options |= {"deallocate": case.draw.random() < 0.5, "link_sharpening": link and case.draw.random() < 0.5}
    options["clip"] = case.draw.choice([None, None, 1.0])
    rest = {"usage": case.unit(case.B, case.N, of_state=True)}
    if link:
        ahead = case.shares(case.B, case.N, case.N, of_state=True) / 2
        rest["links"] = ahead * (1 - torch.eye(case.N, dtype=case.wide))
        rest["precedence"] = case.shares(case.B, case.N, of_state=True) / 2
    rest["write_weights"] = case.shares(case.B, case.N, of_state=True) / 2
    parts = {"link": link, "masks": masks, "link_sharpening": options["link_sharpening"]}
    return options, dnc_head_sizes(case.R, case.D, **parts), rest


def dnc_cell(case):
    case.wide, case.half = torch.float64, None  # in less its choices are not compared yet
    return cell(case, "dnc_cell", dnc_of_cell, ops.DNCState, ("write_weights",))


def sparse_of_cell(case):
    num_reads = case.draw.randint(1, min(case.N, 9))
    rest = {
        "read_slots": case.read_slots(num_reads),
        "read_weights": case.shares(case.B, case.R, num_reads, of_state=True),
        "last_access": torch.randint(-1, 5, (case.B, case.N), generator=case.noise),
        "clock": torch.full((case.B,), 4),
    }
    # No threshold is a sum of equal shares, which might fall on either side of it.
    options = {"threshold": case.draw.choice([0.005, 0.0, 0.37])}
    return options, sparse_head_sizes(case.R, case.D), rest


def sparse_cell(case):
    case.wide, case.half = torch.float64, None  # in less its choices are not compared yet
    return cell(case, "sparse_cell", sparse_of_cell, ops.SparseState, ())


FAMILIES = {
    "least_used": least_used,
    "content": content,
    "write": write,
    "lrua": lrua,
    "address": address,
    "ntm": ntm,
    "dnc": dnc,
    "sparse_read": sparse_read,
    "sparse": sparse,
    "cell": cell,
    "ntm_cell": ntm_cell,
    "dnc_cell": dnc_cell,
    "sparse_cell": sparse_cell,
}
