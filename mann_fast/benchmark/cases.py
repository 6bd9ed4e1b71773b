"""What is measured: each op at a size, ours beside what people would use instead, with its counted cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops, reference
from ..layers import MemoryLayer
from ..models import MANN, LSTMClassifier
from ..ops import _backend
from ..ops.lrua import LRUA_SCAN
from . import baselines, cost

DIRECTIONS = ("forward", "forward+backward")
OURS = "mann_fast"
EAGER = "eager reference"
AUTOCAST = "mann_fast, autocast to bfloat16"
BY_STEPS = "mann_fast, a step at a time"
LSTM = "nn.LSTM alone"
MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile
CELLS = ("cell", "ntm_cell", "dnc_cell", "sparse_cell")
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """T steps, B samples, N slots of D numbers, R heads; H hidden units of a training step. The paper's by default."""

    T: int = 50
    B: int = 16
    N: int = 128
    D: int = 40
    R: int = 4
    H: int = 200

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "T=50,B=1" and the like; ValueError for another letter or what is no positive number."""
        known, values = [field.name for field in fields(cls)], {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, value = part.partition("=")
            if name not in known or not value.isdigit() or int(value) < 1:
                raise ValueError(
                    f"--shape takes positive numbers for {', '.join(known)}, such as T=50,B=1; got {part!r}"
                )
            values[name] = int(value)
        return replace(cls(), **values)

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True)
class Case:
    """One op in one direction: its contestants by name, what ours must agree with, and its counted cost."""

    op: str
    direction: str
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    calls: dict[str, Call]
    oracle: Call
    flop: int
    transferred: int


def has(op: str, direction: str) -> bool:
    """Whether an op has this direction: slots have no gradient, and a training step is whole."""
    return {"least_used": DIRECTIONS[0], "mann_step": DIRECTIONS[1]}.get(op, direction) == direction


def takes(op: str, dtype: str) -> bool:
    """Whether an op is measured in a dtype: with a controller in float32 alone, for in half precision rounding decides which
    slots it uses."""
    return dtype == "float32" or op not in (*CELLS, "mann_step")


def cases(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    directions: tuple[str, ...] = DIRECTIONS,
    *,
    device: str | torch.device = "cpu",
    modes: tuple[str, ...] = (),
    jax: bool = False,
) -> Iterator[Case]:
    """The cases of one op, on new random inputs on the device. Also torch.compile in each of the modes, of the step where there
    are several; with ``jax`` also JAX for mann_step.

    Raises ValueError for an unknown op; ImportError where JAX is asked for and absent.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    more = (jax,) if op == "mann_step" else ()
    if modes:
        torch.compiler.reset()  # its limit of recompilations holds for all shapes that came before
    with torch.device(device):
        calls, oracle, wanted, flop, transferred = globals()[f"_{op}"](shape, dtype, modes, *more)
    for direction in directions:
        backward = direction != "forward"
        if not has(op, direction):
            continue
        if op == "mann_step":
            wrapped, checked = calls, oracle
        else:
            wrapped = {name: _wrap(call, wanted, backward) for name, call in calls.items()}
            checked = _wrap(oracle, wanted, backward)
        where = torch.device(device)
        yield Case(
            op, direction, shape, dtype, where, wrapped, checked, flop(backward), transferred(backward)
        )


def _compiled(function, modes: tuple[str, ...], use, name: str = "torch.compile") -> dict[str, Callable]:
    """A contestant for each mode: what ``use`` makes of the compiled function."""

    def contestant(mode: str) -> Callable:
        step = torch.compile(function, mode=mode)

        def call(*arguments):
            torch.compiler.cudagraph_mark_step_begin()  # the graphs of reduce-overhead may reuse the last call's memory
            return use(step, *arguments)

        return call

    return {name if mode == "default" else f"{name} ({mode})": contestant(mode) for mode in modes}


def _wrap(call: Call, wanted: list[Tensor], backward: bool) -> Call:
    if not backward:

        def forward():
            with torch.no_grad():
                return call()

        return forward

    def both():
        output = call()[0]
        return torch.autograd.grad(output, wanted, noise.to(output.dtype))

    with torch.no_grad():
        output = call()[0]
    generator = torch.Generator(output.device).manual_seed(1)  # the same for all contestants
    noise = torch.randn(output.shape, generator=generator, device=output.device)

    return both


def _lrua_inputs(shape: Shape, dtype: torch.dtype, *leading: int):
    """A state as in the middle of a sequence, and the inputs of a step or a scan."""
    wide = dtype if dtype == torch.float64 else torch.float32
    weights = torch.softmax(torch.randn(shape.B, shape.R, shape.N, dtype=wide), 2)
    memory, usage = (
        torch.randn(shape.B, shape.N, shape.D, dtype=wide),
        torch.rand(shape.B, shape.N, dtype=wide),
    )
    heads = (*leading, shape.B, shape.R)
    inputs = [torch.tanh(torch.randn(*heads, shape.D, dtype=dtype)) for _ in range(2)]
    inputs += [torch.randn(heads, dtype=dtype), 1 + 10 * torch.rand(heads, dtype=dtype)]
    return ops.LRUAState(memory, weights, usage), [x.requires_grad_() for x in inputs]


def _content_read(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    (memory, _, _), (key, _, _, sharpness) = _lrua_inputs(shape, dtype)
    calls = {
        OURS: lambda: ops.content_read(memory, key, sharpness),
        EAGER: lambda: reference.content_read(memory, key, sharpness),
    }
    if dtype in (torch.float32, torch.float64):
        # On rows of unit norm a cosine is a dot product: attention with the sharpness as its scale, folded into the keys.
        def attention():
            rows, unit = F.normalize(memory, dim=2), F.normalize(key, dim=2) * sharpness.unsqueeze(2)
            return (F.scaled_dot_product_attention(unit, rows, memory, scale=1.0),)

        calls["scaled_dot_product_attention"] = attention
    calls |= _compiled(reference.content_read, modes, lambda function: function(memory, key, sharpness))
    size = (shape.B, shape.N, shape.D, shape.R)
    return (
        calls, calls[EAGER], [key, sharpness],
        lambda backward: cost.content_read_flop(*size, backward=backward),
        lambda backward: cost.content_read_bytes(*size, backward=backward, item=memory.element_size()),
    )  # fmt: skip


def _least_used(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    usage = _lrua_inputs(shape, dtype)[0].usage
    calls = {
        OURS: lambda: (ops.least_used(usage, shape.R),),
        EAGER: lambda: (reference.least_used(usage, shape.R),),
        "torch.topk": lambda: (torch.topk(usage, shape.R, largest=False).indices,),
    }
    passes = shape.B * shape.N * shape.R
    return (
        calls,
        calls[EAGER],
        [],
        lambda backward: passes,
        lambda backward: 4 * shape.B * shape.N,
    )


def _lrua_write(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    state, (_, vector, gate, _) = _lrua_inputs(shape, dtype)
    calls = {
        OURS: lambda: ops.lrua_write(*state, vector, gate),
        EAGER: lambda: reference.lrua_write(*state, vector, gate),
    }
    calls |= _compiled(reference.lrua_write, modes, lambda function: function(*state, vector, gate))
    size = (shape.B, shape.N, shape.D, shape.R)
    return (
        calls, calls[EAGER], [vector, gate],
        lambda backward: cost.lrua_write_flop(*size, backward=backward),
        lambda backward: cost.lrua_write_bytes(*size, backward=backward, item=state.memory.element_size()),
    )  # fmt: skip


def _lrua_step(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    return _lrua(shape, dtype, modes, ops.lrua_step, reference.lrua_step, None)


def _lrua_scan(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    return _lrua(shape, dtype, modes, ops.lrua_scan, reference.lrua_scan, shape.T)


def _lrua(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...], fused, plain, steps: int | None):
    state, inputs = _lrua_inputs(shape, dtype, *(() if steps is None else (steps,)))
    step = baselines.lrua_step_by_products

    def products(one_step):
        return one_step(state, *inputs)[:1] if steps is None else baselines.scan(one_step, state, *inputs)[:1]

    calls = {OURS: lambda: fused(state, *inputs)[:1], EAGER: lambda: plain(state, *inputs)[:1]}
    if dtype in (torch.float32, torch.float64):
        calls["eager by products"] = lambda: products(step)
        calls |= _compiled(step, modes, products, "torch.compile of the step")

    def oracle():
        """The reference with the slots that the kernel chose: in float32 usages nearly tie within a few steps."""
        if steps is None or (serving := _backend.serving(state.memory.device, LRUA_SCAN)) == "reference":
            return plain(state, *inputs)[:1]
        # By name, for with --base these are the ops of another commit.
        raw = getattr(torch.ops, "mann_fast" if serving == "cpp" else f"mann_fast_{serving}")
        options = (False, False, 0.95, 1e-6, 8)
        # What follows the inputs there: nothing, or resets, lengths and start.
        optional = len(raw.lrua_scan.default._schema.arguments) - len((*state, *inputs, *options))
        with torch.no_grad():
            slots = raw.lrua_scan(*state, *inputs, *(None,) * optional, *options)[4]
        return plain(state, *inputs, slots=slots)[:1]

    size = (1 if steps is None else steps, shape.B, shape.N, shape.D, shape.R)
    return (
        calls, oracle, inputs,
        lambda backward: cost.lrua_scan_flop(*size, backward=backward),
        lambda backward: cost.lrua_scan_bytes(*size, backward=backward, item=state.memory.element_size()),
    )  # fmt: skip


def _ntm_scan(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    """R read heads and one write head."""
    wide = dtype if dtype == torch.float64 else torch.float32

    def head(count: int) -> ops.NTMHead:
        sizes = (shape.T, shape.B, count)
        normal = lambda *more: torch.randn(*sizes, *more, dtype=dtype)  # noqa: E731
        shift = torch.softmax(normal(3), 3)
        return ops.NTMHead(
            normal(shape.D), 1 + 5 * normal().abs(), normal().sigmoid(), shift, 1 + normal().abs()
        )

    weights = [torch.softmax(torch.randn(shape.B, heads, shape.N, dtype=wide), 2) for heads in (shape.R, 1)]
    state = ops.NTMState(torch.randn(shape.B, shape.N, shape.D, dtype=wide), *weights)
    vectors = torch.randn(2, shape.T, shape.B, 1, shape.D, dtype=dtype)
    heads, erase, add = (head(shape.R), head(1)), vectors[0].sigmoid(), vectors[1].clone()
    wanted = [x.requires_grad_() for x in (*heads[0], *heads[1], erase, add)]
    calls = {
        OURS: lambda: ops.ntm_scan(state, *heads, erase, add)[:1],
        EAGER: lambda: reference.ntm_scan(state, *heads, erase, add)[:1],
    }

    def loop(step):
        now, reads = state, []
        for t in range(shape.T):
            at = (ops.NTMHead(*(x[t] for x in part)) for part in heads)
            read, now = step(now, *at, erase[t], add[t])
            reads.append(read)
        return (torch.stack(reads),)

    calls |= _compiled(reference.ntm_step, modes, loop, "torch.compile of the step")
    size = (shape.T, shape.B, shape.N, shape.D, shape.R, 1)
    return (
        calls, calls[EAGER], wanted,
        lambda backward: cost.ntm_scan_flop(*size, backward=backward),
        lambda backward: cost.ntm_scan_bytes(*size, backward=backward, item=state.memory.element_size()),
    )  # fmt: skip


def _dnc_scan(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    """With links, as Graves et al. 2016 have it."""
    wide = dtype if dtype == torch.float64 else torch.float32
    sizes = (shape.T, shape.B)
    normal = lambda *more: torch.randn(*sizes, *more, dtype=dtype)  # noqa: E731
    sharp = lambda *more: 1 + 5 * normal(*more).abs()  # noqa: E731
    unit = lambda *more: normal(*more).sigmoid()  # noqa: E731
    interface = ops.DNCInterface(
        *(normal(shape.R, shape.D), sharp(shape.R), normal(shape.D), sharp(), unit(shape.D), normal(shape.D)),
        *(unit(shape.R), unit(), unit(), torch.softmax(normal(shape.R, 3), 3)),
    )
    state = ops.DNCState.initial(shape.B, shape.N, shape.D, shape.R, dtype=wide)
    state = state._replace(
        memory=torch.randn(shape.B, shape.N, shape.D, dtype=wide),
        usage=torch.rand(shape.B, shape.N, dtype=wide),
    )
    wanted = [x.requires_grad_() for x in interface if x is not None]
    calls = {
        OURS: lambda: ops.dnc_scan(state, interface)[:1],
        EAGER: lambda: reference.dnc_scan(state, interface)[:1],
    }

    def loop(step):
        now, reads = state, []
        for t in range(shape.T):
            read, now = step(now, ops.DNCInterface(*(x if x is None else x[t] for x in interface)))
            reads.append(read)
        return (torch.stack(reads),)

    calls |= _compiled(reference.dnc_step, modes, loop, "torch.compile of the step")
    size = (shape.T, shape.B, shape.N, shape.D, shape.R)
    return (
        calls, calls[EAGER], wanted,
        lambda backward: cost.dnc_scan_flop(*size, backward=backward),
        lambda backward: cost.dnc_scan_bytes(*size, backward=backward, item=state.memory.element_size()),
    )  # fmt: skip


READS = 4  # slots that a head reads with sparse access


def _sparse_scan(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    wide = dtype if dtype == torch.float64 else torch.float32
    normal = lambda *more: torch.randn(shape.T, shape.B, shape.R, *more, dtype=dtype)  # noqa: E731
    reads = min(READS, shape.N)
    state = ops.SparseState.initial(shape.B, shape.N, shape.D, shape.R, reads, dtype=wide)
    state = state._replace(memory=torch.randn(shape.B, shape.N, shape.D, dtype=wide))
    wanted = [normal(shape.D), normal(shape.D), normal(), 5 * normal().abs(), normal()]
    wanted = [x.requires_grad_() for x in wanted]
    calls = {
        OURS: lambda: ops.sparse_scan(state, *wanted)[:1],
        EAGER: lambda: reference.sparse_scan(state, *wanted)[:1],
    }
    size = (shape.T, shape.B, shape.N, shape.D, shape.R, reads)
    return (
        calls, calls[EAGER], wanted,
        lambda backward: cost.sparse_scan_flop(*size, backward=backward),
        lambda backward: cost.sparse_scan_bytes(*size, backward=backward, item=state.memory.element_size()),
    )  # fmt: skip


def _sparse_read(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    (memory, _, _), (key, _, _, sharpness) = _lrua_inputs(shape, dtype)
    reads = min(READS, shape.N)
    calls = {
        OURS: lambda: ops.sparse_read(memory, key, sharpness, num_reads=reads)[:1],
        EAGER: lambda: reference.sparse_read(memory, key, sharpness, num_reads=reads)[:1],
    }
    size = (shape.B, shape.N, shape.D, shape.R)
    return (
        calls, calls[EAGER], [key, sharpness],
        lambda backward: cost.sparse_read_flop(*size, reads, backward=backward),
        lambda backward: memory.element_size() * memory.numel(),
    )  # fmt: skip


def _cell(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    return _layer("lrua", shape, cost.lrua_scan_flop, cost.lrua_scan_bytes)


def _ntm_cell(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    return _layer("ntm", shape, cost.ntm_scan_flop, cost.ntm_scan_bytes, 1)


def _dnc_cell(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    return _layer("dnc", shape, cost.dnc_scan_flop, cost.dnc_scan_bytes)


def _sparse_cell(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...]):
    reads = min(READS, shape.N)
    return _layer("sparse", shape, cost.sparse_scan_flop, cost.sparse_scan_bytes, reads, num_reads=reads)


def _layer(addressing: str, shape: Shape, flop, transferred, *more: int, **options):
    """The layer that goes by a cell, on inputs of D numbers. flop, transferred: of the memory's scan, which takes these sizes
    beside those that all have."""
    sizes = {"num_slots": shape.N, "slot_size": shape.D, "num_heads": shape.R}
    layer = MemoryLayer(shape.D, shape.H, addressing=addressing, **sizes, **options)
    x = torch.randn(shape.T, shape.B, shape.D, requires_grad=True)

    def on_reference():
        with _backend.backend("reference"):
            return layer(x)[:1]

    wanted = [x, *layer.parameters()]
    weights = sum(weight.numel() for weight in wanted[1:] if weight.dim() == 2)
    size = (shape.T, shape.B, shape.N, shape.D, shape.R, *more)
    times = lambda backward: 3 if backward else 1  # noqa: E731 - a product, and the gradient of either factor
    return (
        {OURS: lambda: layer(x)[:1], EAGER: on_reference}, on_reference, wanted,
        lambda backward: flop(*size, backward=backward) + 2 * shape.T * shape.B * weights * times(backward),
        lambda backward: transferred(*size, backward=backward) + x.element_size() * weights * times(backward),
    )  # fmt: skip


INPUTS, CLASSES = 405, 5  # 20 x 20 pixels and five labels


def _mann_step(shape: Shape, dtype: torch.dtype, modes: tuple[str, ...], jax: bool):
    """A whole training step: forward, backward, Adam."""
    x, targets = torch.rand(shape.T, shape.B, INPUTS), torch.randint(CLASSES, (shape.T, shape.B))
    sizes = {"num_slots": shape.N, "slot_size": shape.D, "num_heads": shape.R}

    def on_reference(model, x):
        with _backend.backend("reference"):
            return model(x)[0]

    functions = {
        OURS: lambda model, x: model(x)[0],
        BY_STEPS: lambda model, x: baselines.mann_by_steps(model, x, baselines.fused_cell_step),
        EAGER: on_reference,
        "eager by products": baselines.mann_by_steps,
    }
    functions |= _compiled(
        baselines.cell_step,
        modes,
        lambda step, model, x: baselines.mann_by_steps(model, x, step),
        "torch.compile of the step",
    )

    def training_step(function, make):
        torch.manual_seed(0)  # the same parameters for all
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=x.is_cuda)  # by a CUDA graph

        def run():
            optimizer.zero_grad()
            loss = F.cross_entropy(function(model, x).flatten(0, 1), targets.flatten())
            loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            return (loss.detach(), *gradients)

        return run

    def mann():
        return MANN(INPUTS, CLASSES, shape.H, **sizes)

    def rounded(model, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return model(x)[0].float()

    if dtype == torch.float32 and x.device.type == "cpu":
        functions[AUTOCAST] = rounded
    calls = {name: training_step(function, mann) for name, function in functions.items()}
    if jax:
        from .jax_baseline import training_step as jax_training_step

        torch.manual_seed(0)
        calls["JAX jit of lax.scan"] = jax_training_step(mann(), x, targets)
    calls[LSTM] = training_step(
        lambda model, x: model(x)[0], lambda: LSTMClassifier(INPUTS, CLASSES, shape.H)
    )
    flop = cost.mann_step_flop(shape.T, shape.B, INPUTS, shape.H, CLASSES, shape.N, shape.D, shape.R)
    return calls, training_step(on_reference, mann), [], lambda backward: flop, lambda backward: 0


# The public ops that have a case here, and a whole training step.
OPS = (*(name for name in ops.__all__ if callable(globals().get(f"_{name}"))), "mann_step")
