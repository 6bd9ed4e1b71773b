"""What every op promises, whatever it computes, from its declaration: a new op inherits all of this.

The raw ops are called as torch.export, vmap or a compiled graph call them, past the public functions; the right value is
that of a plain call, or of a loop of plain calls, which the files per op compare with the reference. All is in float64.
"""

import itertools

import pytest
import torch
from cases import BACKEND, RAW_OPS, implemented, needs_cpp, needs_kernels, worst_error
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mann_fast import ops, reference
from mann_fast.ops._cell import NUMBERS
from mann_fast.ops._declare import fixed_sizes, sizes_of
from mann_fast.ops._register import OPS
from mann_fast.reference.cell import (
    CONTROLLERS,
    dnc_head_sizes,
    head_sizes,
    ntm_head_sizes,
    sparse_head_sizes,
)

pytestmark = needs_kernels

SIZES = {
    "T": 5,
    "B": 2,
    "N": 7,
    "D": 5,
    "R": 3,
    "K": 2,
    "W": 1,
    "R+W": 3,
    "2R": 6,
    "2S+1": 3,
    "H": 4,
    "RD": 15,
}


def heads_of_cell(r, d, v):
    return head_sizes(
        r, d, "separate" if v["separate_vector"] else "key", "learned" if v["learned_sharpness"] else None
    )


def heads_of_dnc(r, d, v):
    options = {name: v[name] for name in ("masks", "link_sharpening")}
    return dnc_head_sizes(r, d, link=v["links"] is not None, **options)


# What the heads of a whole network have numbers for, by the op's values.
HEADS = {
    "cell": heads_of_cell,
    "ntm_cell": lambda r, d, v: ntm_head_sizes(r, d, None if v["max_shift"] < 0 else v["max_shift"]),
    "dnc_cell": heads_of_dnc,
    "sparse_cell": lambda r, d, v: sparse_head_sizes(r, d),
}
TIGHT = 1e-11
MAPPED = 3  # size of the axis that vmap maps over


ALL = [name for name in OPS if implemented(name)]
DIFFERENTIABLE = [name for name in ALL if OPS[name].saved]
every_op = pytest.mark.parametrize("op", [OPS[name] for name in ALL], ids=ALL)
every_gradient = pytest.mark.parametrize("op", [OPS[name] for name in DIFFERENTIABLE], ids=DIFFERENTIABLE)


def sizes_for(op, **values):
    """Of every axis, with these values of the raw op, by name; else there is every tensor, and an option has its default."""
    values = {x.name: getattr(x, "default", ...) for x in (*op.arguments, *op.options)} | values
    sizes = SIZES | fixed_sizes(axis for a in op.arguments for axis in a.names)
    if op.name in HEADS:
        sizes["heads"] = sum(HEADS[op.name](sizes["R"], sizes["D"], values))
        per_unit = {NUMBERS[name]: count for name, (count, _) in CONTROLLERS.items()}
        sizes["G"] = per_unit[values["controller"]] * sizes["H"]
    return sizes


def draw(argument, sizes, steps=True, dtype=torch.float64):
    x = torch.randn([sizes[name] for name in (argument.names if steps else argument.step_names)], dtype=dtype)
    if argument.within == "flags":
        return x > 0.5
    if argument.within == "slots":
        return torch.rand(*x.shape[:-1], sizes["N"]).argsort(-1)[..., : x.shape[-1]]
    if argument.within == "times":
        return torch.randint(-1, 4, x.shape)
    if argument.within == "now":
        return torch.randint(3, 6, x.shape)
    if argument.within == "up to T":
        return torch.randint(0, (sizes["T"] if steps else 1) + 1, x.shape)
    if argument.within == "unit":
        return torch.sigmoid(x)
    if argument.within == "shares":
        return torch.softmax(x, -1)
    if argument.within == "from 1":
        return 1 + x.square()
    return x


def sample(op, *, steps=True, dtype=torch.float64, half=None, without=(), options=None, keep=0, **sizes):
    """Values of a raw op. half: of what may be half precision; without: arguments that do not come; keep: anchor_every."""
    options = {"anchor_every": keep, "num_slots": SIZES["N"], **(options or {})}
    options = {x.name: options.get(x.name, x.default) for x in op.options}
    sizes = {**sizes_for(op, **options, **dict.fromkeys(without)), **sizes}
    chosen = {}
    for argument in op.arguments:
        kind = half if half and (argument.half or chosen.get(argument.like) == half) else dtype
        chosen[argument.name] = kind
    values = [None if a.name in without else draw(a, sizes, steps, chosen[a.name]) for a in op.arguments]
    return [*values, *options.values()]


def raw(op):
    return getattr(RAW_OPS, op.name).default


def public_outputs(op, results):
    """Those that carry a gradient."""
    results = (results,) if isinstance(results, torch.Tensor) else results
    return [x for x, output in zip(results, op.outputs, strict=True) if output in op.outer and x.numel()]


def differentiable(op, values):
    return [i for i, a in enumerate(op.arguments) if a.differentiable and values[i] is not None]


def function_of(op, values):
    """One number per sample and output of the differentiable arguments, and these."""
    places = differentiable(op, values)

    def function(*tensors):
        given = list(values)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        return sum((x.square() * (1 + k)).sum() for k, x in enumerate(public_outputs(op, raw(op)(*given))))

    return function, tuple(values[i] for i in places)


def plain_gradient(op, values):
    function, tensors = function_of(op, values)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_close(actual, expected, tolerance=TIGHT):
    """The worst element, of tensors that may have no batch."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape and worst_error(x.reshape(1, -1), y.reshape(1, -1)) < tolerance


def variants(op):
    """Values over every choice, odd sizes, empty axes, strided and expanded tensors, and half precision."""
    flags = [option.name for option in op.options if option.type == "bool" and option.name != "bfloat16"]
    keep = 2 if op.interval else 0
    of_flags = list(itertools.product((False, True), repeat=len(flags)))
    if op.name in HEADS:  # each takes seconds, and what all of them change, some of them does
        of_flags = of_flags[:: max(len(of_flags) - 1, 1)]
    for choice in of_flags:
        for kept in {0, keep}:
            yield sample(op, keep=kept, options=dict(zip(flags, choice, strict=True)))
    yield sample(op, keep=keep, B=0)
    if any("T" in a.names for a in op.arguments):
        yield sample(op, keep=keep, T=1)
    if any(a.step_names != a.names for a in op.arguments):
        yield sample(op, steps=False, keep=keep)
    optional = [a.name for a in op.arguments if a.optional]
    if op.name in HEADS:
        of_lstm = ("cell",)
        recurrent = (*of_lstm, "hidden", "hidden_weight", "hidden_bias")
        yield sample(op, without=of_lstm, keep=keep, options={"controller": NUMBERS["gru"]})
        yield sample(op, without=recurrent, keep=keep, options={"controller": NUMBERS["feedforward"]})
        yield sample(op, without=optional, keep=keep, options={"controller": NUMBERS["feedforward"]})
    else:
        if optional:
            yield sample(op, without=optional, keep=keep)
        if any(a.half for a in op.arguments):
            yield sample(op, dtype=torch.float32, half=torch.bfloat16, keep=keep)
    values = sample(op, keep=keep)
    yield [strided(x) if isinstance(x, torch.Tensor) else x for x in values]
    expanded = [x[:1].expand_as(x) if isinstance(x, torch.Tensor) and x.dim() > 2 else x for x in values]
    yield expanded


def has_steps(argument, x):
    """Whether it is a tensor with a leading T."""
    return isinstance(x, torch.Tensor) and argument.names_of(x.dim())[:1] == ("T",)


def strided(x):
    """The same numbers in a slice of a larger, transposed tensor that else holds NaN, or of integers the least."""
    other = float("nan") if x.is_floating_point() else -(2**63) if x.dtype == torch.int64 else True
    larger = torch.full([n + 1 for n in reversed(x.shape)], other, dtype=x.dtype)
    view = larger.permute(*reversed(range(x.dim())))[tuple(slice(0, n) for n in x.shape)]
    return view.copy_(x)


# Tracing is the same whatever implements an op, and slow where that is emulated.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
CHECKS += ("test_aot_dispatch_dynamic",) if BACKEND == "cpp" else ()


@pytest.mark.once
@every_op
def test_opcheck(op):
    """Schema, aliasing, fake rule, registration of autograd, and tracing with symbolic sizes; of the raw backward too."""
    for values in variants(op):
        for i, argument in enumerate(op.arguments):
            # All outputs are compared, and what is kept for backward of a sample's steps after its length is never written.
            if argument.within == "up to T" and values[i] is not None:
                steps = max(
                    (x.shape[0] for a, x in zip(op.arguments, values, strict=False) if has_steps(a, x)),
                    default=1,
                )
                values[i] = torch.full_like(values[i], steps)
        torch.library.opcheck(raw(op), tuple(values), test_utils=CHECKS)
        if op.saved and not (op.interval and values[-1] == 0):  # which keeps nothing for it
            backward = getattr(RAW_OPS, f"{op.name}_backward").default
            torch.library.opcheck(backward, backward_values(op, values), test_utils=CHECKS)


def backward_values(op, values, some=True):
    """Of the raw backward; with ``some`` without the gradient of the first output, where there is another."""
    results = raw(op)(*values)
    by_name = {x.name: y for x, y in zip(op.outputs, results, strict=True)}
    by_name |= dict(zip(op.names, values, strict=True))
    outer = [torch.randn_like(x) for x, output in zip(results, op.outputs, strict=True) if output in op.outer]
    outer = [None if x.dim() == 1 or (some and i == 0 and len(outer) > 1) else x for i, x in enumerate(outer)]
    saved = [by_name[name] for name in op.saved]
    return (*outer, *saved, *(by_name[option.name] for option in op.backward_options))


@every_op
def test_strides_change_nothing(op):
    values = sample(op)
    moved = [strided(x) if isinstance(x, torch.Tensor) else x for x in values]
    assert not any(x.is_contiguous() for x in moved if isinstance(x, torch.Tensor) and x.dim() > 1)
    leaves = torch.utils._pytree.tree_leaves
    for x, y in zip(leaves(raw(op)(*moved)), leaves(raw(op)(*values)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "op", [op for op in map(OPS.get, ALL) if "T" in op.outputs[0].argument.names], ids=lambda op: op.name
)
@pytest.mark.parametrize("half", [1, 3])
def test_halves_and_whole_are_the_same_bits(op, half):
    """Whoever goes on from the state of a call, under the names that it came in by, gets what one call for all would give."""
    values = sample(op)
    steps = SIZES["T"]

    def part(begin, end, carried):
        cut = []
        for name, x, argument in zip(op.names, values, (*op.arguments, *op.options), strict=True):
            if name in carried:
                x = carried[name]
            elif has_steps(argument, x):
                x = x[begin:end]
            elif getattr(argument, "within", None) == "up to T":
                x = (x - begin).clamp(0, end - begin)
            cut.append(x)
        results = raw(op)(*cut)
        return {x.name: y for x, y in zip(op.outputs, results, strict=True) if not x.kept}

    whole, first = part(0, steps, {}), part(0, half, {})
    of_steps = op.outputs[0].name
    second = part(half, steps, {name: x for name, x in first.items() if name != of_steps})
    assert torch.equal(whole.pop(of_steps), torch.cat([first[of_steps], second.pop(of_steps)]))
    assert set(second) <= {*op.names} and whole.keys() == second.keys() and whole
    for name, x in second.items():
        assert torch.equal(x, whole[name]), name


@every_op
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_outputs_share_no_storage_with_inputs_or_each_other(op, steps):
    if steps == 0 and op.name in HEADS:
        pytest.skip("the public function gives no steps to the reference")
    values = sample(op, T=steps)
    results = torch.utils._pytree.tree_leaves(raw(op)(*values))
    tensors = [x for x in (*values, *results) if isinstance(x, torch.Tensor) and x.numel()]
    storages = [x.untyped_storage().data_ptr() for x in tensors]
    assert len(set(storages)) == len(storages)
    assert all(x.is_contiguous() for x in results)


@pytest.mark.once
@every_op
def test_autocast_changes_nothing(op):
    values = sample(op, dtype=torch.float32)
    expected = torch.utils._pytree.tree_leaves(raw(op)(*values))
    gradients = plain_gradient(op, values) if op.saved else ()
    with torch.autocast(torch.empty(0).device.type, torch.bfloat16):
        results = torch.utils._pytree.tree_leaves(raw(op)(*values))
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        for x, y in zip(plain_gradient(op, values) if op.saved else (), gradients, strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.thorough
@pytest.mark.filterwarnings(
    "ignore:All-NaN slice:RuntimeWarning"
)  # of NumPy, in which Triton's interpreter computes
@every_op
def test_a_nan_stays_in_its_sample(op):
    """Whatever tensor it is in, values and gradients of the other samples keep their bits."""
    values = sample(op, B=3)
    results = torch.utils._pytree.tree_leaves(raw(op)(*values))
    gradients = plain_gradient(op, values) if op.saved else ()
    places = differentiable(op, values)
    for i, argument in enumerate(op.arguments):
        if "B" not in argument.names or argument.dtype:
            continue
        dirty = list(values)
        dirty[i] = values[i].clone()
        dirty[i].select(argument.names.index("B"), 1).fill_(float("nan"))
        pairs = list(zip(op.outputs, results, torch.utils._pytree.tree_leaves(raw(op)(*dirty)), strict=True))
        if op.saved:
            of = [op.arguments[k] for k in places]
            pairs += zip(of, gradients, plain_gradient(op, dirty), strict=True)
        for what, x, y in pairs:
            if "B" in what.axes.split() and x.numel():
                axis = what.axes.replace("[T]", "T").split().index("B")
                kept = torch.tensor([0, 2])
                assert torch.equal(x.index_select(axis, kept), y.index_select(axis, kept)), (
                    argument.name,
                    what.name,
                )


@needs_cpp  # the threads are the processor's
@every_op
def test_threads_change_nothing(op):
    values = sample(op, B=8)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                [
                    *torch.utils._pytree.tree_leaves(raw(op)(*values)),
                    *(plain_gradient(op, values) if op.saved else ()),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.once
@every_gradient
def test_one_tensor_given_twice(op):
    """As a head that writes its key does: the gradient is the sum of both."""
    values = sample(op)
    shapes = [(i, (op.arguments[i].names, op.arguments[i].within)) for i in differentiable(op, values)]
    pairs = [
        (i, k)
        for (i, a), (k, b) in itertools.combinations(shapes, 2)
        if a == b and not {"G", "heads"} & set(a)
    ]
    for i, k in pairs:
        leaf = values[i].clone().requires_grad_()
        twice, apart = list(values), list(values)
        twice[i] = twice[k] = leaf
        apart[i], apart[k] = leaf.detach().clone().requires_grad_(), leaf.detach().clone().requires_grad_()
        loss = lambda given: sum(x.square().sum() for x in public_outputs(op, raw(op)(*given)))  # noqa: E731
        together = torch.autograd.grad(loss(twice), leaf)[0]
        assert_close([together], [sum(torch.autograd.grad(loss(apart), (apart[i], apart[k])))])


@pytest.mark.once
@every_gradient
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(op, dynamic):
    torch.compiler.reset()
    values = sample(op)
    function, tensors = function_of(op, values)
    leaves = [x.clone().requires_grad_() for x in tensors]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    assert_close(torch.autograd.grad(compiled(*leaves), leaves), plain_gradient(op, values))
    inside = torch.compile(lambda *x: grad(function, tuple(range(len(x))))(*x), fullgraph=True)
    assert_close(inside(*tensors), plain_gradient(op, values))


class _Program(torch.nn.Module):
    """One op, its differentiable arguments as parameters."""

    def __init__(self, op, values):
        super().__init__()
        self.function, tensors = function_of(op, values)
        self.parameters_of = torch.nn.ParameterList(x.clone() for x in tensors)

    def forward(self, x):
        return self.function(*self.parameters_of) * x


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@every_gradient
@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
def test_exported_and_then_trained(op, recorded):
    values = sample(op)
    with torch.set_grad_enabled(recorded):
        program = torch.export.export(_Program(op, values), (torch.ones((), dtype=torch.float64),))
    for stage in (program, program.run_decompositions()):
        module = stage.module()
        parameters = list(module.parameters())
        loss = module(torch.ones((), dtype=torch.float64))
        assert_close(torch.autograd.grad(loss, parameters), plain_gradient(op, values))


def mapped_values(op, place):
    """Values of which one (or all) has an axis to map over, the loop's values, and in_dims."""
    values = sample(op)
    tensors = [i for i, a in enumerate(op.arguments)]
    chosen = tensors if place == "all" else [tensors[place % len(tensors)]]
    loops = [list(values) for _ in range(MAPPED)]
    stacked = list(values)
    for i in chosen:
        others = [draw(op.arguments[i], sizes_for(op)) for _ in range(MAPPED)]
        for loop, other in zip(loops, others, strict=True):
            loop[i] = other
        stacked[i] = torch.stack(others, dim=values[i].dim() if i % 2 else 0)
    in_dims = [(stacked[i].dim() - 1 if i % 2 else 0) if i in chosen else None for i in tensors]
    return stacked, loops, tuple(in_dims + [None] * len(op.options))


EVERY_PLACE = [
    (op, place)
    for op in (OPS[name] for name in ALL)
    # Of a whole network, whose every item takes a call of its own where weights are mapped, some.
    for place in ("all", *((0, 2, -1) if op.name in HEADS else range(len(op.arguments))))
]


@pytest.mark.once
@pytest.mark.parametrize("op, place", EVERY_PLACE, ids=lambda x: getattr(x, "name", x))
def test_vmap(op, place):
    stacked, loops, in_dims = mapped_values(op, place)
    leaves = torch.utils._pytree.tree_leaves
    actual = leaves(vmap(raw(op), in_dims, randomness="error")(*stacked))
    expected = [torch.stack(x) for x in zip(*(leaves(raw(op)(*loop)) for loop in loops), strict=True)]
    for x, y in zip(actual, expected, strict=True):
        if y.numel():
            assert torch.equal(x, y)


@pytest.mark.once
@every_op
def test_vmap_over_nothing_is_refused(op):
    in_dims = tuple([0] * len(op.arguments) + [None] * len(op.options))
    values = [x.expand(0, *x.shape) if isinstance(x, torch.Tensor) else x for x in sample(op)]
    with pytest.raises(ValueError, match=f"{op.name} cannot be mapped over an axis of size 0"):
        vmap(raw(op), in_dims)(*values)


@pytest.mark.once
@pytest.mark.parametrize(
    "op, place", [(op, place) for op, place in EVERY_PLACE if op.saved], ids=lambda x: getattr(x, "name", x)
)
def test_gradient_of_vmap_and_vmap_of_gradient(op, place):
    """Ensembles and per-sample gradients: the right value is the loop's."""
    stacked, loops, in_dims = mapped_values(op, place)
    places = differentiable(op, stacked)
    per_loop = [plain_gradient(op, loop) for loop in loops]
    dims = tuple(in_dims[i] for i in places)
    expected = [
        sum(x) if dim is None else torch.stack(x, dim)
        for dim, x in zip(dims, zip(*per_loop, strict=True), strict=True)
    ]
    every = tuple(range(len(places)))

    def function(*values):  # all values, as not every mapped argument is differentiable
        return sum((x.square() * (1 + k)).sum() for k, x in enumerate(public_outputs(op, raw(op)(*values))))

    def total(*tensors):
        given = list(stacked)
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        return vmap(function, in_dims)(*given).sum()

    tensors = tuple(stacked[i] for i in places)
    assert_close(grad(total, every)(*tensors), expected)
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert_close(torch.autograd.grad(total(*leaves), leaves), expected)
    each = vmap(grad(function, tuple(places)), in_dims)(*stacked)
    assert_close(each, [torch.stack(x) for x in zip(*per_loop, strict=True)])


@pytest.mark.once
@every_gradient
def test_batched_gradients(op):
    """torch.autograd.grad with is_grads_batched maps over backward alone."""
    function, tensors = function_of(op, sample(op))
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    batched = torch.autograd.grad(loss, leaves, factors, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(loss, leaves)
    assert_close(batched, [torch.stack([factor * x for factor in factors]) for x in single])


@pytest.mark.once
@every_gradient
def test_jacrev(op):
    values = sample(op)
    place = differentiable(op, values)[0]

    def first(x):
        given = [*values[:place], x, *values[place + 1 :]]
        return public_outputs(op, raw(op)(*given))[0].flatten()[:6]

    leaf = values[place].clone().requires_grad_()
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in first(leaf)]
    assert_close([jacrev(first)(values[place])], [torch.stack(rows)])


@pytest.mark.once
@every_gradient
def test_second_derivatives_are_refused(op):
    function, tensors = function_of(op, sample(op))
    leaf = tensors[0].clone().requires_grad_()
    message = f"{op.name} has no second derivative; use mann_fast.reference"
    (first,) = torch.autograd.grad(function(leaf, *tensors[1:]), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        first.square().sum().backward()
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda x: grad(function)(x, *tensors[1:]).square().sum())(tensors[0])


@pytest.mark.once
@every_gradient
def test_second_derivatives_of_a_compiled_call_are_refused(op):
    function, tensors = function_of(op, sample(op))
    leaf = tensors[0].clone().requires_grad_()
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="second derivative|double backward"):
        (first,) = torch.autograd.grad(torch.compile(function)(leaf, *tensors[1:]), leaf, create_graph=True)
        first.square().sum().backward()


@pytest.mark.once
@every_gradient
def test_second_derivatives_of_a_linear_loss_are_refused_or_zero(op):
    """By each argument alone, the incoming gradient a constant: an error, or no history where the op is linear in it."""
    values = sample(op)
    for place in differentiable(op, values):
        given = list(values)
        leaf = given[place] = values[place].clone().requires_grad_()
        loss = sum(x.sum() for x in public_outputs(op, raw(op)(*given)))
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if first.requires_grad:
            with pytest.raises(NotImplementedError, match="has no second derivative"):
                first.square().sum().backward()
        else:
            assert (op.name, op.arguments[place].name) == ("lrua_write", "memory")


@pytest.mark.once
@every_gradient
def test_checkpoint_without_reentering(op):
    values = sample(op)
    function, tensors = function_of(op, values)
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = checkpoint(function, *leaves, use_reentrant=False)
    assert_close(torch.autograd.grad(loss, leaves), plain_gradient(op, values))


@pytest.mark.once
def test_symbolic_sizes_outside_of_compile():
    memory, key = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    traced = make_fx(lambda m, k: ops.content_read(m, k), tracing_mode="symbolic")(memory, key)
    assert_close(traced(memory, key), ops.content_read(memory, key))


@pytest.mark.once
@every_gradient
def test_forward_mode_is_refused(op):
    function, tensors = function_of(op, sample(op))
    of_first = lambda x: function(x, *tensors[1:])  # noqa: E731
    x, message = tensors[0], f"{op.name} has no forward-mode derivative .* use mann_fast.reference"
    for call in (
        lambda: jvp(of_first, (x,), (x,)),
        lambda: jacfwd(of_first)(x),
        lambda: vmap(lambda y: jvp(of_first, (y,), (y,))[1])(x.unsqueeze(0)),
        lambda: jvp(grad(of_first), (x,), (x,)),
        lambda: dual(of_first, x),
        lambda: torch.no_grad()(dual)(of_first, x),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.once
def test_a_compiled_call_refuses_forward_mode():
    """Through the public functions: a compiled graph drops tangents before they come to the raw op."""
    memory, key = torch.randn(2, 7, 5), torch.randn(2, 3, 5)

    def read(key):
        return ops.content_read(memory, 2 * key)[0]

    torch.compiler.reset()
    compiled = torch.compile(read)
    compiled(key)  # compiled before any tangent
    for call in (
        lambda: jvp(compiled, (key,), (key,)),
        lambda: dual(compiled, key),
        lambda: torch.no_grad()(dual)(compiled, key),
        lambda: torch.compile(lambda x: jvp(read, (x,), (x,)))(key),
    ):
        with pytest.raises(NotImplementedError, match="content_read has no forward-mode derivative"):
            call()


def interface(keys, gates):
    """Of a DNC with all repairs, from numbers [T, B, R, D] and [T, B, R]."""
    unit, modes = torch.sigmoid, keys[..., :1] * torch.arange(3.0, dtype=keys.dtype)
    one, row = gates[..., 0], keys[..., 0, :]
    return reference.DNCInterface(
        *(keys, 1 + gates**2, row, 1 + one**2, unit(row), row, unit(gates), unit(one), unit(-one)),
        *(torch.softmax(modes, -1), unit(keys), unit(row), 1 + keys[..., :2] ** 2),
    )


def public_calls(of, dtype):
    """Every public function of ops or of the reference, by name, as one of numbers x [3, 2, 2, 3]: T, B, R, D."""

    def drawn(*shape):
        return torch.randn(*shape, dtype=dtype)

    state, start, linked, many = (
        kind.initial(2, 5, 3, *heads, dtype=dtype)._replace(memory=drawn(2, 5, 3))
        for kind, heads in (
            (reference.LRUAState, (2,)),
            (reference.NTMState, (2, 2)),
            (reference.DNCState, (2,)),
            (reference.SparseState, (2, 2)),
        )
    )
    gates, shares = drawn(3, 2, 2), torch.softmax(drawn(3, 2, 2, 3), -1)
    hidden, of_controller = (drawn(2, 2), drawn(2, 2)), (drawn(8, 2), drawn(8), drawn(8, 6))

    def head(x):
        return reference.NTMHead(x, gates.exp(), torch.sigmoid(gates), shares, 1 + gates**2)

    def first(x):
        return reference.NTMHead(*(part[0] for part in head(x)))

    def network(numbers):
        weights = (*of_controller, drawn(numbers, 2), drawn(numbers))

        def of_memory(function, memory, x, **options):
            of_cell = torch.cat([x.flatten(2), x[:, :, 0, :2]], -1)
            return function(of_cell, hidden, memory, x[0], *weights, **options)

        return of_memory

    lrua, ntm = network(sum(head_sizes(2, 3, "key", "learned"))), network(sum(ntm_head_sizes(2, 3, 1)))
    dnc = network(sum(dnc_head_sizes(2, 3, link=True, masks=False, link_sharpening=False)))
    sparse = network(sum(sparse_head_sizes(2, 3)))
    erase = torch.sigmoid(drawn(3, 2, 2, 3))
    return {
        "content_read": lambda x: of.content_read(state.memory, x[0]),
        "least_used": lambda x: of.least_used(state.usage, 2),
        "lrua_write": lambda x: of.lrua_write(*state, x[0], gates[0]),
        "lrua_step": lambda x: of.lrua_step(state, x[0], x[1], gates[0]),
        "lrua_scan": lambda x: of.lrua_scan(state, x, x, gates),
        "ntm_address": lambda x: of.ntm_address(start.memory, first(x), start.read_weights),
        "ntm_step": lambda x: of.ntm_step(start, first(x), first(x), erase[0], x[0]),
        "ntm_scan": lambda x: of.ntm_scan(start, head(x), head(x), erase, x),
        "dnc_step": lambda x: of.dnc_step(linked, interface(x[0], gates[0])),
        "dnc_scan": lambda x: of.dnc_scan(linked, interface(x, gates)),
        "sparse_read": lambda x: of.sparse_read(state.memory, x[0], num_reads=2),
        "sparse_step": lambda x: of.sparse_step(many, x[0], x[1], gates[0]),
        "sparse_scan": lambda x: of.sparse_scan(many, x, x.flip(0), gates),
        "cell": lambda x: lrua(of.cell, state, x, write_vector="key"),
        "ntm_cell": lambda x: ntm(of.ntm_cell, start, x),
        "dnc_cell": lambda x: dnc(of.dnc_cell, linked, x),
        "sparse_cell": lambda x: sparse(of.sparse_cell, many, x),
    }


@pytest.mark.parametrize("name", [name for op in OPS.values() if op.saved for name in op.public])
def test_the_reference_supports_what_the_ops_refuse(name):
    with torch.device("cpu"):
        call = public_calls(reference, torch.float64)[name]
        x = torch.randn(3, 2, 2, 3, dtype=torch.float64)

        def loss(x):
            outputs = call(x)
            return (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).square().sum()

        tangent = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        directional = (first * tangent).sum()
        assert_close([jvp(loss, (x,), (tangent,))[1]], [directional], 1e-9)
        (second,) = torch.autograd.grad(directional, leaf)
        assert_close([jvp(grad(loss), (x,), (tangent,))[1]], [second], 1e-9)
        several = torch.stack([x, x.flip(0), -x])
        expected = torch.stack([grad(loss)(y) for y in several])
        assert_close([vmap(grad(loss))(several)], [expected], 1e-9)


@pytest.mark.once
def test_autocast_changes_nothing_where_the_reference_serves():
    calls, x = public_calls(ops, torch.float32), torch.randn(3, 2, 2, 3)
    assert set(calls) == {name for op in OPS.values() for name in op.public}
    for name, call in calls.items():
        with ops.backend("reference"):
            expected = torch.utils._pytree.tree_leaves(call(x))
            with torch.autocast(torch.empty(0).device.type, torch.bfloat16):
                results = torch.utils._pytree.tree_leaves(call(x))
        assert all(
            x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(results, expected, strict=True)
        ), name


def test_every_public_op_is_declared_and_has_its_reference():
    """The lists of public functions are one: __all__, the declarations, the reference; and so are names and defaults."""
    import inspect

    declared = {name for op in OPS.values() for name in op.public}
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {
        "backend",
        "backends",
    }
    assert declared == functions
    for name in declared:
        ours = inspect.signature(getattr(ops, name)).parameters
        theirs = dict(inspect.signature(getattr(reference, name)).parameters)
        for extra in ("slots", "step", "orders"):  # what the reference takes besides
            theirs.pop(extra, None)
        assert {k: v.default for k, v in ours.items()} == {k: v.default for k, v in theirs.items()}


def test_sizes_come_from_the_declaration():
    op = OPS["lrua_scan"]
    sizes = sizes_of(op.arguments, sample(op)[: len(op.arguments)])
    assert sizes == {axis: SIZES[axis] for axis in "BNDRT"}
