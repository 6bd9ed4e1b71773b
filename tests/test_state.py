"""States: pytrees that go through containers, with methods; what is refused as a state, as a start, and as sizes."""

import copy
import pickle
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

import mann_fast
from mann_fast import MANN, MemoryLayer, MemoryState, ops, reference
from mann_fast._state import tensors_of
from mann_fast.layers import LRUA

SIZES = {"num_slots": 7, "slot_size": 5, "num_heads": 3}


class CountedState(NamedTuple):
    """A user's own state: no methods, and a tensor of integers."""

    memory: Tensor
    read_weights: Tensor
    usage: Tensor
    steps: Tensor  # [B], int64


class Counted(LRUA):
    """An LRUA memory that counts steps."""

    fused = False

    def initial_state(self, batch, *, dtype, device):
        state = super().initial_state(batch, dtype=dtype, device=device)
        return CountedState(*state, torch.zeros(batch, dtype=torch.int64, device=device))

    def step(self, state, heads, record=False):
        *state, steps = state
        reads, after, weights = super().step(ops.LRUAState(*state), heads, record)
        return reads, CountedState(*after, steps + 1), weights


class TwoCells(torch.nn.Module):
    """A user's own controller, with a state of more than one kind of tuple."""

    def __init__(self):
        super().__init__()
        self.lower = torch.nn.LSTMCell(4 + 15, 6, dtype=torch.float64)
        self.upper = torch.nn.GRUCell(6, 6, dtype=torch.float64)

    def forward(self, z, state):
        lower, upper = state or (None, None)
        lower = self.lower(z, lower and tuple(lower))
        upper = self.upper(lower[0], upper)
        return upper, (lower, upper)


KINDS = {
    "lstm": {},
    "gru": {"controller": "gru"},
    "feedforward": {"controller": "feedforward"},
    "ntm": {"addressing": "ntm"},
    "dnc": {"addressing": "dnc"},
    "dnc without links": {"addressing": "dnc", "link": False},
    "own memory": {"addressing": Counted()},
    "own controller": {"controller": TwoCells},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_layer(kind="lstm", dtype=torch.float64, **options):
    options = {**SIZES, **KINDS[kind], **options}
    if options.get("controller") is TwoCells:
        options["controller"] = TwoCells()
    return MemoryLayer(4, 6, dtype=dtype, **options)


def after_a_call(kind="lstm", batch=4):
    """A layer, an input and a state in the middle of a sequence, with its history."""
    layer = make_layer(kind)
    x = torch.randn(3, batch, 4, dtype=torch.float64)
    return layer, x, layer(x)[1]


def assert_same(actual, expected, tolerance=0.0):
    actual, expected = (tensors_of(state) for state in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@kinds
def test_is_a_pytree_and_has_a_list(kind):
    _, _, state = after_a_call(kind)
    leaves, structure = pytree.tree_flatten(state)
    tensors = state.flatten()
    given = [leaf for leaf in leaves if leaf is not None]
    assert isinstance(tensors, list) and all(a is b for a, b in zip(tensors, given, strict=True))
    for again in (pytree.tree_unflatten(leaves, structure), state.unflatten(tensors)):
        assert type(again) is MemoryState and type(again.memory) is type(state.memory)
        assert pytree.tree_structure(again) == structure
        assert all(a is b for a, b in zip(again.flatten(), tensors, strict=True))
    for again in (copy.deepcopy(state.detach()), pickle.loads(pickle.dumps(state.detach()))):
        assert pytree.tree_structure(again) == structure
        assert_same(again, state)


@pytest.mark.parametrize("kind", [ops.LRUAState, ops.NTMState])
def test_a_memory_state_has_the_same_methods(kind):
    state = kind.initial(3, 5, 2, *((2,) if kind is ops.LRUAState else (2, 1)), dtype=torch.float64)
    state = state.map(lambda x: (x + torch.rand_like(x)).requires_grad_())
    assert type(state) is kind
    assert all(x.dtype == torch.float32 for x in state.to(torch.float32))
    assert not any(x.requires_grad for x in state.detach())
    copied = state.clone()
    assert all(
        x.grad_fn is not None and x.data_ptr() != y.data_ptr() for x, y in zip(copied, state, strict=True)
    )
    assert_same(copied, state)
    assert_same(kind.cat([state.select(slice(1)), state.select([1, 2])]), state)
    assert state.select(-1).memory.shape == (5, 2)
    assert type(state.unflatten(state.flatten())) is kind and len(state.flatten()) == 3
    assert type(pytree.tree_map(torch.neg, state)) is kind
    leaves = default_collate([state.select(i) for i in range(3)])
    assert type(leaves) is kind
    assert_same(leaves, state)


def test_map_goes_over_the_tensors_of_several_states():
    _, _, state = after_a_call("own controller")
    doubled = state.map(torch.add, state)
    assert_same(doubled, state.map(lambda x: 2 * x))
    assert doubled.controller[0][1].equal(2 * state.controller[0][1])
    with pytest.raises(ValueError):
        state.map(torch.add, make_layer("own controller").initial_state(4))


def test_unflatten_refuses():
    _, _, state = after_a_call()
    tensors = state.flatten()
    with pytest.raises(ValueError, match=re.escape("tensors must be 6, as many as flatten() gives, got 5")):
        state.unflatten(tensors[:-1])
    with pytest.raises(TypeError, match=re.escape("tensors[2] must be a tensor, got int")):
        state.unflatten([*tensors[:2], 3, *tensors[3:]])


@kinds
def test_converts_with_what_its_memory_says(kind):
    _, _, state = after_a_call(kind)
    state = state.to(torch.float32)
    half = state.to(torch.float16)
    for before, after in zip(tensors_of(state.memory), tensors_of(half.memory), strict=True):
        assert after.equal(before) and after.dtype == before.dtype  # not rounded, and integers stay
    assert all(x.dtype == torch.float16 for x in (*pytree.tree_leaves(half.controller), half.reads))
    assert all(x.device.type == "meta" for x in state.to("meta").flatten())
    assert all(a is b for a, b in zip(state.to(torch.float32).flatten(), state.flatten(), strict=True))
    copied = state.to("cpu", torch.float32, copy=True)
    pointers = {x.data_ptr() for x in state.flatten()}
    assert not pointers & {x.data_ptr() for x in copied.flatten()}
    with pytest.raises(TypeError, match="non_blocking and copy must be given by name"):
        state.to("cpu", torch.float32, False, True)


def test_integers_of_a_controller_stay():
    state = make_layer().initial_state(2)._replace(controller=(torch.tensor([2**24 + 1, 5]),))
    assert state.to(torch.float32).controller[0].tolist() == [2**24 + 1, 5]


INDICES = [
    0,
    -1,
    torch.tensor(2),
    slice(None),
    slice(1, 4, 2),
    slice(0, 0),
    [2, 0, 2],
    [],
    torch.tensor([3, -1]),
    torch.tensor([1], dtype=torch.int32),
    [True, False, False, True],
    torch.tensor([False, True, True, False]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["lstm", "own memory", "own controller"])
def test_select_is_indexing_and_goes_on_alike(kind, index):
    layer, x, state = after_a_call(kind)
    state = state.detach().map(lambda x: x.requires_grad_(x.is_floating_point()))
    chosen = state.select(index)
    assert_same(chosen, pytree.tree_map(lambda part: part[index], state))
    rows = torch.arange(4)[index]
    output, after = layer(x, state)
    alone, alone_after = layer(x[:, rows], chosen)  # [3, 4], unbatched, where one sample is chosen
    torch.testing.assert_close(alone, output[:, rows], rtol=0, atol=1e-12)
    assert_same(alone_after, after.select(index), 1e-12)
    (gradient,) = torch.autograd.grad(chosen.reads.sum(), state.reads)
    assert gradient[:, 0, 0].tolist() == torch.bincount(rows.flatten(), minlength=4).tolist()


@pytest.mark.parametrize(
    "index, error, message",
    [
        (4, IndexError, "index must be within [-B, B) = [-4, 4), got 4"),
        ([0, -5], IndexError, "index must be within [-B, B) = [-4, 4), got -5"),
        (torch.tensor([9]), IndexError, "9 is out of bounds"),
        (True, TypeError, "index must be an int, slice, list or tensor, got bool"),
        (None, TypeError, "index must be an int, slice, list or tensor, got NoneType"),
        ((0, 1), TypeError, "index must be an int, slice, list or tensor, got tuple"),
        ([0, True], TypeError, "index must be a list of ints or of bools, got [0, True]"),
        ([0.0], TypeError, "index must be a list of ints or of bools, got [0.0]"),
        ([True, False], ValueError, "index must be B = 4 bools, got 2"),
        (torch.tensor([0.0]), TypeError, "index must be a tensor of bool, int32 or int64, got torch.float32"),
        (
            torch.ones(4, dtype=torch.uint8),
            TypeError,
            "index must be a tensor of bool, int32 or int64, got torch.uint8",
        ),
        (torch.tensor([True]), ValueError, "index must have shape [B] = [4] as it is a mask, got [1]"),
        (torch.tensor(True), ValueError, "index must have shape [B] = [4] as it is a mask, got []"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "index must have shape [K] or [], got [2, 2]"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            RuntimeError,
            "index must be on the device of the state, cpu, got meta",
        ),
    ],
)
def test_select_refuses(index, error, message):
    state = make_layer().initial_state(4)
    for of in (state, state.memory):
        with pytest.raises(error, match=re.escape(message)):
            of.select(index)


@kinds
def test_cat_is_the_way_back_from_select(kind):
    layer, x, state = after_a_call(kind, batch=5)
    parts = [state.select(slice(0, 2)), state.select(slice(2, 2)), state.select([2, 3, 4])]
    joined = MemoryState.cat(iter(parts))
    assert pytree.tree_structure(joined) == pytree.tree_structure(state)
    assert_same(joined, state)
    torch.testing.assert_close(layer(x, joined)[0], layer(x, state)[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(MemoryState.cat([joined, joined]).reads.sum(), state.reads)
    assert gradient.eq(2).all()


def wrong_parts():
    state, half = make_layer().initial_state(2), make_layer(dtype=torch.float32).initial_state(2)
    memory, kept = state.memory, state.controller
    return [
        ([], ValueError, "states must be at least one, got none"),
        (state, TypeError, "states[0] must be MemoryState, got a tuple of 2"),  # not a list of it
        ([state, memory], TypeError, "states[1] must be MemoryState, got LRUAState"),
        ([state, None], TypeError, "states[1] must be MemoryState, got NoneType"),
        (
            [state, make_layer("ntm").initial_state(2)],
            TypeError,
            "states[1].memory must be LRUAState, got NTMState",
        ),
        (
            [state, state, make_layer("gru").initial_state(2)],
            TypeError,
            "states[2].controller must be a tuple of 2, got a tuple of 1",
        ),
        (
            [state, make_layer(num_slots=6).initial_state(3)],
            ValueError,
            "states[1].memory.memory must have shape [3, 7, 5], got [3, 6, 5]",
        ),
        (
            [state, half],
            TypeError,
            "states[1].controller[0] must have dtype torch.float64, got torch.float32",
        ),
        ([state, state.to("meta")], RuntimeError, "states[1].controller[0] must be on cpu, got meta"),
        ([state, state.select(0)], ValueError, "states[1] must have the axis B, but is of an unbatched call"),
        (
            [state._replace(controller=(kept[0], kept[1][:1]))],
            ValueError,
            "states[0].controller[1] must have shape [2, 6], got [1, 6]",
        ),
        (
            [state, state._replace(memory=memory._replace(usage=None))],
            TypeError,
            "states[1].memory.usage must be a tensor, got NoneType",
        ),
    ]


@pytest.mark.parametrize("states, error, message", wrong_parts())
def test_cat_refuses(states, error, message):
    with pytest.raises(error, match=re.escape(message)):
        MemoryState.cat(states)


def test_an_unbatched_state_says_so():
    layer, x, _ = after_a_call()
    _, state = layer(x[:, 0])
    with pytest.raises(ValueError, match="select needs a state with the axis B, but this one is of an unb"):
        state.select(0)
    with pytest.raises(ValueError, match="select needs a state with the axis B, but this one is of an unb"):
        state.memory.select(0)
    assert_same(state.map(lambda part: part.unsqueeze(0)).select(0), state)


def repackage(state):
    """As PyTorch's word_language_model has it."""
    if state is None:
        return state
    return state.detach() if isinstance(state, Tensor) else tuple(repackage(part) for part in state)


def listed(state):
    return state if state is None or isinstance(state, Tensor) else [listed(part) for part in state]


@kinds
@pytest.mark.parametrize("container", [repackage, listed])
def test_a_plain_nested_tuple_is_a_state(kind, container):
    layer, x, state = after_a_call(kind)
    expected, end = layer(x, state)
    for given in (container(state), state._replace(memory=container(state.memory))):
        output, after = layer(x, given)
        assert output.equal(expected) and type(after.memory) is type(state.memory)
        assert_same(after, end)
    alone = state.select(1)
    torch.testing.assert_close(layer(x[:, 1], container(alone))[0], layer(x[:, 1], alone)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dnc without links"])  # it takes no None
def test_default_collate_makes_a_batch_of_unbatched_states(kind):
    layer, x, state = after_a_call(kind)
    collated = default_collate([state.detach().select(i) for i in range(4)])  # tuples come out as lists
    assert type(collated) is MemoryState and type(collated.memory) is type(state.memory)
    assert_same(collated, state)
    assert layer(x, collated)[0].equal(layer(x, state)[0])
    assert_same(MemoryState.cat([collated, state]).select([0, 4]), state.select([0, 0]))
    assert_same(collated.reset(torch.zeros(4, dtype=torch.bool), state.detach().select([0])), state)


def test_a_plain_tuple_under_autocast_and_in_a_model():
    model = MANN(4, 2, 6, **SIZES)
    x = torch.randn(3, 2, 4)
    _, state = model(x)
    assert model(x, repackage(state))[0].equal(model(x, state)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, repackage(state))[0].equal(model(x, state)[0])
        with pytest.raises(TypeError, match="state.memory.usage must be a tensor, got list"):
            model(x, state._replace(memory=state.memory._replace(usage=[1.0])))


def wrong_states():
    state = make_layer().initial_state(2)
    plain, ntm = repackage(state), make_layer("ntm").initial_state(2)
    expected = "state must be a MemoryState, a plain tuple (controller, memory, reads) or None, got "
    form = "state must be a MemoryState of (hidden, cell), an LRUAState and reads, got one of "
    return [
        (plain[0], TypeError, expected + "a tuple of 2"),
        ((*plain, plain[2]), TypeError, expected + "a tuple of 4"),
        (state.memory, TypeError, expected + "LRUAState"),
        (state.reads, TypeError, expected + "Tensor"),
        (dict(state._asdict()), TypeError, expected + "dict"),
        ((plain[0][:1], *plain[1:]), TypeError, form + "a tuple of 1, a tuple of 3 and reads"),
        ((plain[0], plain[1][:2], plain[2]), TypeError, form + "a tuple of 2, a tuple of 2 and reads"),
        ((plain[0], ntm.memory, plain[2]), TypeError, form + "a tuple of 2, NTMState and reads"),
        ((None, *plain[1:]), TypeError, form + "NoneType, a tuple of 3 and reads"),
        (
            repackage(ntm),
            ValueError,
            "state.memory.usage must have shape [2, 7], got [2, 3, 7]",
        ),
        (
            (plain[0], plain[1], plain[2].float()),
            TypeError,
            "state.reads must have dtype torch.float64, got torch.float32",
        ),
        (
            (plain[0], plain[1], plain[2].tolist()),
            TypeError,
            "state.reads must be a tensor, got list",
        ),
    ]


@pytest.mark.parametrize("state, error, message", wrong_states())
def test_what_is_no_state_is_refused_at_once(state, error, message):
    layer = make_layer()
    with pytest.raises(error, match=re.escape(message)):
        layer(torch.zeros(3, 2, 4, dtype=torch.float64), state)


def wrong_starts():
    layer = make_layer()
    state, wide = layer.initial_state(1), make_layer(dtype=torch.float32).initial_state(1)
    reads_only = state._replace(reads=wide.reads)
    return [
        (repackage(state), TypeError, "start must be a MemoryState of one sample or None, got a tuple of 3"),
        (state.memory, TypeError, "start must be a MemoryState of one sample or None, got LRUAState"),
        (layer, TypeError, "start must be a MemoryState of one sample or None, got MemoryLayer"),
        (
            make_layer("gru").initial_state(1),
            TypeError,
            "start.controller must be a tuple of 2, got a tuple of 1",
        ),
        (
            make_layer("feedforward").initial_state(1),
            TypeError,
            "start.controller must be a tuple of 2, got a tuple of 0",
        ),
        (make_layer("ntm").initial_state(1), TypeError, "start.memory must be LRUAState, got NTMState"),
        (wide, TypeError, "start.controller[0] must have dtype torch.float64, got torch.float32"),
        (reads_only, TypeError, "start.reads must have dtype torch.float64, got torch.float32"),
        (state.to("meta"), RuntimeError, "start.controller[0] must be on cpu, got meta"),
        (layer.initial_state(3), ValueError, "start.controller[0] must have shape [1, 6], got [3, 6]"),
        (state.select(0), ValueError, "start.controller[0] must have shape [1, 6], got [6]"),
        (
            make_layer(num_slots=8).initial_state(1),
            ValueError,
            "start.memory.memory must have shape [1, 7, 5], got [1, 8, 5]",
        ),
    ]


@pytest.mark.parametrize("start, error, message", wrong_starts())
def test_reset_refuses_other_starts(start, error, message):
    layer, x, state = after_a_call(batch=3)
    for given, mask in ((state, [True, False, True]), (layer(x[:, 0])[1], True)):
        with pytest.raises(error, match=re.escape(message)):
            given.reset(torch.tensor(mask), start)


@kinds
def test_reset_takes_a_start_of_any_kind(kind):
    _, _, state = after_a_call(kind, batch=3)
    start = state.select([0]).map(torch.rand_like) if kind != "own memory" else state.select([0])
    back = state.reset(torch.tensor([False, True, False]), start)
    assert pytree.tree_structure(back) == pytree.tree_structure(state)
    assert_same(back.select([1]), start)
    assert_same(back.select([0, 2]), state.select([0, 2]))


def test_a_start_of_the_memory_itself_is_checked():
    class Odd(CountedState):
        __slots__ = ()

        def initial_like(self):
            return self

    state = make_layer("own memory").initial_state(2)
    state = state._replace(memory=Odd(*state.memory))
    with pytest.raises(
        ValueError, match=re.escape("start.memory.memory must have shape [1, 7, 5], got [2, 7, 5]")
    ):
        state.reset(torch.tensor([True, False]))


LRUA_SIZES = {"batch": 2, "num_slots": 5, "slot_size": 3, "num_heads": 2}
NTM_SIZES = {"batch": 2, "num_slots": 5, "slot_size": 3, "read_heads": 2, "write_heads": 1}


@pytest.mark.parametrize("kind, sizes", [(ops.LRUAState, LRUA_SIZES), (ops.NTMState, NTM_SIZES)])
def test_initial_checks_its_arguments(kind, sizes):
    least = {"batch": 0, "read_heads": 0, "write_heads": 0}
    for name in sizes:
        lowest = least.get(name, 1)
        fitting = {"num_heads": 1} if kind is ops.LRUAState else {}  # R <= N
        assert type(kind.initial(**{**sizes, **fitting, name: lowest})) is kind
        with pytest.raises(ValueError, match=f"{name} must be at least {lowest}, got {lowest - 1}"):
            kind.initial(**{**sizes, name: lowest - 1})
        for wrong, came in ((2.0, "float"), (True, "bool"), ("2", "str"), (torch.tensor(2), "Tensor")):
            with pytest.raises(TypeError, match=f"{name} must be an int, got {came}"):
                kind.initial(**{**sizes, name: wrong})
    with pytest.raises(TypeError, match="value must be a number, got str"):
        kind.initial(**sizes, value="0")
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(TypeError, match="state must be torch.float32 or torch.float64, got torch"):
            kind.initial(**sizes, dtype=dtype)


@pytest.mark.parametrize("kind", ["lstm", "own memory"])
def test_initial_state_checks_the_batch(kind):
    layer = make_layer(kind)
    assert layer.initial_state(0).reads.shape == (0, 3, 5)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        layer.initial_state(-1)
    for wrong, came in ((2.0, "float"), (True, "bool"), (None, "NoneType"), (torch.tensor(2), "Tensor")):
        with pytest.raises(TypeError, match=f"batch must be an int, got {came}"):
            layer.initial_state(wrong)


@pytest.mark.parametrize("learned", [False, True])
def test_the_batch_may_be_a_symbol(learned):
    """Where PyTorch traces with a dynamic size, and in torch.jit's traces, in which it is a tensor."""
    layer = make_layer(memory_start="learned" if learned else "constant")
    x, other = (torch.randn(2, batch, 4, dtype=torch.float64) for batch in (3, 5))
    with torch.no_grad():
        expected = layer(other)[0]
        batch = torch.export.Dim("batch")
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: batch}})
        assert program.module()(other)[0].equal(expected)
        compiled = torch.compile(layer, backend="eager", dynamic=True, fullgraph=True)
        assert compiled(x)[0].equal(layer(x)[0]) and compiled(other)[0].equal(expected)
        with pytest.warns((DeprecationWarning, torch.jit.TracerWarning)):
            traced = torch.jit.trace(layer, (x,))
        output, state = traced(other)
        assert output.equal(expected)
        assert layer(other, state)[0].shape == output.shape  # what it returns are plain tuples


def test_compiles_and_exports_with_its_methods():
    layer, x, state = after_a_call()
    state = state.detach()

    def step(x, state):
        state = state.select(torch.tensor([3, 1])).map(torch.neg).clone().to(torch.float64)
        state = MemoryState.cat([state, state.unflatten(state.flatten())]).select(slice(2, 4))
        state = state.reset(torch.tensor([True, False]), layer.initial_state(1))
        return layer(x[:, 1:3], state)

    expected, end = step(x, state)
    for function in (step, lambda x, state: step(x, MemoryState(*state))):
        output, after = torch.compile(function, backend="eager", fullgraph=True)(x, state)
        assert output.equal(expected) and type(after) is MemoryState
        assert_same(after, end)
    plain = torch.compile(layer, backend="eager", fullgraph=True)
    assert plain(x, repackage(state))[0].equal(layer(x, state)[0])
    batch = torch.export.Dim("batch")
    shapes = {"x": {1: batch}, "state": state.map(lambda _: {0: batch})}
    with torch.no_grad():
        program = torch.export.export(layer, (x, state), dynamic_shapes=shapes)
    output, after = program.module()(x[:, :2], state.select([0, 1]))
    assert type(after) is MemoryState
    torch.testing.assert_close(output, layer(x[:, :2], state.select([0, 1]))[0], rtol=0, atol=1e-12)


def test_maps_under_vmap():
    """An ensemble of states, of one layer."""
    layer, x, state = after_a_call()
    states = [state.detach().map(lambda part, i=i: part + 0.1 * i) for i in range(3)]
    stacked = states[0].map(lambda *parts: torch.stack(parts), *states[1:])
    chosen = torch.func.vmap(lambda s: layer(x[:, :2], s.select([2, 0]))[0])(stacked)
    for i, one in enumerate(states):
        torch.testing.assert_close(chosen[i], layer(x[:, :2], one.select([2, 0]))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 2])
def test_ops_take_a_plain_tuple_on_every_backend(steps):
    lrua, ntm = (
        kind.initial(2, 5, 3, 2, *more) for kind, more in ((ops.LRUAState, ()), (ops.NTMState, (2,)))
    )
    vectors, numbers = torch.rand(steps, 2, 2, 3), torch.rand(steps, 2, 2)
    head = (vectors, numbers, numbers, torch.full((steps, 2, 2, 3), 1 / 3), 1 + numbers)
    for name in ("auto", "reference"):
        with mann_fast.backend(name):
            reads, after = ops.lrua_scan(tuple(lrua), vectors, vectors, numbers)
            assert reads.shape == (steps, 2, 2, 3) and type(after) is reference.LRUAState
            reads, after = ops.ntm_scan(tuple(ntm), head, head, vectors, vectors)
            assert reads.shape == (steps, 2, 2, 3) and type(after) is reference.NTMState
